//! Which packets are masqueraded, and which forwarded ones accepted: the decisions, without a mechanism.
//!
//! One list of rules (contract §6.1) is rendered both to nftables and to iptables, so that the two modes
//! can't differ.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use subnet::Family;

/// The mark that kube-proxy sets on packets that it masquerades itself; only this bit counts.
pub(crate) const SERVICE_MARK: u32 = 0x4000;

/// What one family's traffic rules are made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// The whole overlay network.
    pub network: IpNet,
    /// This node's subnet.
    pub subnet: IpNet,
    /// Networks of earlier configurations in which there still are pods, with this node's subnet in them.
    pub others: Vec<(IpNet, Option<IpNet>)>,
    /// Masquerade pods that leave the network (`--ip-masq`); `None` installs nothing of the kind.
    pub masquerade: Option<Masquerade>,
    /// Accept what is forwarded from and to the network (`--iptables-forward-rules`).
    pub forward: bool,
    /// The fast path has a chain at the forward hook.
    pub fast_path: bool,
}

/// How to masquerade.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// Choose source ports at random (`NF_NAT_RANGE_PROTO_RANDOM_FULLY`).
    pub fully_random: bool,
    /// Networks that see the pods' own addresses.
    pub except: Vec<IpNet>,
}

/// A condition on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Match {
    /// It carries [`SERVICE_MARK`].
    Marked,
    /// Its source is inside.
    From(IpNet),
    /// Its source is outside.
    NotFrom(IpNet),
    /// Its destination is inside.
    To(IpNet),
    /// Its destination is outside.
    NotTo(IpNet),
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TrafficVerdict {
    /// Nothing here; later chains go on.
    Return,
    /// It is let through.
    Accept,
    /// Its source becomes this node's address.
    Masquerade {
        /// See [`Masquerade::fully_random`].
        fully_random: bool,
    },
}

/// A rule: the verdict for packets that meet all conditions and no earlier rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrafficRule {
    /// All of them have to hold.
    pub matches: Vec<Match>,
    /// What then happens.
    pub verdict: TrafficVerdict,
}

impl Traffic {
    /// The family of these rules.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.network.addr())
    }

    /// The rules for packets that leave this node.
    pub(crate) fn postrouting(&self) -> Vec<TrafficRule> {
        let Some(masquerade) = &self.masquerade else { return Vec::new() };
        let (network, subnet) = (self.network, self.subnet);
        let fully_random = masquerade.fully_random;
        let rule = |matches: &[Match], verdict| TrafficRule { matches: matches.to_vec(), verdict };
        let mut rules = vec![
            rule(&[Match::Marked], TrafficVerdict::Return),
            rule(&[Match::From(subnet), Match::To(network)], TrafficVerdict::Return),
            rule(&[Match::From(network), Match::To(subnet)], TrafficVerdict::Return),
            rule(&[Match::NotFrom(network), Match::To(subnet)], TrafficVerdict::Return),
        ];
        // A cluster that moves from one network to another is one network as long as that takes.
        for (other, own) in &self.others {
            rules.extend(own.map(|own| rule(&[Match::To(own)], TrafficVerdict::Return)));
            rules.push(rule(&[Match::From(*other), Match::To(network)], TrafficVerdict::Return));
            rules.push(rule(&[Match::From(network), Match::To(*other)], TrafficVerdict::Return));
            rules.push(rule(&[Match::From(*other), Match::To(*other)], TrafficVerdict::Return));
        }
        let except = masquerade.except.iter().filter(|net| Family::of(net.addr()) == self.family());
        let all = || self.networks().flat_map(|network| except.clone().map(move |net| (network, *net)));
        rules.extend(
            all().map(|(network, net)| rule(&[Match::From(network), Match::To(net)], TrafficVerdict::Return)),
        );
        let multicast = Match::NotTo(multicast(self.family()));
        let verdict = TrafficVerdict::Masquerade { fully_random };
        rules.extend(self.networks().map(|network| rule(&[Match::From(network), multicast], verdict)));
        rules.extend(
            self.networks().map(|network| rule(&[Match::NotFrom(network), Match::To(network)], verdict)),
        );
        rules
    }

    /// The network, and those that are being left.
    fn networks(&self) -> impl Iterator<Item = IpNet> {
        [self.network].into_iter().chain(self.others.iter().map(|(network, _)| *network))
    }

    /// The rules for packets that pass through this node.
    pub(crate) fn forward(&self) -> Vec<TrafficRule> {
        if !self.forward {
            return Vec::new();
        }
        let rule = |one| TrafficRule { matches: vec![one], verdict: TrafficVerdict::Accept };
        self.networks().flat_map(|network| [rule(Match::From(network)), rule(Match::To(network))]).collect()
    }
}

/// All multicast addresses of a family.
pub(crate) fn multicast(family: Family) -> IpNet {
    let (addr, len) = match family {
        Family::V4 => (IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4),
        Family::V6 => (IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
    };
    IpNet::new_assert(addr, len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn traffic(network: &str, subnet: &str) -> Traffic {
        let except = vec![net("192.168.0.0/16"), net("fd99::/16")];
        let masquerade = Some(Masquerade { fully_random: true, except });
        Traffic {
            network: net(network),
            subnet: net(subnet),
            others: Vec::new(),
            masquerade,
            forward: true,
            fast_path: false,
        }
    }

    /// The obvious reading of a list of rules.
    fn decide(rules: &[TrafficRule], mark: u32, from: &str, to: &str) -> Option<TrafficVerdict> {
        let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let holds = |one: &Match| match one {
            Match::Marked => mark & SERVICE_MARK != 0,
            Match::From(net) => net.contains(&from),
            Match::NotFrom(net) => !net.contains(&from),
            Match::To(net) => net.contains(&to),
            Match::NotTo(net) => !net.contains(&to),
        };
        rules.iter().find(|rule| rule.matches.iter().all(holds)).map(|rule| rule.verdict)
    }

    #[test]
    fn packets_are_masqueraded_where_the_contract_says_so() {
        const MASQUERADED: Option<TrafficVerdict> = Some(TrafficVerdict::Masquerade { fully_random: true });
        for (network, subnet, local, remote, third, outside, multicast, excepted) in [
            (
                "10.244.0.0/16",
                "10.244.1.0/24",
                "10.244.1.5",
                "10.244.2.5",
                "10.244.3.5",
                "203.0.113.9",
                "224.0.0.9",
                "192.168.3.4",
            ),
            (
                "fd00:1::/48",
                "fd00:1:0:1::/64",
                "fd00:1:0:1::5",
                "fd00:1:0:2::5",
                "fd00:1:0:3::5",
                "2001:db8::9",
                "ff02::9",
                "fd99::4",
            ),
        ] {
            let rules = traffic(network, subnet).postrouting();
            for (from, to, masqueraded) in [
                (local, remote, false),
                (remote, local, false),
                (outside, local, false),
                (local, outside, true),
                (remote, outside, true),
                (local, multicast, false),
                (outside, remote, true),
                (remote, third, true),
                (local, excepted, false),
                (outside, excepted, false),
            ] {
                let verdict = decide(&rules, 0, from, to);
                assert_eq!(verdict == MASQUERADED, masqueraded, "{from} → {to}: {verdict:?}");
                assert_eq!(
                    decide(&rules, 0x4000 | 0x1, from, to),
                    Some(TrafficVerdict::Return),
                    "marked {from} → {to}"
                );
            }
        }
    }

    #[test]
    fn pods_of_a_network_that_is_being_left_see_each_other_and_the_others_as_before() {
        let others = vec![(net("10.99.0.0/16"), Some(net("10.99.1.0/24")))];
        let rules = Traffic { others, ..traffic("10.244.0.0/16", "10.244.1.0/24") };
        let rules = (rules.postrouting(), rules.forward());
        let (old, old_remote, new, new_remote, outside) =
            ("10.99.1.5", "10.99.2.5", "10.244.1.5", "10.244.2.5", "203.0.113.9");
        for (from, to, masqueraded) in [
            (old, old_remote, false),
            (old, new_remote, false),
            (old_remote, new, false),
            (new, old_remote, false),
            (outside, old, false),
            (old, outside, true),
            (new, outside, true),
            (outside, old_remote, true),
            (outside, new_remote, true),
            (old, "192.168.3.4", false),
        ] {
            let verdict = decide(&rules.0, 0, from, to);
            assert_eq!(
                matches!(verdict, Some(TrafficVerdict::Masquerade { .. })),
                masqueraded,
                "{from} → {to}"
            );
        }
        assert_eq!(decide(&rules.1, 0, old, outside), Some(TrafficVerdict::Accept));
        assert_eq!(decide(&rules.1, 0, outside, new), Some(TrafficVerdict::Accept));
    }

    #[test]
    fn what_is_off_has_no_rules() {
        let off = Traffic { masquerade: None, forward: false, ..traffic("10.244.0.0/16", "10.244.1.0/24") };
        assert!(off.postrouting().is_empty() && off.forward().is_empty());
    }

    #[test]
    fn all_of_the_network_is_accepted_in_both_directions() {
        let rules = traffic("10.244.0.0/16", "10.244.1.0/24").forward();
        assert_eq!(decide(&rules, 0, "10.244.9.9", "203.0.113.9"), Some(TrafficVerdict::Accept));
        assert_eq!(decide(&rules, 0, "203.0.113.9", "10.244.9.9"), Some(TrafficVerdict::Accept));
        assert_eq!(decide(&rules, 0, "203.0.113.9", "198.51.100.1"), None);
    }
}
