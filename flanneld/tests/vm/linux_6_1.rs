//! What Linux 6.1 can't do, and how it is said: devices that are up keep their names, TUN has no UDP segmentation, and
//! connection tracking can't be asked to forget by a filter.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use backends::testing::{PingOptions, Pinger, Pod};
use serde_json::json;

use crate::bed::{Cluster, VXLAN, flanneld};
use crate::{require_kernel, transfer};

const CONFIG: &str = "/coreos.com/network/config";

#[test]
fn a_port_change_is_refused_with_the_remedy_and_no_packet_is_lost() {
    require_kernel("6.1.");
    let cluster = Cluster::new(VXLAN);
    let members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(|member| member.pod());
    let pinger = Pinger::start(pods[0].namespace(), pods[1].address()).unwrap();
    pinger.wait_for_reply(Duration::from_secs(20)).unwrap();
    cluster.put(CONFIG, &VXLAN.replace("vxlan\"", "vxlan\",\"Port\":4789"));
    for member in &members {
        member.wait("the refusal with its remedy", || {
            let notes = member.agent.get("/readyz?verbose").unwrap().1;
            notes.contains("Linux 6.2") && notes.contains("restart flanneld on all nodes")
        });
        assert!(member.show("ip -d link show flannel.1").contains("dstport 8472"));
    }
    assert_eq!(pinger.finish().unwrap().lost, 0);
    transfer::tcp(&pods[0], &pods[1], 16);
}

#[test]
fn udp_carries_streams_and_large_datagrams_without_uso() {
    require_kernel("6.1.");
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#);
    let members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(|member| member.pod());
    transfer::both_ways(&pods[0], &pods[1], 32);
    let pings = PingOptions { size: 8000, ..PingOptions::default() };
    let pinger = Pinger::start_with(pods[0].namespace(), pods[1].address(), pings).unwrap();
    pinger.wait_for_reply(Duration::from_secs(20)).unwrap();
}

#[test]
fn connections_from_before_a_pod_are_forgotten_one_by_one() {
    require_kernel("6.1.");
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    let host = node.namespace();
    // In place of an agent: policies are in force at once.
    let socket = node.dir().join("policy.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let agent = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        BufReader::new(&stream).read_line(&mut String::new()).unwrap();
        stream.write_all(b"{\"ok\":true}\n").unwrap();
    });
    let subnet = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    fs::write(node.subnet_file(), format!("{subnet}FLANNEL_POLICY_SOCKET={}\n", socket.display())).unwrap();
    let run = |program: &str, arguments: &str| host.command(program).args(arguments.split(' ')).ok().unwrap();
    run("ip", "link set lo up");
    host.command("nft")
        .args(["-f", "-"])
        .input("table inet t { chain o { type filter hook output priority 0; ct state new counter; }; }")
        .ok()
        .unwrap();
    // Others speak with the address that will be the pod's, it speaks with them, and others with each other.
    for address in ["10.244.7.2", "10.244.7.3", "10.244.7.200"] {
        run("ip", &format!("address add {address}/32 dev lo"));
    }
    for (from, to) in [("200", "2"), ("2", "3"), ("200", "3")] {
        run("ping", &format!("-n -c1 -I 10.244.7.{from} 10.244.7.{to}"));
    }
    run("ip", "address flush dev lo");
    let tracked = |address: &str| {
        let table = run("cat", "/proc/net/nf_conntrack");
        table.lines().filter(|line| line.contains(&format!("={address} "))).count()
    };
    assert_eq!((tracked("10.244.7.2"), tracked("10.244.7.3")), (2, 2));
    let plugin = flanneld().with_file_name("flannel");
    let mut pod = Pod::cni_with(&node, &plugin, &json!({})).unwrap();
    assert_eq!(pod.address().to_string(), "10.244.7.2");
    assert_eq!((tracked("10.244.7.2"), tracked("10.244.7.3")), (0, 1));
    agent.join().unwrap();
    pod.detach().unwrap();
}
