//! A node stays where it is while what it uses is there, follows the configuration from the first moment, and
//! survives signals that mean nothing to it.

use backends::testing::{Pinger, Signal};

use crate::bed::{Cluster, LIMIT, VXLAN};

const CONFIG: &str = "/coreos.com/network/config";

#[test]
fn a_vpn_with_a_better_default_route_moves_no_node_and_costs_no_packet() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    // A node that is ready may be news to its peers.
    a.wait("the first echo between pods", || pod_b.namespace().reaches(pod_a.address()).unwrap());
    let pings = Pinger::start(pod_b.namespace(), pod_a.address()).unwrap();
    pings.wait_for_reply(LIMIT).unwrap();
    let before = cluster.leases();
    a.ip("route replace default via 172.31.0.254 metric 100");
    a.ip("link add tun0 type bridge\naddr add 10.8.0.6/24 dev tun0\nlink set tun0 up\nroute add default dev tun0 metric 50");
    // What a DHCP client does to every device that it finds.
    a.ip("addr add 172.30.5.125/24 dev flannel.1\nroute add default dev flannel.1 metric 10");
    for restart in [false, true] {
        if restart {
            a.agent.terminate(LIMIT).unwrap();
            a.start_again();
        }
        // An order to look again, and a sign that it was obeyed.
        a.ip("link set flannel.1 mtu 1400");
        a.wait("the repair", || a.show("ip link show flannel.1").contains("mtu 1450"));
        assert_eq!(cluster.leases(), before);
        assert!(a.show("ip -d link show flannel.1").contains("local 172.31.0.1 dev eth0"));
        a.wait("readiness", || a.agent.get("/readyz").is_ok_and(|(code, _)| code == 200));
    }
    assert_eq!(pings.finish().unwrap().lost, 0, "{}", a.agent.log());
}

#[test]
fn a_public_address_of_a_translator_is_announced_and_the_tunnel_sends_from_the_interfaces_own() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--iface=eth0", "--public-ip=203.0.113.9"]);
    assert!(cluster.leases()[0].1.contains("203.0.113.9"), "{:?}", cluster.leases());
    assert!(a.show("ip -d link show flannel.1").contains("local 172.31.0.1 dev eth0"));
}

#[test]
fn a_network_that_was_too_small_for_a_node_is_enlarged_and_the_node_gets_its_lease() {
    let small =
        VXLAN.replace("\"Backend\"", "\"SubnetMin\":\"10.244.9.0\",\"SubnetMax\":\"10.244.9.0\",\"Backend\"");
    let cluster = Cluster::new(&small);
    let a = cluster.join();
    let mut b = cluster.start(cluster.fabric.node().unwrap(), &[]);
    b.wait_for_log("out of subnets");
    cluster.put(CONFIG, VXLAN);
    b.agent.wait_ready(LIMIT).unwrap();
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
}

#[test]
fn a_node_that_is_restarted_with_a_configuration_that_it_refused_follows_its_peers() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    cluster.put(CONFIG, "nonsense");
    a.wait_for_log("can't be followed");
    a.agent.terminate(LIMIT).unwrap();
    a.start_again();
    let notes = a.agent.get("/readyz?verbose").unwrap().1;
    assert!(notes.contains("not in force"), "{notes}");
    cluster.put(CONFIG, VXLAN);
    let b = cluster.join();
    a.wait("the peer's route", || a.node.has_route(b.subnet()).unwrap());
    a.wait("no complaint", || !a.agent.get("/readyz?verbose").unwrap().1.contains("not in force"));
}

#[test]
fn a_hangup_has_the_host_looked_at_and_no_other_signal_ends_the_agent() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    a.agent.process().signal(Signal::HUP).unwrap();
    a.wait_for_log("SIGHUP: looking at the host again");
    a.agent.process().signal(Signal::USR2).unwrap();
    a.wait_for_log("SIGUSR2 has no meaning");
    assert!(a.agent.get("/readyz").is_ok_and(|(code, _)| code == 200));
}
