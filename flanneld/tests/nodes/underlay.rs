//! The external interface goes down, changes and disappears, and the agent follows.

use std::fs;
use std::time::{Duration, Instant};

use crate::bed::{Cluster, VXLAN};

fn mtu_in_file(member: &crate::bed::Member) -> u32 {
    member.agent.subnet_env().unwrap().mtu.unwrap()
}

#[test]
fn device_and_subnet_file_follow_the_mtu_of_the_underlay() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let ino = || {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(a.node.subnet_file()).unwrap().ino()
    };
    assert_eq!(mtu_in_file(&a), 1450);
    for mtu in [1400, 1500] {
        let before = ino();
        a.node.set_mtu(mtu).unwrap();
        a.wait("the MTU in subnet.env", || mtu_in_file(&a) == mtu - 50);
        assert!(a.show("ip link show flannel.1").contains(&format!("mtu {} ", mtu - 50)));
        assert_ne!(ino(), before, "replaced by rename");
    }
}

#[test]
fn a_new_address_of_the_underlay_is_published_and_peers_follow() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    let subnet = a.subnet();
    a.ip("addr del 172.31.0.1/24 dev eth0\naddr add 172.31.0.77/24 dev eth0\nroute replace default via 172.31.0.254");
    a.wait("the new address in the store", || {
        cluster.leases().iter().any(|(_, value)| value.contains("172.31.0.77"))
    });
    assert_eq!(cluster.leases().len(), 2, "{:?}", cluster.leases());
    b.wait("the new address in the forwarding database", || {
        b.show("bridge fdb show dev flannel.1").contains("172.31.0.77")
    });
    assert_eq!(a.subnet(), subnet);
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    a.wait("the source of the tunnel", || a.show("ip -d link show flannel.1").contains("local 172.31.0.77"));
}

#[test]
fn an_address_that_the_store_was_reached_from_may_go() {
    /// Less than a request waits for an answer, which is 10 s.
    const SOON: Duration = Duration::from_secs(9);
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let fdb = |member: &crate::bed::Member| member.show("bridge fdb show dev flannel.1");
    for (changed, other, last) in [(&a, &b, 77), (&b, &a, 78)] {
        other.wait("the peer", || fdb(other).contains(&format!("dst {} ", changed.node.address())));
        let start = Instant::now();
        changed.node.readdress([172, 31, 0, last].into(), changed.node.address_v6()).unwrap();
        other.wait("the new address", || fdb(other).contains(&format!("dst 172.31.0.{last} ")));
        // The second time it is heard of by the node that was the first to change.
        assert!(start.elapsed() < SOON, "{:?}: {}", start.elapsed(), changed.agent.log());
    }
}

#[test]
fn an_interface_that_disappears_and_comes_back_takes_everything_up_again() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let before = cluster.leases();
    // Renamed and moved away it is gone for the agent, and the tunnel device with it.
    a.ip("link set eth0 down\nlink set eth0 name gone0");
    a.ip("link del flannel.1");
    a.wait("not ready", || a.agent.get("/readyz").is_ok_and(|(code, _)| code == 503));
    a.ip("link set gone0 name eth0\nlink set eth0 up\naddr replace 172.31.0.1/24 dev eth0\nroute replace default via 172.31.0.254");
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    a.wait("ready", || a.agent.get("/readyz").is_ok_and(|(code, _)| code == 200));
    assert_eq!(cluster.leases(), before);
}

#[test]
fn a_node_without_an_interface_waits_for_one_and_says_so() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.start(cluster.fabric.node().unwrap(), &["--iface=wan7"]);
    a.wait_for_log("--iface=wan7: this host has no such interface");
    a.wait("the reason", || {
        a.agent.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains("wan7"))
    });
    a.ip("link add wan7 type bridge\naddr add 172.31.7.1/24 dev wan7\nlink set wan7 up");
    a.agent.wait_ready(crate::bed::LIMIT).unwrap();
    assert!(a.show("ip -d link show flannel.1").contains("local 172.31.7.1 dev wan7"));
}
