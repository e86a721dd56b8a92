//! STATUS tells whether an ADD would succeed, and asks a delegate that knows the verb.

use std::fs;

use serde_json::{Value, json};

use crate::support::{NO_NETNS, Node, Pod, V4};

const POD: Pod<'_> = Pod { container: "c1", ifname: "eth0", netns: NO_NETNS };

#[test]
fn a_delegate_of_1_1_is_asked_with_its_own_configuration() {
    let node = Node::new(V4);
    let stand_in = node.stand_in();
    let network =
        node.network("n", "1.1.0", json!({"type": "stand-in-1.1", "members": "its own"})).to_string();
    let path = [("CNI_PATH", &*stand_in.path()), ("CNI_CONTAINERID", ""), ("CNI_IFNAME", "")];
    assert_eq!(node.call_with("STATUS", POD, &network, &path).result(), Value::Null);
    let calls = stand_in.calls();
    assert_eq!(calls.iter().map(|(who, _)| who.as_str()).collect::<Vec<_>>(), ["VERSION", "STATUS"]);
    let config = &calls[1].1;
    assert_eq!((&config["cniVersion"], &config["members"]), (&json!("1.1.0"), &json!("its own")));
    assert_eq!(config["ipam"]["ranges"], json!([[{"subnet": "10.1.17.0/24"}]]));

    // Its error is the answer, with a code of its own.
    stand_in.falls_ill(r#"{"cniVersion":"1.1.0","code":51,"msg":"half of it works"}"#);
    assert_eq!(node.call_with("STATUS", POD, &network, &path).error(), (51, "half of it works".into()));
    stand_in.calls();

    // Flannel's own check comes first.
    fs::write(node.path("subnet.env"), "FLANNEL_MTU=1450\n").unwrap();
    let (code, msg) = node.call_with("STATUS", POD, &network, &path).error();
    assert!(code == 50 && msg.contains("is missing FLANNEL_NETWORK,"), "{code} {msg}");
    assert!(stand_in.calls().is_empty());
}

#[test]
fn adding_a_pod_asks_nobody_for_versions() {
    let node = Node::new(V4);
    let stand_in = node.stand_in();
    let network = node.network("n", "1.1.0", json!({"type": "stand-in-1.1"})).to_string();
    let path = [("CNI_PATH", &*stand_in.path())];
    for verb in ["ADD", "DEL"] {
        node.call_with(verb, POD, &network, &path).result();
        let calls = stand_in.calls();
        assert_eq!(calls.iter().map(|(who, _)| who.clone()).collect::<Vec<_>>(), [format!("{verb} c1 eth0")]);
    }
}

#[test]
fn a_delegate_that_would_refuse_every_add_makes_status_fail() {
    let node = Node::new(V4);
    for delegate in [json!({"type": "host-local"}), json!({"type": "ptp"})] {
        let network = node.network("n", "1.1.0", delegate);
        let (code, msg) = node.call("STATUS", POD, &network).error();
        assert!(code == 50 && msg.contains("does not speak CNI 1.1.0"), "{code} {msg}");
        assert!(msg.contains(r#"set "cniVersion""#), "{msg}");
        assert!(!node.call("ADD", POD, &network).success);
    }
}

#[test]
fn what_would_make_every_add_fail_is_told_with_cause_and_remedy() {
    let node = Node::new(V4);
    let told = |delegate: Value, path: &str, expected: &str, remedy: &str| {
        let network = node.network("n", "1.1.0", delegate).to_string();
        let (code, msg) = node.call_with("STATUS", POD, &network, &[("CNI_PATH", path)]).error();
        assert!(code == 50 && msg.contains(expected) && msg.contains(remedy), "{code} {msg}");
    };
    told(json!({"type": "ptp"}), "/nowhere", r#"failed to find plugin "ptp" in path [/nowhere]"#, "install");
    let missing = r#"failed to find plugin "bridge" in path [/nowhere]"#;
    told(json!({"vlan": 7}), "/nowhere", missing, r#"the built-in bridge does not have "vlan""#);
    let mut network = node.network("n", "1.1.0", json!({}));
    for data_dir in ["/proc/nowhere", "/dev/null/flannel"] {
        network["dataDir"] = json!(data_dir);
        let (code, msg) = node.call("STATUS", POD, &network).error();
        let expected = format!("failed to keep the delegate's configuration for DEL in {data_dir}: ");
        assert!(code == 50 && msg.starts_with(&expected) && msg.contains("set \"dataDir\""), "{code} {msg}");
    }
    told(json!({"name": "x"}), "/usr/lib/cni", "must not have 'name' field", "set by flannel");
    fs::write(node.path("subnet.env"), "FLANNEL_MTU=much\n").unwrap();
    told(json!({}), "/usr/lib/cni", "FLANNEL_MTU=\"much\" is not a number", "restart flanneld");
    fs::remove_file(node.path("subnet.env")).unwrap();
    told(json!({}), "/usr/lib/cni", "no such file or directory. Check the flannel pod log", "podCIDR");
}
