//! The trees as tables: a healthy node, one thing changed, and the finding that has to follow.

mod pods;

use std::collections::BTreeMap;

use backends::firewall::blocking::Blocking;
use backends::prerequisites::Obstacle;

use super::direction::Direction;
use super::finding::Finding;
use super::seen::{Addresses, AgentAnswer, Env, Link, Observation};
use super::*;
use crate::cni::{Conf, ConfFile};
use crate::cni_calls::FailedCall;
use crate::status::model::PeerCounts;
use crate::status::{KernelStatus, Node, NodeStatus, PeerEntry, Store};

fn conf(file: &str, types: &[&str]) -> ConfFile {
    let plugins = types.iter().map(|name| json!({ "type": name })).collect();
    ConfFile {
        path: format!("/etc/cni/net.d/{file}").into(),
        conf: Ok(Conf { name: "cbr0".into(), plugins }),
    }
}

fn link(name: &str, address: Option<&str>) -> Link {
    Link {
        name: name.to_owned(),
        up: true,
        carrier: true,
        bridge: name == "cni0",
        addresses: address.into_iter().map(|text| text.parse().unwrap()).collect(),
    }
}

/// A node on which all is well.
fn healthy() -> Observation {
    let status = NodeStatus {
        at: 1_000_000,
        alive: true,
        ready: true,
        conditions: [("store".to_owned(), None), ("kernel".to_owned(), None)].into(),
        node: Some(Node {
            subnets: vec!["10.244.1.0/24".into()],
            backend: "vxlan VNI 1 port 8472".into(),
            devices: vec!["flannel.1".into()],
            interface: "eth0".into(),
            interface_why: "default route".into(),
            ..Node::default()
        }),
        store: Store {
            name: "etcd".into(),
            connected: true,
            lease_ends: Some(1_086_400),
            ..Store::default()
        },
        peers: PeerCounts { known: 2, usable: 2, programmed: 2, ..PeerCounts::default() },
        kernel: KernelStatus { seen: Some(1), settled: true, ..KernelStatus::default() },
        ..NodeStatus::default()
    };
    let peer = |number: u8| PeerEntry {
        name: Some(format!("a{number}")),
        subnet: format!("10.244.{number}.0/24"),
        public: Some([192, 0, 2, number].into()),
        state: "programmed".into(),
        ..PeerEntry::default()
    };
    Observation {
        agent: AgentAnswer::Answers(status),
        peers: vec![peer(2), peer(3)],
        subnet_file: "/run/flannel/subnet.env".into(),
        env: Env::Written(["10.244.1.0/24".parse::<ipnet::IpNet>().unwrap()].into_iter().collect()),
        obstacles: Ok(Vec::new()),
        links: Ok(vec![link("eth0", None), link("flannel.1", None), link("cni0", Some("10.244.1.1/24"))]),
        detours: Ok(Vec::new()),
        directions: BTreeMap::new(),
        asked: 2,
        blocking: Ok(Vec::new()),
        confs: Some(vec![conf("10-flannel.conflist", &["flannel", "portmap"])]),
        cni_conf_dir: "/etc/cni/net.d".into(),
        missing_plugins: Some(Vec::new()),
        cni_bin_dirs: vec!["/opt/cni/bin".into()],
        addresses: Addresses {
            directory: "/var/lib/cni/networks/cbr0".into(),
            exists: true,
            pools: vec![("10.244.1.0/24".parse().unwrap(), 253, 83)],
            leaked: Ok(Vec::new()),
        },
        pod: None,
        checksum_errors: 0,
    }
}

fn troubles(seen: &Observation) -> Vec<Finding> {
    diagnose(seen).into_iter().filter(Finding::is_trouble).collect()
}

/// What happens to a node, and what has to be found: object, a part of the cause, a part of the remedy.
type Case = (&'static str, fn(&mut Observation), [&'static str; 3]);

/// Exactly one trouble each, which names these.
fn each_is_named(cases: &[Case]) {
    for (what, injure, [object, cause, remedy]) in cases {
        let mut seen = healthy();
        injure(&mut seen);
        let found = troubles(&seen);
        let [one] = found.as_slice() else { panic!("{what}: {found:#?}") };
        assert!(one.object.contains(object), "{what}: {one:?}");
        assert!(one.cause.contains(cause), "{what}: {one:?}");
        assert!(one.remedy.contains(remedy), "{what}: {one:?}");
    }
}

fn silent(running: Option<&str>, lacking: &[&str]) -> AgentAnswer {
    let lacking = Ok(lacking.iter().map(|change| (*change).to_owned()).collect());
    AgentAnswer::Silent { why: "no answer".into(), running: running.map(str::to_owned), lacking }
}

#[test]
fn what_is_damaged_while_the_agent_is_gone_is_named_as_well() {
    let mut seen = healthy();
    seen.agent =
        silent(None, &["link set flannel.1 up", "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1"]);
    let found = troubles(&seen);
    let objects: Vec<&str> = found.iter().map(|finding| finding.object.as_str()).collect();
    assert_eq!(objects, ["flanneld", "flannel.1", "10.244.2.0/24"], "{found:#?}");
    assert!(found[1].remedy.contains("start flanneld"), "{found:#?}");
}

fn status(seen: &mut Observation) -> &mut NodeStatus {
    match &mut seen.agent {
        AgentAnswer::Answers(status) => status,
        AgentAnswer::Silent { .. } => panic!("it answers"),
    }
}

#[test]
fn a_healthy_node_has_no_trouble_and_every_check_says_so() {
    let found = diagnose(&healthy());
    assert_eq!(troubles(&healthy()), []);
    let checks: Vec<&str> = found.iter().map(|finding| finding.check).collect();
    assert_eq!(
        checks,
        ["agent", "store", "kernel", "settings", "rules", "peers", "cni", "addresses", "network policies"]
    );
    let said = |seen: &Observation, check: &str| {
        diagnose(seen).into_iter().find(|finding| finding.check == check).map(|finding| finding.cause)
    };
    let mut seen = healthy();
    assert_eq!(said(&seen, "peers").unwrap(), "2 of 2 are programmed, and not probed");
    status(&mut seen).peers.reachable = Some(2);
    assert_eq!(said(&seen, "peers").unwrap(), "2 of 2 are programmed, 2 answer probes");
    seen.addresses.pools.push(("fd00:1::/64".parse().unwrap(), u64::MAX, 83));
    let addresses = said(&seen, "addresses").unwrap();
    assert_eq!(addresses, "83 of 253 taken of 10.244.1.0/24, 83 taken of fd00:1::/64");
}

const NODE: &[Case] = &[
    (
        "an agent that does not run",
        |seen| seen.agent = silent(None, &[]),
        ["flanneld", "it is not running", "start it"],
    ),
    (
        "an agent that hangs, or has another port",
        |seen| seen.agent = silent(Some("pid 7"), &[]),
        ["flanneld", "pid 7, and does not answer", "--healthz-port"],
    ),
    ("a loop that stands", |seen| status(seen).alive = false, ["flanneld", "loop does not turn", "restart"]),
    (
        "a condition that is not met",
        |seen| {
            let why = "no interface for the traffic between nodes: name one of them with --iface";
            status(seen).conditions.insert("interface".into(), Some(why.into()));
        },
        ["interface", "no interface", "--iface"],
    ),
    (
        "a store that is away",
        |seen| status(seen).store.trouble = Some("etcd at a: nothing listens: is etcd running?".into()),
        ["etcd", "it is away", "is etcd running?"],
    ),
    (
        "a store that refuses",
        |seen| {
            let store = &mut status(seen).store;
            (store.refused, store.trouble) = (true, Some("denied: user fl needs a role".into()));
        },
        ["etcd", "it refuses this node", "needs a role"],
    ),
    (
        "a lease that is about to end",
        |seen| {
            let status = status(seen);
            (status.store.lease_ends, status.store.trouble) = (Some(status.at + 600), Some("away".into()));
        },
        ["etcd", "it ends in 10m and can't be renewed: away", "peers drop the node"],
    ),
    (
        "a lease that is not renewed",
        |seen| status(seen).store.lease_trouble = Some("denied: grant the role".into()),
        ["etcd", "denied", "grant the role"],
    ),
    (
        "another node with this node's address",
        |seen| {
            let note = "another node announces this node's public address 192.0.2.1: give each node its own";
            status(seen).notes.insert("public-address".into(), vec![note.into()]);
        },
        ["public-address", "192.0.2.1", "give each node its own"],
    ),
    (
        "a fight over a device",
        |seen| {
            let note = "\"link set flannel.1 up\" was needed more than 5 times within a minute";
            status(seen).kernel.fights = vec![note.into()];
        },
        ["flannel.1", "was needed", "find the program"],
    ),
    (
        "a change that the kernel refuses",
        |seen| {
            status(seen).kernel.refused =
                vec!["fdb replace 0a:0b dev flannel.1 dst 192.0.2.9: No space".into()];
        },
        ["flannel.1", "No space", "kernel's reason"],
    ),
    (
        "something that stays undone",
        |seen| {
            let change = "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1";
            status(seen).kernel.changes = vec![change.into()];
        },
        ["10.244.2.0/24", "flanneld has not put it right", "log of flanneld"],
    ),
    (
        "a refused change, which of course still differs",
        |seen| {
            status(seen).kernel.changes = vec!["fdb replace 0a:0b dev flannel.1 dst 192.0.2.9".into()];
            status(seen).kernel.refused =
                vec!["fdb replace 0a:0b dev flannel.1 dst 192.0.2.9: No space".into()];
        },
        ["flannel.1", "No space", "kernel's reason"],
    ),
];

#[test]
fn agent_store_and_lease() {
    each_is_named(NODE);
}

const HOST: &[Case] = &[
    (
        "forwarding that is off",
        |seen| {
            let obstacle = Obstacle {
                object: "net.ipv4.ip_forward".into(),
                cause: "net.ipv4.ip_forward is 0".into(),
                remedy: "sysctl -w net.ipv4.ip_forward=1".into(),
            };
            seen.obstacles = Ok(vec![obstacle]);
        },
        ["net.ipv4.ip_forward", "is 0", "sysctl -w"],
    ),
    (
        "a rule that drops the tunnel",
        |seen| {
            let blocking =
                Blocking { table: "inet fw".into(), chain: "input".into(), rule: Some(3), handle: Some(17) };
            seen.blocking = Ok(vec![("UDP 8472 from peers".into(), blocking)]);
        },
        [
            "rule 3 of chain input in table inet fw",
            "drops UDP 8472 from peers",
            "nft delete rule inet fw input handle 17",
        ],
    ),
    (
        "a policy that drops the tunnel",
        |seen| {
            let blocking =
                Blocking { table: "inet fw".into(), chain: "input".into(), rule: None, handle: None };
            seen.blocking = Ok(vec![("UDP 8472 from peers".into(), blocking)]);
        },
        ["policy of chain input", "drops UDP 8472", "accept UDP 8472 from peers"],
    ),
];

#[test]
fn settings_and_rules_of_the_host() {
    each_is_named(HOST);
    let mut seen = healthy();
    seen.obstacles = Err("no netlink".into());
    assert_eq!(troubles(&seen), [], "what could not be checked is no trouble");
    assert!(diagnose(&seen).contains(&Finding::not_run("settings", "no netlink")));
}

fn first(seen: &mut Observation, why: &str) {
    (seen.peers[0].state, seen.peers[0].why) = ("skipped".into(), Some(why.into()));
}

const NETWORK: &[Case] = &[
    (
        "a device that is gone",
        |seen| seen.links.as_mut().unwrap().retain(|link| link.name != "flannel.1"),
        ["flannel.1", "does not exist", "its log says why"],
    ),
    (
        "a device that is down",
        |seen| seen.links.as_mut().unwrap()[1].up = false,
        ["flannel.1", "set down", "ip link set flannel.1 up"],
    ),
    (
        "a cable that is out",
        |seen| seen.links.as_mut().unwrap()[0].carrier = false,
        ["eth0", "no carrier", "cable"],
    ),
    (
        "the wrong interface",
        |seen| {
            seen.links.as_mut().unwrap().push(link("eth1", None));
            let to = |last: u8| ([192, 0, 2, last].into(), "eth1".to_owned());
            seen.detours = Ok(vec![to(2), to(3)]);
        },
        ["eth0", "reaches peers such as 192.0.2.2 by eth1", "--iface=eth1"],
    ),
    (
        "no way to the peers",
        |seen| {
            let to = |last: u8| ([192, 0, 2, last].into(), "Network is unreachable".to_owned());
            seen.detours = Ok(vec![to(2), to(3)]);
        },
        ["192.0.2.2", "Network is unreachable", "add a route"],
    ),
    (
        "checksums that are wrong while doctor looks",
        |seen| seen.checksum_errors = 3,
        ["UDP on eth0", "wrong checksum", "ChecksumOffload"],
    ),
    (
        "checksums that were wrong before",
        |seen| {
            let status = status(seen);
            (status.host.checksum_errors_new, status.host.checksum_errors_at) = (400, Some(status.at - 60));
        },
        ["UDP on eth0", "400 datagrams", "ChecksumOffload"],
    ),
    (
        "a peer with another backend",
        |seen| first(seen, "its backend is host-gw, this node's is vxlan: both need the same"),
        ["a2 (10.244.2.0/24)", "its backend is host-gw", "the same Backend"],
    ),
    (
        "a peer with this node's address",
        |seen| first(seen, "its public address 192.0.2.1 is this node's own"),
        ["a2", "192.0.2.1", "--public-ip"],
    ),
    (
        "a peer that was copied",
        |seen| first(seen, "its VtepMAC x is that of the node at y"),
        ["a2", "VtepMAC", "another MAC"],
    ),
    (
        "a peer outside of the network",
        |seen| first(seen, "it lies outside the network 10.244.0.0/16"),
        ["a2", "outside the network", "net-conf.json"],
    ),
    (
        "a lease that can't be read, beside peers",
        |seen| {
            let why = "not a JSON object: expected value at line 1 column 1".to_owned();
            status(seen).peers.skipped_why.insert("10.244.9.0-24".into(), why);
        },
        ["10.244.9.0-24", "not a JSON object", "look at the lease"],
    ),
    (
        "a lease that can't be used, which the store lists with its key as well",
        |seen| {
            let why = "it lies outside the network 10.244.0.0/16";
            first(seen, why);
            status(seen).peers.skipped_why.insert("10.244.2.0-24".into(), why.into());
        },
        ["a2 (10.244.2.0/24)", "outside the network", "net-conf.json"],
    ),
    (
        "a peer that the kernel refuses",
        |seen| seen.peers[1].state = "refused".into(),
        ["a3", "the kernel lacks", "flanneld status"],
    ),
    (
        "a tunnel whose port is blocked, as probes found",
        |seen| {
            let peer = &mut seen.peers[1];
            peer.state = "unreachable".into();
            peer.cause =
                Some("192.0.2.3 answers, the tunnel does not: UDP 8472 is dropped between the nodes".into());
            peer.remedy = Some("allow UDP 8472 both ways".into());
        },
        ["a3 (10.244.3.0/24)", "UDP 8472 is dropped", "allow UDP 8472"],
    ),
];

#[test]
fn of_many_peers_with_trouble_the_first_are_named_and_the_rest_is_counted() {
    for (state, check) in [("unreachable", "tunnel"), ("skipped", "peer")] {
        let mut seen = healthy();
        seen.peers = (2..=9)
            .map(|number| PeerEntry {
                subnet: format!("10.244.{number}.0/24"),
                state: state.into(),
                ..PeerEntry::default()
            })
            .collect();
        let found = troubles(&seen);
        assert_eq!(found.len(), 6, "{found:#?}");
        assert!(found.iter().all(|finding| finding.check == check), "{found:#?}");
        assert_eq!(found[5].object, "3 more", "{found:#?}");
        assert!(found[5].remedy.contains("flanneld status --peers"), "{found:#?}");
    }
}

#[test]
fn pods_of_two_nodes_do_not_reach_each_other() {
    each_is_named(NETWORK);
    let mut one = healthy();
    one.detours = Ok(vec![([192, 0, 2, 2].into(), "eth1".to_owned())]);
    assert_eq!(troubles(&one), [], "one of two peers behind another interface may be meant");
    let mut few = healthy();
    let status = status(&mut few);
    (status.host.checksum_errors_new, status.host.checksum_errors_at) = (2, Some(status.at));
    assert_eq!(troubles(&few), [], "single errors happen on any wire");
}

#[test]
fn a_call_of_the_plugin_that_failed_a_moment_ago_is_named_and_an_older_one_is_not() {
    let failed = |age: u64, verb: &str| {
        let mut seen = healthy();
        let AgentAnswer::Answers(status) = &mut seen.agent else { unreachable!() };
        let message = "no IP addresses available in range set".to_owned();
        status.cni.failures.push_back(FailedCall {
            at: status.at - age,
            verb: verb.into(),
            code: 11,
            message,
        });
        troubles(&seen)
    };
    let [finding] = &failed(20, "ADD")[..] else { panic!() };
    assert_eq!((finding.check, finding.object.as_str()), ("cni-calls", "ADD (code 11)"));
    assert!(finding.cause.contains("20s ago: no IP addresses available"), "{}", finding.cause);
    assert!(finding.remedy.contains("--fix=leaked-addresses"), "{}", finding.remedy);
    assert_eq!((failed(600, "ADD"), failed(20, "DEL")), (Vec::new(), Vec::new()));
}

#[test]
fn the_direction_that_is_blocked_is_named_where_the_peer_tells_it() {
    let blocked = |direction: Option<Direction>| {
        let mut seen = healthy();
        seen.peers[0].state = "unreachable".into();
        seen.peers[0].public = Some("192.0.2.2".parse().unwrap());
        seen.peers[0].cause = Some("UDP port 8472 is dropped between the nodes".into());
        seen.peers[0].remedy = Some("allow UDP port 8472 both ways".into());
        let AgentAnswer::Answers(status) = &mut seen.agent else { unreachable!() };
        status.node.as_mut().unwrap().public = vec!["192.0.2.1".parse().unwrap()];
        seen.directions =
            direction.map(|direction| (seen.peers[0].subnet.clone(), direction)).into_iter().collect();
        let [Finding { cause, remedy, .. }] = &troubles(&seen)[..] else { panic!() };
        (cause.clone(), remedy.clone())
    };
    let (cause, remedy) = blocked(Some(Direction::Forth));
    assert!(
        cause.contains("does not arrive there") && remedy.ends_with("from 192.0.2.1 to 192.0.2.2"),
        "{cause} {remedy}"
    );
    let (cause, remedy) = blocked(Some(Direction::Back));
    assert!(
        cause.contains("only the way back is blocked") && remedy.ends_with("from 192.0.2.2 to 192.0.2.1"),
        "{cause} {remedy}"
    );
    let (cause, remedy) = blocked(None);
    assert!(!cause.contains("counters") && remedy.ends_with("both ways"), "{cause} {remedy}");
}
