//! ADD while flanneld is still starting.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::{NO_NETNS, Node, PLUGINS, V4, flannel};

/// An ADD without a `subnet.env` that has said that it waits for one.
fn waiting(node: &Node) -> (Child, BufReader<impl Read>) {
    let mut network = node.network("n", "1.0.0", json!({"type": "host-local"}));
    network["waitSeconds"] = json!(255);
    let mut add = Command::new(flannel())
        .envs([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")])
        .envs([("CNI_NETNS", NO_NETNS), ("CNI_PATH", PLUGINS)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    add.stdin.take().unwrap().write_all(network.to_string().as_bytes()).unwrap();
    let mut stderr = BufReader::new(add.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(line, format!("waiting up to 255 s for {}\n", node.path("subnet.env").display()));
    (add, stderr)
}

fn appears(node: &Node, content: &str) {
    fs::write(node.path("new"), content).unwrap();
    fs::rename(node.path("new"), node.path("subnet.env")).unwrap();
}

#[test]
fn an_add_before_subnet_env_succeeds_once_it_is_written() {
    let node = Node::new(V4);
    fs::remove_file(node.path("subnet.env")).unwrap();
    let (mut add, _stderr) = waiting(&node);
    assert!(add.try_wait().unwrap().is_none());
    appears(&node, V4);
    let output = add.wait_with_output().unwrap();
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{result}");
    assert_eq!(result["ips"][0]["address"], "10.1.17.2/24");
}

#[test]
fn a_damaged_subnet_env_ends_the_wait_at_once() {
    let node = Node::new(V4);
    fs::remove_file(node.path("subnet.env")).unwrap();
    let (add, _stderr) = waiting(&node);
    appears(&node, "FLANNEL_MTU=1450\n");
    let output = add.wait_with_output().unwrap();
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!output.status.success() && error["code"] == 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("is missing FLANNEL_NETWORK"), "{error}");
}
