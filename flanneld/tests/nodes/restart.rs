//! Agents end and start; pods don't notice, and nothing is left of peers that went meanwhile.

use backends::testing::Pinger;

use crate::bed::{Cluster, HOST_GW, LIMIT, VXLAN};

#[test]
fn a_restart_loses_no_packet_and_changes_nothing() {
    for config in [VXLAN, HOST_GW] {
        let cluster = Cluster::new(config);
        let (mut a, b) = (cluster.join(), cluster.join());
        let (pod_a, pod_b) = (a.pod(), b.pod());
        a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
        let (healthy, subnet) = (a.state(), a.subnet());
        let pinger = Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
        pinger.wait_for_reply(LIMIT).unwrap();
        assert!(a.agent.terminate(LIMIT).unwrap().success());
        assert_eq!(a.state(), healthy, "stopping leaves everything in place");
        a.start_again();
        a.agent.kill().unwrap();
        a.start_again();
        let log = a.agent.log();
        for word in ["link ", "address add", "fdb ", "neigh ", "route "] {
            assert!(!log.contains(&format!("] {word}")), "{word} changed by a restart:\n{log}");
        }
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{config}: {pings:?}");
        assert_eq!((a.state(), a.subnet()), (healthy, subnet));
    }
}

#[test]
fn what_peers_left_behind_while_the_agent_was_down_is_swept_at_its_start() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    for number in 1..=20 {
        let value = format!(
            r#"{{"PublicIP":"172.31.0.{}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:01:{number:02x}"}}}}"#,
            100 + number
        );
        cluster.put(&format!("/coreos.com/network/subnets/10.244.{}.0-24", 200 + number), &value);
    }
    let count = |command: &str| a.show(command).lines().count();
    // Routes are the last that is made of peers.
    a.wait("20 peers", || count("ip route show dev flannel.1") == 20);
    assert_eq!(count("bridge fdb show dev flannel.1"), 20);
    a.agent.terminate(LIMIT).unwrap();
    for number in 1..=20 {
        cluster.etcdctl(&["del", &format!("/coreos.com/network/subnets/10.244.{}.0-24", 200 + number)]);
    }
    a.start_again();
    for command in
        ["bridge fdb show dev flannel.1", "ip neigh show dev flannel.1", "ip route show dev flannel.1"]
    {
        a.wait(&format!("nothing in {command}"), || a.show(command).is_empty());
    }
}

#[test]
fn a_peer_that_joined_after_the_state_was_saved_is_reached_after_a_restart_without_the_store() {
    for config in [VXLAN, HOST_GW] {
        let mut cluster = Cluster::new(config);
        let mut a = cluster.join();
        let state = a.state_file();
        let before = std::fs::read_to_string(&state).unwrap();
        let b = cluster.join();
        let (pod_a, pod_b) = (a.pod(), b.pod());
        a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
        cluster.etcd.kill();
        a.agent.kill().unwrap();
        // As if it had ended before the peer was saved.
        std::fs::write(&state, before).unwrap();
        let pinger = Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
        pinger.wait_for_reply(LIMIT).unwrap();
        a.start_again();
        assert!(a.verbose().contains("as they were saved"), "{config}: {}", a.verbose());
        assert!(a.agent.log().contains("peers=0"), "{config}: {}", a.agent.log());
        assert!(pod_b.namespace().reaches(pod_a.address()).unwrap(), "{config}");
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{config}: {pings:?}\n{}", a.agent.log());
        // A complete list decides: the peer is in it, and later no more.
        cluster.etcd.restart().unwrap();
        a.wait("the store", || !a.verbose().contains("as they were saved"));
        assert!(pod_a.namespace().reaches(pod_b.address()).unwrap(), "{config}");
        let subnet = b.subnet();
        cluster.leaves(b);
        a.wait("the end of the route", || !a.node.has_route(subnet).unwrap());
    }
}

#[test]
fn a_node_keeps_its_subnet_and_its_mac_through_reboots() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    let before = (cluster.leases(), a.subnet());
    a.agent.terminate(LIMIT).unwrap();
    a.ip("link del flannel.1");
    std::fs::remove_file(a.node.subnet_file()).unwrap();
    a.start_again();
    assert_eq!((cluster.leases(), a.subnet()), before);
}

#[test]
fn agents_live_on_while_etcd_is_away_and_hear_what_changed_meanwhile() {
    let mut cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let healthy = a.state();
    cluster.etcd.kill();
    a.wait_for_log("keeping all leases that are known");
    assert_eq!(a.agent.get("/readyz").unwrap().0, 200);
    a.ip(&format!("route del {}", b.subnet()));
    a.wait("repair without the store", || a.state() == healthy);
    // So does a restart without the store, from what was kept: the node is ready and heals.
    let state = a.state_file();
    let peer = b.subnet().to_string();
    a.wait("the peer in what is kept", || std::fs::read_to_string(&state).unwrap().contains(&peer));
    a.agent.kill().unwrap();
    a.ip("link del flannel.1");
    a.start_again();
    a.wait("everything made anew without the store", || a.state().lines().count() == healthy.lines().count());
    assert!(pod_a.namespace().reaches(pod_b.address()).unwrap());
    assert!(a.agent.get("/readyz?verbose").unwrap().1.contains("as they were saved"));
    cluster.etcd.restart().unwrap();
    a.wait("the store", || !a.agent.get("/readyz?verbose").unwrap().1.contains("as they were saved"));
    let c = cluster.join();
    a.wait("the new peer", || a.node.has_route(c.subnet()).unwrap());
    b.wait("the new peer on the one that never ended", || b.node.has_route(c.subnet()).unwrap());
}
