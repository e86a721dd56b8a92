//! GC drops what belongs to no valid attachment, and nothing else. The delegate is `host-local` itself, which
//! needs no namespace; it does not know GC, so that the plugin has to do it by DEL.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::support::{NO_NETNS, Namespace, Node, Pod, V4};

/// The variables of GC: those of an attachment are not set.
const NOBODY: Pod<'_> = Pod { container: "", ifname: "", netns: "" };

/// A network to which `attachments` were added, still with the version that Debian's plugins speak.
fn added(node: &Node, name: &str, attachments: &[(&str, &str)]) {
    let network = node.network(name, "1.0.0", json!({"type": "host-local"}));
    for (container, ifname) in attachments {
        node.call("ADD", Pod { container, ifname, netns: NO_NETNS }, &network).result();
    }
}

/// The same network for GC, with `members` added.
fn collecting(node: &Node, name: &str, members: Value) -> Value {
    let mut network = node.network(name, "1.1.0", json!({"type": "host-local"}));
    network.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    network
}

fn valid(attachments: &[(&str, &str)]) -> Value {
    let each = attachments.iter().map(|(id, ifname)| json!({"containerID": id, "ifname": ifname}));
    json!({"cni.dev/valid-attachments": each.collect::<Vec<_>>()})
}

#[test]
fn only_valid_attachments_keep_their_addresses_and_files() {
    let node = Node::new(V4);
    added(
        &node,
        "n",
        &[("c1", "eth0"), ("c1", "net1"), ("c2", "eth0"), ("c2", "net1"), ("c3", "net7"), ("c4", "eth0")],
    );
    assert_eq!(node.kept(), ["c1", "c1-net1", "c2", "c2-net1", "c3", "c4"]);
    let network =
        collecting(&node, "n", valid(&[("c1", "eth0"), ("c2", "net1"), ("c4", "eth0"), ("c9", "eth0")]));
    for _ in 0..2 {
        assert_eq!(node.call("GC", NOBODY, &network).result(), Value::Null);
        assert_eq!(node.kept(), ["c1", "c2-net1", "c4"]);
        assert_eq!(node.reserved("n"), ["10.1.17.2", "10.1.17.5", "10.1.17.7"]);
    }
}

#[test]
fn other_networks_in_the_same_directory_are_left_alone() {
    let node = Node::new(V4);
    added(&node, "other", &[("c1", "eth0"), ("c2", "eth0")]);
    added(&node, "n", &[("c1", "net1"), ("c3", "eth0")]);
    node.call("GC", NOBODY, &collecting(&node, "n", valid(&[]))).result();
    assert_eq!((node.kept(), node.reserved("n")), (vec!["c1".into(), "c2".into()], vec![]));
    assert_eq!(node.reserved("other").len(), 2);
}

#[test]
fn names_with_dashes_that_can_mean_two_attachments_cost_neither_its_file() {
    let node = Node::new(V4);
    let attachments = [("a", "b"), ("a-b", "eth0")];
    added(&node, "n", &attachments);
    assert_eq!(node.kept(), ["a", "a-b"]);
    node.call("GC", NOBODY, &collecting(&node, "n", valid(&attachments))).result();
    assert_eq!((node.kept().len(), node.reserved("n").len()), (2, 2));
    node.call("GC", NOBODY, &collecting(&node, "n", valid(&[]))).result();
    assert_eq!((node.kept().len(), node.reserved("n").len()), (0, 0));
}

#[test]
fn a_list_that_is_missing_or_makes_no_sense_drops_nothing() {
    let node = Node::new(V4);
    added(&node, "n", &[("c1", "eth0"), ("c2", "eth0")]);
    for members in [
        json!({}),
        json!({"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2"}]}),
        json!({"cni.dev/valid-attachments": [{"containerID": "../c1", "ifname": "eth0"}]}),
        json!({"cni.dev/valid-attachments": ["c1"]}),
    ] {
        let (code, msg) = node.call("GC", NOBODY, &collecting(&node, "n", members.clone())).error();
        assert!(code == 7 && msg.contains("cni.dev/valid-attachments"), "{members}: {code} {msg}");
        assert!(msg.contains("nothing was dropped"), "{msg}");
        assert_eq!((node.kept().len(), node.reserved("n").len()), (2, 2), "{members}");
    }
    let wrong_type = collecting(&node, "n", json!({"cni.dev/valid-attachments": "c1"}));
    let (code, msg) = node.call("GC", NOBODY, &wrong_type).error();
    assert!(code == 6 && msg.contains("cni.dev/valid-attachments"), "{code} {msg}");
    assert_eq!((node.kept().len(), node.reserved("n").len()), (2, 2));
}

#[test]
fn the_list_of_a_go_runtime_may_be_null_or_under_the_older_key() {
    let node = Node::new(V4);
    added(&node, "n", &[("c1", "eth0"), ("c2", "eth0")]);
    let older = json!({"cni.dev/attachments": [{"containerID": "c2", "ifname": "eth0"}]});
    node.call("GC", NOBODY, &collecting(&node, "n", older)).result();
    assert_eq!((node.kept(), node.reserved("n")), (vec!["c2".into()], vec!["10.1.17.3".into()]));
    // An empty list of Go.
    let empty = json!({"cni.dev/valid-attachments": null, "cni.dev/attachments": [7]});
    node.call("GC", NOBODY, &collecting(&node, "n", empty)).result();
    assert_eq!((node.kept().len(), node.reserved("n").len()), (0, 0));
}

#[test]
fn addresses_whose_kept_configuration_was_lost_are_given_back() {
    for subnet_env in [V4, ""] {
        let node = Node::new(V4);
        added(&node, "n", &[("c1", "eth0"), ("c2", "net3"), ("c3", "eth0")]);
        added(&node, "other", &[("c4", "eth0")]);
        fs::remove_file(node.path("flannel/c1")).unwrap();
        // A file that can't be read may be of any network: its address goes, it stays.
        fs::write(node.path("flannel/c2"), "{\"name\":").unwrap();
        fs::write(node.path("subnet.env"), subnet_env).unwrap();
        let answer = node.call("GC", NOBODY, &collecting(&node, "n", valid(&[("c3", "eth0")])));
        answer.result();
        assert!(answer.stderr.contains("flannel/c2"), "{answer:?}");
        assert_eq!(node.reserved("n"), ["10.1.17.4"]);
        assert_eq!(node.kept(), ["c2", "c3", "c4"]);
        assert_eq!(node.reserved("other").len(), 1);
    }
}

#[test]
fn what_can_not_be_dropped_is_reported_and_stops_nothing_else() {
    let node = Node::new(V4);
    added(&node, "n", &[("c1", "eth0"), ("c2", "eth0"), ("c3", "eth0")]);
    let lost = fs::read_to_string(node.path("flannel/c1"))
        .unwrap()
        .replace("\"type\":\"host-local\"}", "\"type\":\"gone\"}");
    for container in ["c1", "c2"] {
        fs::write(node.path("flannel").join(container), &lost).unwrap();
    }
    let answer = node.call("GC", NOBODY, &collecting(&node, "n", valid(&[])));
    let (code, msg) = answer.error();
    assert!(code == 999 && msg.contains(r#"failed to find plugin "gone""#), "{code} {msg}");
    assert!(answer.stdout.contains(r#""details": "2 failures""#), "{answer:?}");
    assert_eq!(node.kept(), ["c1", "c2"]);
}

#[test]
fn a_delegate_of_1_1_collects_too_after_the_stale_attachments_are_taken_down() {
    let node = Node::new(V4);
    let stand_in = node.stand_in();
    let path = [("CNI_PATH", &*stand_in.path())];
    let mut network = node.network("n", "1.1.0", json!({"type": "stand-in-1.1", "members": "its own"}));
    for container in ["c1", "c2", "c3"] {
        let pod = Pod { container, ifname: "eth0", netns: NO_NETNS };
        node.call_with("ADD", pod, &network.to_string(), &path).result();
    }
    stand_in.calls();
    network["cni.dev/valid-attachments"] = json!([{"containerID": "c2", "ifname": "eth0"}]);
    node.call_with("GC", NOBODY, &network.to_string(), &path).result();
    let calls = stand_in.calls();
    let order: Vec<_> = calls.iter().map(|(who, _)| who.as_str()).collect();
    assert_eq!(order, ["DEL c1 eth0", "DEL c3 eth0", "VERSION", "GC"]);
    let config = &calls[3].1;
    assert_eq!(config["cni.dev/valid-attachments"], network["cni.dev/valid-attachments"]);
    assert_eq!(config["cni.dev/attachments"], network["cni.dev/valid-attachments"]);
    assert_eq!((&config["cniVersion"], &config["members"]), (&json!("1.1.0"), &json!("its own")));
    assert_eq!(config["ipam"]["ranges"], json!([[{"subnet": "10.1.17.0/24"}]]));

    // Without subnet.env the configuration is what ADD used, and a failure is the delegate's own.
    fs::remove_file(node.path("subnet.env")).unwrap();
    stand_in.falls_ill(r#"{"code":123,"msg":"not today"}"#);
    assert_eq!(node.call_with("GC", NOBODY, &network.to_string(), &path).error(), (123, "not today".into()));
    assert_eq!(stand_in.calls()[1].1["ipam"]["ranges"], json!([[{"subnet": "10.1.17.0/24"}]]));
    assert_eq!(node.kept(), ["c2"]);
}

#[test]
fn a_node_full_of_pods_that_vanished_takes_new_ones_after_gc() {
    // Five addresses for pods.
    let node = Node::with_namespace(&V4.replace("/24", "/29"));
    let network = node.network("n", "1.0.0", json!({}));
    let add = |container: &str, namespace: &Namespace| {
        node.call("ADD", Pod { container, ifname: "eth0", netns: &namespace.path() }, &network)
    };
    for number in 0..5 {
        add(&format!("old{number}"), &Namespace::new()).result();
    }
    let namespace = Namespace::new();
    let (_, msg) = add("new", &namespace).error();
    assert!(msg.contains("no IP addresses available"), "{msg}");
    let pod = Pod { container: "new", ifname: "eth0", netns: &namespace.path() };
    node.call("DEL", pod, &network).result();
    let mut gc = node.network("n", "1.1.0", json!({}));
    gc["cni.dev/valid-attachments"] = json!([]);
    node.call("GC", NOBODY, &gc).result();
    assert_eq!((node.kept().len(), node.reserved("n").len()), (0, 0));
    add("new", &namespace).result();
    assert_eq!((node.kept(), node.reserved("n").len()), (vec!["new".into()], 1));
    node.call("DEL", pod, &network).result();
}

#[test]
fn addresses_that_are_reserved_for_no_container_are_given_back() {
    let node = Node::new(V4);
    added(&node, "n", &[("c1", "eth0"), ("c2", "eth0")]);
    // Left by a full disk, by a power cut, by an old host-local, and by hand.
    for (number, content) in [(10, ""), (11, "\0\0\0\0\0\0"), (12, "old-and-gone"), (13, "\n")] {
        fs::write(node.path("addresses/n").join(format!("10.1.17.{number}")), content).unwrap();
    }
    fs::write(node.path("addresses/n/10.1.17.14"), "c2").unwrap();
    fs::create_dir(node.path("addresses/n/10.1.17.15")).unwrap();
    let answer = node.call("GC", NOBODY, &collecting(&node, "n", valid(&[("c2", "eth0")])));
    answer.result();
    assert!(answer.stderr.contains("10.1.17.10: reserved for no container: given back"), "{answer:?}");
    assert_eq!(node.reserved("n"), ["10.1.17.14", "10.1.17.15", "10.1.17.3"]);
}

#[test]
fn temporary_files_of_killed_calls_are_swept() {
    let node = Node::new(V4);
    added(&node, "n", &[("c1", "eth0")]);
    let old = SystemTime::now() - Duration::from_secs(3600);
    for name in [".c7.4711", ".c8.new"] {
        File::create(node.path("flannel").join(name)).unwrap().set_modified(old).unwrap();
    }
    fs::write(node.path("flannel/.c9.new"), "of a call that goes on").unwrap();
    node.call("GC", NOBODY, &collecting(&node, "n", valid(&[("c1", "eth0")]))).result();
    assert_eq!(node.kept(), [".c9.new", "c1"]);
    // The DEL of its own attachment needs no GC.
    let pod = Pod { container: "c9", ifname: "eth0", netns: NO_NETNS };
    node.call("DEL", pod, &node.network("n", "1.0.0", json!({"type": "host-local"}))).result();
    assert_eq!(node.kept(), ["c1"]);
}

#[test]
fn the_plugins_beside_flannel_collect_and_tell_their_status_when_they_are_called_themselves() {
    let node = Node::with_namespace(V4);
    let plugins = node.own_plugins();
    let namespace = Namespace::new();
    let path = namespace.path();
    let call = |plugin: &str, verb: &str, pod: Pod<'_>, more: Value| {
        let mut config = json!({"name": "n", "cniVersion": "1.1.0", "type": plugin, "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": node.path("addresses"), "ranges": [[{"subnet": "10.1.17.0/24"}]]}});
        if plugin == "host-local" {
            config.as_object_mut().unwrap().remove("isGateway");
        }
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        node.call_plugin(&format!("{plugins}/{plugin}"), verb, pod, &config.to_string(), &[])
    };
    for plugin in ["host-local", "bridge"] {
        for container in ["c1", "c2"] {
            let pod = Pod { container, ifname: "eth0", netns: &path };
            call(plugin, "ADD", pod, json!({})).result();
            if plugin == "bridge" {
                namespace.ip(&["link", "del", "eth0"]);
            }
        }
        assert_eq!(node.reserved("n").len(), 2, "{plugin}");
        let (code, msg) = call(plugin, "GC", NOBODY, json!({})).error();
        assert!(code == 7 && msg.contains("nothing was dropped"), "{plugin}: {code} {msg}");
        call(plugin, "GC", NOBODY, valid(&[("c2", "eth0")])).result();
        assert_eq!(node.reserved("n").len(), 1, "{plugin}");
        call(plugin, "GC", NOBODY, valid(&[])).result();
        assert_eq!(node.reserved("n").len(), 0, "{plugin}");
    }
    for plugin in ["host-local", "bridge", "portmap", "bandwidth", "loopback"] {
        assert_eq!(call(plugin, "STATUS", NOBODY, json!({})).result(), Value::Null, "{plugin}");
        call(plugin, "GC", NOBODY, valid(&[])).result();
    }
    fs::remove_dir_all(node.path("addresses")).unwrap();
    fs::write(node.path("addresses"), "").unwrap();
    for plugin in ["host-local", "bridge"] {
        assert_eq!(call(plugin, "STATUS", NOBODY, json!({})).error().0, 50, "{plugin}");
    }
}
