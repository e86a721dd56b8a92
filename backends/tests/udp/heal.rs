//! What happens to a tunnel from outside is put right by the next look, and traffic goes on.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;

use backends::datapath::engine::Offload;
use backends::testing::{Fabric, wait_for};

use crate::bed::{Cluster, LIMIT, Site, UDP, UDP_BOTH, UDP_V6, show};
use crate::flows::{Datagrams, exchange};

fn state(site: &Site) -> String {
    // Without its number, which is another one for a device that was recreated.
    let tail = |text: String| text.split_once(':').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    let link = tail(site.show("ip -o link show flannel0"));
    let address = tail(site.show("ip -o -4 address show dev flannel0"));
    // A device has a random address for its link each time it gets IPv6.
    let v6 = site.show("ip -o -6 address show dev flannel0 scope global");
    let v6 = v6.split_once("flannel0").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    let routes = ["ip -4 route show proto 70", "ip -6 route show proto 70"].map(|command| site.show(command));
    format!("{link}\n{address}\n{v6}\n{}", routes.join("\n"))
}

#[test]
fn every_damage_is_repaired_and_traffic_goes_on() {
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    cluster.assert_reaches("at first");
    let healthy = state(&cluster.sites[0]);
    for damage in [
        "link del flannel0",
        "link set flannel0 down",
        "address flush dev flannel0",
        "route del 10.244.0.0/16",
        "route replace blackhole 10.244.0.0/16",
        "route replace 10.244.0.0/16 via 172.31.0.254",
        "link set flannel0 mtu 1280",
        "link set flannel0 mtu 9000",
        "link del flannel0\nlink add flannel0 type bridge",
        "link set flannel0 down\nlink set flannel0 name other0",
        "tuntap add flannel1 mode tun\nlink del flannel0",
    ] {
        cluster.sites[0].ip(damage);
        assert_ne!(cluster.sites[0].converge().len(), 0, "not noticed: {damage}");
        assert_eq!(state(&cluster.sites[0]), healthy, "after: {damage}");
        assert_eq!(cluster.sites[0].converge(), Vec::<String>::new(), "after: {damage}");
        cluster.assert_reaches(damage);
    }
}

#[test]
fn every_damage_to_ipv6_is_repaired_and_traffic_of_both_families_goes_on() {
    for config in [UDP_V6, UDP_BOTH] {
        let mut cluster = Cluster::new(2, config, Offload(true));
        cluster.assert_reaches("at first");
        let healthy = state(&cluster.sites[0]);
        assert!(healthy.contains("inet6 fd00:244:0:1::/128 scope global nodad"), "{healthy}");
        for damage in [
            "link del flannel0",
            "link set flannel0 down",
            "-6 address flush dev flannel0 scope global",
            "-6 route del fd00:244::/48",
            "-6 route replace blackhole fd00:244::/48",
            "-6 route replace fd00:244::/48 via fd31::fe",
            "link set flannel0 mtu 1280",
            // Too little for IPv6, so the kernel takes all of it off the device.
            "link set flannel0 mtu 1000",
            "sysctl 1",
            "link set flannel0 down\nlink set flannel0 name other0",
        ] {
            match damage.strip_prefix("sysctl ") {
                Some(value) => {
                    let namespace = cluster.sites[0].machine.namespace();
                    namespace.sysctl("ipv6/conf/flannel0/disable_ipv6", value).unwrap();
                }
                None => damage.lines().for_each(|line| drop(cluster.sites[0].show(&format!("ip {line}")))),
            }
            assert_ne!(cluster.sites[0].converge().len(), 0, "not noticed: {damage}");
            assert_eq!(state(&cluster.sites[0]), healthy, "after: {damage}");
            assert_eq!(cluster.sites[0].converge(), Vec::<String>::new(), "after: {damage}");
            cluster.assert_reaches(damage);
        }
    }
}

/// The host's default keeps IPv6 off new devices.
#[test]
fn a_device_takes_ipv6_where_the_default_is_to_have_none() {
    let fabric = Fabric::new().unwrap();
    let mut site = Site::new(&fabric, UDP_BOTH, Offload(true));
    site.machine.namespace().sysctl("ipv6/conf/default/disable_ipv6", "1").unwrap();
    site.converge();
    assert!(state(&site).contains("fd00:244:0:1::/128"), "{}", state(&site));
}

#[test]
fn an_underlay_that_goes_down_and_up_needs_no_repair() {
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    cluster.assert_reaches("at first");
    let site = &cluster.sites[0];
    site.machine.link_down().unwrap();
    let pod = cluster.pods[0].namespace();
    assert!(!pod.reaches(cluster.pods[1].address()).unwrap());
    site.wait_for("packets that can't be sent", |counters| counters.dropped_unsent.get() > 0);
    site.machine.link_up().unwrap();
    assert_eq!(cluster.sites[0].converge(), Vec::<String>::new());
    cluster.assert_reaches("after the link came up");
}

#[test]
fn the_mtu_follows_the_underlay() {
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    for mtu in [1400, 9000, 1500] {
        for site in &mut cluster.sites {
            site.machine.set_mtu(mtu).unwrap();
            site.node.underlay.mtu = mtu;
            let peer = 3 - site.number();
            let words = [
                format!("link set flannel0 mtu {}", mtu - 28),
                format!("forwarding set flannel0 local 172.31.0.{}:8285 mtu {} peers 1", 3 - peer, mtu - 28),
            ];
            assert_eq!(site.converge(), words);
        }
        cluster.assert_reaches("after another MTU");
    }
}

#[test]
fn the_narrowest_tunnel_that_there_can_be_carries_everything() {
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    for site in &mut cluster.sites {
        site.machine.set_mtu(68 + 28).unwrap();
        site.node.underlay.mtu = 68 + 28;
        site.converge();
    }
    let [a, b] = [0, 1].map(|at| cluster.pods[at].namespace());
    exchange(a, b, cluster.pods[1].address(), 1 << 16);
    Datagrams::new(a, b, cluster.pods[1].address(), 3).run(20, 12..=40, 4);
    cluster.assert_sound();
}

#[test]
fn a_new_address_of_the_node_moves_the_socket_and_keeps_the_device() {
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    let new = Ipv4Addr::new(172, 31, 0, 77);
    cluster.sites[0].ip("addr del 172.31.0.1/24 dev eth0\naddr add 172.31.0.77/24 dev eth0\nroute replace default via 172.31.0.254");
    cluster.sites[0].node.local.v4 = Some(new);
    let words = cluster.sites[0].converge();
    assert_eq!(words, ["forwarding set flannel0 local 172.31.0.77:8285 mtu 1472 peers 1"]);
    cluster.sites[1].peers = vec![(1, new)];
    cluster.sites[1].converge();
    cluster.assert_reaches("after the node moved");
}

#[test]
fn a_device_ends_with_its_process_and_is_made_anew_by_the_next() {
    let fabric = Fabric::new().unwrap();
    let mut site = Site::new(&fabric, UDP, Offload(true));
    site.converge();
    let machine = Arc::clone(&site.machine);
    drop(site);
    // A program that is being started elsewhere in this process may hold its files for a moment.
    wait_for("the end of the device", LIMIT, || {
        !show(machine.namespace(), "ip -o link show").contains("flannel0")
    })
    .unwrap();
    let mut site = Site::on(machine, UDP, Offload(true));
    assert_eq!(site.try_converge().applied[0].to_string(), "link add flannel0 type tun mtu 1472");
    wait_for("the port of the one before", LIMIT, || site.try_converge().settled).unwrap();
}

#[test]
fn a_device_that_nobody_holds_is_taken_over() {
    for kind in ["mode tun", "mode tun vnet_hdr"] {
        let mut cluster = Cluster::new(2, UDP, Offload(true));
        let site = &mut cluster.sites[0];
        site.ip(&format!(
            "link del flannel0\ntuntap add flannel0 {kind}\naddr add 10.244.1.0/32 dev flannel0"
        ));
        site.converge();
        assert_eq!(site.converge(), Vec::<String>::new(), "{kind}");
        cluster.assert_reaches(kind);
    }
}

#[test]
fn a_device_that_another_process_holds_is_left_to_it_with_a_clear_word() {
    for offload in [Offload(true), Offload(false)] {
        let mut cluster = Cluster::new(2, UDP, offload);
        let mut second = Site::on(Arc::clone(&cluster.sites[0].machine), UDP, offload);
        let report = second.try_converge();
        let text = report.failed.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(
            text.contains(" holds flannel0: stop it")
                && text.contains(&format!("(pid {})", std::process::id()))
                && text.contains("Backend.Port"),
            "{text}; done: {:?}",
            report.applied
        );
        drop(second);
        assert_eq!(cluster.sites[0].converge(), Vec::<String>::new(), "the one that holds it lost nothing");
        cluster.assert_reaches("after somebody else wanted the device");
    }
}

#[test]
fn a_port_that_another_process_has_is_named_and_taken_once_it_is_free() {
    let fabric = Fabric::new().unwrap();
    let mut site = Site::new(&fabric, UDP, Offload(true));
    let at = (site.machine.address(), 8285);
    let other = site.machine.namespace().run(|| UdpSocket::bind(at).unwrap());
    let report = site.try_converge();
    let text = report.failed.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let holder = format!("(pid {}) has UDP port 8285 (ss -ulnp", std::process::id());
    assert!(text.contains(&holder), "{text}");
    drop(other);
    assert_eq!(site.converge(), ["forwarding set flannel0 local 172.31.0.1:8285 mtu 1472 peers 0"]);
}

#[test]
fn two_networks_with_two_ports_share_the_nodes() {
    const SECOND: &str = r#"{"Network":"10.99.0.0/16","Backend":{"Type":"udp","Port":8286}}"#;
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    let second = |site: &Site, peer: &Site| {
        let mut second = Site::on(Arc::clone(&site.machine), SECOND, Offload(true));
        second.peers = vec![(peer.number(), peer.machine.address())];
        assert_eq!(second.converge()[0], "link add flannel8286 type tun mtu 1472");
        second
    };
    let [a, b] = [0, 1].map(|at| second(&cluster.sites[at], &cluster.sites[1 - at]));
    let there = "10.99.2.0".parse().unwrap();
    cluster.assert_reaches("beside the second network");
    assert!(a.machine.namespace().reaches(there).unwrap());
    assert_eq!(cluster.sites.iter_mut().map(|site| site.converge().len()).sum::<usize>(), 0);
    a.wait_for("both directions", |counters| {
        counters.sent_packets.get() > 0 && counters.received_packets.get() > 0
    });
    drop((a, b));
    assert_eq!(cluster.sites.iter_mut().map(|site| site.converge().len()).sum::<usize>(), 0);
    cluster.assert_reaches("after the second network ended");
}
