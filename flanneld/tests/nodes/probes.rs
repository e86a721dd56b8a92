//! Probes of real peers over a real network that loses, cuts and shortens.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bed::{Cluster, LIMIT, Member, VXLAN};

/// Rounds that are quick enough for a test: four packets a second in the tunnel, one below it.
const QUICK: &[&str] = &["--probe-interval=1s"];

fn peers(member: &Member) -> Vec<Value> {
    let (code, body) = member.agent.get("/peers").unwrap();
    assert_eq!(code, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    answer["peers"].as_array().unwrap().clone()
}

/// What the probes of its only peer found.
fn probe(member: &Member) -> Value {
    peers(member).first().map_or(Value::Null, |peer| peer["probe"].clone())
}

/// Waits until the verdict on the only peer is this one.
fn wait_for_verdict(member: &Member, expected: &str) -> Value {
    let limit = Duration::from_secs(120);
    let begun = Instant::now();
    loop {
        let probe = probe(member);
        if probe["verdict"] == expected {
            return probe;
        }
        assert!(begun.elapsed() < limit, "{probe:#} instead of {expected}; log:\n{}", member.agent.log());
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_healthy_peer_is_fine_at_full_length_and_silent_in_the_log() {
    let cluster = Cluster::new(VXLAN);
    let (a, _b) = (cluster.join_with(QUICK), cluster.join_with(QUICK));
    a.wait("a healthy peer", || !peers(&a).is_empty());
    let found = wait_for_verdict(&a, "fine");
    assert_eq!(found["state"], "reachable");
    a.wait("the path MTU", || probe(&a)["path_mtu"] == 1450);
    let found = probe(&a);
    for path in ["underlay", "tunnel"] {
        assert!(found[path]["rtt_seconds"].as_f64().unwrap() > 0.0, "{found}");
        assert_eq!(found[path]["state"], "reachable", "{found}");
    }
    assert!(!a.agent.log().contains("WARN"), "{}", a.agent.log());
}

#[test]
fn a_tunnel_port_that_is_dropped_between_the_nodes_is_told_from_a_node_that_is_down() {
    let cluster = Cluster::new(VXLAN);
    let (a, mut b) = (cluster.join_with(QUICK), cluster.join_with(QUICK));
    wait_for_verdict(&a, "fine");
    cluster.switch_rules("udp dport 8472 drop");
    let found = wait_for_verdict(&a, "port-blocked");
    let (cause, remedy) = (found["cause"].as_str().unwrap(), found["remedy"].as_str().unwrap());
    assert!(cause.contains(&b.node.address().to_string()) && cause.contains("UDP port 8472"), "{cause}");
    assert!(remedy.contains("allow UDP port 8472 both ways"), "{remedy}");
    a.wait_for_log("allow UDP port 8472 both ways");
    cluster.switch_rules("");
    wait_for_verdict(&a, "fine");
    a.wait_for_log("is reachable again");

    // The kernel answers, with or without an agent.
    b.agent.kill().unwrap();
    cluster.switch_rules("udp dport 8472 drop");
    wait_for_verdict(&a, "port-blocked");
    cluster.switch_rules("");
    wait_for_verdict(&a, "fine");

    b.node.unplug().unwrap();
    let found = wait_for_verdict(&a, "down");
    assert!(found["cause"].as_str().unwrap().contains("the node or the network is down"), "{found}");
    b.node.plug().unwrap();
    wait_for_verdict(&a, "fine");
}

#[test]
fn packets_that_are_too_long_for_the_way_are_told_with_what_passes() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join_with(QUICK), cluster.join_with(QUICK));
    wait_for_verdict(&a, "fine");
    // A switch that drops longer frames, as one without jumbo frames does.
    cluster.switch_rules("ip length > 1400 drop");
    wait_for_verdict(&a, "path-mtu");
    a.wait("the length that passes", || probe(&a)["path_mtu"] == 1350);
    let found = probe(&a);
    assert!(found["cause"].as_str().unwrap().contains("packets of 1450 bytes"), "{found}");
    assert!(found["remedy"].as_str().unwrap().contains("by 100"), "{found}");
    assert!(found["cause"].as_str().unwrap().contains(&b.node.address().to_string()), "{found}");
    cluster.switch_rules("");
    let found = wait_for_verdict(&a, "fine");
    assert_eq!(found["path_mtu"], 1450);
}

/// Loss of 400 probes, as shares.
struct Loss {
    counted: f64,
    reported: f64,
    /// All states that the tunnel was in meanwhile.
    states: BTreeSet<String>,
}

/// The switch drops this share of the tunnel's datagrams to `b`.
fn loss(cluster: &Cluster, a: &Member, b: &Member, of_hundred: u32) -> Loss {
    let small = format!("ip daddr {} udp dport 8472 udp length < 200", b.node.address());
    let outcomes = || {
        let found = probe(a);
        let count = |key: &str| found["tunnel"][key].as_f64().unwrap();
        (count("sent"), count("lost"))
    };
    let before = outcomes();
    let drop = match of_hundred {
        // Nothing is below 0, which nft refuses to compare with.
        0 => "ip daddr 203.0.113.1 counter drop;".to_owned(),
        share => format!("{small} numgen random mod 100 < {share} counter drop;"),
    };
    cluster.switch_rules(&format!("{small} counter; {drop}"));
    let counters = || {
        let listed =
            cluster.fabric.switch().command("nft").args(["list", "table", "bridge", "faults"]).ok().unwrap();
        let after = listed.split("counter packets ").skip(1);
        let counts: Vec<f64> = after.map(|text| text.split(' ').next().unwrap().parse().unwrap()).collect();
        (counts[0], counts[1])
    };
    let (begun, mut states) = (Instant::now(), BTreeSet::new());
    while counters().0 < 400.0 {
        assert!(begun.elapsed() < Duration::from_secs(240), "{:?}; {}", counters(), probe(a));
        states.extend(probe(a)["state"].as_str().map(str::to_owned));
        std::thread::sleep(Duration::from_secs(1));
    }
    // Those before the fault are still in the window of five minutes.
    let (after, (sent, dropped)) = (outcomes(), counters());
    Loss { counted: dropped / sent, reported: (after.1 - before.1) / (after.0 - before.0), states }
}

#[test]
fn loss_is_reported_as_the_network_counts_it() {
    // All at a time, because each takes a minute and a half.
    let cases: Vec<_> = [0, 5, 20, 50]
        .into_iter()
        .map(|of_hundred| {
            std::thread::spawn(move || {
                let cluster = Cluster::new(VXLAN);
                let (a, b) = (cluster.join_with(QUICK), cluster.join_with(&["--probe-interval=0"]));
                wait_for_verdict(&a, "fine");
                let Loss { counted, reported, states } = loss(&cluster, &a, &b, of_hundred);
                println!(
                    "of 400 probes, {of_hundred} % to be lost: {counted:.3} counted, {reported:.3} reported"
                );
                assert!(
                    (counted - reported).abs() <= 0.03,
                    "{reported} reported, {counted} counted; {:#}",
                    probe(&a)
                );
                match of_hundred {
                    0 | 5 => assert!(states.iter().eq(["reachable"]), "{of_hundred} %: {states:?}"),
                    50 => drop(wait_for_verdict(&a, "lossy-tunnel")),
                    _ => {}
                }
            })
        })
        .collect();
    cases.into_iter().for_each(|case| case.join().unwrap());
}

#[test]
fn answers_of_others_are_counted_and_mean_nothing() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join_with(QUICK), cluster.join_with(QUICK));
    wait_for_verdict(&a, "fine");
    // A node between that answers for the peer with another source.
    let to = a.node.address();
    let rules =
        format!("ip saddr {} ip daddr {to} icmp type echo-reply ip saddr set 172.31.0.99;", b.node.address());
    cluster.switch_rules(&rules);
    let begun = Instant::now();
    while probe(&a)["underlay"]["state"] != "unreachable" {
        assert!(begun.elapsed() < Duration::from_secs(90), "{:#}", probe(&a));
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(probe(&a)["verdict"], "fine", "the tunnel answers");
    a.wait("the count of what was rejected", || {
        let (_, status) = a.agent.get("/status").unwrap();
        let status: Value = serde_json::from_str(&status).unwrap();
        status["probes"]["rejected"].as_u64().unwrap() >= 10
    });
}

#[test]
fn both_families_and_backends_without_a_tunnel_are_probed() {
    let both = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10::/48","Backend":{"Type":"TYPE"}}"#;
    for (backend, tunnelled) in [("vxlan", true), ("host-gw", false), ("udp", true)] {
        let cluster = Cluster::new(&both.replace("TYPE", backend));
        let (a, b) = (cluster.join_with(QUICK), cluster.join_with(QUICK));
        a.wait("two families that are fine", || {
            let all = peers(&a);
            all.len() == 2 && all.iter().all(|peer| peer["probe"]["verdict"] == "fine")
        });
        for peer in peers(&a) {
            let probe = &peer["probe"];
            let public: IpAddr = probe["underlay_address"].as_str().unwrap().parse().unwrap();
            assert!([IpAddr::from(b.node.address()), b.node.address_v6().into()].contains(&public));
            let expected = if tunnelled { "reachable" } else { "unreachable" };
            a.wait("the way of the pods", || {
                peers(&a).iter().all(|peer| peer["probe"]["tunnel"]["state"] == expected)
            });
            assert_eq!(peer["probe"]["underlay"]["state"], "reachable", "{peer}");
        }
        assert!(!a.agent.log().contains("reachable again"), "{backend}: {}", a.agent.log());
    }
}

#[test]
fn probes_can_be_switched_off_and_need_a_capability() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join_with(&["--probe-interval=0"]), cluster.join_with(QUICK));
    wait_for_verdict(&b, "fine");
    assert!(probe(&a).is_null());
    let node = cluster.fabric.node().unwrap();
    let subnet_file = format!("--subnet-file={}", node.subnet_file().display());
    let endpoints = format!("--etcd-endpoints={}", cluster.etcd.endpoint());
    let flanneld = crate::bed::flanneld();
    let log = node.dir().join("log");
    let file = std::fs::File::create(&log).unwrap();
    let without =
        node.namespace().command("setpriv").args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"]);
    let _agent = without.arg(flanneld).args([subnet_file, endpoints]).stderr(file).spawn().unwrap();
    let said = || std::fs::read_to_string(&log).unwrap();
    backends::testing::wait_for("the note", LIMIT, || said().contains("add the capability NET_RAW")).unwrap();
    backends::testing::wait_for("the subnet file", LIMIT, || node.subnet_file().exists()).unwrap();
}
