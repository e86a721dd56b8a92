//! A plugin that is killed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{FLANNEL, NO_NETNS, Node, V4};

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
    fs::write(directory.join("slow"), SLOW).unwrap();
    fs::set_permissions(directory.join("slow"), fs::Permissions::from_mode(0o755)).unwrap();
    let network = node.network("n", "1.0.0", json!({"type": "slow"}));
    fs::write(node.path("stdin"), network.to_string()).unwrap();
    let mut plugin = Command::new(FLANNEL)
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
