//! Which leases of a cluster are usable.

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
    let active = ActiveBackends::new(&network.backend, network).unwrap();
    let before = KernelState::default();
    let surroundings = Surroundings::default();
    let undecided = BTreeSet::new();
    let (surroundings, undecided) = (&surroundings, &undecided);
    let context =
        PeerContext { network, former: &[], own, active: &active, before: &before, surroundings, undecided };
    Peers::choose(context, all)
}

fn subnets(peers: &Peers) -> Vec<String> {
    peers.usable.keys().map(ToString::to_string).collect()
}

#[test]
fn a_node_of_which_one_family_has_moved_is_reached_by_both_of_its_leases() {
    let network = NetworkConfig::parse(
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"host-gw"}}"#,
    )
    .unwrap();
    let value = |last: u8| {
        format!(r#"{{"PublicIP":"192.0.2.{last}","PublicIPv6":"2001:db8::{last}","BackendType":"host-gw"}}"#)
    };
    let mut all = Leases::default();
    for (key, last, created, written) in [
        ("10.244.1.0-24&fd00:244:0:1::-64", 1, 1, 1),
        ("10.99.1.0-24&fd00:244:0:1::-64", 1, 0, 0),
        // The IPv4 network of this one, and the IPv6 network of that one.
        ("10.99.2.0-24&fd00:244:0:2::-64", 2, 2, 5),
        ("10.244.2.0-24&fd00:244:0:2::-64", 2, 6, 6),
        ("10.244.3.0-24&fd00:99:0:3::-64", 3, 3, 8),
        ("10.244.3.0-24&fd00:244:0:3::-64", 3, 7, 8),
        // Another node's lease of the same subnet is no second one of the same.
        ("10.244.9.0-24&fd00:244:0:3::-64", 4, 9, 9),
    ] {
        all.insert_written(key, value(last).as_bytes(), created, written);
    }
    let own = all.leases[&parse_key("10.244.1.0-24&fd00:244:0:1::-64").unwrap()].clone();
    let (active, before) = (ActiveBackends::new(&network.backend, &network).unwrap(), KernelState::default());
    let (surroundings, undecided) = (&Surroundings::default(), &BTreeSet::new());
    let former = &["10.99.0.0/16".parse().unwrap(), "fd00:99::/48".parse().unwrap()];
    let (network, own, active, before) = (&network, &own, &active, &before);
    let peers =
        Peers::choose(PeerContext { network, former, own, active, before, surroundings, undecided }, &all);
    assert_eq!(
        subnets(&peers),
        [
            "10.99.2.0/24",
            "10.244.2.0/24",
            "10.244.3.0/24",
            "10.244.9.0/24",
            "fd00:99:0:3::/64",
            "fd00:244:0:2::/64",
            "fd00:244:0:3::/64"
        ]
    );
    assert_eq!(peers.skipped.len(), 1, "{:?}", peers.skipped);
    let key = "10.244.9.0-24&fd00:244:0:3::-64";
    assert!(peers.skipped[key].contains("it overlaps fd00:244:0:3::/64"), "{:?}", peers.skipped);
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
    let active = ActiveBackends::new(&network.backend, &network).unwrap();
    let (undecided, surroundings) = (BTreeSet::from([mac]), Surroundings::default());
    let context = PeerContext {
        network: &network,
        former: &[],
        own: &own,
        active: &active,
        before: &before,
        surroundings: &surroundings,
        undecided: &undecided,
    };
    assert_eq!(subnets(&Peers::choose(context, &all)), ["10.244.2.0/24"], "where it was");
    // The living one wrote its lease again.
    all.insert_written("10.244.2.0-24", value("192.0.2.11", 2).as_bytes(), 2, 4);
    assert_eq!(subnets(&choose(&network, &own, &all)), ["10.244.2.0/24"]);
}

#[test]
fn a_lease_without_an_enabled_family_is_named() {
    let (own, all) = cluster(&[("0.0.0.0-0&fd00::-64", value("192.0.2.2", 2), 2)]);
    let peers = choose(&network(), &own, &all);
    assert!(peers.usable.is_empty());
    assert!(peers.skipped["0.0.0.0-0&fd00::-64"].contains("no subnet of a family"), "{:?}", peers.skipped);
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
    assert!(peers.skipped.values().all(|why| why.contains("inside the pod network")), "{:?}", peers.skipped);
}

#[test]
fn a_subnet_that_contains_a_node_is_never_routed() {
    let (own, all) =
        cluster(&[("10.244.2.0-24", value("192.0.2.2", 2), 2), ("10.244.3.0-24", value("10.244.2.5", 3), 3)]);
    let network = network();
    let active = ActiveBackends::new(&network.backend, &network).unwrap();
    let lan = ("eth0".parse().unwrap(), "10.244.2.1/23".parse().unwrap());
    let surroundings = Surroundings { addresses: vec![lan], ..Surroundings::default() };
    let context = PeerContext {
        network: &network,
        former: &[],
        own: &own,
        active: &active,
        before: &KernelState::default(),
        surroundings: &surroundings,
        undecided: &BTreeSet::new(),
    };
    let peers = Peers::choose(context, &all);
    // The other one is reached, since it is on a LAN of this host.
    assert_eq!(subnets(&peers), ["10.244.3.0/24"]);
    assert!(peers.skipped["10.244.2.0-24"].contains("this host's address on eth0"), "{:?}", peers.skipped);
}

#[test]
fn of_two_overlapping_leases_with_equal_standing_the_older_one_is_used() {
    let (own, all) =
        cluster(&[("10.244.4.0-23", value("192.0.2.2", 2), 9), ("10.244.5.0-25", value("192.0.2.3", 3), 8)]);
    assert_eq!(subnets(&choose(&network(), &own, &all)), ["10.244.5.0/25"]);
}

#[test]
fn a_node_with_two_leases_keeps_both_reachable() {
    let (own, all) =
        cluster(&[("10.244.4.0-24", value("192.0.2.2", 2), 2), ("10.244.5.0-24", value("192.0.2.2", 2), 3)]);
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

#[test]
fn what_a_lease_lacks_because_it_cannot_be_read_counts_once_with_the_real_reason() {
    let [near, far] = ["10.244.2.0-24", "10.244.3.0-24"];
    let (own, mut all) =
        cluster(&[("10.244.1.0-24", value("192.0.2.1", 1), 1), (near, value("192.0.2.2", 2), 2)]);
    all.insert_entry(far, br#"{"PublicIP":"192.0.2.3","BackendType":"vxlan"}"#, 3);
    let without = choose(&network(), &own, &all);
    assert!(without.skipped[far].contains("no tunnel endpoint"), "{:?}", without.skipped);
    for (key, name) in [(near, "node-2"), (far, "node-3")] {
        let lease = parse_key(key);
        let malformed = Malformed { why: "backend-data: not a JSON object".into(), subnets: None, lease };
        all.malformed.insert(name.into(), malformed);
    }
    let peers = choose(&network(), &own, &all);
    let skipped: Vec<&str> = peers.skipped.keys().map(String::as_str).collect();
    assert_eq!(skipped, [far, "node-2"], "one whose rest can be used is told by its name");
    assert!(peers.skipped.values().all(|why| why == "backend-data: not a JSON object"));
    assert_eq!(peers.reasons, [(SkipReason::Malformed, 2)].into());
}

proptest! {
    /// With anything in the store: no two usable peers overlap, none leaves the network or touches our
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
        let usable: Vec<&Peer> = peers.usable.values().collect();
        for (index, peer) in usable.iter().enumerate() {
            prop_assert!(network.ranges().all(|range| range.network.contains(&peer.subnet)));
            prop_assert!(own.subnets.iter().all(|mine| !overlap(mine, peer.subnet)));
            prop_assert!(usable[index + 1..].iter().all(|other| !overlap(peer.subnet, other.subnet)));
        }
        prop_assert_eq!(peers.usable.len() + peers.skipped.len() + 1, all.leases.len() + all.malformed.len());

        let mut with_good = all.clone();
        let good = "10.244.250.0-24";
        with_good.insert_entry(good, value("198.51.100.1", 0xfe).as_bytes(), 0);
        let after = choose(&network, &own, &with_good);
        prop_assert!(!after.skipped.contains_key(good), "{:?}", after.skipped);
    }
}
