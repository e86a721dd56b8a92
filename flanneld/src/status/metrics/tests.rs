//! An exposition, line by line.

mod whole;

use std::time::Duration;

use super::*;
use crate::status::model::{CountedPeer, PeerHandshake, ProbedPeer, SessionCounts};

fn status() -> NodeStatus {
    let mut times = Times::default();
    [2, 3, 50, 9000].map(Duration::from_millis).into_iter().for_each(|time| times.add(time));
    NodeStatus {
        ready: true,
        conditions: [("store".to_owned(), Some("away".to_owned())), ("kernel".to_owned(), None)].into(),
        node: Some(Node {
            backend: "vxlan \"VNI\" 1\n".into(),
            subnets: vec!["10.244.1.0/24".into(), "fd00::/64".into()],
            public: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            ..Node::default()
        }),
        peers: PeerCounts { known: 5, usable: 4, programmed: 3, ..PeerCounts::default() },
        pools: vec![Pool {
            subnet: "10.244.1.0/24".into(),
            size: 253,
            used: 3,
            leaked: Some(1),
            ..Pool::default()
        }],
        fast_path: Some(4),
        policy: Some(Policy { apply: times, repairs: 2, ..Policy::default() }),
        ..NodeStatus::default()
    }
}

#[test]
fn every_value_is_a_line_and_what_is_not_known_is_none() {
    let text = text(status());
    for line in [
        "flannel_ready 1",
        "flannel_condition{condition=\"alive\"} 0",
        "flannel_condition{condition=\"store\"} 0",
        "flannel_condition{condition=\"kernel\"} 1",
        "flannel_node_info{backend=\"vxlan \\\"VNI\\\" 1\",subnet=\"fd00::/64\",public_ip=\"2001:db8::1\",family=\"ipv6\",mtu=\"0\"} 1",
        "flannel_peers{state=\"known\"} 5",
        "flannel_ipam_addresses{state=\"free\",family=\"ipv4\"} 250",
        "flannel_ipam_addresses{state=\"leaked\",family=\"ipv4\"} 1",
        "# TYPE flannel_policy_apply_seconds histogram",
        "flannel_policy_apply_seconds_bucket{le=\"0.001\"} 0",
        "flannel_policy_apply_seconds_bucket{le=\"0.005\"} 2",
        "flannel_policy_apply_seconds_bucket{le=\"0.1\"} 3",
        "flannel_policy_apply_seconds_bucket{le=\"5.0\"} 3",
        "flannel_policy_apply_seconds_bucket{le=\"+Inf\"} 4",
        "flannel_policy_apply_seconds_sum 9.055",
        "flannel_policy_apply_seconds_count 4",
        "flannel_fast_path_devices 4",
        "flannel_policy_repairs_total 2",
        "# TYPE flannel_policy_repairs counter",
    ] {
        assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
    }
    assert!(!text.contains("state=\"reachable\"") && !text.contains("lease_expiry"), "{text}");
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn probes_have_series_by_path_and_few_peers_have_their_own() {
    let path = crate::status::model::ProbedPath {
        answered: 4,
        lost: 1,
        classes: vec![(0.001, 1), (0.01, 2)],
        sum: 0.5,
        ..Default::default()
    };
    let peer = ProbedPeer {
        peer: format!("no\"de\n{}", "x".repeat(300)),
        up: true,
        loss: 0.2,
        rtt_seconds: Some(0.0005),
        path_mtu: None,
    };
    let probes = ProbeStatus {
        paths: [("overlay".to_owned(), path)].into(),
        peers: vec![peer],
        ..ProbeStatus::default()
    };
    let counted = CountedPeer { peer: "a\"2".into(), received: 7, transmitted: 1 << 60 };
    let text = text(NodeStatus { probes: Some(probes), traffic: vec![counted], ..status() });
    for line in [
        "flannel_probes_total{path=\"overlay\",result=\"lost\"} 1",
        "flannel_probe_rtt_seconds_bucket{le=\"0.01\",path=\"overlay\"} 3",
        "flannel_probe_rtt_seconds_bucket{le=\"+Inf\",path=\"overlay\"} 4",
        "flannel_probe_rtt_seconds_count{path=\"overlay\"} 4",
        "flannel_peer_receive_bytes_total{peer=\"a\\\"2\"} 7",
        "flannel_peer_transmit_bytes_total{peer=\"a\\\"2\"} 1152921504606846976",
    ] {
        assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
    }
    let loss = text.lines().find(|line| line.starts_with("flannel_peer_loss_ratio{")).unwrap();
    assert!(
        loss.starts_with("flannel_peer_loss_ratio{peer=\"no\\\"de·xxx") && loss.ends_with("…\"} 0.2"),
        "{loss}"
    );
    assert!(text.contains("flannel_peer_up{") && !text.contains("flannel_peer_path_mtu_bytes"), "{text}");
}

#[test]
fn no_name_appears_twice_and_labels_are_cut_and_escaped() {
    let mut long = status();
    long.node.as_mut().unwrap().backend = "x".repeat(1000);
    let text = text(long);
    let mut names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
    assert!(text.lines().all(|line| line.len() < 500), "{text}");
}

#[test]
fn handshakes_of_wireguard_are_counted_by_role_and_result_and_each_peer_has_its_last_one() {
    let tunnel = [
        ("sent_packets", 1),
        ("handshakes", 7),
        ("handshakes_begun", 4),
        ("handshakes_unanswered", 9),
        ("handshakes_asked", 3),
        ("handshakes_proving", 2),
        ("handshakes_misanswered", 5),
        ("refused_handshakes", 11),
        ("dropped_handshakes", 8),
        ("refused_session", 1),
    ];
    let status = NodeStatus {
        tunnel: tunnel.map(|(name, count)| (name.to_owned(), count)).into(),
        wireguard: Some(SessionCounts { current: 3, idle: 1, failing: 2 }),
        handshakes: vec![PeerHandshake { peer: "b\n\"".into(), at: 1_700_000_000 }],
        ..status()
    };
    let text = text(status);
    for line in [
        "flannel_wireguard_handshakes_total{role=\"initiator\",result=\"completed\"} 4",
        "flannel_wireguard_handshakes_total{role=\"initiator\",result=\"unanswered\"} 9",
        "flannel_wireguard_handshakes_total{role=\"initiator\",result=\"challenged\"} 2",
        "flannel_wireguard_handshakes_total{role=\"initiator\",result=\"refused\"} 5",
        "flannel_wireguard_handshakes_total{role=\"responder\",result=\"completed\"} 3",
        "flannel_wireguard_handshakes_total{role=\"responder\",result=\"challenged\"} 3",
        "flannel_wireguard_handshakes_total{role=\"responder\",result=\"refused\"} 6",
        "flannel_wireguard_handshakes_total{role=\"responder\",result=\"dropped\"} 8",
        "flannel_wireguard_peers{session=\"current\"} 3",
        "flannel_wireguard_peers{session=\"idle\"} 1",
        "flannel_wireguard_peers{session=\"failing\"} 2",
        "flannel_peer_handshake_timestamp_seconds{peer=\"b·\\\"\"} 1700000000",
    ] {
        assert!(text.lines().any(|one| one == line), "{line} in\n{text}");
    }
    assert!(!text.contains("reason=\"handshakes\""), "{text}");
    assert!(
        text.contains("flannel_tunnel_dropped_total{direction=\"receive\",reason=\"session\"} 1"),
        "{text}"
    );
    // Without WireGuard there is nothing of it.
    assert!(!self::text(self::status()).contains("wireguard"));
}
