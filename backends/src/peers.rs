//! Which of the cluster's leases this node can use, and why not the others; pure.
//!
//! A lease that can't be used is left out with a reason and never disturbs another one: one bad key or
//! one misconfigured node must not cost anybody else's traffic.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::lease::format_key;
use subnet::net::{bits_of, overlap};
use subnet::{Attachment, Family, Lease, Leases, Mac, NetworkConfig, Subnets};

use crate::state::KernelState;
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
        let mut claims: Vec<&Lease> = all.leases.values().filter(|lease| !is_own(lease)).collect();
        // Of leases that overlap, one with the right length beats one with a wrong length, and of two
        // with the right length the older one is right.
        let wrong_length = |lease: &Lease| !network.ranges().all(|range| fits_length(range, lease));
        claims.sort_by_cached_key(|lease| (wrong_length(lease), lease.created, lease.subnets));

        let mut taken = Taken::default();
        for lease in claims {
            for family in Family::BOTH {
                let (Some(range), Some(subnet)) = (network.range(family), lease.subnets.get(family)) else {
                    continue;
                };
                match examine(outlook, range.network, lease, subnet, &mut taken) {
                    Ok((peer, kept)) => {
                        peers.usable.push(peer);
                        peers.kept += usize::from(kept);
                    }
                    Err(why) => {
                        let why = if network.ranges().count() > 1 { format!("{family}: {why}") } else { why };
                        peers.skip(&lease.subnets, why);
                    }
                }
            }
        }
        peers.usable.sort_unstable_by_key(|peer| peer.subnet);
        peers
    }

    fn skip(&mut self, subnets: &Subnets, why: String) {
        let key = format_key(subnets).unwrap_or_else(|| subnets.to_string());
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

/// What earlier, better leases hold already.
#[derive(Default)]
struct Taken {
    /// Subnets by first address, per family, none overlapping another.
    subnets: BTreeMap<(Family, u128), IpNet>,
    /// Tunnel endpoints and the address behind which they are.
    macs: BTreeMap<(Family, Mac), IpAddr>,
}

impl Taken {
    fn overlapping(&self, subnet: IpNet) -> Option<IpNet> {
        let family = Family::of(subnet.addr());
        let last = (family, bits_of(subnet.broadcast()));
        let (_, before) = self.subnets.range(..=last).next_back()?;
        overlap(*before, subnet).then_some(*before)
    }
}

/// The peer, and whether it is only reached as before.
fn examine(
    outlook: Outlook<'_>,
    network: IpNet,
    lease: &Lease,
    subnet: IpNet,
    taken: &mut Taken,
) -> Result<(Peer, bool), String> {
    let Outlook { former, own, ways, before, .. } = outlook;
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
    if let Some(other) = taken.overlapping(subnet) {
        return Err(format!("it overlaps {other}, which has the right length or is older"));
    }
    let public = lease.public.get(family).ok_or("it has no public address")?;
    if public.is_unspecified() || public.is_loopback() || public.is_multicast() || is_broadcast(public) {
        return Err(format!("its public address {public} is not that of a node"));
    }
    if Some(public) == own.public.get(family) {
        return Err(format!(
            "its public address {public} is this node's own: an old lease of this node, or a node with a duplicate address"
        ));
    }
    let mac = match (&lease.attachment, kept) {
        (_, Some(mac)) => mac,
        (Attachment::Vxlan { .. }, None) if ways.leads_to_vteps(way) => {
            vtep(own, lease, family, public, taken)?
        }
        (_, None) => Mac([0; 6]),
    };
    taken.subnets.insert((family, bits_of(subnet.network())), subnet);
    Ok((Peer { subnet, public, mac, way }, kept.is_some()))
}

/// The peer's tunnel endpoint. The forwarding database has one entry for a MAC, so two nodes can't share one.
fn vtep(
    own: &Lease,
    lease: &Lease,
    family: Family,
    public: IpAddr,
    taken: &mut Taken,
) -> Result<Mac, String> {
    let mac = lease.attachment.vtep(family).ok_or("it announces no tunnel endpoint (BackendData)")?.mac;
    if !mac.is_unicast() {
        return Err(format!("its VtepMAC {mac} can't be the address of a device"));
    }
    if own.attachment.vtep(family).is_some_and(|mine| mine.mac == mac) {
        return Err(format!("its VtepMAC {mac} is this node's own"));
    }
    match taken.macs.get(&(family, mac)) {
        Some(other) if *other != public => {
            Err(format!("its VtepMAC {mac} belongs to the node at {other} already"))
        }
        _ => {
            taken.macs.insert((family, mac), public);
            Ok(mac)
        }
    }
}

fn is_broadcast(addr: IpAddr) -> bool {
    matches!(addr, IpAddr::V4(v4) if v4.is_broadcast())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
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
        Peers::choose(Outlook { network, former: &[], own, ways: &ways, before: &before }, all)
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
        assert_eq!(subnets(&peers), ["10.244.2.0/24", "10.244.3.0/24"]);
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
            ("10.244.15.0-24", "belongs to the node at 192.0.2.2 already"),
            ("10.244.16.0-24", "no tunnel endpoint"),
            ("10.244.17.0-24", "can't be the address of a device"),
        ] {
            assert!(peers.skipped[key].contains(part), "{key}: {}", peers.skipped[key]);
        }
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
