//! What the plugin says when it does nothing, and that it then leaves nothing behind.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{NO_NETNS, Node, Pod, V4, answer};

const POD: Pod<'_> = Pod { container: "c1", ifname: "eth0", netns: NO_NETNS };

#[test]
fn without_subnet_env_the_runtime_is_to_try_again_later() {
    let node = Node::new(V4);
    let mut network = node.network("n", "1.1.0", json!({"type": "stand-in-1.1"}));
    network["waitSeconds"] = json!(0);
    let file = node.path("subnet.env");
    let path = node.stand_in().path();
    let status = node.call_with("STATUS", POD, &network.to_string(), &[("CNI_PATH", &path)]);
    assert_eq!(status.result(), Value::Null);
    fs::write(&file, "FLANNEL_MTU=1450\n").unwrap();
    let (code, msg) = node.call("STATUS", POD, &network).error();
    assert!(code == 50 && msg.contains("is missing FLANNEL_NETWORK,"), "{msg}");
    fs::remove_file(&file).unwrap();
    assert_eq!(node.call("STATUS", POD, &network).error().0, 50);
    let (code, msg) = node.call("ADD", POD, &network).error();
    let go = format!(
        "failed to load flannel 'subnet.env' file: open {}: no such file or directory. Check the flannel pod log for this node.",
        file.display()
    );
    assert!(code == 11 && msg.starts_with(&go) && msg.len() > go.len(), "{code} {msg}");
    assert!(node.kept().is_empty());
}

#[test]
fn a_delegate_that_did_not_run_leaves_nothing_to_take_down() {
    let node = Node::new(V4);
    let network = node.network("n", "1.0.0", json!({"type": "no-such-plugin"}));
    let (code, msg) = node.call("ADD", POD, &network).error();
    let expected =
        r#"failed to delegate add: failed to find plugin "no-such-plugin" in path [/usr/lib/cni]: install"#;
    assert!(code == 999 && msg.starts_with(expected), "{code} {msg}");
    assert!(node.kept().is_empty());
    // Debian's host-local is too old for this version: its own error, with its own code.
    let network = node.network("n", "1.1.0", json!({"type": "host-local"}));
    assert_eq!(node.call("ADD", POD, &network).error(), (1, "incompatible CNI versions".into()));
    assert!(node.kept().is_empty());
}

#[test]
fn the_plugins_own_namespace_is_no_pod() {
    let node = Node::new(V4);
    let network = node.network("n", "1.0.0", json!({"type": "host-local"})).to_string();
    let own = Pod { netns: "/proc/self/ns/net", ..POD };
    let allowed = [("CNI_NETNS_OVERRIDE", "True")];
    assert!(node.call_with("ADD", own, &network, &allowed).success);
    assert!(node.call_with("DEL", own, &network, &allowed).success);
    let refused = (8, "plugin's netns and netns from CNI_NETNS should not be the same".to_owned());
    assert_eq!(node.call_with("ADD", own, &network, &[]).error(), refused);
    assert_eq!(node.call_with("DEL", own, &network, &[]).error(), refused);
}

#[test]
fn an_error_is_one_indented_object_on_standard_output() {
    let node = Node::new(V4);
    let given = node.call_with("ADD", Pod { container: "../c1", ..POD }, "{}", &[]);
    assert!(!given.success && given.stderr.is_empty(), "{given:?}");
    assert_eq!(
        given.stdout,
        "{\n    \"code\": 4,\n    \"msg\": \"invalid characters in containerID\",\n    \"details\": \"../c1\"\n}"
    );
    for (stdin, code) in [("", 6), ("{\"name\":", 6), ("{}", 7), (r#"{"name":"n","cniVersion":"7.0.0"}"#, 1)]
    {
        for verb in ["ADD", "DEL", "CHECK"] {
            assert_eq!(node.call_with(verb, POD, stdin, &[]).error().0, code, "{verb} {stdin}");
        }
    }
    for (verb, version) in [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0")] {
        let network = node.network("n", version, json!({}));
        let refused = (1, format!("config version does not allow {verb}"));
        assert_eq!(node.call(verb, POD, &network).error(), refused);
    }
}

#[test]
fn the_versions_are_told_to_machines_and_to_people() {
    let flannel = || Command::new(crate::support::flannel());
    let mut machine = flannel();
    machine.env("CNI_COMMAND", "VERSION");
    assert_eq!(
        answer(machine, "").stdout.trim_end(),
        r#"{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#
    );
    let told = answer(flannel(), "");
    assert!(told.success && told.stdout.is_empty(), "{told:?}");
    assert!(told.stderr.starts_with("CNI Plugin flannel version v"), "{told:?}");
    assert!(told.stderr.contains("0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{told:?}");
}
