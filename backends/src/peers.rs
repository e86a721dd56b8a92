//! Which of the cluster's leases this node can use, and why not the others; pure.
//!
//! A lease that can't be used is left out with a reason and never disturbs another one: one bad key or
//! one misconfigured node must not cost anybody else's traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::lease::format_key;
use subnet::net::{addr_of, bits_of, overlap};
use subnet::{Attachment, Family, Lease, Leases, Mac, NetworkConfig};

use crate::state::KernelState;
use crate::surroundings::Surroundings;
use crate::ways::Ways;

/// One family of a peer that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its pod subnet.
    pub subnet: IpNet,
    /// Where to send packets for it.
    pub public: IpAddr,
    /// The MAC of its VXLAN tunnel endpoint; zero for other backends.
    pub mac: Mac,
    /// Which of this node's ways leads to it ([`Ways::reaching`]).
    pub way: u8,
}

/// The outcome of looking through all leases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    /// The peers to reach, ordered by subnet.
    pub usable: Vec<Peer>,
    /// The leases that were left out, by their key, with the reason.
    pub skipped: BTreeMap<String, String>,
    /// The MACs that several nodes announce.
    pub disputed: BTreeSet<Mac>,
    /// How many of the usable ones announce something that this node doesn't know, and are reached as before.
    pub kept: usize,
}

/// From what this node looks at the leases.
#[derive(Clone, Copy, Debug)]
pub struct Outlook<'a> {
    /// The cluster's configuration.
    pub network: &'a NetworkConfig,
    /// Networks of earlier configurations, in which leases may still be.
    pub former: &'a [IpNet],
    /// This node's lease.
    pub own: &'a Lease,
    /// The ways that this node has.
    pub ways: &'a Ways,
    /// What it last wanted of the kernel.
    pub before: &'a KernelState,
    /// What no peer may cover.
    pub surroundings: &'a Surroundings,
    /// Disputed MACs of which nobody knows yet which of the nodes is living: they stay where they are.
    pub undecided: &'a BTreeSet<Mac>,
}

impl Peers {
    /// Looks through `all` from this node.
    pub fn choose(outlook: Outlook<'_>, all: &Leases) -> Self {
        let Outlook { network, own, .. } = outlook;
        let mut peers = Self::default();
        for (key, malformed) in &all.malformed {
            peers.skipped.insert(key.clone(), malformed.why.clone());
        }
        // What this node had before a family came or went is its own as well.
        let is_own = |lease: &Lease| {
            lease.subnets == own.subnets
                || lease.public.same_node(&own.public)
                    && lease.subnets.iter().any(|subnet| own.subnets.iter().any(|mine| mine == subnet))
        };
        let mut leases: Vec<&Lease> = all.leases.values().filter(|lease| !is_own(lease)).collect();
        // Of leases that overlap, one with the right length beats one with a wrong length, and of two
        // with the right length the older one is right.
        let wrong_length = |lease: &Lease| !network.ranges().all(|range| fits_length(range, lease));
        leases.sort_by_cached_key(|lease| (wrong_length(lease), lease.created, lease.subnets));

        let mut chosen = Vec::new();
        for lease in leases {
            if network.ranges().all(|range| lease.subnets.get(Family::of(range.network.addr())).is_none()) {
                let key = format_key(&lease.subnets).unwrap_or_else(|| lease.subnets.to_string());
                let why = format!("it has no subnet of a family that is enabled ({})", network.networks());
                peers.skipped.insert(key, why);
                continue;
            }
            for family in Family::BOTH {
                let (Some(range), Some(subnet)) = (network.range(family), lease.subnets.get(family)) else {
                    continue;
                };
                match examine(outlook, range.network, lease, subnet) {
                    Ok((peer, kept)) => chosen.push(Claimed { lease, peer, kept }),
                    Err(why) => peers.skip(network, lease, family, why),
                }
            }
        }
        let rules: [(Rule, bool); 3] =
            [(uncovered, false), (first_of_overlapping, false), (last_written_of_a_mac, true)];
        for (rule, about_macs) in rules {
            let (kept, refused) = rule(outlook, chosen);
            peers.disputed.extend(refused.iter().filter(|_| about_macs).map(|(claimed, _)| claimed.peer.mac));
            for (claimed, why) in refused {
                peers.skip(network, claimed.lease, Family::of(claimed.peer.public), why);
            }
            chosen = kept;
        }
        peers.kept = chosen.iter().filter(|claimed| claimed.kept).count();
        peers.usable = chosen.into_iter().map(|claimed| claimed.peer).collect();
        peers.usable.sort_unstable_by_key(|peer| peer.subnet);
        peers
    }

    fn skip(&mut self, network: &NetworkConfig, lease: &Lease, family: Family, why: String) {
        let why = if network.ranges().count() > 1 { format!("{family}: {why}") } else { why };
        let key = format_key(&lease.subnets).unwrap_or_else(|| lease.subnets.to_string());
        let entry = self.skipped.entry(key).or_default();
        if !entry.is_empty() {
            entry.push_str("; ");
        }
        entry.push_str(&why);
    }
}

fn fits_length(range: &subnet::Range, lease: &Lease) -> bool {
    let family = Family::of(range.network.addr());
    lease.subnets.get(family).is_none_or(|subnet| subnet.prefix_len() == range.subnet_len)
}

/// One family of a lease that is right as long as no other one contradicts it.
struct Claimed<'a> {
    lease: &'a Lease,
    peer: Peer,
    /// It announces something unknown and is reached as before.
    kept: bool,
}

/// Those that a rule leaves, and those that it doesn't, with the reason.
type Sorted<'a> = (Vec<Claimed<'a>>, Vec<(Claimed<'a>, String)>);

/// Says which of these can't be used together with the others.
type Rule = for<'a> fn(Outlook<'_>, Vec<Claimed<'a>>) -> Sorted<'a>;

/// What is wrong with one family of a lease, whatever the others say; or the peer, and whether it is only
/// reached as before.
fn examine(
    outlook: Outlook<'_>,
    network: IpNet,
    lease: &Lease,
    subnet: IpNet,
) -> Result<(Peer, bool), String> {
    let Outlook { former, own, ways, before, surroundings, .. } = outlook;
    let family = Family::of(subnet.addr());
    let announced = ways.reaching(lease);
    let kept = if announced.is_none() { ways.reached(&lease.attachment, before, subnet) } else { None };
    let Some(way) = announced.or(kept.map(|_| 0)) else {
        let name = |attachment: &Attachment| match attachment.type_name() {
            "" => "udp".to_owned(),
            name => name.to_owned(),
        };
        return Err(format!(
            "its backend is {}, this node's is {}: both need the same",
            name(&lease.attachment),
            name(&own.attachment)
        ));
    };
    if !network.contains(&subnet) && !former.iter().any(|former| former.contains(&subnet)) {
        return Err(format!("it lies outside the network {network}"));
    }
    if let Some(mine) = own.subnets.get(family).filter(|mine| overlap(*mine, subnet)) {
        return Err(format!("it overlaps this node's own subnet {mine}"));
    }
    let public = lease.public.get(family).ok_or("it has no public address")?;
    if Some(public) == own.public.get(family) {
        return Err(format!(
            "its public address {public} is this node's own: an old lease of this node, or a node with a duplicate address"
        ));
    }
    let networks: Vec<IpNet> = outlook.network.networks().iter().chain(former.iter().copied()).collect();
    if let Some(why) = surroundings.unreachable(public, &networks) {
        return Err(format!("its public address {public} {why}"));
    }
    if let Some(why) = surroundings.covered(subnet) {
        return Err(format!(
            "{why}: a route to it would cut that off; give the node another subnet, with a network that does not \
             overlap that of the nodes"
        ));
    }
    let mac = match (&lease.attachment, kept) {
        (_, Some(mac)) => mac,
        (Attachment::Vxlan { .. }, None) if ways.leads_to_vteps(way) => vtep(own, lease, family)?,
        (_, None) => Mac([0; 6]),
    };
    Ok((Peer { subnet, public, mac, way }, kept.is_some()))
}

/// The peer's tunnel endpoint.
fn vtep(own: &Lease, lease: &Lease, family: Family) -> Result<Mac, String> {
    let mac = lease.attachment.vtep(family).ok_or("it announces no tunnel endpoint (BackendData)")?.mac;
    if !mac.is_unicast() {
        return Err(format!("its VtepMAC {mac} can't be the address of a device"));
    }
    if own.attachment.vtep(family).is_some_and(|mine| mine.mac == mac) {
        return Err(format!("its VtepMAC {mac} is this node's own"));
    }
    Ok(mac)
}

/// Leaves out the subnets that contain the public address of a peer: packets to that node would be taken for
/// packets to a pod.
fn uncovered<'a>(_: Outlook<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    let publics: BTreeSet<(Family, u128)> =
        claimed.iter().map(|one| (Family::of(one.peer.public), bits_of(one.peer.public))).collect();
    let covered = |subnet: IpNet| {
        let family = Family::of(subnet.addr());
        let (first, last) = (bits_of(subnet.network()), bits_of(subnet.broadcast()));
        publics.range((family, first)..=(family, last)).next().map(|(family, bits)| addr_of(*family, *bits))
    };
    partition(claimed, |one| {
        let public = covered(one.peer.subnet)?;
        Some(format!(
            "it contains the public address {public} of a node: a route to it would cut that node off"
        ))
    })
}

/// Of subnets that overlap leaves the first.
fn first_of_overlapping<'a>(_: Outlook<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    // By first address, per family, none overlapping another.
    let mut taken: BTreeMap<(Family, u128), IpNet> = BTreeMap::new();
    partition(claimed, |one| {
        let (subnet, family) = (one.peer.subnet, Family::of(one.peer.subnet.addr()));
        let before = taken.range(..=(family, bits_of(subnet.broadcast()))).next_back();
        if let Some((_, other)) = before.filter(|(_, before)| overlap(**before, subnet)) {
            return Some(format!("it overlaps {other}, which has the right length or is older"));
        }
        taken.insert((family, bits_of(subnet.network())), subnet);
        None
    })
}

/// The forwarding database has one entry for a MAC, so two nodes can't share one. A node that has moved leaves
/// its old lease behind: the one written last is the living one.
fn last_written_of_a_mac<'a>(outlook: Outlook<'_>, claimed: Vec<Claimed<'a>>) -> Sorted<'a> {
    let mut holders: BTreeMap<(Family, Mac), Holder> = BTreeMap::new();
    let has_vtep = |one: &Claimed<'_>| outlook.ways.leads_to_vteps(one.peer.way) && !one.kept;
    for one in claimed.iter().filter(|one| has_vtep(one)) {
        let Peer { public, mac, .. } = one.peer;
        let current = outlook.undecided.contains(&mac)
            && outlook.before.fdb.iter().any(|((_, known), dst)| *known == mac && *dst == public);
        let mine = Holder { current, written: one.lease.written, public };
        let holder = holders.entry((Family::of(public), mac)).or_insert(mine);
        if (mine.current, mine.written) > (holder.current, holder.written) {
            *holder = mine;
        }
    }
    partition(claimed, |one| {
        let holder = holders.get(&(Family::of(one.peer.public), one.peer.mac)).filter(|_| has_vtep(one))?;
        (holder.public != one.peer.public).then(|| {
            let (mac, public) = (one.peer.mac, holder.public);
            format!("its VtepMAC {mac} is that of the node at {public}, whose lease was written later")
        })
    })
}

/// Which node a MAC is at.
#[derive(Clone, Copy)]
struct Holder {
    /// It is undecided, and this is where it was.
    current: bool,
    written: u64,
    public: IpAddr,
}

fn partition<'a>(
    claimed: Vec<Claimed<'a>>,
    mut refusal: impl FnMut(&Claimed<'a>) -> Option<String>,
) -> Sorted<'a> {
    let (mut kept, mut refused) = (Vec::with_capacity(claimed.len()), Vec::new());
    for one in claimed {
        match refusal(&one) {
            None => kept.push(one),
            Some(why) => refused.push((one, why)),
        }
    }
    (kept, refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use subnet::Subnets;
    use subnet::lease::parse_key;

    fn network() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap()
    }

    fn value(public: &str, last: u8) -> String {
        format!(
            r#"{{"PublicIP":"{public}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{last:02x}"}}}}"#
        )
    }

    fn cluster(entries: &[(&str, String, u64)]) -> (Lease, Leases) {
        let mut all = Leases::default();
        all.insert_entry("10.244.1.0-24", value("192.0.2.1", 1).as_bytes(), 1);
        for (key, value, created) in entries {
            all.insert_entry(key, value.as_bytes(), *created);
        }
        let own = all.leases[&parse_key("10.244.1.0-24").unwrap()].clone();
        (own, all)
    }

    fn choose(network: &NetworkConfig, own: &Lease, all: &Leases) -> Peers {
        let ways = Ways::new(&network.backend, network).unwrap();
        let before = KernelState::default();
        let surroundings = Surroundings::default();
        let undecided = BTreeSet::new();
        let (surroundings, undecided) = (&surroundings, &undecided);
        let outlook =
            Outlook { network, former: &[], own, ways: &ways, before: &before, surroundings, undecided };
        Peers::choose(outlook, all)
    }

    fn subnets(peers: &Peers) -> Vec<String> {
        peers.usable.iter().map(|peer| peer.subnet.to_string()).collect()
    }

    #[test]
    fn nothing_that_a_stranger_writes_costs_a_good_peer_its_place() {
        let (own, all) = cluster(&[
            ("10.244.2.0-24", value("192.0.2.2", 2), 2),
            ("10.244.3.0-24", value("192.0.2.3", 3), 3),
            ("nonsense", "{}".into(), 4),
            ("10.244.9.0-24", "nonsense".into(), 4),
            ("192.168.0.0-16", value("192.0.2.4", 4), 4),
            ("0.0.0.0-0", value("192.0.2.5", 5), 0),
            ("10.244.0.0-16", value("192.0.2.6", 6), 0),
            ("10.244.2.0-25", value("192.0.2.7", 7), 0),
            ("10.244.10.0-24", r#"{"PublicIP":"192.0.2.8","BackendType":"host-gw"}"#.into(), 4),
            ("10.244.11.0-24", value("0.0.0.0", 9), 4),
            ("10.244.12.0-24", value("224.0.0.1", 10), 4),
            ("10.244.13.0-24", value("192.0.2.1", 11), 4),
            ("10.244.14.0-24", value("192.0.2.14", 1), 4),
            ("10.244.15.0-24", value("192.0.2.15", 2), 4),
            ("10.244.16.0-24", r#"{"PublicIP":"192.0.2.16","BackendType":"vxlan"}"#.into(), 4),
            ("10.244.17.0-24", value("192.0.2.17", 17).replace("02:00", "03:00"), 4),
        ]);
        let peers = choose(&network(), &own, &all);
        assert_eq!(subnets(&peers), ["10.244.3.0/24", "10.244.15.0/24"]);
        assert_eq!(peers.disputed.len(), 1);
        assert_eq!(peers.skipped.len(), 14);
        for (key, part) in [
            ("nonsense", "not a subnet"),
            ("10.244.9.0-24", "not a JSON object"),
            ("192.168.0.0-16", "outside the network 10.244.0.0/16"),
            ("0.0.0.0-0", "outside"),
            ("10.244.0.0-16", "this node's own subnet 10.244.1.0/24"),
            ("10.244.2.0-25", "overlaps 10.244.2.0/24"),
            ("10.244.10.0-24", "its backend is host-gw, this node's is vxlan"),
            ("10.244.11.0-24", "no public address"),
            ("10.244.12.0-24", "224.0.0.1 is not that of a node"),
            ("10.244.13.0-24", "192.0.2.1 is this node's own"),
            ("10.244.14.0-24", "is this node's own"),
            (
                "10.244.2.0-24",
                "its VtepMAC 02:00:00:00:00:02 is that of the node at 192.0.2.15, whose lease was written later",
            ),
            ("10.244.16.0-24", "no tunnel endpoint"),
            ("10.244.17.0-24", "can't be the address of a device"),
        ] {
            assert!(peers.skipped[key].contains(part), "{key}: {}", peers.skipped[key]);
        }
    }

    #[test]
    fn of_two_leases_with_one_mac_the_one_written_last_is_used_once_that_is_settled() {
        let (own, mut all) = cluster(&[("10.244.2.0-24", value("192.0.2.11", 2), 2)]);
        all.insert_written("10.244.3.0-24", value("192.0.2.51", 2).as_bytes(), 3, 3);
        let network = network();
        assert_eq!(subnets(&choose(&network, &own, &all)), ["10.244.3.0/24"]);
        let mac: Mac = "02:00:00:00:00:02".parse().unwrap();
        let mut before = KernelState::default();
        before.fdb.insert(("flannel.1".parse().unwrap(), mac), "192.0.2.11".parse().unwrap());
        let ways = Ways::new(&network.backend, &network).unwrap();
        let (undecided, surroundings) = (BTreeSet::from([mac]), Surroundings::default());
        let outlook = Outlook {
            network: &network,
            former: &[],
            own: &own,
            ways: &ways,
            before: &before,
            surroundings: &surroundings,
            undecided: &undecided,
        };
        assert_eq!(subnets(&Peers::choose(outlook, &all)), ["10.244.2.0/24"], "where it was");
        // The living one wrote its lease again.
        all.insert_written("10.244.2.0-24", value("192.0.2.11", 2).as_bytes(), 2, 4);
        assert_eq!(subnets(&choose(&network, &own, &all)), ["10.244.2.0/24"]);
    }

    #[test]
    fn a_lease_without_an_enabled_family_is_named() {
        let (own, all) = cluster(&[("0.0.0.0-0&fd00::-64", value("192.0.2.2", 2), 2)]);
        let peers = choose(&network(), &own, &all);
        assert!(peers.usable.is_empty());
        assert!(
            peers.skipped["0.0.0.0-0&fd00::-64"].contains("no subnet of a family"),
            "{:?}",
            peers.skipped
        );
    }

    #[test]
    fn a_lease_whose_public_address_is_a_pods_is_skipped_and_costs_the_pods_node_nothing() {
        let (own, all) = cluster(&[
            ("10.244.2.0-24", value("192.0.2.2", 2), 2),
            ("10.244.3.0-24", value("10.244.2.5", 3), 1),
            ("10.244.200.0-24", value("10.244.200.5", 4), 1),
        ]);
        let peers = choose(&network(), &own, &all);
        assert_eq!(subnets(&peers), ["10.244.2.0/24"]);
        assert!(
            peers.skipped.values().all(|why| why.contains("inside the pod network")),
            "{:?}",
            peers.skipped
        );
    }

    #[test]
    fn a_subnet_that_contains_a_node_is_never_routed() {
        let (own, all) = cluster(&[
            ("10.244.2.0-24", value("192.0.2.2", 2), 2),
            ("10.244.3.0-24", value("10.244.2.5", 3), 3),
        ]);
        let network = network();
        let ways = Ways::new(&network.backend, &network).unwrap();
        let lan = ("eth0".parse().unwrap(), "10.244.2.1/23".parse().unwrap());
        let surroundings = Surroundings { addresses: vec![lan], ..Surroundings::default() };
        let outlook = Outlook {
            network: &network,
            former: &[],
            own: &own,
            ways: &ways,
            before: &KernelState::default(),
            surroundings: &surroundings,
            undecided: &BTreeSet::new(),
        };
        let peers = Peers::choose(outlook, &all);
        // The other one is reached, since it is on a LAN of this host.
        assert_eq!(subnets(&peers), ["10.244.3.0/24"]);
        assert!(
            peers.skipped["10.244.2.0-24"].contains("this host's address on eth0"),
            "{:?}",
            peers.skipped
        );
    }

    #[test]
    fn of_two_overlapping_leases_with_equal_standing_the_older_one_is_used() {
        let (own, all) = cluster(&[
            ("10.244.4.0-23", value("192.0.2.2", 2), 9),
            ("10.244.5.0-25", value("192.0.2.3", 3), 8),
        ]);
        assert_eq!(subnets(&choose(&network(), &own, &all)), ["10.244.5.0/25"]);
    }

    #[test]
    fn a_node_with_two_leases_keeps_both_reachable() {
        let (own, all) = cluster(&[
            ("10.244.4.0-24", value("192.0.2.2", 2), 2),
            ("10.244.5.0-24", value("192.0.2.2", 2), 3),
        ]);
        assert_eq!(choose(&network(), &own, &all).usable.len(), 2);
    }

    #[test]
    fn a_peer_with_one_family_stays_reachable_in_it() {
        let network = NetworkConfig::parse(
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"host-gw"}}"#,
        )
        .unwrap();
        let mut all = Leases::default();
        let both = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}"#;
        all.insert_entry("10.244.1.0-24&fd00:244:0:1::-64", both.as_bytes(), 1);
        all.insert_entry("10.244.2.0-24", br#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#, 2);
        all.insert_entry(
            "10.244.3.0-24&fd00:244:0:3::-64",
            br#"{"PublicIP":"192.0.2.3","BackendType":"host-gw"}"#,
            3,
        );
        let own = all.leases.values().next().unwrap().clone();
        let peers = choose(&network, &own, &all);
        assert_eq!(subnets(&peers), ["10.244.2.0/24", "10.244.3.0/24"]);
        assert_eq!(peers.skipped["10.244.3.0-24&fd00:244:0:3::-64"], "IPv6: it has no public address");
    }

    proptest! {
        /// Whatever is in the store: no two usable peers overlap, none leaves the network or touches our
        /// own subnet, every lease is either used or explained, and strangers never push out a lease
        /// that is right in every respect.
        #[test]
        fn usable_peers_never_disturb_each_other(
            entries in prop::collection::vec((0u32..0x800, 14u8..28, 0u8..12, 0u64..9, any::<bool>()), 0..30),
        ) {
            let entries: Vec<(String, String, u64)> = entries
                .into_iter()
                .map(|(low, len, last, created, inside)| {
                    let base = if inside { 0x0af4_0000u32 } else { 0x0af3_0000 };
                    let net = ipnet::Ipv4Net::new((base | (low << 5)).into(), len).unwrap().trunc();
                    let subnets = Subnets { v4: Some(net), v6: None };
                    (format_key(&subnets).unwrap(), value(&format!("192.0.2.{}", last + 1), last + 1), created)
                })
                .collect();
            let entries: Vec<(&str, String, u64)> =
                entries.iter().map(|(key, value, created)| (key.as_str(), value.clone(), *created)).collect();
            let (own, all) = cluster(&entries);
            let network = network();
            let peers = choose(&network, &own, &all);
            for (index, peer) in peers.usable.iter().enumerate() {
                prop_assert!(network.ranges().all(|range| range.network.contains(&peer.subnet)));
                prop_assert!(own.subnets.iter().all(|mine| !overlap(mine, peer.subnet)));
                prop_assert!(peers.usable[index + 1..].iter().all(|other| !overlap(peer.subnet, other.subnet)));
            }
            prop_assert_eq!(peers.usable.len() + peers.skipped.len() + 1, all.leases.len() + all.malformed.len());

            let mut with_good = all.clone();
            let good = "10.244.250.0-24";
            with_good.insert_entry(good, value("198.51.100.1", 0xfe).as_bytes(), 0);
            let after = choose(&network, &own, &with_good);
            prop_assert!(!after.skipped.contains_key(good), "{:?}", after.skipped);
        }
    }
}
