//! `portmap` of this program, in the shipped list.
//!
//! ```text
//!     client namespace [eth0 192.0.2.2] -- [up0 192.0.2.1] host namespace [cni0] -- veth -- [eth0] pod namespace
//! ```

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::chain::{assert_within, client, rate_by, rules, shipped};
use crate::pods::V6;
use crate::runtime::List;
use crate::support::{Answer, Namespace, Node, Pod, V4};

fn list<'a>(node: &'a Node, version: &str) -> List<'a> {
    let mut conflist = shipped(node);
    conflist["cniVersion"] = version.into();
    List::new(node, conflist).with_plugins(&node.own_plugins())
}

/// TCP and UDP, since iperf3 wants TCP beside UDP.
fn port(host: u16, more: Value) -> Vec<Value> {
    let one = |protocol: &str| {
        let mut one = json!({"hostPort": host, "containerPort": 5201, "protocol": protocol});
        one.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        one
    };
    vec![one("tcp"), one("udp")]
}

fn nft(node: &Node, arguments: &[&str]) -> String {
    let output = node.host().command("nft").args(arguments).output().unwrap();
    assert!(output.status.success(), "install the package nftables: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

const SHORT: [&str; 4] = ["--time", "1", "--omit", "0"];

#[test]
fn a_port_of_the_host_leads_to_the_pod_from_everywhere() {
    let node = Node::with_namespace(V4);
    let client = client(&node);
    node.host().ip(&["address", "add", "192.0.2.9/24", "dev", "up0"]);
    let list = list(&node, "1.0.0");
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let mappings = [port(8080, json!({})), port(8081, json!({"hostIP": "192.0.2.9"}))].concat();
    let attached = list.add(pod, json!({"portMappings": mappings}));
    assert_eq!(list.check(&attached), Ok(()));
    let reach = |from: &Namespace, address: &str, port: u16, options: &[&str]| {
        rate_by(&namespace, from, address, port, &[&SHORT[..], options].concat())
    };
    for (from, address, port) in [
        (&client, "192.0.2.1", 8080),
        (node.host(), "127.0.0.1", 8080),
        (node.host(), "192.0.2.1", 8080),
        // Hairpin: the pod reaches itself.
        (&namespace, "192.0.2.1", 8080),
        (&client, "192.0.2.9", 8081),
        (&client, "192.0.2.9", 8080),
    ] {
        for options in [&[][..], &["--udp", "--bitrate", "1M"]] {
            println!("{address}:{port} {options:?}");
            assert_within(0.1..=f64::INFINITY, || reach(from, address, port, options));
        }
    }
    assert!(reach(&client, "192.0.2.1", 8081, &[]).is_err());
    list.del(&attached);
    assert!(reach(&client, "192.0.2.1", 8080, &[]).is_err());
    assert!(!nft(&node, &["list", "ruleset"]).contains("dnat"));
}

#[test]
fn a_port_of_the_host_leads_to_the_pod_by_ipv6() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let client = client(&node);
    node.host().ip(&["address", "add", "fd00:99::1/64", "dev", "up0", "nodad"]);
    client.ip(&["address", "add", "fd00:99::2/64", "dev", "eth0", "nodad"]);
    client.ip(&["route", "add", "fc00::/48", "via", "fd00:99::1"]);
    let list = list(&node, "1.0.0");
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let attached = list.add(pod, json!({"portMappings": port(8080, json!({}))}));
    for (from, address) in [(&client, "fd00:99::1"), (&client, "192.0.2.1"), (&namespace, "fd00:99::1")] {
        println!("{address}");
        assert_within(0.1..=f64::INFINITY, || rate_by(&namespace, from, address, 8080, &SHORT));
    }
    list.del(&attached);
    assert!(!nft(&node, &["list", "ruleset"]).contains("dnat"));
}

#[test]
fn the_rules_are_those_that_the_original_finds_again() {
    let node = Node::with_namespace(V4);
    let list = list(&node, "1.0.0");
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let mappings = [port(8080, json!({})), port(8081, json!({"hostIP": "192.0.2.9"}))].concat();
    let attached = list.add(pod, json!({"portMappings": mappings}));
    // As the original since 1.9 makes them, with the container as the comment.
    let expected = r#"table ip cni_hostport {
	comment "CNI portmap plugin"
	chain hostports {
		tcp dport 8080 dnat to 10.1.17.2:5201 comment "c1"
		udp dport 8080 dnat to 10.1.17.2:5201 comment "c1"
		ip daddr 192.0.2.9 tcp dport 8081 dnat to 10.1.17.2:5201 comment "c1"
		ip daddr 192.0.2.9 udp dport 8081 dnat to 10.1.17.2:5201 comment "c1"
	}

	chain hostip_hostports {
	}

	chain hostports_all {
		jump hostip_hostports
		jump hostports
	}

	chain prerouting {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local jump hostports_all
	}

	chain output {
		type nat hook output priority -100; policy accept;
		fib daddr type local jump hostports_all
	}

	chain masquerading {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 10.1.17.2 ip daddr 10.1.17.2 masquerade comment "c1"
		ip saddr 127.0.0.1 ip daddr 10.1.17.2 masquerade comment "c1"
	}
}
"#;
    assert_eq!(nft(&node, &["list", "table", "ip", "cni_hostport"]), expected);
    // A second pod changes nothing for the first, and takes nothing along when it goes.
    let second = Namespace::new();
    let second_path = second.path();
    let other = Pod { container: "c2", ifname: "eth0", netns: &second_path };
    let other = list.add(other, json!({"portMappings": port(9090, json!({}))}));
    assert!(nft(&node, &["list", "ruleset"]).contains("dport 9090 dnat to 10.1.17.3:5201"));
    list.del(&other);
    assert_eq!(nft(&node, &["list", "table", "ip", "cni_hostport"]), expected);
    nft(&node, &["flush", "chain", "ip", "cni_hostport", "masquerading"]);
    let (kind, msg) = list.check(&attached).unwrap_err();
    assert_eq!((&*kind, &*msg), ("portmap", r#"missing hostport rules in "masquerading" chain"#));
    list.del(&attached);
    list.del(&attached);
}

/// What goes to other machines and to other pods, from pods, from outside and from the host, is not for the pod that has the port, and
/// not for one that asks for the address of another machine (CVE-2025-67499 of the original).
#[test]
fn what_is_not_for_the_host_goes_where_it_is_sent() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let client = client(&node);
    node.host().ip(&["address", "add", "fd00:99::1/64", "dev", "up0", "nodad"]);
    client.ip(&["address", "add", "fd00:99::2/64", "dev", "eth0", "nodad"]);
    client.ip(&["route", "add", "10.1.17.0/24", "via", "192.0.2.1"]);
    client.ip(&["route", "add", "fc00::/48", "via", "fd00:99::1"]);
    let list = list(&node, "1.0.0");
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pod = |number: usize| Pod { container: ["c1", "c2"][number], ifname: "eth0", netns: &paths[number] };
    let other = list.add(pod(1), json!({}));
    let addresses: Vec<&str> =
        other.result["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
    let of_pod = |family: char| {
        let address = addresses.iter().find(|address| address.contains(family)).unwrap();
        address.split('/').next().unwrap().to_owned()
    };
    let elsewhere = ["192.0.2.2", "fd00:99::2"].map(|ip| port(5201, json!({"hostIP": ip})));
    let mappings = [port(5201, json!({})), elsewhere.concat()].concat();
    let attached = list.add(pod(0), json!({"portMappings": mappings}));
    for (to, from, address) in [
        (&client, &namespaces[1], "192.0.2.2"),
        (&client, &namespaces[1], "fd00:99::2"),
        (&client, node.host(), "192.0.2.2"),
        (&client, node.host(), "fd00:99::2"),
        (&namespaces[1], &client, &of_pod('.')),
        (&namespaces[1], &client, &of_pod(':')),
    ] {
        for options in [&[][..], &["--udp", "--bitrate", "1M"]] {
            println!("{address} {options:?}");
            // The server is at the other end alone: a connection to the pod with the port would be refused.
            assert_within(0.1..=f64::INFINITY, || {
                rate_by(to, from, address, 5201, &[&SHORT[..], options].concat())
            });
        }
    }
    // The host's own addresses lead to the pod as before.
    assert_within(0.1..=f64::INFINITY, || rate_by(&namespaces[0], &client, "192.0.2.1", 5201, &SHORT));
    list.del(&attached);
    list.del(&other);
}

/// As many as fill the socket by their answers, and more than fit into its buffer.
#[test]
fn a_pod_has_as_many_ports_as_it_asks_for_and_loses_them_all() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let list = list(&node, "1.0.0");
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let mappings: Vec<Value> = (0..1000)
        .map(|port| json!({"hostPort": 10000 + port, "containerPort": 80, "protocol": "tcp"}))
        .collect();
    let attached = list.add(pod, json!({"portMappings": mappings}));
    let count = || nft(&node, &["list", "ruleset"]).matches("dnat").count();
    assert_eq!(count(), 2000);
    assert_eq!(list.check(&attached), Ok(()));
    list.del(&attached);
    assert_eq!(count(), 0);
}

#[test]
fn rules_of_the_original_before_1_6_are_removed_too() {
    let node = Node::with_namespace(V4);
    let conflist = shipped(&node);
    let gos = List::new(&node, conflist);
    let ours = list(&node, "0.3.1");
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pod = |number: usize| Pod { container: ["c1", "c2"][number], ifname: "eth0", netns: &paths[number] };
    let first = gos.add(pod(0), json!({"portMappings": port(8080, json!({}))}));
    let second = gos.add(pod(1), json!({"portMappings": port(9090, json!({}))}));
    assert!(rules(&node).contains("10.1.17.2:5201"));
    ours.del(&first);
    let left = rules(&node);
    assert!(!left.contains("10.1.17.2:5201") && !left.contains("8080"), "{left}");
    assert!(left.contains("10.1.17.3:5201") && left.contains("9090"), "{left}");
    gos.del(&second);
    assert!(!rules(&node).contains("10.1.17."), "{}", rules(&node));
}

fn add(node: &Node, config: Value) -> Answer {
    let mut network = json!({"name": "n", "cniVersion": "1.0.0", "type": "portmap"});
    network.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    let program = format!("{}/portmap", node.own_plugins());
    let pod = Pod { container: "c1", ifname: "eth0", netns: "/nowhere" };
    node.call_plugin(&program, "ADD", pod, &network.to_string(), &[])
}

#[test]
fn mappings_that_make_no_sense_are_named_and_change_nothing() {
    let node = Node::with_namespace(V4);
    let mapping = |mapping: Value| {
        json!({"prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.1.17.2/24"}]},
        "runtimeConfig": {"portMappings": [mapping]}})
    };
    for (config, expected) in [
        (
            mapping(json!({"hostPort": 0, "containerPort": 1, "protocol": "tcp"})),
            "Invalid host port number: 0",
        ),
        (
            mapping(json!({"hostPort": 70000, "containerPort": 1, "protocol": "tcp"})),
            "Invalid host port number: 70000",
        ),
        (
            mapping(json!({"hostPort": 1, "containerPort": 0, "protocol": "tcp"})),
            "Invalid container port number: 0",
        ),
        (
            mapping(json!({"hostPort": 1, "containerPort": 1, "protocol": "icmp"})),
            "\"icmp\" is not tcp, udp or sctp",
        ),
        (
            mapping(json!({"hostPort": 1, "containerPort": 1, "protocol": "tcp", "hostIP": "x"})),
            "hostIP \"x\"",
        ),
        (json!({"runtimeConfig": {"portMappings": []}}), "must be called as chained plugin"),
        (json!({"prevResult": {}, "masqAll": true}), "masqAll"),
    ] {
        let (code, msg) = add(&node, config).error();
        assert!(code == 999 && msg.contains(expected), "{code} {msg}");
    }
    assert_eq!(nft(&node, &["list", "ruleset"]), "");
    // SCTP is a port like any other.
    add(&node, mapping(json!({"hostPort": 7, "containerPort": 8, "protocol": "sctp"}))).result();
    assert!(nft(&node, &["list", "ruleset"]).contains("sctp dport 7 dnat to 10.1.17.2:8"));
}

#[test]
fn all_or_none_of_a_pods_rules_are_there_when_portmap_is_killed() {
    let node = Node::with_namespace(V4);
    let list = list(&node, "1.0.0");
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let config = json!({"name": "cbr0", "cniVersion": "1.0.0", "type": "portmap",
        "prevResult": list.add(pod, json!({})).result,
        "runtimeConfig": {"portMappings": port(8080, json!({}))}});
    let program = format!("{}/portmap", node.own_plugins());
    for (verb, calls) in [("ADD", 6), ("DEL", 4)] {
        for number in 1..=calls {
            if verb == "DEL" {
                node.call_plugin(&program, "ADD", pod, &config.to_string(), &[]).result();
            }
            crate::killed::at(&node, &program, verb, pod, &config, "sendto", number);
            let dnats = nft(&node, &["list", "ruleset"]).matches("dnat to").count();
            assert!(dnats == 0 || dnats == 2, "{verb} {number}: {dnats}");
            node.call_plugin(&program, "DEL", pod, &config.to_string(), &[]).result();
            let left = nft(&node, &["list", "ruleset"]);
            assert!(!left.contains("c1"), "{verb} killed at {number}: {left}");
        }
    }
}

#[test]
fn gc_removes_the_rules_of_pods_that_are_gone_and_no_others() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let list = list(&node, "1.0.0");
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    for (number, container) in ["c1", "c2"].into_iter().enumerate() {
        let pod = Pod { container, ifname: "eth0", netns: &paths[number] };
        let more = json!({"hostIP": "192.0.2.9"});
        let ports = [port(8080 + number as u16, json!({})), port(9090 + number as u16, more)].concat();
        list.add(pod, json!({"portMappings": ports}));
    }
    let program = format!("{}/portmap", node.own_plugins());
    let call = |verb: &str, container: &str, config: &Value| {
        let pod = Pod { container, ifname: "eth0", netns: "/nowhere" };
        node.call_plugin(&program, verb, pod, &config.to_string(), &[])
    };
    // A pod of another network, and one of Go's plugin, whose rules do not tell the network.
    let other = json!({"name": "other", "cniVersion": "1.0.0", "type": "portmap",
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.9.0.2/24"}]},
        "runtimeConfig": {"portMappings": port(7070, json!({}))}});
    call("ADD", "c3", &other).result();
    let gos = ["tcp", "dport", "6060", "dnat", "to", "10.1.17.9:1", "comment", "\"c9\""];
    nft(&node, &[&["add", "rule", "ip", "cni_hostport", "hostports"], &gos[..]].concat());
    let gc = |valid: Value| {
        let config = json!({"name": "cbr0", "cniVersion": "1.1.0", "type": "portmap", "cni.dev/valid-attachments": valid});
        call("GC", "", &config).result();
        let left = nft(&node, &["list", "ruleset"]);
        ["c1", "c2", "c3", "c9"].map(|container| left.matches(&format!("comment \"{container}\"")).count())
    };
    // Four ports and two masquerades of IPv4, two ports and one of IPv6.
    let whole = 4 + 2 + 2 + 1;
    let both = json!([{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "eth0"}]);
    assert_eq!(gc(both), [whole, whole, 4, 1]);
    assert_eq!(gc(json!([{"containerID": "c2", "ifname": "eth0"}])), [0, whole, 4, 1]);
    assert_eq!(gc(json!([])), [0, 0, 4, 1]);
    let (code, msg) =
        call("GC", "", &json!({"name": "other", "cniVersion": "1.1.0", "type": "portmap"})).error();
    assert!(code == 7 && msg.contains("nothing was dropped"), "{code} {msg}");
    call("DEL", "c3", &other).result();
    assert_eq!(gc(json!([])), [0, 0, 0, 1]);
}

#[test]
fn what_a_client_sent_by_udp_before_the_port_led_to_a_pod_does_not_keep_it_from_there() {
    let node = Node::with_namespace(V4);
    let client = client(&node);
    let list = list(&node, "1.0.0");
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pod = |number: usize| Pod { container: ["c1", "c2"][number], ifname: "eth0", netns: &paths[number] };
    // From its rules on the kernel tracks connections.
    let first = list.add(pod(0), json!({"portMappings": port(9090, json!({}))}));
    let arrived = "table ip arrived {\ncounter c { }\nchain f {\ntype filter hook forward priority 0\n\
                   ip daddr 10.1.17.3 udp dport 5201 counter name c\n}\n}";
    nft(&node, &[arrived]);
    // One socket, whose packets are one connection to the kernel.
    let script = "exec 3<>/dev/udp/192.0.2.1/8080; while read -r word; do echo $word >&3; echo sent; done";
    let mut command = client.command("bash");
    let command = command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut sender = command.spawn().unwrap();
    let (mut words, mut sent) = (sender.stdin.take().unwrap(), BufReader::new(sender.stdout.take().unwrap()));
    let mut send = |word: &str| {
        writeln!(words, "{word}").unwrap();
        let mut line = String::new();
        sent.read_line(&mut line).unwrap();
        assert_eq!(line, "sent\n");
    };
    send("before");
    let second = list.add(pod(1), json!({"portMappings": port(8080, json!({}))}));
    // The first may end with the refusal of what was sent before.
    send("after");
    send("again");
    let counted = || nft(&node, &["list", "counter", "ip", "arrived", "c"]);
    crate::killed::eventually("the pod gets it", || !counted().contains("packets 0 "));
    drop((words, sent));
    sender.wait().unwrap();
    list.del(&second);
    list.del(&first);
}

#[test]
fn of_what_was_sent_by_udp_before_only_that_to_the_port_is_forgotten() {
    let node = Node::with_namespace(&format!("{V4}{}", crate::pods::V6));
    let list = list(&node, "1.0.0");
    let host = node.host();
    host.ip(&["link", "set", "lo", "up"]);
    nft(
        &node,
        &["table inet t {\nchain o {\ntype filter hook output priority 0\nct state new counter\n}\n}"],
    );
    for port in [8080, 8081] {
        for address in ["127.0.0.1", "::1"] {
            let send = format!("echo before > /dev/udp/{address}/{port}");
            assert!(host.command("bash").args(["-c", &send]).status().unwrap().success(), "{send}");
        }
    }
    let tracked = |port: u16| {
        let table = host.command("cat").arg("/proc/net/nf_conntrack").output().unwrap();
        let table = String::from_utf8(table.stdout).unwrap();
        table.lines().filter(|line| line.contains(&format!("dport={port} "))).count()
    };
    assert_eq!((tracked(8080), tracked(8081)), (2, 2));
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let attached = list.add(pod, json!({"portMappings": port(8080, json!({}))}));
    assert_eq!((tracked(8080), tracked(8081)), (0, 2));
    list.del(&attached);
}
