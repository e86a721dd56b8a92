//! IPv4, IPv6 and both, by every backend and with every store.

use std::thread;

use backends::testing::Pod;
use subnet::Family;

use crate::bed::Member;
use crate::site::{Kind, Site, config};

const V4: &[Family] = &[Family::V4];
const V6: &[Family] = &[Family::V6];
const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const UDP: &str = r#"{"Type":"udp"}"#;

/// The lines of `subnet.env` that say anything about `families`, and no others.
fn check_subnet_env(member: &Member, families: &[Family], mtu: u32) {
    let text = std::fs::read_to_string(member.node.subnet_file()).unwrap();
    let mut expected = Vec::new();
    for (family, prefix, network) in
        [(Family::V4, "", "10.244.0.0/16"), (Family::V6, "IPV6_", "fd00:244::/48")]
    {
        if !families.contains(&family) {
            continue;
        }
        let subnet = member.subnets().into_iter().find(|net| Family::of(net.addr()) == family).unwrap();
        let gateway = subnet::env_file::gateway(subnet);
        expected.push(format!("FLANNEL_{prefix}NETWORK={network}"));
        expected.push(format!("FLANNEL_{prefix}SUBNET={gateway}/{}", subnet.prefix_len()));
    }
    expected.push(format!("FLANNEL_MTU={mtu}"));
    expected.push("FLANNEL_IPMASQ=true".to_owned());
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

/// The devices with the MTU that their own underlay leaves, and the IPv6 address usable from the start.
fn check_devices(member: &Member, families: &[Family], backend: &str) {
    let vxlan = backend.contains("vxlan");
    for (family, device, mtu) in [(Family::V4, "flannel.1", 1450), (Family::V6, "flannel-v6.1", 1430)] {
        let link = member.try_show(&format!("ip -o link show {device}"));
        if vxlan && families.contains(&family) {
            assert!(link.contains(&format!(" mtu {mtu} ")), "{link}");
        } else {
            assert_eq!(link, "");
        }
    }
    let udp = backend == UDP;
    let link = member.try_show("ip -o link show flannel0");
    let mtu = if families.contains(&Family::V6) { 1452 } else { 1472 };
    assert_eq!(link.contains(&format!(" mtu {mtu} ")), udp, "{link}");
    if (vxlan || udp) && families.contains(&Family::V6) {
        let device = if udp { "flannel0" } else { "flannel-v6.1" };
        let address = member.show(&format!("ip -6 -o address show dev {device} scope global"));
        let own = member.subnets().pop().unwrap().network();
        assert_eq!(address.lines().count(), 1, "{address}");
        assert!(address.contains(&format!("inet6 {own}/128 scope global nodad")), "{address}");
        assert!(!address.contains("tentative"), "{address}");
    }
}

/// The rules of one family in the words of IPv4, so that those of both can be compared.
fn rules(member: &Member, family: Family) -> Option<String> {
    let (table, number) = match family {
        Family::V4 => ("ip", 4),
        Family::V6 => ("ip6", 6),
    };
    let mut text = member.try_show(&format!("nft -s list table {table} flannel-ipv{number}"));
    if text.is_empty() {
        return None;
    }
    let own = member.subnets().into_iter().find(|net| Family::of(net.addr()) == family).unwrap();
    for (from, to) in [
        (own.to_string(), "OWN".to_owned()),
        ("10.244.0.0/16".to_owned(), "NETWORK".to_owned()),
        ("fd00:244::/48".to_owned(), "NETWORK".to_owned()),
        ("224.0.0.0/4".to_owned(), "MULTICAST".to_owned()),
        ("ff00::/8".to_owned(), "MULTICAST".to_owned()),
        ("table ip6 ".to_owned(), "table ip ".to_owned()),
        ("flannel-ipv6".to_owned(), "flannel-ipv4".to_owned()),
        ("ip6 ".to_owned(), "ip ".to_owned()),
    ] {
        text = text.replace(&from, &to);
    }
    Some(text)
}

fn check_rules(members: &[&Member], families: &[Family]) {
    for member in members {
        for family in Family::BOTH {
            assert_eq!(rules(member, family).is_some(), families.contains(&family), "{family}");
        }
        if families.len() == 2 {
            let (v4, v6) = (rules(member, Family::V4).unwrap(), rules(member, Family::V6).unwrap());
            assert_eq!(v4, v6);
            assert!(v4.contains("masquerade") && v4.contains("MULTICAST") && v4.contains("OWN"), "{v4}");
        }
    }
}

fn check_echoes(a: &Member, pod_a: &Pod, b: &Member, pod_b: &Pod, families: &[Family]) {
    assert_eq!(pod_b.addresses().len(), families.len());
    for (from, to) in [(pod_a, pod_b), (pod_b, pod_a)] {
        for address in to.addresses() {
            a.wait(&format!("echoes from {from:?} to {address}"), || {
                from.namespace().reaches(address.addr()).unwrap()
            });
        }
    }
    for (from, to) in [(a, pod_b), (b, pod_a)] {
        for address in to.addresses() {
            assert!(from.node.namespace().reaches(address.addr()).unwrap(), "from the host to {address}");
        }
    }
}

/// Two nodes with these families.
fn carries(kind: Kind, families: &[Family], backend: &str, mtu: u32) {
    let site = Site::new(kind, &config(families, backend));
    let join = || {
        let node = site.fabric.node().unwrap();
        // The usual setting: an address that is not told otherwise can't be used for a second.
        node.namespace().sysctl("ipv6/conf/default/accept_dad", "1").unwrap();
        site.ready(node, &["--ip-masq", "--traffic-manager=nft"])
    };
    let (a, b) = (join(), join());
    for member in [&a, &b] {
        // Read first: an address that was tentative would be so for a second.
        check_devices(member, families, backend);
        check_subnet_env(member, families, mtu);
    }
    check_rules(&[&a, &b], families);
    let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
    check_echoes(&a, &pod_a, &b, &pod_b, families);
    assert_eq!(site.announced().len(), 2);
}

fn all_families_by(kind: Kind) {
    thread::scope(|scope| {
        for (families, backend, mtu) in [
            (V4, VXLAN, 1450),
            (V6, VXLAN, 1430),
            (&Family::BOTH[..], VXLAN, 1430),
            (V4, r#"{"Type":"host-gw"}"#, 1500),
            (V6, r#"{"Type":"host-gw"}"#, 1500),
            (&Family::BOTH[..], r#"{"Type":"host-gw"}"#, 1500),
            (V4, UDP, 1472),
            (V6, UDP, 1452),
            (&Family::BOTH[..], UDP, 1452),
        ] {
            let name = format!("{kind:?} {families:?} {backend}");
            let work = move || carries(kind, families, backend, mtu);
            thread::Builder::new().name(name).spawn_scoped(scope, work).unwrap();
        }
    });
}

#[test]
fn every_family_is_carried_by_every_backend_with_leases_in_etcd() {
    all_families_by(Kind::Etcd);
}

#[test]
fn every_family_is_carried_by_every_backend_with_leases_in_files() {
    all_families_by(Kind::Files);
}

#[test]
fn every_family_is_carried_by_every_backend_with_leases_in_kubernetes() {
    all_families_by(Kind::Kube);
}
