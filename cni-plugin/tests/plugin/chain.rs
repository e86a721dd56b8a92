//! The shipped list of plugins with real traffic; `bandwidth` is added to it as its users do.
//!
//! ```text
//!     client namespace [eth0 192.0.2.2] -- [up0 192.0.2.1] host namespace [cni0] -- veth -- [eth0] pod namespace
//! ```

use std::fs;
use std::io::{BufRead, BufReader};
use std::ops::RangeInclusive;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::runtime::List;
use crate::support::{Namespace, Node, PLUGINS, Pod, V4};

/// How often a rate is measured that remains below what is right.
const MAX_MEASUREMENTS: usize = 6;

/// contract §8.2, with the directories of the test.
pub(crate) fn shipped(node: &Node) -> Value {
    let mut list = json!({
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
            {"type": "portmap", "capabilities": {"portMappings": true}},
            {"type": "bandwidth", "capabilities": {"bandwidth": true}},
        ],
    });
    let flannel = &mut list["plugins"][0];
    flannel["subnetFile"] = json!(node.path("subnet.env"));
    flannel["dataDir"] = json!(node.path("flannel"));
    flannel["ipam"] = json!({"dataDir": node.path("addresses")});
    list
}

/// A namespace on the other side of the host's uplink.
pub(crate) fn client(node: &Node) -> Namespace {
    let client = Namespace::new();
    let host = node.host();
    host.ip(&["link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", client.name()]);
    host.ip(&["addr", "add", "192.0.2.1/24", "dev", "up0"]);
    client.ip(&["addr", "add", "192.0.2.2/24", "dev", "eth0"]);
    for (namespace, link) in [(host, "lo"), (host, "up0"), (&client, "lo"), (&client, "eth0")] {
        namespace.ip(&["link", "set", link, "up"]);
    }
    client
}

/// An iperf3 server for one client, on port 5201.
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn start(namespace: &Namespace) -> Self {
        // `ip netns exec` becomes the program, so that killing it kills that.
        let mut command = namespace.command("iperf3");
        let mut child = command
            .args(["--server", "--one-off", "--forceflush"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("install the package iproute2");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let server = Self(child);
        let listening = lines.any(|line| line.unwrap().contains("Server listening"));
        assert!(listening, "iperf3 does not start: install the package iperf3");
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Checks that so many megabits per second arrive through `port` of the host, from the client or, `reversed`, at it.
#[track_caller]
fn assert_rate(pod: &Namespace, client: &Namespace, port: u16, reversed: bool, range: RangeInclusive<f64>) {
    let options = if reversed { vec!["--reverse"] } else { vec![] };
    assert_within(range, || rate_by(pod, client, "192.0.2.1", port, &options));
}

/// Checks a rate that is measured. No measurement may exceed the range; one that remains below it, or fails, is repeated: a
/// machine that does something else sends less than may pass.
#[track_caller]
pub(crate) fn assert_within(range: RangeInclusive<f64>, measure: impl Fn() -> Result<f64, Value>) {
    let mut measured = Vec::new();
    for _ in 0..MAX_MEASUREMENTS {
        measured.push(measure());
        match measured.last() {
            Some(Ok(rate)) if rate > range.end() => break,
            Some(Ok(rate)) if range.contains(rate) => return,
            _ => {}
        }
    }
    panic!("{measured:?} Mbit/s, and {range:?} are right");
}

/// The same through any address, with more options.
pub(crate) fn rate_by(
    pod: &Namespace,
    client: &Namespace,
    address: &str,
    port: u16,
    options: &[&str],
) -> Result<f64, Value> {
    let _server = Server::start(pod);
    let mut command: Command = client.command("iperf3");
    // The first second is the burst that the limit lets pass.
    command.args([
        "--json",
        "--connect-timeout",
        "2000",
        "--client",
        address,
        "--time",
        "3",
        "--omit",
        "1",
        "--port",
        &port.to_string(),
    ]);
    command.args(options);
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let end = &report["end"];
    let received = end["sum_received"]["bits_per_second"].as_f64();
    received.map(|rate| rate / 1e6).ok_or_else(|| report["error"].clone())
}

pub(crate) fn rules(node: &Node) -> String {
    let output = node.host().command("iptables").args(["-t", "nat", "-S"]).output().unwrap();
    assert!(output.status.success(), "install the package iptables: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_client_reaches_pods_by_ports_of_the_host_as_fast_as_their_limits_allow() {
    let node = Node::with_namespace(V4);
    let client = client(&node);
    let list = List::new(&node, shipped(&node));
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let [limited, free] = [("limited", &paths[0]), ("free", &paths[1])].map(|(container, netns)| Pod {
        container,
        ifname: "eth0",
        netns,
    });
    let port = |port: u16| json!([{"hostPort": port, "containerPort": 5201, "protocol": "tcp"}]);
    // Bits, and bits per second.
    let limits = json!({"ingressRate": 10_000_000, "ingressBurst": 400_000, "egressRate": 10_000_000, "egressBurst": 400_000});
    let limited = list.add(limited, json!({"portMappings": port(8080), "bandwidth": limits}));
    let free = list.add(free, json!({"portMappings": port(8081), "unknown": 1}));
    assert_eq!(limited.result["ips"][0]["address"], "10.1.17.2/24");
    assert_eq!(free.result["ips"][0]["address"], "10.1.17.3/24");

    for reversed in [false, true] {
        assert_rate(&namespaces[0], &client, 8080, reversed, 5.0..=15.0);
        assert_rate(&namespaces[1], &client, 8081, reversed, 30.0..=f64::INFINITY);
    }

    // Away with one: the other still has its port.
    list.del(&limited);
    assert!(!rules(&node).contains(":8080") && rules(&node).contains("10.1.17.3:5201"), "{}", rules(&node));
    assert_rate(&namespaces[1], &client, 8081, false, 30.0..=f64::INFINITY);
    list.del(&free);
    list.del(&free);
    assert!(!rules(&node).contains("10.1.17."), "{}", rules(&node));
    assert_eq!(node.host().links(), ["lo", "up0", "cni0"]);
    assert_eq!((node.kept(), node.reserved("cbr0")), (vec![], vec![]));
    assert_eq!(namespaces[0].links(), ["lo"]);
}

#[test]
fn a_pod_reaches_itself_by_the_port_of_its_host() {
    let node = Node::with_namespace(V4);
    let _client = client(&node);
    let list = List::new(&node, shipped(&node));
    let namespace = Namespace::new();
    let path = namespace.path();
    let ports = json!([{"hostPort": 8080, "containerPort": 5201, "protocol": "tcp"}]);
    let pod = list.add(Pod { container: "c1", ifname: "eth0", netns: &path }, json!({"portMappings": ports}));
    // Needs the delegate's hairpinMode.
    assert_rate(&namespace, &namespace, 8080, false, 1.0..=f64::INFINITY);
    list.del(&pod);
}

/// As kube-proxy would make them: a Service with one endpoint, which may be the client itself.
const SERVICE: &str = "table ip services {
    chain prerouting { type nat hook prerouting priority dstnat; ip daddr 10.96.0.10 tcp dport 80 dnat to 10.1.17.2:5201; }
    chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.1.17.2 ip daddr 10.1.17.2 masquerade; }
}";

#[test]
fn a_pod_reaches_itself_by_its_service() {
    for (exec, bridged) in [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")] {
        let node = Node::with_namespace(V4);
        // With 1 the frame goes back out by the port that it came in by.
        let mut sysctl = node.host().command("sysctl");
        let set =
            sysctl.args(["-qw", &format!("net.bridge.bridge-nf-call-iptables={bridged}")]).status().unwrap();
        assert!(set.success(), "load the module br_netfilter");
        let made = node.host().command("nft").arg(SERVICE).status().unwrap();
        assert!(made.success(), "install the package nftables");
        let network = node.network("n", "1.0.0", json!({"hairpinMode": true, "isDefaultGateway": true}));
        let namespace = Namespace::new();
        let path = namespace.path();
        let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
        node.call_with("ADD", pod, &network.to_string(), &[("FLANNEL_CNI_EXEC", exec)]).result();
        namespace.ip(&["link", "set", "lo", "up"]);
        println!("exec {exec}, bridged {bridged}");
        assert_within(0.1..=f64::INFINITY, || {
            rate_by(&namespace, &namespace, "10.96.0.10", 80, &["--time", "1", "--omit", "0"])
        });
        node.call("DEL", pod, &network).result();
    }
}

#[test]
fn a_list_passes_check_until_the_pod_is_damaged() {
    let node = Node::with_namespace(V4);
    let mut conflist = shipped(&node);
    conflist["cniVersion"] = "1.0.0".into();
    // Debian's portmap looks for rules of IPv6 even where the pod has no such address.
    conflist["plugins"].as_array_mut().unwrap().remove(1);
    let list = List::new(&node, conflist);
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let limits = json!({"ingressRate": 10_000_000, "ingressBurst": 400_000});
    let attached = list.add(pod, json!({"bandwidth": limits}));
    assert_eq!(list.check(&attached), Ok(()));
    // What is for other plugins does not get into the delegate's configuration.
    let kept = fs::read_to_string(node.path("flannel/c1")).unwrap();
    assert!(!kept.contains("runtimeConfig") && !kept.contains("prevResult"), "{kept}");
    namespace.ip(&["addr", "flush", "dev", "eth0"]);
    let (kind, msg) = list.check(&attached).unwrap_err();
    assert!(kind == "flannel" && msg.contains("10.1.17.2"), "{kind}: {msg}");
    list.del(&attached);
}

#[test]
fn plugins_of_others_work_between_ours() {
    let node = Node::with_namespace(V4);
    let plugins = node.own_plugins();
    std::os::unix::fs::symlink(format!("{PLUGINS}/tuning"), format!("{plugins}/tuning")).unwrap();
    let mut conflist = shipped(&node);
    conflist["cniVersion"] = "1.0.0".into();
    let tuning = json!({"type": "tuning", "mac": "02:00:00:00:00:77", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}});
    conflist["plugins"].as_array_mut().unwrap().insert(1, tuning);
    let list = List::new(&node, conflist).with_plugins(&plugins);
    let namespace = Namespace::new();
    let path = namespace.path();
    let ports = json!([{"hostPort": 8080, "containerPort": 5201, "protocol": "tcp"}]);
    let limits = json!({"ingressRate": 10_000_000, "ingressBurst": 400_000, "egressRate": 10_000_000, "egressBurst": 400_000});
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let attached = list.add(pod, json!({"portMappings": ports, "bandwidth": limits}));
    let interfaces = attached.result["interfaces"].as_array().unwrap();
    let end = interfaces.iter().find(|one| one["name"] == "eth0").unwrap();
    assert_eq!(end["mac"], "02:00:00:00:00:77");
    assert!(interfaces.iter().any(|one| one["name"].as_str().unwrap().starts_with("bwp")), "{interfaces:?}");
    let shown = namespace.command("sysctl").args(["-n", "net.ipv4.conf.eth0.arp_filter"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&shown.stdout).trim(), "1");
    assert_eq!(list.check(&attached), Ok(()));
    list.del(&attached);
    assert_eq!(node.host().links(), ["lo", "cni0"]);
    assert_eq!((node.kept(), node.reserved("cbr0")), (vec![], vec![]));
}
