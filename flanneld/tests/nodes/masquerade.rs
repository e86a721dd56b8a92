//! Which source address a packet arrives with, and that the rules behind it come back and go.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use backends::testing::{Namespace, Node, Pinger, Pod, uninterrupted};

use crate::bed::{Cluster, HOST_GW, LIMIT, Member, VXLAN, flanneld};

/// The modes under test: equal in every outcome.
const MODES: [&str; 2] = ["--traffic-manager=nft", "--traffic-manager=iptables"];

/// Sends a datagram and says which source address it arrives with; `None` if it doesn't.
fn arrives_from(from: &Namespace, to: &Namespace, target: IpAddr) -> Option<IpAddr> {
    static PORT: AtomicU16 = AtomicU16::new(20_000);
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let any: SocketAddr = ([0, 0, 0, 0], port).into();
    let receiver = to.run(|| UdpSocket::bind(any).unwrap());
    receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let sender = from.run(|| UdpSocket::bind(SocketAddr::from(([0, 0, 0, 0], 0))).unwrap());
    // A first packet may be lost to address resolution.
    (0..100).find_map(|_| {
        sender.send_to(b"whose", (target, port)).ok()?;
        uninterrupted(|| receiver.recv_from(&mut [0; 16])).ok().map(|(_, source)| source.ip())
    })
}

/// Two nodes with a pod each, and a host outside of the cluster that knows the way to the pods through
/// the first node.
struct Setup {
    a: Member,
    b: Member,
    pod_a: Pod,
    pod_b: Pod,
    outside: Node,
}

impl Setup {
    fn new(cluster: &Cluster, args: &[&str]) -> Self {
        let (a, b) = (cluster.join_with(args), cluster.join_with(args));
        let outside = cluster.fabric.node().unwrap();
        outside.namespace().ip(&format!("route add 10.244.0.0/16 via {}", a.node.address())).unwrap();
        let (pod_a, pod_b) = (a.pod(), b.pod());
        a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
        Self { a, b, pod_a, pod_b, outside }
    }

    /// Who sends to whom, and which source address is seen there.
    fn matrix(&self) -> Vec<(&'static str, Option<IpAddr>)> {
        let (a, b) = (self.a.node.namespace(), self.b.node.namespace());
        let (pod_a, pod_b) = (self.pod_a.namespace(), self.pod_b.namespace());
        let outside = self.outside.namespace();
        let (at_a, at_b): (IpAddr, IpAddr) = (self.a.node.address().into(), self.b.node.address().into());
        let (at_pod_a, at_pod_b) = (self.pod_a.address(), self.pod_b.address());
        let at_outside: IpAddr = self.outside.address().into();
        vec![
            ("pod → other pod", arrives_from(pod_a, pod_b, at_pod_b)),
            ("other pod → pod", arrives_from(pod_b, pod_a, at_pod_a)),
            ("pod → own node", arrives_from(pod_a, a, at_a)),
            ("pod → other node", arrives_from(pod_a, b, at_b)),
            ("pod → outside", arrives_from(pod_a, outside, at_outside)),
            ("node → own pod", arrives_from(a, pod_a, at_pod_a)),
            ("node → other pod", arrives_from(a, pod_b, at_pod_b)),
            ("node → other node", arrives_from(a, b, at_b)),
            ("node → outside", arrives_from(a, outside, at_outside)),
            ("outside → pod", arrives_from(outside, pod_a, at_pod_a)),
            ("outside → other pod, in transit", arrives_from(outside, pod_b, at_pod_b)),
        ]
    }

    fn expected(&self, tunnel: bool) -> Vec<(&'static str, Option<IpAddr>)> {
        let (pod_a, pod_b) = (self.pod_a.address(), self.pod_b.address());
        let (a, outside): (IpAddr, IpAddr) = (self.a.node.address().into(), self.outside.address().into());
        let bridge = self.a.subnet().hosts().next().unwrap();
        // What a node sends into a tunnel has the tunnel device's address.
        let device = if tunnel { self.a.subnet().network() } else { a };
        [
            ("pod → other pod", pod_a),
            ("other pod → pod", pod_b),
            ("pod → own node", pod_a),
            ("pod → other node", a),
            ("pod → outside", a),
            ("node → own pod", bridge),
            ("node → other pod", device),
            ("node → other node", a),
            ("node → outside", a),
            ("outside → pod", outside),
            ("outside → other pod, in transit", device),
        ]
        .map(|(who, source)| (who, Some(source)))
        .to_vec()
    }
}

#[test]
fn source_addresses_are_the_contracts_in_both_modes_and_with_both_backends() {
    for (config, tunnel) in [(VXLAN, true), (HOST_GW, false)] {
        for mode in MODES {
            let cluster = Cluster::new(config);
            let setup = Setup::new(&cluster, &["--ip-masq", mode]);
            assert_eq!(setup.matrix(), setup.expected(tunnel), "{mode} {config}");

            // What kube-proxy marked is left to it, with any other bits of the mark.
            let (pod, outside) = (setup.pod_a.namespace(), &setup.outside);
            for mark in ["0x4000", "0x14001"] {
                setup.a.show("nft add table ip marker");
                let hook = "{ type filter hook prerouting priority mangle ; }";
                let nft = |words: &str| {
                    let command = setup.a.node.namespace().command("nft");
                    command.arg(words).ok().unwrap();
                };
                nft(&format!("add chain ip marker pre {hook}"));
                nft(&format!("add rule ip marker pre ip daddr {} meta mark set {mark}", outside.address()));
                let seen = arrives_from(pod, outside.namespace(), outside.address().into());
                assert_eq!(seen, Some(setup.pod_a.address()), "{mode} mark {mark}");
                nft("delete table ip marker");
            }
        }
    }
}

#[test]
fn without_masquerading_sources_stay_and_networks_can_be_excepted_from_it() {
    for mode in MODES {
        let cluster = Cluster::new(VXLAN);
        let setup = Setup::new(&cluster, &[mode]);
        let to_outside = |setup: &Setup| {
            arrives_from(setup.pod_a.namespace(), setup.outside.namespace(), setup.outside.address().into())
        };
        assert_eq!(to_outside(&setup), Some(setup.pod_a.address()), "{mode}");

        let cluster = Cluster::new(
            r#"{"Network":"10.244.0.0/16","MasqueradeExcept":["172.31.0.0/24"],"Backend":{"Type":"vxlan"}}"#,
        );
        let setup = Setup::new(&cluster, &["--ip-masq", mode]);
        assert_eq!(to_outside(&setup), Some(setup.pod_a.address()), "{mode}");
        setup.outside.namespace().ip("addr add 198.51.100.7/32 dev lo").unwrap();
        setup.a.ip(&format!("route add 198.51.100.7 via {}", setup.outside.address()));
        let seen =
            arrives_from(setup.pod_a.namespace(), setup.outside.namespace(), "198.51.100.7".parse().unwrap());
        assert_eq!(seen, Some(setup.a.node.address().into()), "{mode}");
    }
}

#[test]
fn rules_that_somebody_removes_or_changes_come_back() {
    for mode in MODES {
        let cluster = Cluster::new(VXLAN);
        let a = cluster.join_with(&["--ip-masq", mode]);
        let healthy = a.rules();
        assert!(healthy.contains("masquerade") || healthy.contains("MASQUERADE"), "{healthy}");
        let damages: &[&str] = if mode.ends_with("nft") {
            &[
                "nft flush ruleset",
                "nft flush chain ip flannel-ipv4 postrtg",
                "nft delete table ip flannel-ipv4",
                "nft add rule ip flannel-ipv4 forward drop",
                "nft insert rule ip flannel-ipv4 postrtg counter",
            ]
        } else {
            &[
                "nft flush ruleset",
                "iptables -t nat -F FLANNEL-POSTRTG",
                "iptables -t nat -D FLANNEL-POSTRTG 3",
                "iptables -t nat -F POSTROUTING",
                "iptables -D FLANNEL-FWD 1",
                "iptables -I FLANNEL-FWD -j DROP",
                "iptables -F FORWARD",
            ]
        };
        for damage in damages {
            a.show(damage);
            a.wait(&format!("{mode}: repair of {damage}"), || a.rules() == healthy);
        }
    }
}

#[test]
fn what_is_switched_off_or_cleaned_up_is_gone() {
    for mode in MODES {
        let cluster = Cluster::new(VXLAN);
        let mut a = cluster.join_with(&["--ip-masq", mode]);
        assert!(a.rules().to_lowercase().contains("masquerade"));
        a.agent.terminate(LIMIT).unwrap();
        assert!(a.rules().to_lowercase().contains("masquerade"), "stopping removes nothing");

        a.start_with(&["--iptables-forward-rules=false", mode]);
        let off = a.rules().to_lowercase();
        // What keeps strangers out of the tunnel has nothing to do with these flags.
        let off: Vec<&str> = off.split("table ").filter(|table| !table.contains("flannel-tunnel")).collect();
        assert!(!off.concat().contains("flannel"), "{mode}: {off:?}");

        a.agent.terminate(LIMIT).unwrap();
        a.start_with(&["--ip-masq", mode]);
        assert!(a.rules().to_lowercase().contains("flannel"));
        a.agent.terminate(LIMIT).unwrap();
        let file = format!("--subnet-file={}", a.node.subnet_file().display());
        let told = a.node.namespace().command(flanneld()).args(["cleanup", &file]).ok().unwrap();
        let clean = a.rules().to_lowercase();
        assert!(!clean.contains("flannel"), "{mode}: {clean}\n{told}");
    }
}

#[test]
fn changing_the_mode_leaves_nothing_of_the_other_one() {
    let cluster = Cluster::new(VXLAN);
    let mut a = cluster.join_with(&["--ip-masq", MODES[0]]);
    let nft = a.rules();
    a.agent.terminate(LIMIT).unwrap();
    a.start_with(&["--ip-masq", MODES[1]]);
    let iptables = a.rules();
    assert!(!iptables.contains("flannel-ipv4") && iptables.contains("FLANNEL-POSTRTG"), "{iptables}");
    a.agent.terminate(LIMIT).unwrap();
    a.start_with(&["--ip-masq", MODES[0]]);
    let back = a.rules();
    assert!(back.contains("flannel-ipv4") && !back.contains("FLANNEL-POSTRTG"), "{back}");
    let table =
        |all: &str| all.split("table ").find(|table| table.starts_with("ip flannel-ipv4")).map(str::to_owned);
    assert!(table(&nft).is_some() && table(&back) == table(&nft), "{back}\n{nft}");
}

#[test]
fn a_foreign_chain_that_drops_is_opened_and_named() {
    let cluster = Cluster::new(VXLAN);
    let (a, b) = (cluster.join(), cluster.join());
    let (pod_a, pod_b) = (a.pod(), b.pod());
    a.wait("the first echo between pods", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    // As Docker does.
    a.show("iptables -P FORWARD DROP");
    a.wait("echoes through a policy of drop", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    a.wait_for_log("FORWARD");
    // What was put there is something that iptables can show.
    assert!(a.show("iptables -S FORWARD").contains("10.244.0.0/16"), "{}", a.show("iptables -S FORWARD"));
    let notes = a.agent.get("/readyz?verbose").unwrap();
    assert!(notes.0 == 200 && notes.1.contains("chain FORWARD of table ip filter"), "{notes:?}");
    // As a firewall of its own table does.
    a.show("nft add table inet outer");
    let chain = "add chain inet outer passing { type filter hook forward priority 10 ; policy drop ; }";
    a.node.namespace().command("nft").arg(chain).ok().unwrap();
    a.wait("echoes through a foreign table", || pod_a.namespace().reaches(pod_b.address()).unwrap());
    a.wait_for_log("inet outer");
}

#[test]
fn no_packet_is_lost_through_the_masquerade_while_the_agent_restarts() {
    let cluster = Cluster::new(VXLAN);
    let mut setup = Setup::new(&cluster, &["--ip-masq"]);
    let pinger = Pinger::start(setup.pod_a.namespace(), setup.outside.address().into()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    let before = setup.a.rules();
    for _ in 0..3 {
        setup.a.agent.kill().unwrap();
        setup.a.start_again();
    }
    assert_eq!(setup.a.rules(), before);
    let pings = pinger.finish().unwrap();
    assert_eq!(pings.lost, 0, "{pings:?}");
    drop(setup.b);
}

#[test]
fn rules_of_legacy_iptables_beside_nftables_are_told() {
    let cluster = Cluster::new(VXLAN);
    let node = cluster.fabric.node().unwrap();
    node.namespace().command("iptables-legacy").args(["-A", "FORWARD", "-j", "ACCEPT"]).ok().unwrap();
    let mut a = cluster.start(node, &[]);
    a.agent.wait_ready(LIMIT).unwrap();
    a.wait_for_log("legacy iptables has tables in this kernel besides nftables");
    let (code, body) = a.agent.get("/readyz?verbose").unwrap();
    assert!(code == 200 && body.contains("iptables-legacy -S FORWARD"), "{body}");
}
