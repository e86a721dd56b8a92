//! What somebody breaks on a living node is put right, and pods go on talking.

use crate::bed::{Cluster, HOST_GW, LIMIT, VXLAN};

const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan"}}"#;

#[test]
fn every_damage_to_a_tunnel_heals_by_itself() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let healthy = a.state();

    let peer = b.subnet();
    let gateway = peer.network();
    let public = b.node.address();
    let lease =
        cluster.leases().into_iter().find(|(_, value)| value.contains(&public.to_string())).unwrap().1;
    let mac = lease.split("\"VtepMAC\":\"").nth(1).unwrap()[..17].to_owned();
    let damages = [
        ("ip", format!("route del {peer}")),
        ("ip", format!("route replace {peer} via 172.31.0.254")),
        ("bridge", format!("fdb del {mac} dev flannel.1 dst {public} self")),
        ("bridge", format!("fdb replace {mac} dev flannel.1 dst 172.31.0.99 self")),
        ("ip", format!("neigh del {gateway} dev flannel.1")),
        ("ip", "address flush dev flannel.1".to_owned()),
        ("ip", "link set flannel.1 down".to_owned()),
        ("ip", "link set flannel.1 address 02:00:00:00:00:77".to_owned()),
        ("ip", "link del flannel.1".to_owned()),
        ("ip", "link set flannel.1 mtu 1280".to_owned()),
        ("ip", "neigh flush dev flannel.1 nud permanent".to_owned()),
        ("ip", "route flush dev flannel.1".to_owned()),
    ];
    for (program, damage) in damages {
        a.show(&format!("{program} {damage}"));
        // The index of a recreated device differs; nothing else may.
        a.wait(&format!("the repair of: {program} {damage}"), || {
            without_index(&a.state()) == without_index(&healthy)
        });
        assert!(pod_a.namespace().reaches(pod_b.address()).unwrap(), "after {program} {damage}");
        assert!(pod_b.namespace().reaches(pod_a.address()).unwrap(), "after {program} {damage}");
    }
}

fn without_index(state: &str) -> Vec<String> {
    let without = |line: &str| match line.split_once(": flannel.1:") {
        Some((_, rest)) => rest.to_owned(),
        None => line.to_owned(),
    };
    state.lines().map(without).collect()
}

#[test]
fn a_deleted_route_of_host_gw_comes_back_and_so_do_all_after_the_link_was_down() {
    let cluster = Cluster::new(HOST_GW);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let healthy = a.state();
    a.ip(&format!("route del {}", b.subnet()));
    a.wait("the route", || a.state() == healthy);

    a.node.link_down().unwrap();
    a.wait("the loss of the route", || !a.node.has_route(b.subnet()).unwrap());
    a.node.link_up().unwrap();
    a.wait("the route after the link came up", || a.state() == healthy);
    assert!(pod_a.namespace().reaches(pod_b.address()).unwrap());
}

#[test]
fn traffic_rules_are_restored_while_the_kernel_refuses_the_device() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--ip-masq"]);
    let healthy = a.rules();
    // Its VNI and port are taken then, by a device that is not ours any more.
    a.ip("link set flannel.1 down\nlink set flannel.1 name other");
    a.wait("the reason", || a.verbose().contains("remove it (ip link del other)"));
    a.show("nft delete table ip flannel-ipv4");
    a.wait("the rules", || a.rules() == healthy);
    assert!(!a.is_ready() && a.verbose().contains(r#""rules":"met""#), "{}", a.verbose());
    a.ip("link del other");
    a.wait("readiness", || a.is_ready());
}

/// The kernel refuses a device where another has its VNI, port and family.
#[test]
fn the_device_in_the_way_is_named_and_no_device_of_this_node() {
    let cluster = Cluster::new(DUAL);
    let mut a = cluster.join();
    a.agent.terminate(LIMIT).unwrap();
    a.ip("link del flannel.1\nlink add foo type vxlan id 1 dev eth0 dstport 8472");
    let agent = a.launch.start(&a.node).unwrap();
    a.agent = agent;
    a.wait("the reason", || a.verbose().contains("remove it (ip link del foo)"));
    assert!(!a.verbose().contains("ip link del flannel"), "{}", a.verbose());
    a.ip("link del foo");
    a.wait("readiness", || a.is_ready());
}

#[test]
fn somebody_who_keeps_undoing_our_work_is_named_in_the_log() {
    let cluster = Cluster::new(HOST_GW);
    let (a, b) = (cluster.join(), cluster.join());
    a.wait("the route", || a.node.has_route(b.subnet()).unwrap());
    for _ in 0..7 {
        a.ip(&format!("route del {}", b.subnet()));
        a.wait("the route", || a.node.has_route(b.subnet()).unwrap());
    }
    a.wait_for_log("something else on this host undoes it");
}
