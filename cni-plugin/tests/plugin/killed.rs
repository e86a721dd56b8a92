//! A plugin that is killed, at each of its system calls that can change something.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::pods::V6;
use crate::support::{NO_NETNS, Namespace, Node, Pod, V4, flannel, write_program};

/// A delegate that would still make something after its parent is gone.
const SLOW: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
echo $$ >pid.new && mv pid.new pid
while ! [ -e go-on ]; do sleep 0.01; done
echo made >made
"#;

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_delegate_ends_with_the_plugin_that_is_killed() {
    let node = Node::new(V4);
    let directory = node.path("bin");
    fs::create_dir(&directory).unwrap();
    write_program(&directory.join("slow"), SLOW);
    let network = node.network("n", "1.0.0", json!({"type": "slow"}));
    fs::write(node.path("stdin"), network.to_string()).unwrap();
    let mut plugin = Command::new(flannel())
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_NETNS", NO_NETNS)
        .env("CNI_PATH", &directory)
        .stdin(fs::File::open(node.path("stdin")).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the delegate starts", || directory.join("pid").exists());
    let delegate = fs::read_to_string(directory.join("pid")).unwrap();
    let status = Path::new("/proc").join(delegate.trim()).join("status");
    let alive = || fs::read_to_string(&status).is_ok_and(|status| !status.contains("State:\tZ"));
    assert!(alive());
    plugin.kill().unwrap();
    plugin.wait().unwrap();
    eventually("the delegate ends", || !alive());
    fs::write(directory.join("go-on"), "").unwrap();
    assert!(!directory.join("made").exists());
}

/// The calls that make, change or remove something outside of the process, or on which it waits. The C library decides between
/// `open` and `openat`.
const STEPS: [&str; 10] =
    ["open", "openat", "write", "sendto", "rename", "unlink", "mkdir", "flock", "setns", "recvfrom"];

/// Runs a plugin that is killed at a system call, if it comes to it.
pub(crate) fn at(
    node: &Node,
    program: &str,
    verb: &str,
    pod: Pod<'_>,
    config: &Value,
    call: &str,
    number: usize,
) {
    let stdin = node.path("stdin");
    fs::write(&stdin, config.to_string()).unwrap();
    let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=KILL:when={number}"));
    let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
    traced_program(node, program, verb, pod, stdin.to_str().unwrap(), &options);
}

/// `flannel` under strace, in the node's namespace.
fn traced(node: &Node, verb: &str, pod: Pod<'_>, stdin: &str, options: &[&str]) -> bool {
    traced_program(node, flannel(), verb, pod, stdin, options)
}

fn traced_program(
    node: &Node,
    program: &str,
    verb: &str,
    pod: Pod<'_>,
    stdin: &str,
    options: &[&str],
) -> bool {
    let mut command = node.host().command("strace");
    command.args(options).arg(program);
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", pod.container)
        .env("CNI_IFNAME", pod.ifname)
        .env("CNI_NETNS", pod.netns)
        .env("CNI_PATH", "/nowhere")
        .stdin(fs::File::open(stdin).unwrap())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().expect("install the package strace").success()
}

/// What strace tells of a call that succeeds.
pub(crate) fn log_of(node: &Node, verb: &str, pod: Pod<'_>, stdin: &str, trace: &str) -> String {
    let log = node.path("trace");
    assert!(traced(node, verb, pod, stdin, &["-s", "4096", "-o", log.to_str().unwrap(), "-e", trace]));
    fs::read_to_string(log).unwrap()
}

/// The steps of a call that succeeds, each as a system call and its how manieth it is.
fn steps(node: &Node, verb: &str, pod: Pod<'_>, stdin: &str) -> Vec<(String, usize)> {
    // Not every architecture has all of them.
    let log = log_of(node, verb, pod, stdin, &format!("trace=?{}", STEPS.join(",?")));
    let mut counts = std::collections::BTreeMap::<String, usize>::new();
    let names = log.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name.to_owned());
    names
        .filter(|name| STEPS.contains(&&**name))
        .map(|name| {
            let count = counts.entry(name.clone()).or_default();
            *count += 1;
            (name, *count)
        })
        .collect()
}

/// Kills the verb at each of its steps; a DEL after it has to leave nothing.
fn killed_everywhere(verb: &str) {
    let node = Node::with_namespace(&format!("{V4}{V6}"));
    let namespace = Namespace::new();
    let path = namespace.path();
    let pod = Pod { container: "c1", ifname: "eth0", netns: &path };
    let network = node.network("n", "1.0.0", json!({"hairpinMode": true, "isDefaultGateway": true}));
    let stdin = node.path("stdin");
    fs::write(&stdin, network.to_string()).unwrap();
    let stdin = stdin.to_str().unwrap();
    // Forwarding is switched on by the first pod, and stays.
    node.call("ADD", pod, &network).result();
    node.call("DEL", pod, &network).result();
    // Each time as on a node that has had no pod yet.
    let prepared = || {
        for directory in ["addresses", "flannel"] {
            let _ = fs::remove_dir_all(node.path(directory));
        }
        if node.host().links().contains(&"cni0".into()) {
            node.host().ip(&["link", "del", "cni0"]);
        }
        if verb == "DEL" {
            node.call("ADD", pod, &network).result();
        }
    };
    prepared();
    let steps = steps(&node, verb, pod, stdin);
    node.call("DEL", pod, &network).result();
    assert!(steps.len() >= 12, "{steps:?}");
    for (name, count) in steps {
        prepared();
        let inject = format!("inject={name}:signal=KILL:when={count}");
        let trace = format!("trace={name}");
        let survived = traced(&node, verb, pod, stdin, &["-o", "/dev/null", "-e", &trace, "-e", &inject]);
        assert!(!survived, "{verb} {name} {count}");
        node.call("DEL", pod, &network).result();
        let what = format!("{verb} killed at {name} number {count}");
        assert!(node.host().links().iter().all(|link| link == "lo" || link == "cni0"), "{what}");
        assert_eq!(namespace.links(), ["lo"], "{what}");
        assert_eq!((node.kept(), node.reserved("n")), (vec![], vec![]), "{what}");
        let left: Vec<_> = node.reservations("n").into_keys().collect();
        assert!(
            left.iter().all(|name| name == "lock" || name.starts_with("last_reserved_ip.")),
            "{what}: {left:?}"
        );
    }
}

#[test]
fn an_add_that_is_killed_anywhere_is_undone_by_del() {
    killed_everywhere("ADD");
}

#[test]
fn a_del_that_is_killed_anywhere_is_completed_by_the_next() {
    killed_everywhere("DEL");
}
