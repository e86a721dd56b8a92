//! The fast path on a kernel that has flowtables: what goes through it is what was sent, also when peers, pods and agents change meanwhile.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use backends::testing::{Namespace, Pod, Signal, uninterrupted};
use ipnet::IpNet;
use serde_json::Value;

use crate::bed::{Cluster, Member};
use crate::exchange::Exchange;
use crate::{evidence, require_kernel, transfer};

mod every_backend;
mod policies;

/// What only a table that is not armed has.
const WAITS: &str = "quota name \"long\"";

const CONFIG: &str = "/coreos.com/network/config";
const VXLAN: &str = r#"{"Network":"10.244.0.0/16","FastPath":true,"Backend":{"Type":"vxlan"}}"#;
const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","FastPath":true,"Backend":{"Type":"host-gw"}}"#;

/// The devices of a node's flowtable.
fn devices(member: &Member) -> Vec<String> {
    let text = member.node.namespace().command("nft").args(["list", "flowtables"]).ok().unwrap();
    let list = text.split("devices = {").nth(1).and_then(|rest| rest.split('}').next()).unwrap_or_default();
    let mut devices: Vec<String> = list
        .split(',')
        .map(|name| name.trim().trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    devices.sort();
    devices
}

/// The entries of connection tracking with these words.
fn entries(namespace: &Namespace, words: &[&str]) -> Vec<String> {
    let all = namespace.run(|| fs::read_to_string("/proc/thread-self/net/nf_conntrack").unwrap());
    all.lines().filter(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned).collect()
}

fn is_offloaded(member: &Member, port: u16) -> bool {
    !entries(member.node.namespace(), &[&format!("port={port} "), "[OFFLOAD]"]).is_empty()
}

fn another_pod(member: &Member, number: usize) -> Pod {
    let subnet = member.subnet();
    let address = subnet.hosts().nth(number).unwrap();
    Pod::wired(&member.node, IpNet::new(address, subnet.prefix_len()).unwrap()).unwrap()
}

fn at(pod: &Pod, port: u16) -> SocketAddr {
    SocketAddr::new(pod.address(), port)
}

/// The address and port of a service on a node, which leads to this pod.
fn service(member: &Member, to: SocketAddr) -> SocketAddr {
    let service = SocketAddr::from(([10, 96, 0, 10], 80));
    let rule = format!(
        "table ip service {{ chain pre {{ type nat hook prerouting priority dstnat; \
         ip daddr {} tcp dport {} dnat to {to}; }}; }}",
        service.ip(),
        service.port(),
    );
    member.node.namespace().command("nft").args(["-f", "-"]).input(rule).ok().unwrap();
    service
}

struct Setup {
    cluster: Cluster,
    config: String,
    members: [Member; 2],
    pods: [Pod; 2],
}

impl Setup {
    fn new(config: &str, args: &[&str]) -> Self {
        require_kernel("6.");
        let cluster = Cluster::new(config);
        let members = [cluster.join_with(args), cluster.join_with(args)];
        let pods = members.each_ref().map(Member::pod);
        let outer = outer(config);
        for member in &members {
            member.wait("a table that waits for long connections on all devices between nodes", || {
                let tables = member.show("nft list ruleset");
                let devices =
                    outer.iter().all(|name| tables.contains(&format!("oifname \"{name}\" ip saddr")));
                devices && tables.contains(WAITS)
            });
            let own = member.show("nft list tables");
            assert!(
                own.contains("flannel-ipv4") == args.contains(&"--ip-masq"),
                "nothing that only accepts: {own}"
            );
        }
        members[0].wait("the first echo", || pods[0].namespace().reaches(pods[1].address()).unwrap());
        Self { cluster, config: config.to_owned(), members, pods }
    }

    fn exchange(&self, port: u16) -> Exchange {
        let [a, b] = &self.pods;
        let exchange = Exchange::start(a.namespace(), b.namespace(), at(b, port), port);
        let outer = outer(&self.config);
        for member in &self.members {
            member.wait("the connection in the flowtable", || is_offloaded(member, port));
            let devices = devices(member);
            assert!(outer.iter().all(|device| devices.contains(device)), "{devices:?}");
            assert!(devices.len() > outer.len(), "the pod's, too: {devices:?}");
        }
        exchange
    }
}

/// What shows where a connection hangs: a guest is gone afterwards.
impl Drop for Setup {
    fn drop(&mut self) {
        if thread::panicking() {
            evidence::show(&self.cluster, &self.members, &self.pods);
        }
    }
}

/// The external interface and the tunnels of a configuration.
fn outer(config: &str) -> Vec<String> {
    let config: Value = serde_json::from_str(config).unwrap();
    let tunnels: &[&str] = match (config["Backend"]["Type"].as_str().unwrap(), &config["EnableIPv6"]) {
        ("vxlan", Value::Bool(true)) => &["flannel.1", "flannel-v6.1"],
        ("vxlan", _) => &["flannel.1"],
        ("wireguard", Value::Bool(true)) => &["flannel-wg", "flannel-wg-v6"],
        ("wireguard", _) => &["flannel-wg"],
        ("udp", _) => &["flannel0"],
        ("ipip", _) => &["flannel.ipip"],
        _ => &[],
    };
    ["eth0"].iter().chain(tunnels).map(ToString::to_string).collect()
}

#[test]
fn a_connection_outlives_pods_that_come_and_go_agents_that_are_killed_other_backends_and_mtus() {
    let mut setup = Setup::new(VXLAN, &[]);
    let exchange = setup.exchange(7071);
    let [a, b] = &setup.members;
    let before = devices(a);
    for number in 0..3 {
        let pod = another_pod(a, 20 + number);
        a.wait("the new pod's device", || devices(a).len() == before.len() + 1);
        transfer::tcp(&pod, &setup.pods[1], 4);
        // The kernel removes the pod's link with its namespace.
        drop(pod);
        a.wait("no more than before", || devices(a) == before);
    }
    exchange.goes_on(a, "pods that came and went");

    setup.cluster.put(CONFIG, HOST_GW);
    for (member, peer) in [(a, b), (b, a)] {
        let subnet = peer.subnet();
        member
            .wait("routes by eth0", || member.show(&format!("ip route show {subnet}")).contains("dev eth0"));
    }
    exchange.goes_on(a, "host-gw in place of vxlan");
    for member in [a, b] {
        member.wait("the connection in the flowtable again", || is_offloaded(member, 7071));
    }
    setup.cluster.put(CONFIG, VXLAN);
    for (member, peer) in [(a, b), (b, a)] {
        let subnet = peer.subnet();
        member.wait("routes by flannel.1", || {
            member.show(&format!("ip route show {subnet}")).contains("dev flannel.1")
        });
    }
    exchange.goes_on(a, "vxlan in place of host-gw");

    setup.cluster.put(CONFIG, &VXLAN.replace("vxlan\"", "vxlan\",\"MTU\":1400"));
    for member in [a, b] {
        member.wait("the lower MTU", || member.show("ip link show flannel.1").contains("mtu 1350"));
    }
    exchange.goes_on(a, "a lower MTU");

    let [a, _] = &mut setup.members;
    for moment in 0..19 {
        a.agent.kill().unwrap();
        backends::testing::Member::start_again(a).unwrap();
        // The next one is killed somewhere else in its start.
        thread::sleep(Duration::from_millis(150 * (moment % 8)));
    }
    a.agent.kill().unwrap();
    a.start_again();
    let a = &setup.members[0];
    assert!(!a.agent.log().contains("nftables table ip flannel-fast-path"), "it is adopted as it is");
    exchange.goes_on(a, "an agent that was killed");
    exchange.finish();
}

/// Sends datagrams from one socket to the other, which both are connected, one after the other.
fn datagrams(from: &UdpSocket, to: &UdpSocket, count: usize) {
    let mut buffer = [0; 64];
    for number in 1..=count {
        from.send(&[7; 64]).unwrap();
        let received = uninterrupted(|| to.recv(&mut buffer));
        assert!(received.is_ok(), "datagram {number} of {count} did not arrive: {received:?}");
    }
}

/// As while two nodes change their backend one after the other: what comes in by one device is answered by another, and each way is
/// right. A flow that the kernel adds with a packet that comes in would send the answer out of that device, to no host.
#[test]
fn what_comes_in_by_another_device_than_the_answer_leaves_by_is_answered_by_the_right_one() {
    let mut setup = Setup::new(VXLAN, &[]);
    // Has the fast path armed.
    setup.exchange(7079).finish();
    setup.members.iter_mut().for_each(|member| member.agent.kill().unwrap());
    let [a, b] = &setup.members;
    let port = 7077;
    let socket = |index: usize| {
        let [own, other] = [&setup.pods[index], &setup.pods[1 - index]];
        let socket = own.namespace().run(|| UdpSocket::bind(at(own, port))).unwrap();
        socket.connect(at(other, port)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    };
    let [near, far] = [socket(0), socket(1)];
    datagrams(&near, &far, 1);
    datagrams(&far, &near, 1);
    let (subnet, address) = (b.subnet(), b.node.address());
    a.ip(&format!("route replace {subnet} via {address} dev eth0 proto 70"));
    // By the tunnel; enough for a flow to be added.
    datagrams(&far, &near, 1000);
    // By the external interface.
    datagrams(&near, &far, 1000);
    assert!(is_offloaded(a, port), "the way out is the fast one");
}

#[test]
fn translated_addresses_of_services_and_of_what_leaves_the_network_go_the_fast_way_both_ways() {
    let setup = Setup::new(VXLAN, &["--ip-masq"]);
    let [a, _] = &setup.members;
    let [client, server] = &setup.pods;
    let service = service(a, at(server, 7072));
    let exchange = Exchange::start(client.namespace(), server.namespace(), service, 7072);
    a.wait("the service's connection in the flowtable", || is_offloaded(a, 7072));
    exchange.goes_on(a, "its first bytes");
    exchange.finish();

    let outside = setup.cluster.fabric.node().unwrap();
    let exchange = Exchange::start(
        client.namespace(),
        outside.namespace(),
        SocketAddr::new(outside.address().into(), 7073),
        7073,
    );
    a.wait("the masqueraded connection in the flowtable", || is_offloaded(a, 7073));
    exchange.goes_on(a, "its first bytes");
    exchange.finish();
}

#[test]
fn frames_between_pods_of_a_node_stay_on_the_bridge_and_idle_connections_return_to_connection_tracking() {
    // With what it says at each turn.
    let mut setup = Setup::new(VXLAN, &["--v=1"]);
    let [a, b] = &setup.members;
    a.node.namespace().sysctl("bridge/bridge-nf-call-iptables", "1").unwrap();
    let neighbour = another_pod(a, 30);
    let bridged =
        Exchange::start(setup.pods[0].namespace(), neighbour.namespace(), at(&neighbour, 7074), 7074);
    bridged.goes_on(a, "its first bytes");
    assert!(!is_offloaded(a, 7074), "a bridged connection is none of the fast path's");
    bridged.finish();

    for member in [a, b] {
        member.node.namespace().sysctl("netfilter/nf_flowtable_tcp_timeout", "2").unwrap();
    }
    let listener = setup.pods[1].namespace().run(|| TcpListener::bind(at(&setup.pods[1], 7075))).unwrap();
    let mut stream = setup.pods[0].namespace().run(|| TcpStream::connect(at(&setup.pods[1], 7075))).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    let mut say = |bytes: usize| {
        let mut buffer = vec![7; bytes];
        for _ in 0..200 {
            stream.write_all(&buffer).unwrap();
            other.read_exact(&mut buffer).unwrap();
            other.write_all(&buffer).unwrap();
            stream.read_exact(&mut buffer).unwrap();
        }
    };
    a.wait("the connection in the flowtable", || {
        say(1000);
        is_offloaded(a, 7075)
    });
    a.wait("its return", || !is_offloaded(a, 7075));
    let kept = entries(a.node.namespace(), &["port=7075 ", "ESTABLISHED", "[ASSURED]"]);
    assert_eq!(kept.len(), 1, "the connection is known as long as it lives");
    a.wait("the connection in the flowtable again", || {
        say(1000);
        is_offloaded(a, 7075)
    });
    drop((stream, other));
    a.wait("the end of the connection in the flowtable", || !is_offloaded(a, 7075));

    for member in &mut setup.members {
        member.wait("no connection in the flowtable", || {
            entries(member.node.namespace(), &["[OFFLOAD]"]).is_empty()
        });
        // The agent looks for that once a minute, and when it is asked to.
        member.agent.process().signal(Signal::HUP).unwrap();
        member.wait("no devices in a flowtable without connections", || {
            devices(member).is_empty() && member.show("nft list ruleset").contains(WAITS)
        });
    }
    setup.exchange(7078).finish();
    setup.members.iter().for_each(armed_by_the_kernels_word);
}

/// It was armed twice, and each time the kernel told of a long connection before a look found it.
fn armed_by_the_kernels_word(member: &Member) {
    let log = member.agent.log();
    let armed = |cause: &str| log.matches(&format!("fast path: armed, because {cause}")).count();
    let (told, all) = (armed("the kernel has told of a long connection"), armed(""));
    assert!(told >= 2 && told == all, "{told} of {all} times:\n{log}");
}

#[test]
fn a_table_that_somebody_removes_comes_back_and_nothing_is_left_when_it_is_switched_off() {
    let setup = Setup::new(VXLAN, &[]);
    let [a, _] = &setup.members;
    let exchange = setup.exchange(7076);
    let before = devices(a);
    a.show("nft delete table ip flannel-fast-path");
    a.wait("the table", || devices(a) == before);
    a.wait("the connection in the flowtable again", || is_offloaded(a, 7076));
    setup.cluster.put(CONFIG, &VXLAN.replace("true", "false"));
    a.wait("no table", || !a.show("nft list tables").contains("flannel-fast-path"));
    exchange.goes_on(a, "the fast path's end");
    exchange.finish();
}
