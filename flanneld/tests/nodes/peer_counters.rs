//! Series of single peers: who has them, and bytes to and from each peer as they were sent.

use std::collections::BTreeSet;

use serde_json::Value;
use subnet::Family;

use crate::bed::{Cluster, Member, VXLAN};
use crate::site::{Kind, Site, config};

fn metrics(member: &Member) -> String {
    let (code, text) = member.agent.get("/metrics").unwrap();
    assert_eq!(code, 200, "{text}");
    text
}

/// The value of the series of this peer.
fn series(member: &Member, name: &str, peer: &str) -> Option<u64> {
    let start = format!("flannel_{name}{{peer=\"{peer}\"}} ");
    metrics(member).lines().find_map(|line| line.strip_prefix(&start)?.parse().ok())
}

/// Waits for the last of what was under way: of several pings, the first answer is waited for.
fn wait_until_calm<T: PartialEq>(member: &Member, counted: impl Fn() -> T) {
    member.wait("calm", || {
        let before = counted();
        std::thread::sleep(std::time::Duration::from_millis(300));
        counted() == before
    });
}

fn tables(member: &Member) -> String {
    member.show("nft list tables")
}

#[test]
fn bytes_of_each_peer_are_counted_by_any_backend_and_gone_with_the_agent() {
    let both = |backend| {
        format!(
            r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10::/48","Backend":{{"Type":"{backend}"}}}}"#
        )
    };
    let odd = r#"{"Network":"10.244.0.0/16","SubnetLen":22,"Backend":{"Type":"host-gw"}}"#;
    for config in [VXLAN.to_owned(), odd.to_owned(), both("vxlan")] {
        let cluster = Cluster::new(&config);
        let off = ["--probe-interval=0"];
        let mut a = cluster.join_with(&["--probe-interval=0", "--peer-counters"]);
        let (b, c) = (cluster.join_with(&off), cluster.join_with(&off));
        let (pod, there) = (a.pod(), b.pod());
        a.wait("the way", || pod.namespace().reaches(there.address()).unwrap_or(false));
        a.wait("both peers", || [&b, &c].iter().all(|peer| a.node.has_route(peer.subnet()).unwrap()));
        let (to_b, to_c) = (b.subnet().to_string(), c.subnet().to_string());
        let counted = |peer: &str| {
            (series(&a, "peer_transmit_bytes_total", peer), series(&a, "peer_receive_bytes_total", peer))
        };
        wait_until_calm(&a, || counted(&to_b));
        let before = counted(&to_b);
        assert!(before.0.is_some() && before.1.is_some(), "{config}: {}", metrics(&a));
        // 100 bytes, 8 of ICMP and 20 of IP.
        pod.namespace()
            .command("ping")
            .args(["-c", "7", "-i", "0.01", "-s", "100", &there.address().to_string()])
            .ok()
            .unwrap();
        let after = counted(&to_b);
        assert_eq!(after.0.unwrap() - before.0.unwrap(), 7 * 128, "{config}");
        assert_eq!(after.1.unwrap() - before.1.unwrap(), 7 * 128, "{config}");
        assert_eq!(counted(&to_c), (Some(0), Some(0)), "nothing was sent there");
        let (_, list) = a.agent.get("/peers").unwrap();
        let list: Value = serde_json::from_str(&list).unwrap();
        let entry = list["peers"].as_array().unwrap().iter().find(|peer| peer["subnet"] == *to_b).unwrap();
        assert_eq!(entry["transmitted_bytes"], after.0.unwrap(), "{entry}");

        // A peer that goes takes its series along; the counters of the others stay.
        cluster.leaves(c);
        a.wait("the peer to go", || series(&a, "peer_transmit_bytes_total", &to_c).is_none());
        assert_eq!(counted(&to_b), after, "{config}");

        assert!(tables(&a).contains("flannel-peers-"), "{}", tables(&a));
        a.agent.kill().unwrap();
        a.wait("the table to go", || !tables(&a).contains("flannel-peers-"));
    }
}

#[test]
fn nothing_is_counted_unless_it_is_asked_for() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    a.wait("the peer", || a.node.has_route(b.subnet()).unwrap());
    assert!(!metrics(&a).contains("flannel_peer_transmit_bytes"), "{}", metrics(&a));
    assert!(!tables(&a).contains("flannel-peers-"), "{}", tables(&a));
}

#[test]
fn beyond_the_limit_no_peer_has_a_series_and_below_it_each_has() {
    let cluster = Cluster::new(VXLAN);
    let a = cluster.join_with(&["--metrics-peers=1", "--probe-interval=1s", "--peer-counters"]);
    let b = cluster.join();
    let of_peers = |member: &Member| metrics(member).lines().filter(|line| line.contains("{peer=")).count();
    let up = |peer: &Member| series(&a, "peer_up", &peer.subnet().to_string());
    a.wait("the first peer", || up(&b) == Some(1));
    assert!(series(&a, "peer_transmit_bytes_total", &b.subnet().to_string()).is_some(), "{}", metrics(&a));
    let c = cluster.join();
    a.wait("no series", || a.node.has_route(c.subnet()).unwrap() && of_peers(&a) == 0);
    assert!(metrics(&a).contains("flannel_peers{state=\"usable\"} 2"), "{}", metrics(&a));
    cluster.leaves(c);
    a.wait("series again", || up(&b) == Some(1));
}

#[test]
fn udp_counts_the_bytes_of_each_peer_by_itself() {
    let cluster = Cluster::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#);
    let off = ["--probe-interval=0"];
    let (a, b) = (cluster.join_with(&off), cluster.join_with(&off));
    let (pod, there) = (a.pod(), b.pod());
    a.wait("the way", || pod.namespace().reaches(there.address()).unwrap_or(false));
    let to_b = b.subnet().to_string();
    let counted =
        || (series(&a, "peer_transmit_bytes_total", &to_b), series(&a, "peer_receive_bytes_total", &to_b));
    let ping = |count: &str| {
        let target = there.address().to_string();
        let args = ["-c", count, "-i", "0.01", "-s", "100", &target];
        pod.namespace().command("ping").args(args).ok().unwrap();
    };
    wait_until_calm(&a, counted);
    let before = counted();
    ping("7");
    // A worker counts a batch once it has carried it.
    a.wait("the last answer's count", || counted().1.unwrap() - before.1.unwrap() >= 7 * 128);
    let after = counted();
    assert_eq!(after.0.unwrap() - before.0.unwrap(), 7 * 128);
    assert_eq!(after.1.unwrap() - before.1.unwrap(), 7 * 128);
    // A peer that comes changes nothing of what was counted.
    let c = cluster.join_with(&off);
    let to_c = c.subnet().to_string();
    a.wait("the other peer", || series(&a, "peer_transmit_bytes_total", &to_c) == Some(0));
    assert_eq!(counted(), after);
    assert!(!tables(&a).contains("flannel-peers-"), "{}", tables(&a));
    let (_, list) = a.agent.get("/peers").unwrap();
    let list: Value = serde_json::from_str(&list).unwrap();
    let entry = list["peers"].as_array().unwrap().iter().find(|peer| peer["subnet"] == *to_b).unwrap();
    assert_eq!(entry["received_bytes"], after.1.unwrap(), "{entry}");
}

#[test]
fn a_node_with_both_families_is_one_peer_and_no_series_is_there_twice() {
    let site = Site::new(Kind::Kube, &config(&Family::BOTH, r#"{"Type":"vxlan"}"#));
    let args = ["--probe-interval=1s", "--peer-counters"];
    let (a, b) = (site.join_with(&args), site.join_with(&args));
    let name = b.node.name();
    a.wait("the peer", || series(&a, "peer_up", &name) == Some(1));
    assert!(series(&a, "peer_transmit_bytes_total", &name).is_some(), "{}", metrics(&a));
    let text = metrics(&a);
    let mut seen = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        assert!(seen.insert(series), "{series} is there twice in\n{text}");
    }
}
