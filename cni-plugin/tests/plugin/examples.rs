//! The lists of plugins in docs/cni.md work as they stand there.

use std::fs;

use serde_json::{Value, json};

use crate::runtime::List;
use crate::support::{Namespace, Node, Pod, V4};

/// Blocks that are marked as JSON; what is only to be read is marked otherwise.
fn examples() -> Vec<Value> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cni.md");
    let page = fs::read_to_string(page).unwrap();
    let blocks = page.split("\n```json\n").skip(1).map(|rest| rest.split("\n```\n").next().unwrap());
    blocks
        .map(|block| serde_json::from_str(block).unwrap_or_else(|error| panic!("{error}: {block}")))
        .collect()
}

#[test]
fn every_example_connects_and_disconnects_a_pod() {
    let examples = examples();
    assert_eq!(examples.len(), 5, "the page has other examples");
    for (mut example, own) in
        examples.into_iter().flat_map(|example| [(example.clone(), false), (example, true)])
    {
        let node = Node::with_namespace(V4);
        let host = node.host();
        host.ip(&["link", "add", "eth1", "type", "veth", "peer", "name", "wire"]);
        for link in ["lo", "eth1", "wire"] {
            host.ip(&["link", "set", link, "up"]);
        }
        let before = host.links().len();
        let name = example["name"].as_str().unwrap().to_owned();
        let flannel = &mut example["plugins"][0];
        assert_eq!(flannel["type"], "flannel");
        flannel["subnetFile"] = json!(node.path("subnet.env"));
        flannel["dataDir"] = json!(node.path("flannel"));
        flannel["ipam"]["dataDir"] = json!(node.path("addresses"));
        let bridge = flannel["delegate"]["type"].is_null();
        let mut list = List::new(&node, example);
        if own {
            // portmap and bandwidth of this program; macvlan and ptp are others' in any case.
            list = list.with_plugins(&node.own_plugins());
        }

        let namespace = Namespace::new();
        let path = namespace.path();
        let arguments = json!({
            "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 400_000, "egressRate": 10_000_000, "egressBurst": 400_000},
        });
        let attached = list.add(Pod { container: "c1", ifname: "eth0", netns: &path }, arguments);
        assert_eq!(attached.result["ips"][0]["address"], "10.1.17.2/24", "{name}");
        assert!(namespace.ip(&["addr"]).contains("10.1.17.2/24"), "{name}");
        assert!(namespace.ip(&["route"]).contains("10.1.0.0/16 via 10.1.17.1 dev eth0"), "{name}");
        list.del(&attached);
        assert_eq!(namespace.links(), ["lo"], "{name}");
        assert_eq!((node.kept(), node.reserved(&name)), (vec![], vec![]), "{name}");
        assert_eq!(host.links().len(), before + usize::from(bridge), "{name}");
    }
}
