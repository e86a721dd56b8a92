//! Traffic rules and the filter of tunnel ports: made with the lease, put right when somebody changes them, gone
//! when they are off.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use backends::{Fights, FirewallError, FirewallReport, Look, Masquerade, Peer, Peers, Traffic, TunnelFilter};
use ipnet::IpNet;
use subnet::{Family, SharedMap, SharedSet};
use tokio::time::Instant;

use super::{Action, Machine, Now};
use crate::agent::{RESYNC, condition};

/// When the rules were last found to be right.
#[derive(Debug, Default)]
pub(super) struct Rules {
    sound: Option<Instant>,
    /// Networks of the run before this one, until their rules are gone.
    former: Vec<IpNet>,
    /// The public addresses of peers of each family, with those of `leaving`.
    pub(super) peers: [SharedSet<IpAddr>; 2],
    /// The peers that were admitted last.
    admitted: SharedMap<IpNet, Peer>,
    /// The addresses that several of them have, and how many more than one.
    shared: BTreeMap<IpAddr, usize>,
    /// Addresses that no peer has any more, and until when they are admitted all the same.
    leaving: BTreeMap<IpAddr, Instant>,
    /// The filter of tunnel ports that was carried out last; `None` after a failure.
    filtered: Option<Vec<TunnelFilter>>,
    /// The filter that is being carried out, and whether that was so before: what is changed was undone by somebody.
    filtering: Vec<TunnelFilter>,
    refilters: bool,
    /// What was asked for last, and whether that was asked for before.
    wanted: Vec<Traffic>,
    repairs: bool,
    fights: Fights,
}

/// A node that has got another address sends from the old one for a moment ([`super::underlay`]), so that both are
/// admitted for this long after the new one was heard of.
const LEAVING: Duration = Duration::from_secs(5);

impl Rules {
    pub(super) fn new(former: impl IntoIterator<Item = IpNet>) -> Self {
        Self { former: former.into_iter().collect(), ..Self::default() }
    }

    /// They have to be looked at with the next turn.
    pub(super) fn due(&mut self) {
        self.sound = None;
    }

    /// They have to be made again, in place of those for other networks.
    pub(super) fn renew(&mut self, former: impl IntoIterator<Item = IpNet>) {
        self.former.extend(former);
        self.due();
    }

    /// These peers may send to this node's tunnels. Costs what differs from those before.
    pub(super) fn admit(&mut self, peers: &Peers, now: Instant) {
        let public = |peer: Option<&Peer>| peer.map(|peer| peer.public);
        let changes = peers.usable.changes(&self.admitted).map(|(_, was, now)| (public(was), public(now)));
        let changes: Vec<_> = changes.filter(|(was, now)| was != now).collect();
        // First, so that an address that another peer has now is not taken for one that no peer has.
        for address in changes.iter().filter_map(|(_, now)| *now) {
            let admitted = &mut self.peers[usize::from(address.is_ipv6())];
            if !admitted.contains_key(&address) {
                admitted.insert(address, ());
            } else if self.leaving.remove(&address).is_none() {
                *self.shared.entry(address).or_default() += 1;
            }
        }
        for address in changes.iter().filter_map(|(was, _)| *was) {
            match self.shared.get_mut(&address) {
                Some(1) => drop(self.shared.remove(&address)),
                Some(others) => *others -= 1,
                None => drop(self.leaving.entry(address).or_insert(now + LEAVING)),
            }
        }
        self.admitted = peers.usable.clone();
    }

    /// Admits addresses no longer whose time is over.
    fn expire(&mut self, now: Instant) {
        let over: BTreeSet<IpAddr> =
            self.leaving.iter().filter(|(_, until)| **until <= now).map(|(address, _)| *address).collect();
        if !over.is_empty() {
            self.leaving.retain(|address, _| !over.contains(address));
            for address in over {
                self.peers[usize::from(address.is_ipv6())].remove(&address);
            }
        }
    }

    /// When the next address is no longer admitted.
    pub(super) fn again(&self) -> Option<Instant> {
        self.leaving.values().min().copied()
    }

    /// How long they wait because somebody undoes what is made.
    pub(super) fn held(&self, now: Now) -> Option<Duration> {
        self.fights.wait(now.at.into_std())
    }

    fn are_due(&self, now: Now) -> bool {
        // A little less than the pause of the loop, so that no turn comes just too early.
        const AGE: Duration = RESYNC.saturating_sub(Duration::from_secs(10));
        self.sound.is_none_or(|at| now.at - at >= AGE)
    }
}

impl Machine {
    /// Has the desired traffic rules made, if that is due.
    pub(super) fn due_rules(&mut self) -> Option<Action> {
        if !self.rules.are_due(self.now()) {
            return None;
        }
        let (wanted, former) = (self.wanted_rules(), self.rules.former.clone());
        self.rules.repairs = wanted == self.rules.wanted;
        let held = self.rules.held(self.now());
        if self.rules.repairs && held.is_some() {
            self.hold_back(held);
            return None;
        }
        self.rules.wanted.clone_from(&wanted);
        Some(Action::ApplyRules { wanted, former })
    }

    /// Takes note of what came of the traffic rules. Says whether they are as desired.
    pub(super) fn ruled(&mut self, outcome: &Result<FirewallReport, FirewallError>) -> bool {
        let now = self.now().at.into_std();
        let changed =
            outcome.as_ref().ok().filter(|_| self.rules.repairs).map(|report| report.changed.clone());
        let told = self.rules.fights.record(changed.unwrap_or_default().into_iter(), now);
        self.status.tally.ruled("rules", outcome, self.rules.repairs, self.now().wall);
        self.status.tally.rules(outcome, self.now().wall);
        self.status.journal.rules(outcome, &told);
        let mut notes = outcome.as_ref().map(|report| report.notes.clone()).unwrap_or_default();
        notes.extend(self.rules.fights.notes(now));
        self.status.health.note("rules", notes);
        let state = match outcome {
            Ok(report) if report.obstacles.is_empty() => Ok(()),
            Ok(report) => Err(report.obstacles.join("; ")),
            Err(error) => Err(error.to_string()),
        };
        self.status.health.set(condition::RULES, state);
        let sound = outcome.is_ok();
        self.rules.sound = sound.then(|| self.now().at);
        if sound && self.rules.filtered.is_some() {
            self.rules.former.clear();
        }
        sound
    }

    /// Has the tunnels take datagrams from peers only, if that is not so already. Before routes to new peers are made,
    /// so that their answers are taken. Where it can't be done, tunnels work all the same, as Go flannel's do.
    pub(super) fn due_filters(&mut self) -> Option<Action> {
        self.rules.expire(self.now().at);
        let filters = self.wanted_filters();
        let due = self.rules.are_due(self.now()) || self.rules.filtered.is_none();
        self.rules.refilters = self.rules.filtered.as_ref() == Some(&filters);
        let held = self.rules.held(self.now());
        if self.rules.refilters && (!due || held.is_some()) {
            self.hold_back(held.filter(|_| due));
            return None;
        }
        let look = if due { Look::Kernel } else { Look::Remembered };
        self.rules.filtering.clone_from(&filters);
        Some(Action::FilterTunnels { filters, former: self.rules.former.clone(), look })
    }

    /// Takes note of what came of the filter of tunnel ports.
    pub(super) fn filtered(&mut self, outcome: &Result<FirewallReport, FirewallError>) {
        let notes = match outcome {
            Ok(report) => report.notes.clone(),
            Err(error) => vec![format!("the tunnel's port takes datagrams from anybody: {error}")],
        };
        let repaired = self.rules.refilters;
        let changed = outcome.as_ref().ok().filter(|_| repaired).map(|report| report.changed.clone());
        let now = self.now().at.into_std();
        let told = self.rules.fights.record(changed.unwrap_or_default().into_iter(), now);
        self.status.tally.ruled("tunnel_filter", outcome, repaired, self.now().wall);
        self.status.journal.tunnel_filter(outcome, &notes, &told);
        self.status.health.note("tunnel", notes);
        let filters = std::mem::take(&mut self.rules.filtering);
        self.rules.filtered = outcome.is_ok().then_some(filters);
    }

    pub(super) fn wanted_filters(&self) -> Vec<TunnelFilter> {
        let (Some(lease), Some(external)) = (self.own.lease(), &self.underlay.external) else {
            return Vec::new();
        };
        let of_family = |(family, peers): (Family, &SharedSet<IpAddr>)| {
            let range = self.force.network.range(family).filter(|_| lease.subnets.get(family).is_some())?;
            let others = self.change.others(family).into_iter().map(|(network, _)| network);
            Some(TunnelFilter {
                networks: [range.network].into_iter().chain(others).collect(),
                underlay: external.name,
                ports: self.force.active.tunnel_ports(family),
                ipip: self.force.active.ipip_tunnel(family),
                peers: peers.clone(),
                recalled: self.view.known.recalled,
            })
        };
        Family::BOTH.into_iter().zip(&self.rules.peers).filter_map(of_family).collect()
    }

    fn wanted_rules(&self) -> Vec<Traffic> {
        let settings = self.settings.traffic;
        let Some(lease) = self.own.lease() else { return Vec::new() };
        let masquerade = settings.masquerade.then(|| Masquerade {
            fully_random: settings.fully_random,
            except: self.force.network.masquerade_except.clone(),
        });
        let configured = self.force.network.fast_path;
        let fast_path = self.settings.fast_path.as_ref().is_some_and(|link| link.choice.has_one(configured));
        let of_family = |family| {
            let (range, subnet) = (self.force.network.range(family)?, lease.subnets.get(family)?);
            let (masquerade, forward) = (masquerade.clone(), settings.forward);
            let others = self.change.others(family);
            Some(Traffic { network: range.network, subnet, others, masquerade, forward, fast_path })
        };
        Family::BOTH.into_iter().filter_map(of_family).collect()
    }
}

#[cfg(test)]
mod tests {
    use backends::BackendId;
    use proptest::prelude::*;

    use super::*;

    /// Peers of few subnets, which have few addresses, so that some have one together.
    fn usable() -> impl Strategy<Value = SharedMap<IpNet, Peer>> {
        prop::collection::btree_map(0u8..6, 0u8..5, 0..6).prop_map(|peers| {
            let peer = |(subnet, public): (u8, u8)| {
                let subnet: IpNet = format!("10.5.{subnet}.0/24").parse().unwrap();
                let public = match public {
                    4 => "2001:db8::4".parse().unwrap(),
                    _ => IpAddr::from([192, 0, 2, public]),
                };
                let (mac, backend) = (subnet::Mac([0; 6]), BackendId::default());
                (subnet, Peer { subnet, public, mac, wireguard: None, backend })
            };
            peers.into_iter().map(peer).collect()
        })
    }

    /// Who is admitted, found out by a look at all peers.
    #[derive(Default)]
    struct Model {
        had: BTreeSet<IpAddr>,
        leaving: BTreeMap<IpAddr, Instant>,
    }

    impl Model {
        fn admit(&mut self, peers: &SharedMap<IpNet, Peer>, now: Instant) {
            let have: BTreeSet<IpAddr> = peers.values().map(|peer| peer.public).collect();
            for address in self.had.difference(&have) {
                self.leaving.insert(*address, now + LEAVING);
            }
            self.leaving.retain(|address, _| !have.contains(address));
            self.had = have;
        }

        fn expire(&mut self, now: Instant) {
            self.leaving.retain(|_, until| *until > now);
        }

        fn admitted(&self) -> BTreeSet<IpAddr> {
            self.had.iter().chain(self.leaving.keys()).copied().collect()
        }
    }

    proptest! {
        #[test]
        fn who_is_admitted_follows_from_all_peers(steps in prop::collection::vec((usable(), 0u64..4), 1..20)) {
            let (mut rules, mut model, mut now) = (Rules::default(), Model::default(), Instant::now());
            for (usable, seconds) in steps {
                now += Duration::from_secs(seconds);
                rules.expire(now);
                model.expire(now);
                rules.admit(&Peers { usable: usable.clone(), ..Peers::default() }, now);
                model.admit(&usable, now);
                let admitted = rules.peers.iter().flat_map(SharedSet::keys).copied().collect();
                prop_assert_eq!(model.admitted(), admitted);
                prop_assert_eq!(&rules.leaving, &model.leaving);
                prop_assert!(rules.peers[0].keys().all(IpAddr::is_ipv4) && rules.peers[1].keys().all(IpAddr::is_ipv6));
            }
        }
    }
}
