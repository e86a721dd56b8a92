//! The exposition of a node that has everything at once: each metric is there, within its bound, and described.

use std::collections::{BTreeMap, BTreeSet};

use super::super::*;
use crate::cni_calls::{CniCalls, Durations};
use crate::probe::RTT_BOUNDS;
use crate::status::ChangeCount;
use crate::status::model::{
    CountedPeer, PeerHandshake, Policy, ProbedPath, ProbedPeer, Process, SessionCounts,
};

const PEERS: usize = 100;

/// Metrics with the most series that each may have. Histograms are counted with their sums and counts.
const BOUNDS: &[(&str, usize)] = &[
    ("flannel_build_info", 1),
    ("flannel_node_info", 2),
    ("flannel_ready", 1),
    ("flannel_condition", 12),
    ("flannel_fallback", 1),
    ("flannel_store_connected", 1),
    ("flannel_store_last_answer_timestamp_seconds", 1),
    ("flannel_store_errors_total", 6),
    ("flannel_snapshots_total", 2),
    ("flannel_lease_expiry_timestamp_seconds", 1),
    ("flannel_lease_renewals_total", 2),
    ("flannel_peers", 6),
    ("flannel_leases_skipped", 8),
    ("flannel_converge_seconds", 11),
    ("flannel_converges_total", 7),
    ("flannel_last_converge_timestamp_seconds", 1),
    ("flannel_changes_total", 60),
    ("flannel_repairs_total", 10),
    ("flannel_fights", 1),
    ("flannel_netlink_overruns_total", 1),
    ("flannel_rules_info", 1),
    ("flannel_foreign_chains_dropping", 1),
    ("flannel_device_receive_bytes_total", 4),
    ("flannel_device_receive_packets_total", 4),
    ("flannel_device_receive_errors_total", 4),
    ("flannel_device_receive_dropped_total", 4),
    ("flannel_device_transmit_bytes_total", 4),
    ("flannel_device_transmit_packets_total", 4),
    ("flannel_device_transmit_errors_total", 4),
    ("flannel_device_transmit_dropped_total", 4),
    ("flannel_tunnel_packets_total", 2),
    ("flannel_tunnel_bytes_total", 2),
    ("flannel_tunnel_dropped_total", 30),
    ("flannel_tunnel_fallbacks_total", 1),
    ("flannel_icmp_errors_total", 1),
    ("flannel_udp_checksum_errors_total", 1),
    ("flannel_probe_rtt_seconds", 36),
    ("flannel_probes_total", 12),
    ("flannel_peer_rtt_seconds", PEERS),
    ("flannel_peer_loss_ratio", PEERS),
    ("flannel_peer_up", PEERS),
    ("flannel_peer_path_mtu_bytes", PEERS),
    ("flannel_peer_receive_bytes_total", PEERS),
    ("flannel_peer_transmit_bytes_total", PEERS),
    ("flannel_peer_handshake_timestamp_seconds", PEERS),
    ("flannel_wireguard_peers", 3),
    ("flannel_wireguard_handshakes_total", 8),
    ("flannel_cni_requests_total", 48),
    ("flannel_cni_seconds", 72),
    ("flannel_ipam_addresses", 6),
    ("flannel_fast_path_devices", 1),
    ("process_cpu_seconds_total", 1),
    ("process_resident_memory_bytes", 1),
    ("process_open_fds", 1),
    ("process_start_time_seconds", 1),
];

fn counts(keys: &[&str]) -> BTreeMap<String, u64> {
    keys.iter().map(|key| ((*key).to_owned(), 7)).collect()
}

/// A node with all that there can be.
fn whole() -> NodeStatus {
    let probed = ProbedPath { classes: RTT_BOUNDS.map(|bound| (bound, 1)).to_vec(), ..ProbedPath::default() };
    let peers: Vec<String> = (0..PEERS).map(|number| format!("node-{number}")).collect();
    let probed_peer = |name: &String| ProbedPeer {
        peer: name.clone(),
        rtt_seconds: Some(0.001),
        path_mtu: Some(1450),
        ..ProbedPeer::default()
    };
    let pool = |subnet: &str| Pool { subnet: subnet.into(), leaked: Some(0), ..Pool::default() };
    let codes = counts(&["0", "4", "6", "7", "11", "50", "999", "other"]);
    let verbs = ["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"].map(str::to_owned);
    let device = |name: &&str| Device { name: (*name).to_owned(), ..Device::default() };
    NodeStatus {
        conditions: [("store".to_owned(), None)].into(),
        node: Some(Node { subnets: vec!["10.244.1.0/24".into(), "fd00::/64".into()], ..Node::default() }),
        store: Store { last_answer: Some(1), lease_ends: Some(2), ..Store::default() },
        peers: PeerCounts {
            reachable: Some(1),
            degraded: Some(1),
            unreachable: Some(1),
            skipped: [("backend".to_owned(), 1)].into(),
            ..PeerCounts::default()
        },
        host: Host {
            devices: ["eth0", "flannel.1", "flannel-v6.1", "cni0"].iter().map(device).collect(),
            process: Process::default(),
            ..Host::default()
        },
        pools: vec![pool("10.244.1.0/24"), pool("fd00::/64")],
        probes: Some(ProbeStatus {
            paths: ["underlay", "overlay", "large"].map(|path| (path.to_owned(), probed.clone())).into(),
            peers: peers.iter().map(probed_peer).collect(),
            ..ProbeStatus::default()
        }),
        traffic: peers.iter().map(|peer| CountedPeer { peer: peer.clone(), ..Default::default() }).collect(),
        handshakes: peers.iter().map(|peer| PeerHandshake { peer: peer.clone(), at: 1 }).collect(),
        wireguard: Some(SessionCounts::default()),
        cni: CniCalls {
            requests: verbs.clone().map(|verb| (verb, codes.clone())).into(),
            durations: verbs.map(|verb| (verb, Durations::default())).into(),
            ..CniCalls::default()
        },
        policy: Some(Policy::default()),
        fast_path: Some(1),
        counters: Counters {
            converges: counts(&["start", "kernel", "rules", "leases", "lease", "configuration", "timer"]),
            last_converge: Some(1),
            changes: vec![ChangeCount::default()],
            repairs: counts(&["route"]),
            snapshots: counts(&["store", "saved"]),
            store_errors: counts(&["away"]),
            renewals: counts(&["done", "failed"]),
            ..Counters::default()
        },
        tunnel: counts(&["sent_packets", "dropped_full", "refused_stranger"]),
        ..NodeStatus::default()
    }
}

/// How many series each metric has, without the suffixes of a histogram.
fn series(text: &str) -> BTreeMap<&str, usize> {
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let parts = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        *found.entry(parts.unwrap_or(name)).or_default() += 1;
    }
    found
}

#[test]
fn every_metric_is_there_and_within_its_bound() {
    let text = text(whole());
    let mut found = series(&text);
    found.retain(|name, _| !name.starts_with("flannel_policy_"));
    let expected: BTreeSet<&str> = BOUNDS.iter().map(|(name, _)| *name).collect();
    assert_eq!(found.keys().copied().collect::<BTreeSet<_>>(), expected);
    for (name, bound) in BOUNDS {
        assert!(found[name] <= *bound, "{name}: {} series", found[name]);
    }
    // No cluster has more than this, and each of few peers has seven.
    let of_peers = |name: &str| name.starts_with("flannel_peer_");
    let fixed: usize = BOUNDS.iter().filter(|(name, _)| !of_peers(name)).map(|(_, bound)| bound).sum();
    assert!(fixed <= 410, "{fixed}");
    assert_eq!(BOUNDS.iter().filter(|(name, _)| of_peers(name)).count(), 7);
}

#[test]
fn every_metric_is_described() {
    let documents = [
        include_str!("../../../../../docs/monitoring/README.md"),
        include_str!("../../../../../docs/network-policy.md"),
    ]
    .join("\n");
    let mut described = BTreeSet::new();
    for word in
        documents.split('`').filter(|word| word.starts_with("flannel_") || word.starts_with("process_"))
    {
        described.extend(expanded(word));
    }
    let text = text(whole());
    // `flannel_policy_generation`, `_elements`: further ones with the same begin.
    let is_described = |name: &str| {
        let end = name.rsplit_once("flannel_policy").map(|(_, end)| format!("`{end}`"));
        described.contains(name) || end.is_some_and(|end| documents.contains(&end))
    };
    let missing: Vec<&str> = series(&text).into_keys().filter(|name| !is_described(name)).collect();
    assert!(missing.is_empty(), "docs/monitoring/README.md lacks {missing:?}");
}

/// The words that one with alternatives in braces stands for.
fn expanded(word: &str) -> Vec<String> {
    let Some((before, rest)) = word.split_once('{') else { return vec![word.to_owned()] };
    let (alternatives, after) = rest.split_once('}').unwrap_or((rest, ""));
    alternatives.split(',').flat_map(|one| expanded(&format!("{before}{one}{after}"))).collect()
}
