//! `flanneld doctor` about what happens to packets between the nodes: a port that is blocked, in which direction, and a path
//! that is too narrow; and about what the CNI plugin told.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::bed::{Cluster, VXLAN};
use crate::doctor::Patient;

const WIREGUARD: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard","Userspace":"always"}}"#;

/// An outage is clear after 15 lost probes, at most one a second, and a path MTU after a few rounds.
const A_WHILE: Duration = Duration::from_secs(120);

const QUICK: &[&str] = &["--probe-interval=1s", "--healthz-ip=0.0.0.0"];

#[test]
fn a_port_that_is_blocked_in_one_direction_is_named_with_that_direction() {
    let cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, QUICK);
    let b = cluster.join_with(QUICK);
    let (here, there) = (a.member.node.address(), b.node.address());
    a.recovers("the peer's arrival");
    a.member.wait("a probe", || {
        let (_, text) = a.member.agent.get("/peers").unwrap();
        text.contains("\"verdict\":\"fine\"")
    });
    let peer = b.subnet().to_string();
    let (forth, back) = (format!("from {here} to {there}"), format!("from {there} to {here}"));
    for (rule, evidence, remedy) in [
        (
            format!("ip daddr {there} udp dport 8472 drop"),
            "what this node sends does not arrive there",
            &forth,
        ),
        (format!("ip saddr {there} udp dport 8472 drop"), "only the way back is blocked", &back),
        ("udp dport 8472 drop".to_owned(), "what this node sends does not arrive there", &forth),
    ] {
        cluster.switch_rules(&rule);
        a.is_told(
            &rule,
            [&peer, "UDP port 8472 is dropped between the nodes", "allow UDP port 8472"],
            A_WHILE,
        );
        a.is_told(&rule, [&peer, evidence, remedy], A_WHILE);
        cluster.switch_rules("");
        a.is_over(&rule, A_WHILE);
    }
}

#[test]
fn a_direction_that_the_peer_can_not_tell_is_not_made_up() {
    let cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, QUICK);
    // Like Go flannel's, its health port tells nothing.
    let b = cluster.join_with(&["--probe-interval=1s", "--healthz-ip=127.0.0.1"]);
    a.member.wait("a probe", || a.member.agent.get("/peers").unwrap().1.contains("\"verdict\":\"fine\""));
    cluster.switch_rules("udp dport 8472 drop");
    a.is_told(
        "the blocked port",
        [&b.subnet().to_string(), "UDP port 8472 is dropped", "both ways"],
        A_WHILE,
    );
    let troubles = a.troubles();
    assert!(
        troubles.iter().all(|trouble| !trouble["cause"].as_str().unwrap().contains("counters")),
        "{troubles:#?}"
    );
}

#[test]
fn a_path_that_is_too_narrow_is_named_with_the_length_that_passes() {
    let cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, QUICK);
    let b = cluster.join_with(QUICK);
    a.member.wait("a probe", || a.member.agent.get("/peers").unwrap().1.contains("\"path_mtu\":1450"));
    cluster.switch_rules("ip length > 1400 drop");
    let peer = b.subnet().to_string();
    a.is_told(
        "the narrow path",
        [&peer, "packets of 1450 bytes", "lower the MTU of the pods by 100"],
        A_WHILE,
    );
    cluster.switch_rules("");
    a.is_over("the narrow path", A_WHILE);
}

#[test]
fn a_call_of_the_plugin_that_failed_is_named_in_its_words() {
    let cluster = Cluster::new(VXLAN);
    let a = Patient::of(&cluster, &[]);
    let report = r#"{"verb":"ADD","code":7,"us":900,"error":"failed to find plugin \"portmap\" in path [/opt/cni/bin]"}"#;
    let socket = a.member.node.subnet_file().with_file_name("cni.sock");
    a.member.wait("the socket", || socket.exists());
    UnixDatagram::unbound().unwrap().send_to(report.as_bytes(), &socket).unwrap();
    a.is_told(
        "the call",
        ["ADD (code 7)", "failed to find plugin \"portmap\"", "install the CNI plugins"],
        A_WHILE,
    );
}

#[test]
fn handshakes_that_are_dropped_between_the_nodes_are_named_with_the_port() {
    let cluster = Cluster::new(WIREGUARD);
    cluster.switch_rules("udp dport 51820 drop");
    let a = Patient::of(&cluster, QUICK);
    let b = cluster.join_with(QUICK);
    let (peer, there) = (b.subnet().to_string(), b.node.address().to_string());
    a.is_told(
        "handshakes that never succeed",
        [&peer, &format!("{there} answers, but no handshake of WireGuard"), "allow UDP port 51820 both ways"],
        A_WHILE,
    );
    let failing = "flannel_wireguard_peers{session=\"failing\"} 1";
    b.wait("a failing session in the metrics", || b.agent.get("/metrics").unwrap().1.contains(failing));
    cluster.switch_rules("");
    a.is_over("handshakes that never succeed", A_WHILE);
}
