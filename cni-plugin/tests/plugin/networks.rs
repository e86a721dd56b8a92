//! Several networks of one pod, as Multus attaches them: each with a configuration, a subnet and a bridge of
//! its own, in one directory or in two.
//!
//! ```text
//!     host namespace [cni0 10.1.17.1] -- veth -- [eth0] pod namespace
//!                    [cni1 10.2.17.1] -- veth -- [net1]
//! ```

use std::fs;

use serde_json::{Value, json};

use crate::support::{Namespace, Node, Pod, V4};

/// The second network: other file, other bridge, perhaps another directory.
fn second(node: &Node, data_dir: &str) -> Value {
    let file = node.path("second.env");
    fs::write(&file, V4.replace("10.1.", "10.2.").replace("1472", "1400")).unwrap();
    let mut network = node.network("second", "1.0.0", json!({"bridge": "cni1"}));
    network["subnetFile"] = json!(file);
    network["dataDir"] = json!(node.path(data_dir));
    network
}

/// Two pods of both networks; the network number `first_gone` is taken away first.
fn two_networks(data_dir: &str, first_gone: usize) {
    let node = Node::with_namespace(V4);
    let networks = [node.network("first", "1.0.0", json!({})), second(&node, data_dir)];
    let namespaces = [Namespace::new(), Namespace::new()];
    let paths = namespaces.each_ref().map(Namespace::path);
    let pod = |which: usize, network: usize| Pod {
        container: ["c1", "c2"][which],
        ifname: ["eth0", "net1"][network],
        netns: &paths[which],
    };
    for which in [0, 1] {
        for network in [0, 1] {
            node.call("ADD", pod(which, network), &networks[network]).result();
        }
    }
    let there = |network: usize| ["10.1.17.3", "10.2.17.3"][network];
    for network in [0, 1] {
        assert!(namespaces[0].reaches(there(network)), "{network}");
    }
    assert!(namespaces[0].ip(&["link", "show", "net1"]).contains("mtu 1400"));

    let remaining = 1 - first_gone;
    let ifname = pod(0, remaining).ifname;
    // Repeated, as runtimes do: the other network must not notice.
    for _ in 0..2 {
        node.call("DEL", pod(0, first_gone), &networks[first_gone]).result();
        assert_eq!(namespaces[0].links(), ["lo", ifname]);
        assert!(namespaces[0].reaches(there(remaining)), "{ifname}");
        assert_eq!(
            (node.reserved("first").len(), node.reserved("second").len()),
            [(1, 2), (2, 1)][first_gone]
        );
    }
    node.call("DEL", pod(0, remaining), &networks[remaining]).result();
    for network in [first_gone, remaining] {
        node.call("DEL", pod(1, network), &networks[network]).result();
    }
    assert_eq!((node.reserved("first"), node.reserved("second")), (vec![], vec![]));
    assert!(node.kept().is_empty());
    assert!(fs::read_dir(node.path(data_dir)).unwrap().next().is_none());
    assert_eq!(node.host().links(), ["lo", "cni0", "cni1"]);
}

#[test]
fn networks_in_one_directory_go_in_the_order_they_came() {
    two_networks("flannel", 0);
}

#[test]
fn networks_in_one_directory_go_in_the_other_order() {
    two_networks("flannel", 1);
}

#[test]
fn networks_in_two_directories_go_in_the_order_they_came() {
    two_networks("flannel-second", 0);
}

#[test]
fn networks_in_two_directories_go_in_the_other_order() {
    two_networks("flannel-second", 1);
}

#[test]
fn gc_of_one_network_leaves_the_others_attachments_of_the_same_pods() {
    let node = Node::with_namespace(V4);
    let networks = [node.network("first", "1.0.0", json!({})), second(&node, "flannel")];
    for container in ["c1", "c2"] {
        let namespace = Namespace::new();
        for (network, ifname) in networks.iter().zip(["eth0", "net1"]) {
            node.call("ADD", Pod { container, ifname, netns: &namespace.path() }, network).result();
        }
    }
    let gc = |network: &Value, valid: Value| {
        let mut network = network.clone();
        network["cniVersion"] = "1.1.0".into();
        network["cni.dev/valid-attachments"] = valid;
        node.call("GC", Pod { container: "", ifname: "", netns: "" }, &network).result();
    };
    gc(&networks[1], json!([{"containerID": "c2", "ifname": "net1"}]));
    assert_eq!(node.kept(), ["c1", "c2", "c2-net1"]);
    gc(&networks[0], json!([{"containerID": "c1", "ifname": "eth0"}]));
    assert_eq!(node.kept(), ["c1", "c2-net1"]);
    assert_eq!(
        (node.reserved("first"), node.reserved("second")),
        (vec!["10.1.17.2".into()], vec!["10.2.17.3".into()])
    );
}

#[test]
fn a_container_whose_id_ends_with_an_interface_keeps_its_file_in_a_directory_of_two_networks() {
    for first in [0, 1] {
        let node = Node::with_namespace(V4);
        let networks = [node.network("first", "1.0.0", json!({})), second(&node, "flannel")];
        let namespaces = [Namespace::new(), Namespace::new()];
        let paths = namespaces.each_ref().map(Namespace::path);
        let call = |verb: &str, which: usize| {
            let pod = Pod { container: ["c1", "c1-eth0"][which], ifname: "eth0", netns: &paths[which] };
            node.call(verb, pod, &networks[which]).result();
        };
        for which in [first, 1 - first] {
            call("ADD", which);
        }
        assert_eq!(node.kept(), ["c1", "c1-eth0"], "{first}");
        for _ in 0..2 {
            call("DEL", 0);
            assert_eq!(node.kept(), ["c1-eth0"], "{first}");
            assert_eq!((node.reserved("first").len(), node.reserved("second").len()), (0, 1), "{first}");
            assert_eq!(namespaces[1].links(), ["lo", "eth0"], "{first}");
        }
        call("DEL", 1);
        assert_eq!((node.kept(), node.reserved("second")), (vec![], vec![]), "{first}");
    }
}
