//! Other delegates than a plain bridge. ipvlan is missing: the kernel of the machines that these tests were
//! written on has no such device; what it would be given is tested beside the code that makes it.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Namespace, Node, Pod, V4};

/// Two pods come, pass CHECK, reach each other and what `reach` says of the first, and go; gives what the
/// first looked like from inside.
fn two_pods(node: &Node, delegate: Value, pods_reach: &[&str], host_reaches: bool) -> String {
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pods = [("c1", &paths[0]), ("c2", &paths[1])].map(|(container, netns)| Pod {
        container,
        ifname: "eth0",
        netns,
    });
    let network = node.network("n", "1.0.0", delegate);
    for pod in pods {
        let mut checked = network.clone();
        checked["prevResult"] = node.call("ADD", pod, &network).result();
        node.call("CHECK", pod, &checked).result();
    }
    for address in pods_reach {
        assert!(namespaces[0].reaches(address), "{address}");
    }
    if host_reaches {
        assert!(node.host().reaches("10.1.17.2"));
    }
    let shown = namespaces[0].ip(&["-d", "addr", "show", "eth0"]) + &namespaces[0].ip(&["route"]);
    for pod in pods {
        node.call("DEL", pod, &network).result();
    }
    assert_eq!((node.kept().len(), node.reserved("n").len()), (0, 0));
    for namespace in &namespaces {
        assert_eq!(namespace.links(), ["lo"]);
    }
    shown
}

#[test]
fn pods_on_macvlan_reach_each_other() {
    let node = Node::with_namespace(V4);
    node.host().ip(&["link", "add", "uplink", "type", "veth", "peer", "name", "switch"]);
    for link in ["uplink", "switch"] {
        node.host().ip(&["link", "set", link, "up"]);
    }
    let delegate = json!({"type": "macvlan", "master": "uplink", "mode": "bridge"});
    let shown = two_pods(&node, delegate, &["10.1.17.3"], false);
    assert!(shown.contains("macvlan mode bridge") && shown.contains("mtu 1472"), "{shown}");
    assert!(shown.contains("10.1.0.0/16 via 10.1.17.1"), "{shown}");
    assert_eq!(node.host().links().len(), 3);
}

#[test]
fn pods_on_ptp_reach_each_other_and_the_host() {
    let node = Node::with_namespace(V4);
    let shown = two_pods(&node, json!({"type": "ptp"}), &["10.1.17.1", "10.1.17.3"], true);
    assert!(shown.contains("veth") && shown.contains("mtu 1472"), "{shown}");
    assert_eq!(node.host().links(), ["lo"]);
}

#[test]
fn the_mtu_and_the_masquerading_of_the_delegate_are_what_it_asks_for() {
    let node = Node::with_namespace(&V4.replace("IPMASQ=true", "IPMASQ=false"));
    let shown = two_pods(&node, json!({"type": "ptp", "mtu": 1300}), &["10.1.17.3"], true);
    assert!(shown.contains("mtu 1300"), "{shown}");
    // Who does not masquerade in flanneld has the delegate do it.
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let network = node.network("n", "1.0.0", json!({"type": "ptp"}));
    let rules = || {
        let output = node.host().command("iptables").args(["-t", "nat", "-S"]).output().unwrap();
        assert!(output.status.success(), "install the package iptables: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    node.call("ADD", pod, &network).result();
    assert!(rules().contains("MASQUERADE"), "{}", rules());
    node.call("DEL", pod, &network).result();
    assert!(!rules().contains("MASQUERADE"), "{}", rules());
}

#[test]
fn a_bridge_with_the_address_of_another_subnet_is_refused_unless_the_delegate_may_replace_it() {
    let node = Node::with_namespace(&V4.replace("10.1.17.", "10.1.99."));
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let network = node.network("n", "1.0.0", json!({}));
    let add = |network: &Value| node.call("ADD", pod, network);
    add(&network).result();
    node.call("DEL", pod, &network).result();
    // The node gets another subnet, and the bridge is still there.
    fs::write(node.path("subnet.env"), V4).unwrap();
    let (code, msg) = add(&network).error();
    let expected = "already has an IP address different from 10.1.17.1/24";
    assert!(code == 999 && msg.contains(expected), "{code} {msg}");
    node.call("DEL", pod, &network).result();
    let network = node.network("n", "1.0.0", json!({"forceAddress": true}));
    add(&network).result();
    assert!(namespace.reaches("10.1.17.1"));
    node.call("DEL", pod, &network).result();
}
