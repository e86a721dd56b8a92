use std::net::IpAddr;

use super::*;
use crate::lease::{Attachment, Vtep};
use crate::mac::Mac;
use crate::net::PublicAddrs;

const V4: &str = r#"{"Network":"10.3.0.0/16"}"#;
const DUAL: &str = r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:3::/48"}"#;
const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:3::/48"}"#;
const MOVED: &str = r#"{"Network":"10.9.0.0/16"}"#;

fn public(text: &str) -> PublicAddrs {
    text.split_whitespace().map(|addr| addr.parse::<IpAddr>().unwrap()).collect()
}

fn subnets(text: &str) -> Subnets {
    text.split_whitespace().map(|net| net.parse::<IpNet>().unwrap()).collect()
}

/// Leases, the oldest first, and what a node at 192.0.2.1 and 2001:db8::1 takes after `previous`.
fn chosen(config: &str, previous: &str, leases: &[(&str, &str)]) -> Choice {
    let mut all = Leases::default();
    for (created, (nets, addrs)) in (1..).zip(leases) {
        let (subnets, public) = (subnets(nets), public(addrs));
        all.leases.insert(
            subnets,
            Lease { subnets, public, attachment: Attachment::HostGw, created, written: created },
        );
    }
    let attach = |_: Option<&Lease>, _: &Leases| Attachment::HostGw;
    let claim = Claim::new(public(OWN), subnets(previous), &attach);
    choose(&NetworkConfig::parse(config).unwrap(), &claim, None, &all).unwrap()
}

const OWN: &str = "192.0.2.1 2001:db8::1";
const OTHER: &str = "192.0.2.2 2001:db8::2";

#[test]
fn a_single_lease_that_leaves_no_subnet_is_named() {
    let config = NetworkConfig::parse(DUAL).unwrap();
    let said = |nets: &[&str]| {
        let mut all = Leases::default();
        for nets in nets {
            let subnets = subnets(nets);
            let attachment = Attachment::HostGw;
            all.leases.insert(
                subnets,
                Lease { subnets, public: public(OTHER), attachment, created: 1, written: 1 },
            );
        }
        exhausted(&config, &all).to_string()
    };
    assert!(said(&["0.0.0.0/0"]).contains("10.3.255.0 (all of them by the one lease 0.0.0.0-0) or every"));
    assert!(
        said(&["10.3.9.0/24 fd00:3::/48"]).contains("(all of them by the one lease 10.3.9.0-24&fd00:3::-48)")
    );
    assert!(!said(&["10.3.0.0/17", "10.3.128.0/17"]).contains("by the one lease"));
}

#[test]
fn each_family_of_the_own_lease_is_kept_for_itself() {
    for (config, own, kept, replaces) in [
        (V4, "10.3.7.0/24", "10.3.7.0/24", false),
        (DUAL, "10.3.7.0/24 fd00:3:0:7::/64", "10.3.7.0/24 fd00:3:0:7::/64", false),
        (V6, "fd00:3:0:7::/64", "fd00:3:0:7::/64", false),
        // A family is added, removed, or both.
        (DUAL, "10.3.7.0/24", "10.3.7.0/24", true),
        (DUAL, "fd00:3:0:7::/64", "fd00:3:0:7::/64", true),
        (V4, "10.3.7.0/24 fd00:3:0:7::/64", "10.3.7.0/24", true),
        (V6, "10.3.7.0/24 fd00:3:0:7::/64", "fd00:3:0:7::/64", true),
        // One was moved: pods are in the old one, whose lease stays whole.
        (DUAL, "10.8.7.0/24 fd00:3:0:7::/64", "fd00:3:0:7::/64", false),
        (DUAL, "10.3.7.0/24 fd00:8:0:7::/64", "10.3.7.0/24", false),
        (V4, "10.3.7.0/24 fd00:8:0:7::/64", "10.3.7.0/24", true),
        // One has another length now.
        (DUAL, "10.3.7.0/24 fd00:3:0:7::/80", "10.3.7.0/24", true),
        // Nothing can be kept: the old one is left alone.
        (V6, "10.3.7.0/24", "", false),
        (MOVED, "10.3.7.0/24 fd00:3:0:7::/64", "", false),
    ] {
        let choice = chosen(config, "", &[(own, OWN)]);
        for net in subnets(kept).iter() {
            assert_eq!(choice.subnets.get(Family::of(net.addr())), Some(net), "{config} {own}");
        }
        assert!(NetworkConfig::parse(config).unwrap().allows(&choice.subnets), "{config} {own}");
        assert_eq!((choice.replaces, choice.known.unwrap().subnets), (replaces, subnets(own)), "{config}");
    }
}

#[test]
fn what_an_older_lease_of_another_has_is_not_kept() {
    let half = [("10.3.7.0/24 fd00:3:0:7::/64", OTHER), ("10.3.7.0/24 fd00:3:0:8::/64", OWN)];
    let choice = chosen(DUAL, "", &half);
    assert_eq!(choice.subnets.v6, subnets("fd00:3:0:8::/64").v6);
    assert!(!choice.subnets.overlaps(&subnets(half[0].0)) && choice.replaces);
    // The older of another family's kind counts as well, and one of our own does not.
    let choice = chosen(DUAL, "", &[("10.3.7.0/24", OTHER), ("10.3.7.0/24 fd00:3:0:8::/64", OWN)]);
    assert_ne!(choice.subnets.v4, subnets("10.3.7.0/24").v4);
    let choice = chosen(DUAL, "", &[("10.3.7.0/24", OWN), ("10.3.7.0/24 fd00:3:0:8::/64", OWN)]);
    assert_eq!(choice.subnets, subnets("10.3.7.0/24 fd00:3:0:8::/64"));
    // All of it: then it goes, for it was wrong from the beginning.
    let choice = chosen(V4, "", &[("10.3.6.0/24 fd00::/64", OTHER), ("10.3.6.0/24", OWN)]);
    assert!(choice.replaces && choice.subnets != subnets("10.3.6.0/24"));
}

#[test]
fn of_several_own_leases_one_that_the_network_allows_is_taken() {
    let both = [("10.3.7.0/24", OWN), ("10.9.7.0/24", OWN)];
    assert_eq!(chosen(V4, "", &both).subnets, subnets("10.3.7.0/24"));
    assert_eq!(chosen(MOVED, "", &both).subnets, subnets("10.9.7.0/24"));
    let more = [("10.3.7.0/24", OWN), ("10.3.8.0/24 fd00:3:0:8::/64", OWN)];
    assert_eq!(chosen(DUAL, "", &more).subnets, subnets(more[1].0));
    assert_eq!(chosen(V4, "", &more).subnets, subnets(more[0].0));
}

#[test]
fn previous_subnets_complete_a_lease_family_by_family() {
    let previous = "10.3.9.0/24 fd00:3:0:9::/64";
    assert_eq!(chosen(DUAL, previous, &[]).subnets, subnets(previous));
    assert_eq!(chosen(V4, previous, &[]).subnets, subnets("10.3.9.0/24"));
    assert_eq!(
        chosen(DUAL, previous, &[("10.3.7.0/24", OWN)]).subnets,
        subnets("10.3.7.0/24 fd00:3:0:9::/64")
    );
    let choice = chosen(DUAL, previous, &[("10.3.9.0/24", OTHER)]);
    assert_eq!(choice.subnets.v6, subnets(previous).v6);
    assert_ne!(choice.subnets.v4, subnets(previous).v4);
}

#[test]
fn nodes_without_ipv4_are_told_apart_by_ipv6() {
    let lease = |addrs: &str, attachment: Attachment| Lease {
        subnets: subnets("fd00:3:0:7::/64"),
        public: public(addrs),
        attachment,
        created: 1,
        written: 1,
    };
    let mine = lease("2001:db8::1", Attachment::HostGw);
    let judge = |now: Lease| judge(&mine, Some(&now));
    assert_eq!(judge(mine.clone()), Verdict::Kept);
    let contested = judge(lease("2001:db8::1", Attachment::Udp));
    assert!(matches!(contested, Verdict::Lost(Loss::Contested { .. })), "{contested:?}");
    let taken = judge(lease("2001:db8::2", Attachment::HostGw));
    assert!(matches!(taken, Verdict::Lost(Loss::Taken { holder, .. }) if holder == public("2001:db8::2")));
}

#[cfg(feature = "etcd")]
#[test]
fn a_node_needs_an_address_of_the_family_by_which_it_is_recognised() {
    let need = |config: &str, addrs: &str| {
        let network = NetworkConfig::parse(config).unwrap();
        require_public(&network, &public(addrs), "etcd").map_err(|error| error.to_string())
    };
    assert_eq!(need(V6, "2001:db8::1"), Ok(()));
    assert_eq!(need(DUAL, "192.0.2.1"), Ok(()));
    for (config, addrs, part) in
        [(V6, "192.0.2.1", "--public-ipv6"), (DUAL, "2001:db8::1", "--public-ip "), (V4, "", "IPv4")]
    {
        let error = need(config, addrs).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_node_that_moved_to_another_address_keeps_its_lease() {
    let macs = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
    let vxlan = |mac| Attachment::Vxlan { v4: Some(Vtep { vni: 1, mac, port: None }), v6: None };
    let lease = |nets: &str, addrs: &str, attachment, created| {
        let subnets = subnets(nets);
        (subnets, Lease { subnets, public: public(addrs), attachment, created, written: created })
    };
    let mut all = Leases::default();
    all.leases.extend([
        lease("10.3.7.0/24", OTHER, vxlan(macs[0]), 1),
        lease("10.3.8.0/24", OWN, vxlan(macs[1]), 2),
        lease("10.3.9.0/24", "192.0.2.9", Attachment::HostGw, 3),
    ]);
    let attach = |_: Option<&Lease>, _: &Leases| Attachment::HostGw;
    let network = NetworkConfig::parse(V4).unwrap();
    let taken = |claim: Claim<'_>| choose(&network, &claim, None, &all).unwrap().subnets;
    let claim = |previous: &str| Claim::new(public("192.0.2.77"), subnets(previous), &attach);
    // MAC and subnet.
    assert_eq!(taken(Claim { macs: &macs[..1], ..claim("10.3.7.0/24") }), subnets("10.3.7.0/24"));
    // One of them alone proves nothing.
    assert_ne!(taken(Claim { macs: &macs[..1], ..claim("10.3.8.0/24") }), subnets("10.3.7.0/24"));
    assert_ne!(taken(Claim { macs: &macs[..1], ..claim("") }), subnets("10.3.7.0/24"));
    assert_ne!(taken(claim("10.3.7.0/24")), subnets("10.3.7.0/24"));
    // It goes before the lease that the new address had.
    let moved = Claim { macs: &macs[..1], ..Claim::new(public(OWN), subnets("10.3.7.0/24"), &attach) };
    assert_eq!(taken(moved), subnets("10.3.7.0/24"));
    // Without a MAC: the lease as this machine saved it, as long as no other node has written it.
    let saved = all.leases[&subnets("10.3.9.0/24")].clone();
    assert_eq!(taken(Claim { before: Some(&saved), ..claim("10.3.9.0/24") }), subnets("10.3.9.0/24"));
    let older = Lease { public: public("192.0.2.8"), ..saved };
    assert_ne!(taken(Claim { before: Some(&older), ..claim("10.3.9.0/24") }), subnets("10.3.9.0/24"));
}

#[test]
fn no_subnet_contains_what_is_in_use_outside_of_pods() {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    let network =
        NetworkConfig::parse(r#"{"Network":"172.16.0.0/20","SubnetLen":22,"SubnetMin":"172.16.0.0"}"#)
            .unwrap();
    let attach = |_: Option<&Lease>, _: &Leases| Attachment::HostGw;
    let reserved = [net("172.16.0.1/32"), net("172.16.5.1/32")];
    let claim = |previous: &str| Claim {
        reserved: &reserved,
        ..Claim::new(public("192.0.2.1"), subnets(previous), &attach)
    };
    let mut all = Leases::default();
    // The public address of a peer is one of those.
    let (theirs, peer) = (subnets("172.20.0.0/22"), public("172.16.8.8"));
    let lease =
        Lease { subnets: theirs, public: peer, attachment: Attachment::HostGw, created: 1, written: 1 };
    all.leases.insert(theirs, lease);
    for previous in ["", "172.16.0.0/22", "172.16.4.0/22"] {
        let choice = choose(&network, &claim(previous), None, &all).unwrap();
        assert_eq!(choice.subnets, subnets("172.16.12.0/22"), "{previous}");
    }
    // A lease that the node has is given up as well.
    let (own, public) = (subnets("172.16.4.0/22"), public("192.0.2.1"));
    all.leases
        .insert(own, Lease { subnets: own, public, attachment: Attachment::HostGw, created: 2, written: 2 });
    let choice = choose(&network, &claim("172.16.4.0/22"), None, &all).unwrap();
    assert_eq!((choice.subnets, choice.replaces), (subnets("172.16.12.0/22"), true));
    // LANs are left alone as long as there is something else, and only then.
    all = Leases::default();
    let lans = [net("172.16.0.0/21")];
    for _ in 0..20 {
        let choice = choose(&network, &Claim { lans: &lans, ..claim("") }, None, &all).unwrap();
        assert!(choice.subnets == subnets("172.16.8.0/22") || choice.subnets == subnets("172.16.12.0/22"));
    }
    let all_lans = [net("172.16.0.0/16")];
    assert!(choose(&network, &Claim { lans: &all_lans, ..claim("") }, None, &all).is_some());
}
