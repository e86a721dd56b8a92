//! The checks of the Go plugins' framework, for every verb (contract §7.5).

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Answer, NO_NETNS, Node, PLUGINS, Pod, V4, flannel};

const VERBS: [&str; 5] = ["ADD", "DEL", "CHECK", "STATUS", "GC"];
const POD: Pod<'_> = Pod { container: "c1", ifname: "eth0", netns: NO_NETNS };

/// A configuration with which each of the verbs gets past the framework.
fn network(node: &Node, verb: &str) -> Value {
    let version = if ["STATUS", "GC"].contains(&verb) { "1.1.0" } else { "0.4.0" };
    let kind = if verb == "STATUS" { "stand-in-1.1" } else { "host-local" };
    let mut network = node.network("n", version, json!({"type": kind}));
    if verb == "GC" {
        network["cni.dev/valid-attachments"] = json!([]);
    }
    if verb == "CHECK" {
        network["prevResult"] = json!({"cniVersion": "0.4.0"});
    }
    network
}

#[track_caller]
fn refused(answer: &Answer, code: u64, msg: &str) {
    assert_eq!(answer.error(), (code, msg.to_owned()));
    let members: Value = serde_json::from_str(&answer.stdout).unwrap();
    let indented = answer.stdout.lines().skip(1).take(members.as_object().unwrap().len());
    assert!(indented.clone().all(|line| line.starts_with("    \"")), "{answer:?}");
}

#[test]
fn each_verb_needs_its_variables_and_no_others() {
    let node = Node::new(V4);
    let variables = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"];
    let needed = |verb: &str, variable: &str| match verb {
        "ADD" | "CHECK" => true,
        "DEL" => variable != "CNI_NETNS",
        _ => variable == "CNI_PATH",
    };
    let path = node.stand_in().path();
    for verb in VERBS {
        let network = network(&node, verb).to_string();
        let all: Vec<_> = variables.into_iter().filter(|variable| needed(verb, variable)).collect();
        for variable in variables {
            let answer = node.call_with(verb, POD, &network, &[("CNI_PATH", &path), (variable, "")]);
            if needed(verb, variable) {
                refused(&answer, 4, &format!("required env variables [{variable}] missing"));
            } else {
                assert!(answer.success, "{verb} without {variable}: {answer:?}");
            }
        }
        let none: Vec<_> = variables.into_iter().map(|variable| (variable, "")).collect();
        let answer = node.call_with(verb, POD, &network, &none);
        refused(&answer, 4, &format!("required env variables [{}] missing", all.join(",")));
    }
}

#[test]
fn names_that_are_none_are_refused_by_the_verbs_that_use_them() {
    let node = Node::new(V4);
    let container = "invalid characters in containerID";
    let characters = "interface name contains / or : or whitespace characters";
    let path = node.stand_in().path();
    for (variable, value, msg) in [
        ("CNI_CONTAINERID", "../c1", container),
        ("CNI_CONTAINERID", "c 1", container),
        ("CNI_CONTAINERID", "_c1", container),
        ("CNI_IFNAME", "sixteencharacter", "interface name is too long"),
        ("CNI_IFNAME", ".", "interface name is . or .."),
        ("CNI_IFNAME", "..", "interface name is . or .."),
        ("CNI_IFNAME", "a/b", characters),
        ("CNI_IFNAME", "eth0:1", characters),
        ("CNI_IFNAME", "eth 0", characters),
    ] {
        for verb in VERBS {
            let variables = [("CNI_PATH", &*path), (variable, value)];
            let answer = node.call_with(verb, POD, &network(&node, verb).to_string(), &variables);
            if ["STATUS", "GC"].contains(&verb) {
                assert!(answer.success, "{verb} {value:?}: {answer:?}");
            } else {
                refused(&answer, 4, msg);
            }
        }
    }
    assert!(node.kept().is_empty() && node.reserved("n").is_empty());
}

#[test]
fn what_is_no_network_configuration_is_refused_by_every_verb() {
    let node = Node::new(V4);
    for verb in VERBS {
        let call = |stdin: &str| node.call_with(verb, POD, stdin, &[]);
        for stdin in ["", "{", "[]", "null", r#"{"name":7}"#, r#"{"name":"n","cniVersion":1}"#] {
            let (code, msg) = call(stdin).error();
            assert!(
                code == 6 && msg.starts_with("error unmarshall network config: "),
                "{verb} {stdin}: {msg}"
            );
        }
        refused(&call("{}"), 7, "missing network name");
        refused(&call(r#"{"name":"a b"}"#), 7, "invalid characters found in network name");
        refused(&call(r#"{"name":"n","cniVersion":"7.0.0"}"#), 1, "incompatible CNI versions");
    }
    assert!(node.kept().is_empty() && node.reserved("n").is_empty());
}

#[test]
fn each_verb_works_with_the_versions_that_know_it() {
    let versions = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    for verb in VERBS {
        let since = match verb {
            "CHECK" => "0.4.0",
            "STATUS" | "GC" => "1.1.0",
            _ => "0.1.0",
        };
        for version in versions {
            let node = Node::new(V4);
            let path = [("CNI_PATH", &*node.stand_in().path())];
            let mut network = network(&node, verb);
            network["cniVersion"] = version.into();
            network["delegate"]["type"] = "stand-in-1.1".into();
            let answer = node.call_with(verb, POD, &network.to_string(), &path);
            if version >= since {
                assert!(answer.success, "{verb} {version}: {answer:?}");
            } else {
                refused(&answer, 1, &format!("config version does not allow {verb}"));
            }
        }
    }
}

#[test]
fn version_needs_nothing_and_unknown_verbs_get_nothing() {
    let node = Node::new(V4);
    let none = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"].map(|variable| (variable, ""));
    let answer = node.call_with("VERSION", POD, "nonsense", &none).result();
    assert_eq!(answer["supportedVersions"].as_array().unwrap().len(), 7);
    for verb in ["add", "UPDATE", " ADD"] {
        refused(&node.call_with(verb, POD, "{}", &[]), 4, &format!("unknown CNI_COMMAND: {verb}"));
    }
}

#[test]
fn only_true_or_1_allows_the_plugins_own_namespace() {
    let own = Pod { netns: "/proc/self/ns/net", ..POD };
    for verb in ["ADD", "DEL"] {
        for (over, allowed) in
            [("", false), ("0", false), ("yes", false), ("1", true), ("true", true), ("TRUE", true)]
        {
            let node = Node::new(V4);
            let variables = [("CNI_NETNS_OVERRIDE", over)];
            let answer = node.call_with(verb, own, &network(&node, verb).to_string(), &variables);
            if allowed {
                assert!(answer.success, "{verb} {over:?}: {answer:?}");
            } else {
                refused(&answer, 8, "plugin's netns and netns from CNI_NETNS should not be the same");
            }
        }
    }
}

#[test]
fn a_delegate_is_a_regular_file_with_a_plain_name() {
    let node = Node::new(V4);
    std::fs::create_dir_all(node.path("bin/host-local")).unwrap();
    let bin = node.path("bin");
    for verb in ["ADD", "STATUS", "GC"] {
        let call = |kind: &str| {
            let mut network = network(&node, verb);
            network["delegate"]["type"] = kind.into();
            let path = [("CNI_PATH", bin.to_str().unwrap())];
            node.call_with(verb, POD, &network.to_string(), &path).error()
        };
        let code = if verb == "STATUS" { 50 } else { 999 };
        let (given, msg) = call("host-local");
        assert!(
            given == code && msg.contains(r#"failed to find plugin "host-local" in path ["#),
            "{verb} {msg}"
        );
        let (given, msg) = call("../host-local");
        assert!(given == code && msg.contains(r#"invalid plugin name: "../host-local""#), "{verb} {msg}");
    }
    assert!(node.kept().is_empty());
}

#[test]
fn the_plugins_own_namespace_is_refused_before_a_delegate_runs() {
    let node = Node::new(V4);
    let own = Pod { netns: "/proc/self/ns/net", ..POD };
    let (code, _) = node.call("ADD", own, &network(&node, "ADD")).error();
    assert_eq!(code, 8);
    assert_eq!((node.reserved("n"), node.kept()), (vec![], vec![]));
}

#[test]
fn foreign_text_of_any_length_gives_an_error_of_bearable_length() {
    let node = Node::new(V4);
    let long = "x".repeat(100_000);
    let mut wrong_type = network(&node, "ADD");
    wrong_type["waitSeconds"] = json!(long);
    for (pod, network) in [
        (Pod { container: &format!("-{long}"), ..POD }, network(&node, "ADD")),
        (POD, wrong_type),
        (POD, node.network(&format!("-{long}"), "1.0.0", json!({}))),
        (POD, node.network("n", "1.0.0", json!({"type": long}))),
        (POD, node.network("n", &long, json!({}))),
    ] {
        let answer = node.call("ADD", pod, &network);
        answer.error();
        assert!(answer.stdout.len() + answer.stderr.len() < 6000, "{}", answer.stdout.len());
    }
}

#[test]
fn a_runtime_that_reads_no_answer_or_closed_its_streams_gets_an_exit_status() {
    let node = Node::new(V4);
    let network = node.network("n", "1.0.0", json!({"type": "host-local"})).to_string();
    let call = |verb: &str| {
        let mut command = Command::new(flannel());
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", "c1")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", NO_NETNS)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped());
        command
    };
    // The result is not read: the plugin fails, and is not killed by a signal.
    let mut add = call("ADD").stdout(Stdio::piped()).spawn().unwrap();
    drop(add.stdout.take());
    add.stdin.take().unwrap().write_all(network.as_bytes()).unwrap();
    assert_eq!(add.wait().unwrap().code(), Some(1));
    assert_eq!(node.reserved("n").len(), 1, "the runtime's DEL gives it back");
    // No file that is opened takes the place of a stream that is closed.
    let mut closed = Command::new("sh");
    closed.args(["-c", "exec \"$0\" >&- 2>&-", flannel()]).stdin(Stdio::piped());
    for (name, value) in call("DEL").get_envs() {
        closed.env(name, value.unwrap());
    }
    let mut closed = closed.spawn().unwrap();
    closed.stdin.take().unwrap().write_all(network.as_bytes()).unwrap();
    assert!(closed.wait().unwrap().success());
    assert_eq!((node.reserved("n").len(), node.kept().len()), (0, 0));
}
