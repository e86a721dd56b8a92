//! Who a node is, over new addresses, twins, second agents and networks that overlap those of the nodes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use backends::testing::Agent;

use crate::bed::{Cluster, LIMIT, Member, VXLAN, flanneld};

/// The MAC of the tunnel device by netlink: /sys is the host's.
fn device_mac(member: &Member) -> String {
    let text = member.show("ip -o link show flannel.1");
    let (_, rest) = text.split_once("link/ether ").unwrap();
    rest.split(' ').next().unwrap().to_owned()
}

#[test]
fn a_node_whose_address_changed_while_its_agent_was_down_keeps_subnet_and_mac() {
    let cluster = Cluster::new(VXLAN);
    let (mut a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    b.wait("the first echo", || pod_b.namespace().reaches(pod_a.address()).unwrap());
    let (subnet, before) = (a.subnet(), device_mac(&a));
    a.agent.terminate(LIMIT).unwrap();
    let v6: Ipv6Addr = "fd31::51".parse().unwrap();
    a.node.readdress(Ipv4Addr::new(172, 31, 0, 51), v6).unwrap();
    a.start_again();
    assert_eq!((a.subnet(), device_mac(&a)), (subnet, before.clone()));
    let leases = cluster.leases();
    assert_eq!(leases.len(), 2, "{leases:?}");
    let own = leases.iter().find(|(_, value)| value.contains(&before)).unwrap();
    assert!(own.1.contains("172.31.0.51"), "{own:?}");
    b.wait("an echo at the new address", || pod_b.namespace().reaches(pod_a.address()).unwrap());
    assert!(!b.agent.log().contains("lease skipped"), "{}", b.agent.log());
}

#[test]
fn a_new_node_has_a_random_mac() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join();
    let (first, key) = (device_mac(&a), cluster.leases()[0].0.clone());
    a.agent.kill().unwrap();
    a.ip("link del flannel.1");
    cluster.etcdctl(&["del", &key]);
    let name = a.node.subnet_file().to_string_lossy().trim_start_matches('/').replace('/', "-");
    for path in [
        a.node.subnet_file(),
        a.node.dir().join(format!("{name}.state.json")),
        std::path::Path::new("/var/lib/flannel").join(format!("{name}.state.json")),
    ] {
        let _ = std::fs::remove_file(path);
    }
    a.start_again();
    assert_ne!(device_mac(&a), first, "the same name and address make no MAC");
}

/// Two nodes that are told the same public address, started at the same moment.
fn twins(args: &[String], members: [&backends::testing::Node; 2]) {
    let start = |node| {
        let own = ["--iface=eth0".to_owned(), "--public-ip=172.31.0.77".to_owned()];
        Agent::spawn(node, flanneld(), args.iter().cloned().chain(own)).unwrap()
    };
    let agents = members.map(start);
    let ready = |agent: &Agent| agent.get("/readyz").is_ok_and(|(code, _)| code == 200);
    let contested = |agent: &Agent| agent.log().contains("it has the same public address");
    let logs = || format!("{}\n---\n{}", agents[0].log(), agents[1].log());
    let end = Instant::now() + LIMIT;
    // One is ready and the other one says why it is not.
    while !(agents.iter().filter(|agent| ready(agent)).count() == 1
        && agents.iter().any(|agent| !ready(agent) && contested(agent)))
    {
        assert!(Instant::now() < end, "{}", logs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn of_two_nodes_with_one_public_address_one_owns_the_lease_in_etcd() {
    for _ in 0..3 {
        let cluster = Cluster::new(VXLAN);
        let nodes = [cluster.fabric.node().unwrap(), cluster.fabric.node().unwrap()];
        twins(&[format!("--etcd-endpoints={}", cluster.etcd.endpoint())], [&nodes[0], &nodes[1]]);
        assert_eq!(cluster.leases().len(), 1, "{:?}", cluster.leases());
    }
}

#[test]
fn of_two_nodes_with_one_public_address_one_owns_the_lease_in_files() {
    for reserved in [false, true] {
        let cluster = Cluster::unconfigured();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("config.json"), VXLAN).unwrap();
        let leases = directory.path().join("subnets");
        std::fs::create_dir(&leases).unwrap();
        if reserved {
            std::fs::write(leases.join("10.244.7.0-24"), r#"{"PublicIP":"172.31.0.77"}"#).unwrap();
        }
        let nodes = [cluster.fabric.node().unwrap(), cluster.fabric.node().unwrap()];
        twins(&[format!("--lease-store=file:{}", directory.path().display())], [&nodes[0], &nodes[1]]);
    }
}

#[test]
fn a_second_agent_of_the_same_node_costs_the_first_nothing() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    // From then on it counts as the holder of its lease: `subnet/src/standing.rs`.
    std::thread::sleep(Duration::from_secs(11));
    let args = [
        format!("--etcd-endpoints={}", cluster.etcd.endpoint()),
        format!("--subnet-file={}", a.node.dir().join("second.env").display()),
        "--healthz-port=8082".to_owned(),
    ];
    let second = Agent::spawn(&a.node, flanneld(), args).unwrap();
    a.wait("the newcomer to give up", || second.log().contains("it has the same public address"));
    a.wait_for_log("it was written again");
    drop(second);
    a.wait("readiness", || a.agent.get("/readyz").unwrap().0 == 200);
    assert_eq!(cluster.leases().len(), 1);
}

#[test]
fn a_lease_lost_to_a_second_agent_is_taken_up_again_after_silence() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join();
    let (key, value) = cluster.leases().remove(0);
    // What a twin writes to a newcomer's lease, once.
    cluster.put(&key, &value.replace(&device_mac(&a), "02:00:00:00:00:99"));
    a.wait_for_log("claims it again after 15 s");
    a.wait("the own lease", || cluster.leases()[0].1.contains(&device_mac(&a)));
    a.wait("ready", || a.agent.get("/readyz").is_ok_and(|(code, _)| code == 200));
    assert!(cluster.leases()[0].1.contains(&device_mac(&a)), "{:?}", cluster.leases());
}

#[test]
fn no_subnet_covers_the_store_or_the_gateway() {
    // etcd and the gateway are 172.31.0.254, in the last of three subnets; the nodes are outside of the network.
    let config = r#"{"Network":"172.31.0.128/25","SubnetLen":28,"SubnetMin":"172.31.0.208","SubnetMax":"172.31.0.240","Backend":{"Type":"vxlan"}}"#;
    let cluster = Cluster::new(config);
    // A lease that would cut everybody off.
    cluster.put(
        "/coreos.com/network/subnets/172.31.0.240-28",
        r#"{"PublicIP":"172.31.0.200","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:c8"}}"#,
    );
    let (a, b) = (cluster.join(), cluster.join());
    let mut subnets = [a.subnet().to_string(), b.subnet().to_string()];
    subnets.sort();
    assert_eq!(subnets, ["172.31.0.208/28", "172.31.0.224/28"]);
    for member in [&a, &b] {
        member.wait_for_log("172.31.0.240/28 contains 172.31.0.254");
        member.wait("the note", || {
            member.agent.get("/readyz?verbose").unwrap().1.contains("overlaps the network of the nodes")
        });
        assert!(!member.show("ip route show").contains("172.31.0.240"), "{}", member.show("ip route show"));
    }
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("an echo", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    // The lease is gone, and its subnet is not free for that.
    cluster.etcdctl(&["del", "/coreos.com/network/subnets/172.31.0.240-28"]);
    let c = cluster.start(cluster.fabric.node().unwrap(), &[]);
    c.wait_for_log("out of subnets");
}

#[test]
fn a_network_that_contains_the_nodes_own_address_is_refused_with_the_reason() {
    let cluster = Cluster::new(r#"{"Network":"172.31.0.0/20","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#);
    let node = cluster.fabric.node().unwrap();
    let a = cluster.start(node, &["--iface=eth0"]);
    let routes = a.show("ip route show");
    a.wait_for_log("172.31.0.1 of eth0 lies inside the pod network 172.31.0.0/20");
    assert_ne!(a.agent.get("/readyz").unwrap().0, 200);
    assert!(cluster.leases().is_empty());
    assert_eq!(a.show("ip route show"), routes);
}
