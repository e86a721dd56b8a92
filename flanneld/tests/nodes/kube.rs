//! Agents that keep their leases in Kubernetes.

use std::time::{Duration, Instant};

use backends::testing::{Node, wait_for};
use subnet::testing::{Refusal, node};

use crate::bed::{LIMIT, Member, flanneld};
use crate::kubernetes::Kubernetes;

#[test]
fn nodes_with_nothing_but_an_api_server_carry_their_pods_packets() {
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    assert_eq!(
        (a.subnet().to_string(), b.subnet().to_string()),
        ("10.244.1.0/24".into(), "10.244.2.0/24".into())
    );
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    assert_eq!(cluster.annotation(&a, "kube-subnet-manager").as_deref(), Some("true"));
    assert_eq!(cluster.annotation(&a, "public-ip"), Some(a.node.address().to_string()));
    let data = cluster.annotation(&a, "backend-data").unwrap();
    let mac = a.show("ip -o link show flannel.1");
    let mac = mac.split("link/ether ").nth(1).unwrap()[..17].to_owned();
    assert_eq!(data, format!("{{\"VNI\":1,\"VtepMAC\":\"{mac}\"}}"));
    a.wait("the node's condition", || {
        let node = cluster.api.node(&a.node.name()).unwrap();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|one| one["type"] == "NetworkUnavailable" && one["status"] == "False")
    });
    assert!(a.node.dir().join("net.d/10-flannel.conflist").exists());

    // A node that leaves is gone everywhere, and one whose public address is overwritten is followed.
    cluster.api.annotate(&b.node.name(), "flannel.alpha.coreos.com/public-ip-overwrite", Some("172.31.0.77"));
    a.wait("the overwritten address", || a.show("bridge fdb show dev flannel.1").contains("172.31.0.77"));
    cluster.api.delete_node(&b.node.name());
    a.wait("the end of the peer", || !a.node.has_route(b.subnet()).unwrap());
}

#[test]
fn an_address_that_the_api_server_was_reached_from_may_go() {
    /// Less than a request waits for an answer, which is 30 s, and than a watch may be silent.
    const SOON: Duration = Duration::from_secs(25);
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let fdb = |member: &Member| member.show("bridge fdb show dev flannel.1");
    for (changed, other, last) in [(&a, &b, 77), (&b, &a, 78)] {
        other.wait("the peer", || fdb(other).contains(&format!("dst {} ", changed.node.address())));
        let start = Instant::now();
        changed.node.readdress([172, 31, 0, last].into(), changed.node.address_v6()).unwrap();
        other.wait("the new address", || fdb(other).contains(&format!("dst 172.31.0.{last} ")));
        // The second time it is heard of by the node that was the first to change.
        assert!(start.elapsed() < SOON, "{:?}: {}", start.elapsed(), changed.agent.log());
    }
}

#[test]
fn a_node_without_a_subnet_waits_says_so_and_starts_when_it_has_one() {
    let cluster = Kubernetes::new();
    let mut a = cluster.start();
    cluster.api.put_node(node(&a.node.name(), &[]));
    a.wait("the remedy in readiness", || {
        a.agent.get("/readyz").is_ok_and(|(code, body)| code == 503 && body.contains("allocate-node-cidrs"))
    });
    assert!(!a.node.dir().join("net.d").exists(), "no conflist before an ADD can succeed");
    cluster.api.put_node(node(&a.node.name(), &["10.244.5.0/24"]));
    a.agent.wait_ready(LIMIT).unwrap();
    assert_eq!(a.subnet().to_string(), "10.244.5.0/24");
}

#[test]
fn a_restart_without_the_api_server_brings_the_data_path_up_from_what_was_kept() {
    let cluster = Kubernetes::new();
    let (mut a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    let state = std::fs::read_dir(a.node.dir()).unwrap().map(|entry| entry.unwrap().path());
    let state = state.into_iter().find(|path| path.to_string_lossy().ends_with(".state.json")).unwrap();
    a.wait("the peer in what is kept", || std::fs::read_to_string(&state).unwrap().contains("10.244.2.0/24"));
    cluster.api.behave(|behaviour| behaviour.down = true);
    cluster.api.disconnect();
    a.agent.kill().unwrap();
    a.ip("link del flannel.1");
    a.start_again();
    a.wait("echoes between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    assert!(a.agent.get("/readyz?verbose").unwrap().1.contains("as they were saved"));
    cluster.api.behave(|behaviour| behaviour.down = false);
    let c = cluster.join("10.244.3.0/24");
    a.wait("the new peer", || a.node.has_route(c.subnet()).unwrap());
}

/// A node whose agent was stopped and whose machine then has another name, and an object of that name besides the old
/// one, with other pods' addresses.
fn renamed(cluster: &Kubernetes, mut old: Member, cidr: &str, prepare: impl FnOnce(&Node)) -> Member {
    old.agent.terminate(LIMIT).unwrap();
    prepare(&old.node);
    let mut object = node("renamed", &[cidr]);
    // The younger of two objects with one MAC is the living node's.
    object["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    cluster.api.put_node(object);
    let mut new = cluster.start_as(old.into_node(), "renamed", &[]);
    new.agent.wait_ready(LIMIT).unwrap();
    new
}

/// Pods of the two nodes reach each other, although the object remains under which the first was known.
fn both_reach_each_other(new: &Member, peer: &Member) {
    let (pod, other) = (new.pod(), peer.pod());
    new.wait("an echo to the peer", || pod.namespace().reaches(other.address()).unwrap());
    peer.wait("an echo to the renamed node", || other.namespace().reaches(pod.address()).unwrap());
    let skipped = |line: &&str| line.contains("lease skipped") && line.contains("renamed");
    let log = peer.agent.log();
    let (_, verbose) = peer.agent.get("/readyz?verbose").unwrap();
    assert!(peer.agent.get("/readyz").unwrap().0 == 200 && !verbose.contains("skipped"), "{verbose}\n{log}");
    assert_eq!(log.lines().rfind(skipped), None, "{log}");
}

#[test]
fn a_node_that_was_renamed_and_moved_is_reached_while_its_old_object_remains() {
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let v6 = a.node.address_v6();
    let a =
        renamed(&cluster, a, "10.244.3.0/24", |node| node.readdress([172, 31, 0, 77].into(), v6).unwrap());
    assert_eq!(cluster.annotation_of("renamed", "public-ip").as_deref(), Some("172.31.0.77"));
    both_reach_each_other(&a, &b);
}

#[test]
fn a_node_that_was_renamed_and_kept_its_address_is_reached_while_its_old_object_remains() {
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let a = renamed(&cluster, a, "10.244.3.0/24", |_| {});
    both_reach_each_other(&a, &b);
}

#[test]
fn a_renamed_node_whose_address_is_overwritten_is_reached_while_its_old_object_remains() {
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let a = renamed(&cluster, a, "10.244.3.0/24", |node| {
        node.namespace().ip("addr add 172.31.0.99/24 dev eth0").unwrap();
    });
    // Peers take datagrams from the address that is announced alone, as they come from a translator. What they took before
    // counts for a moment more: a short look would see that.
    let rules = format!(
        "table bridge translator {{ chain c {{ type filter hook forward priority 0; ip saddr {} udp dport 8472 ip saddr set \
         172.31.0.99; }}\n}}\n",
        a.node.address()
    );
    cluster.fabric.switch().command("nft").args(["-f", "-"]).input(rules).ok().unwrap();
    cluster.api.annotate("renamed", "flannel.alpha.coreos.com/public-ip-overwrite", Some("172.31.0.99"));
    a.wait("the overwritten address", || {
        cluster.annotation_of("renamed", "public-ip").as_deref() == Some("172.31.0.99")
    });
    both_reach_each_other(&a, &b);
}

#[test]
fn a_peer_that_starts_later_finds_the_renamed_node_and_not_its_old_object() {
    let cluster = Kubernetes::new();
    let a = cluster.join("10.244.1.0/24");
    let a = renamed(&cluster, a, "10.244.3.0/24", |_| {});
    both_reach_each_other(&a, &cluster.join("10.244.2.0/24"));
}

#[test]
fn two_living_nodes_that_are_told_one_public_address_say_so() {
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let c = cluster.join("10.244.3.0/24");
    let (pod_b, pod_c) = (b.pod(), c.pod());
    let address = a.node.address().to_string();
    let note =
        format!("another node, which has {}, announces this node's public address {address}", b.subnet());
    cluster.api.annotate(&b.node.name(), "flannel.alpha.coreos.com/public-ip-overwrite", Some(&address));
    a.wait("a word about it", || a.verbose().contains(&note) && a.agent.log().contains("is this node's own"));
    cluster.api.annotate(&b.node.name(), "flannel.alpha.coreos.com/public-ip-overwrite", None);
    c.wait("an echo once that is corrected", || pod_c.namespace().reaches(pod_b.address()).unwrap());
    a.wait("the end of the note", || !a.verbose().contains("announces this node's"));
}

#[test]
fn an_api_server_that_refuses_a_node_is_noted_while_it_runs_and_makes_it_unready_when_it_starts() {
    let cluster = Kubernetes::new();
    let (mut a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    a.wait("the saved state", || a.has_kept(b.subnet()));
    cluster.api.behave(|behaviour| behaviour.token = Some("another".into()));
    cluster.api.disconnect();
    a.wait("the note", || a.verbose().contains("store refuses this node since"));
    let text = a.verbose();
    assert!(text.contains("(401): the token or the certificate that flanneld has is not accepted"), "{text}");
    assert!(text.contains("own lease has no end") && a.is_ready(), "{text}");
    assert!(a.node.has_route(b.subnet()).unwrap());

    a.agent.terminate(LIMIT).unwrap();
    let name = a.node.name();
    let mut a = cluster.start_as(a.into_node(), &name, &[]);
    a.wait("the refusal", || a.verbose().contains(r#""store":"the store refuses this node since"#));
    a.wait("the data path", || a.verbose().contains(r#""kernel":"met""#));
    assert!(!a.is_ready() && a.node.has_route(b.subnet()).unwrap(), "{}", a.verbose());
    cluster.api.behave(|behaviour| behaviour.token = None);
    a.agent.wait_ready(LIMIT).unwrap();
}

#[test]
fn a_node_whose_object_is_gone_or_cannot_be_written_says_so_while_it_runs() {
    /// Without a change in the cluster the agent looks around once a minute.
    const A_MINUTE: Duration = Duration::from_secs(100);
    let cluster = Kubernetes::new();
    let (a, b) = (cluster.join("10.244.1.0/24"), cluster.join("10.244.2.0/24"));
    let name = a.node.name();
    let told = |what: &str, present: bool| {
        wait_for(what, A_MINUTE, || a.verbose().contains(what) == present)
            .unwrap_or_else(|error| panic!("{error}: {}\n{}", a.verbose(), a.agent.log()));
    };
    let message = "nodes is forbidden: cannot patch resource nodes/status".to_owned();
    let refusal = Refusal { method: "PATCH", path: "/status".into(), status: 403, message };
    cluster.api.behave(|behaviour| behaviour.refusals = vec![refusal]);
    cluster.api.annotate(&name, "flannel.alpha.coreos.com/public-ip", Some("172.31.0.250"));
    told("this node's object can't be written", true);
    let log = a.agent.log();
    assert!(a.is_ready() && log.contains("the own node can't be written; trying again"), "{log}");
    let status = a.node.namespace().command(flanneld()).arg("status").output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("cannot patch resource nodes/status"), "{status}");
    cluster.api.behave(|behaviour| behaviour.refusals.clear());
    told("this node's object can't be written", false);

    cluster.api.delete_node(&name);
    b.wait("the end of the peer", || !b.node.has_route(a.subnet()).unwrap());
    told(" any more, so that other nodes have no routes to the pods of this node", true);
    assert!(a.is_ready() && a.node.has_route(b.subnet()).unwrap(), "{}", a.verbose());
    cluster.api.put_node(node(&name, &["10.244.1.0/24"]));
    b.wait("the peer again", || b.node.has_route(a.subnet()).unwrap());
    told(" any more, so that other nodes have no routes to the pods of this node", false);
}
