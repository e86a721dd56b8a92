//! Two families on two nodes: what happens to one of them is nothing to the other.

use std::net::{Ipv4Addr, Ipv6Addr};

use backends::testing::Pod;
use subnet::Family;

use crate::bed::{LIMIT, Member};
use crate::site::{Kind, Site, config, logs, lost, pings_of};

const VXLAN: &str = r#"{"Type":"vxlan"}"#;
const HOST_GW: &str = r#"{"Type":"host-gw"}"#;

/// What the other node knows: where frames for this one's tunnel endpoints go.
fn knows(member: &Member, device: &str, mac: &str, public: &str) -> bool {
    let entry = format!("{mac} dst {public} self permanent");
    let fdb = member.try_show(&format!("bridge fdb show dev {device}"));
    fdb.lines().any(|line| line.trim() == entry)
}

fn mac_of(member: &Member, device: &str) -> String {
    member.show(&format!("ip -o link show {device}")).split("link/ether ").nth(1).unwrap()[..17].to_owned()
}

fn reach_each_other(a: &Pod, b: &Pod) -> bool {
    let all = |from: &Pod, to: &Pod| {
        to.addresses().iter().all(|address| from.namespace().reaches(address.addr()).unwrap())
    };
    all(a, b) && all(b, a)
}

#[test]
fn an_address_of_one_family_changes_and_the_other_family_loses_nothing() {
    for kind in [Kind::Etcd, Kind::Kube] {
        for backend in [VXLAN, HOST_GW] {
            let site = Site::new(kind, &config(&Family::BOTH, backend));
            let (a, b) = (site.join(), site.join());
            let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
            a.wait("the first echoes", || reach_each_other(&pod_a, &pod_b));
            let subnets = a.subnets();
            let (v4, v6): (Ipv4Addr, Ipv6Addr) =
                ("172.31.0.77".parse().unwrap(), "fd31::77".parse().unwrap());
            for (changed, quiet) in [(Family::V6, Family::V4), (Family::V4, Family::V6)] {
                let pings = pings_of(&[&pod_a, &pod_b], &[quiet]);
                let public = match changed {
                    Family::V6 => {
                        a.node.readdress(a.node.address(), v6).unwrap();
                        v6.to_string()
                    }
                    Family::V4 => {
                        a.node.readdress(v4, a.node.address_v6()).unwrap();
                        v4.to_string()
                    }
                };
                a.wait("the new address in the store", || {
                    site.announced().iter().any(|text| text.contains(&format!("\"{public}\"")))
                });
                b.wait("the new address on the peer", || {
                    let of = if changed == Family::V4 { "-4" } else { "-6" };
                    b.show("bridge fdb show").contains(&format!("dst {public} "))
                        || b.show(&format!("ip {of} route show proto 70")).contains(&format!("via {public} "))
                });
                b.wait("echoes in both families", || reach_each_other(&pod_a, &pod_b));
                assert_eq!(lost(pings), [0, 0], "{kind:?} {backend} {changed}\n{}", logs(&[&a, &b]));
            }
            assert_eq!((a.subnets(), site.announced().len()), (subnets, 2));
        }
    }
}

/// How many packets a named counter of the table `ip6 sources` has seen.
fn counted(member: &Member, name: &str) -> u64 {
    let text = member.show(&format!("nft list counter ip6 sources {name}"));
    text.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_node_sends_from_its_new_ipv6_address_alone() {
    let site = Site::new(Kind::Etcd, &config(&Family::BOTH, VXLAN));
    let (a, b) = (site.join(), site.join());
    let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
    a.wait("the first echoes", || reach_each_other(&pod_a, &pod_b));
    // The kernel remembers the source by CPU, so both directions run for a while on all of them.
    let pings = pings_of(&[&pod_a, &pod_b], &[Family::V6]);
    let (old, new): (Ipv6Addr, Ipv6Addr) = (a.node.address_v6(), "fd31::77".parse().unwrap());
    a.node.readdress(a.node.address(), new).unwrap();
    b.wait("the new address on the peer", || b.show("bridge fdb show").contains(&format!("dst {new} ")));
    a.wait("the new address of the device", || {
        a.show("ip -d link show flannel-v6.1").contains(&format!("local {new}"))
    });
    b.wait("echoes from the new address", || reach_each_other(&pod_a, &pod_b));
    let rules = format!(
        "table ip6 sources {{\ncounter old {{ }}\ncounter new {{ }}\nchain input {{\ntype filter hook input priority -500;\n\
         udp dport 8472 ip6 saddr {old} counter name old\nudp dport 8472 ip6 saddr {new} counter name new\n}}\n}}\n"
    );
    b.node.namespace().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    b.wait("datagrams from the new address", || counted(&b, "new") >= 500);
    assert_eq!(counted(&b, "old"), 0);
    drop(pings);
}

#[test]
fn a_tunnel_endpoint_of_one_family_is_another_after_a_restart_and_the_peer_follows_in_that_family() {
    for kind in [Kind::Etcd, Kind::Kube] {
        let site = Site::new(kind, &config(&Family::BOTH, VXLAN));
        let (mut a, b) = (site.join(), site.join());
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        a.wait("the first echoes", || reach_each_other(&pod_a, &pod_b));
        for (device, mac, quiet) in [
            ("flannel-v6.1", "02:00:00:00:66:01", Family::V4),
            ("flannel.1", "02:00:00:00:44:01", Family::V6),
        ] {
            let other = if device == "flannel.1" { "flannel-v6.1" } else { "flannel.1" };
            let before = (mac_of(&a, device), mac_of(&a, other));
            let pings = pings_of(&[&pod_a, &pod_b], &[quiet]);
            a.agent.terminate(LIMIT).unwrap();
            a.ip(&format!("link set {device} address {mac}"));
            a.start_again();
            assert_eq!((mac_of(&a, device), mac_of(&a, other)), (mac.to_owned(), before.1.clone()));
            let public = |device| match device {
                "flannel.1" => a.node.address().to_string(),
                _ => a.node.address_v6().to_string(),
            };
            b.wait("the new endpoint on the peer", || knows(&b, device, mac, &public(device)));
            b.wait("the end of the old one", || !knows(&b, device, &before.0, &public(device)));
            assert!(knows(&b, other, &before.1, &public(other)));
            b.wait("echoes in both families", || reach_each_other(&pod_a, &pod_b));
            assert_eq!(lost(pings), [0, 0], "{kind:?} {device}\n{}", logs(&[&a, &b]));
        }
    }
}

/// A peer that is not there, as it announces itself, and the IPv4 half of what a node makes of it.
fn announce(site: &Site, name: &str, number: u8, with_v6: Option<&str>) {
    let mac = format!("02:00:00:00:00:{number:02x}");
    let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
    let public = format!("172.31.0.{number}");
    match site.kind() {
        Kind::Kube => {
            let v4 = format!("10.244.{number}.0/24");
            let v6 = format!("fd00:244:0:{number}::/64");
            let cidrs: &[&str] = if with_v6.is_some() { &[&v4, &v6] } else { &[&v4] };
            site.api().put_node(subnet::testing::announced(
                subnet::testing::node(name, cidrs),
                &public,
                &mac,
            ));
            if let Some(broken) = with_v6 {
                for (key, value) in [("public-ipv6", "fd31::99"), ("backend-v6-data", broken)] {
                    site.api().annotate(name, &format!("flannel.alpha.coreos.com/{key}"), Some(value));
                }
            }
        }
        _ => {
            let (key, value) = match with_v6 {
                None => (
                    format!("10.244.{number}.0-24"),
                    format!(
                        r#"{{"PublicIP":"{public}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{data}}}"#
                    ),
                ),
                Some(broken) => (
                    format!("10.244.{number}.0-24&fd00:244:0:{number}::-64"),
                    format!(
                        r#"{{"PublicIP":"{public}","PublicIPv6":"fd31::99","BackendType":"vxlan","BackendData":{data},"BackendV6Data":{broken}}}"#
                    ),
                ),
            };
            site.etcdctl(&["put", &format!("/coreos.com/network/subnets/{key}"), &value]);
        }
    }
}

#[test]
fn a_peer_whose_ipv6_is_missing_or_broken_stays_reachable_over_ipv4() {
    for kind in [Kind::Etcd, Kind::Kube] {
        let site = Site::new(kind, &config(&Family::BOTH, VXLAN));
        let (a, b) = (site.join(), site.join());
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        a.wait("the first echoes", || reach_each_other(&pod_a, &pod_b));
        let pings = pings_of(&[&pod_a, &pod_b], &Family::BOTH);
        let strangers: [(u8, Option<&str>); 5] = [
            (101, None),
            (102, Some("null")),
            (103, Some(r#"{"VNI":1,"VtepMAC":"nonsense"}"#)),
            (104, Some(r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#)),
            (105, Some(r#""what""#)),
        ];
        for (number, broken) in strangers {
            announce(&site, &format!("stranger{number}"), number, broken);
            a.wait(&format!("{kind:?}: the IPv4 half of {number}, {broken:?}"), || {
                let route = a.show(&format!("ip route show 10.244.{number}.0/24"));
                route.contains("dev flannel.1")
                    && knows(
                        &a,
                        "flannel.1",
                        &format!("02:00:00:00:00:{number:02x}"),
                        &format!("172.31.0.{number}"),
                    )
            });
            let v6 = a.show(&format!("ip -6 route show fd00:244:0:{number}::/64"));
            assert_eq!(v6, "", "{broken:?}");
        }
        assert_eq!(lost(pings), [0; 4], "{kind:?}\n{}", logs(&[&a, &b]));
    }
}

#[test]
fn a_node_of_ipv4_alone_and_a_node_of_both_families_reach_each_other_over_ipv4() {
    let site = Site::new(Kind::Kube, &config(&[Family::V4], VXLAN));
    let a = site.join();
    // As during a rolling change: the nodes that come have another configuration.
    site.configure(&config(&[Family::V4], VXLAN));
    let node = site.fabric.node().unwrap();
    site.configure_one(&node.name(), &config(&Family::BOTH, VXLAN));
    let b = site.ready(node, &[]);
    let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
    assert_eq!((pod_a.addresses().len(), pod_b.addresses().len()), (1, 2));
    a.wait("echoes over IPv4", || {
        pod_a.namespace().reaches(pod_b.address()).unwrap()
            && pod_b.namespace().reaches(pod_a.address()).unwrap()
    });
}

/// All that there is of IPv6 on a node, without the numbers of devices.
fn state(member: &Member) -> Vec<String> {
    let mut lines = Vec::new();
    for command in [
        "ip -6 route show proto 70",
        "ip -6 neigh show dev flannel-v6.1 nud permanent",
        "bridge fdb show dev flannel-v6.1",
        "ip -6 -o address show dev flannel-v6.1 scope global",
        "ip -d -o link show dev flannel-v6.1",
    ] {
        let text = member.try_show(command);
        let without_number = |line: &str| match line.split_once(": ") {
            Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => rest.to_owned(),
            _ => line.trim().to_owned(),
        };
        let mut of_one: Vec<String> = text.lines().map(without_number).collect();
        of_one.sort();
        lines.append(&mut of_one);
    }
    lines
}

#[test]
fn every_damage_to_the_tunnel_of_ipv6_heals_by_itself_and_ipv4_loses_nothing() {
    for families in [&[Family::V6][..], &Family::BOTH] {
        let site = Site::new(Kind::Etcd, &config(families, VXLAN));
        let node = site.fabric.node().unwrap();
        // As hardened hosts have it for devices that come.
        node.namespace().sysctl("ipv6/conf/default/disable_ipv6", "1").unwrap();
        let (a, b) = (site.ready(node, &[]), site.join());
        a.node.namespace().sysctl("ipv6/conf/default/disable_ipv6", "0").unwrap();
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        a.wait("the first echoes", || reach_each_other(&pod_a, &pod_b));
        assert!(!a.agent.log().contains("\nE"), "{}", a.agent.log());
        let healthy = state(&a);
        assert!(healthy.len() >= 5, "{healthy:?}");
        let pings = pings_of(&[&pod_a, &pod_b], &[Family::V4]);
        let peer = b.subnets().pop().unwrap();
        let (gateway, public, mac) = (peer.network(), b.node.address_v6(), mac_of(&b, "flannel-v6.1"));
        for damage in [
            "ip link del flannel-v6.1".to_owned(),
            "ip link set flannel-v6.1 down".to_owned(),
            "ip -6 route flush dev flannel-v6.1".to_owned(),
            format!("ip -6 route del {peer}"),
            format!("ip -6 route replace {peer} via fd31::fe"),
            "ip -6 neigh flush dev flannel-v6.1 nud permanent".to_owned(),
            format!("ip -6 neigh del {gateway} dev flannel-v6.1"),
            format!("bridge fdb del {mac} dev flannel-v6.1 dst {public} self"),
            format!("bridge fdb replace {mac} dev flannel-v6.1 dst fd31::99 self"),
            "ip -6 address flush dev flannel-v6.1 scope global".to_owned(),
            "ip address flush dev flannel-v6.1".to_owned(),
            "ip link set flannel-v6.1 address 02:00:00:00:00:77".to_owned(),
            "ip link set flannel-v6.1 mtu 1280".to_owned(),
            "ip link set flannel-v6.1 mtu 1279".to_owned(),
            "sysctl -qw net.ipv6.conf.flannel-v6/1.disable_ipv6=1".to_owned(),
        ] {
            a.show(&damage);
            a.wait(&format!("the repair of: {damage}"), || state(&a) == healthy);
            assert!(reach_each_other(&pod_a, &pod_b), "after {damage}");
        }
        assert!(lost(pings).iter().all(|lost| *lost == 0), "{}", logs(&[&a, &b]));
    }
}

#[test]
fn an_ipv6_address_that_comes_besides_moves_nobody_not_even_after_a_restart() {
    for kind in Kind::ALL {
        let site = Site::new(kind, &config(&[Family::V6], VXLAN));
        let mut a = site.join();
        let (subnets, own) = (a.subnets(), a.node.address_v6().to_string());
        a.wait("the lease in what is kept", || a.kept().contains(&own));
        a.ip("addr add fd31::99/64 dev eth0 nodad");
        for _ in 0..2 {
            a.agent.terminate(LIMIT).unwrap();
            a.start_again();
            assert_eq!(a.subnets(), subnets, "{kind:?}");
            let announced = site.announced();
            assert!(announced.len() == 1 && announced[0].contains(&own), "{announced:?}");
            assert!(a.show("ip -d link show flannel-v6.1").contains(&format!("local {own} ")));
        }
    }
}
