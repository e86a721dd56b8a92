//! `enabledad`: an address of IPv6 is used when it is known that no other machine has it.

use std::fs;

use serde_json::{Value, json};

use crate::killed::log_of;
use crate::pods::V6;
use crate::support::{Answer, Namespace, Node, Pod, V4};

fn network(node: &Node) -> Value {
    node.network("n", "1.0.0", json!({"isDefaultGateway": true, "enabledad": true}))
}

/// Calls the built-in bridge.
fn call(node: &Node, verb: &str, container: &str, namespace: &Namespace) -> Answer {
    let path = namespace.path();
    let pod = Pod { container, ifname: "eth0", netns: &path };
    node.call_with(verb, pod, &network(node).to_string(), &[("CNI_PATH", "/nowhere")])
}

/// A machine on the bridge with an address that no pod was given.
fn machine(node: &Node, address: &str) -> Namespace {
    let machine = Namespace::new();
    node.host().ip(&["link", "add", "m0", "type", "veth", "peer", "name", "eth0", "netns", machine.name()]);
    node.host().ip(&["link", "set", "m0", "master", "cni0", "up"]);
    machine.ip(&["link", "set", "eth0", "up"]);
    machine.ip(&["address", "add", address, "dev", "eth0", "nodad"]);
    machine
}

#[test]
fn no_address_is_tentative_when_a_pod_is_there() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let namespace = Namespace::new();
    let path = namespace.path();
    let stdin = node.path("stdin");
    fs::write(&stdin, network(&node).to_string()).unwrap();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let log = log_of(&node, "ADD", pod, stdin.to_str().unwrap(), "trace=recvfrom");
    // The kernel's notification ended the waiting, and not its limit.
    assert!(log.contains("recvfrom") && !log.contains("EAGAIN"), "{log}");
    let shown = namespace.ip(&["-6", "address", "show", "dev", "eth0"]);
    assert!(
        shown.contains("fc00::2/64") && shown.contains("fe80::") && !shown.contains("tentative"),
        "{shown}"
    );
    assert!(namespace.reaches("fc00::1"));
}

#[test]
fn a_pod_whose_address_another_machine_has_is_refused_and_leaves_nothing() {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let first = Namespace::new();
    call(&node, "ADD", "c1", &first).result();
    let machine = machine(&node, "fc00::3/64");
    assert!(machine.reaches("fc00::1"));
    let (links, reserved) = (node.host().links(), node.reserved("n"));
    let second = Namespace::new();
    let (code, msg) = call(&node, "ADD", "c2", &second).error();
    let expected = "fc00::3/64 is a duplicate: another machine on the bridge \"cni0\" has this address";
    assert!(code == 999 && msg.contains(expected), "{msg}");
    assert_eq!(
        (second.links(), node.host().links(), node.reserved("n")),
        (vec!["lo".to_owned()], links, reserved)
    );
    call(&node, "DEL", "c2", &second).result();
    // The next address is free.
    let result = call(&node, "ADD", "c2", &second).result();
    assert_eq!(result["ips"][1]["address"], "fc00::4/64");
    assert!(second.reaches("fc00::3"));
}
