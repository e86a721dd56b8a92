//! The value itself, as `docs/status.md` describes it. A reader passes over members that it does not know.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Times;
use crate::cni_calls::CniCalls;
use crate::probe::PeerReport;

/// Raised when a member changes its meaning or goes away; new members do not raise it.
pub(crate) const SCHEMA: u32 = 1;

/// How a node stands. Moments are seconds since 1970.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NodeStatus {
    pub(crate) schema: u32,
    pub(crate) version: String,
    pub(crate) commit: String,
    /// When this was put together.
    pub(crate) at: u64,
    /// When the agent started.
    pub(crate) started: u64,
    pub(crate) alive: bool,
    pub(crate) ready: bool,
    /// Since when it has been ready.
    pub(crate) ready_since: Option<u64>,
    /// Conditions of readiness: null if it is met, or why it is not.
    pub(crate) conditions: BTreeMap<String, Option<String>>,
    /// What an operator should know although the node may be ready, by subject; with the remedy at the end.
    pub(crate) notes: BTreeMap<String, Vec<String>>,
    /// Not before there are a lease and an interface.
    pub(crate) node: Option<Node>,
    pub(crate) store: Store,
    pub(crate) peers: PeerCounts,
    pub(crate) kernel: KernelStatus,
    pub(crate) rules: RulesStatus,
    pub(crate) host: Host,
    /// The address pool of each family.
    pub(crate) pools: Vec<Pool>,
    /// Probes of all peers together; `/peers` has each of them.
    pub(crate) probes: Option<ProbeStatus>,
    /// Bytes to and from each peer, for metrics, while they are counted and there are few peers.
    #[serde(skip)]
    pub(crate) traffic: Vec<CountedPeer>,
    /// Sessions with peers by state; null without WireGuard.
    pub(crate) wireguard: Option<SessionCounts>,
    /// The last handshake with each peer, for metrics, while there are few peers.
    #[serde(skip)]
    pub(crate) handshakes: Vec<PeerHandshake>,
    /// What the CNI plugin did on this node.
    pub(crate) cni: CniCalls,
    /// Only while network policies are enforced.
    pub(crate) policy: Option<Policy>,
    /// Devices of the fast path; only while there is one.
    pub(crate) fast_path: Option<usize>,
    pub(crate) counters: Counters,
    /// What the `udp` backend counts; empty without it.
    pub(crate) tunnel: BTreeMap<String, u64>,
}

/// This node in its cluster.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Node {
    /// Its name, if the store has names.
    pub(crate) name: Option<String>,
    pub(crate) networks: Vec<String>,
    pub(crate) subnets: Vec<String>,
    /// The announced backend, with what distinguishes it: `vxlan VNI 1 port 8472`.
    pub(crate) backend: String,
    /// Other backends by which peers are still reached.
    pub(crate) former: Vec<String>,
    /// The backend stands in for one that the kernel does not have.
    pub(crate) fallback: bool,
    /// Tunnel devices of the announced backend.
    pub(crate) devices: Vec<String>,
    /// The bridge of the pods; empty before there is one.
    pub(crate) bridge: String,
    /// MTU of pods in bytes.
    pub(crate) mtu: u32,
    pub(crate) interface: String,
    pub(crate) interface_mtu: u32,
    /// Why that interface was chosen.
    pub(crate) interface_why: String,
    /// Addresses that are announced to peers.
    pub(crate) public: Vec<IpAddr>,
    /// UDP ports at which tunnels listen.
    pub(crate) ports: Vec<u16>,
    /// Pods reach Services by rules of kube-proxy.
    pub(crate) services: bool,
}

/// The lease store and the own lease.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Store {
    /// Its kind and address.
    pub(crate) name: String,
    pub(crate) connected: bool,
    /// It answers, and refuses this node.
    pub(crate) refused: bool,
    pub(crate) trouble: Option<String>,
    pub(crate) trouble_since: Option<u64>,
    pub(crate) last_answer: Option<u64>,
    /// The node runs on what an earlier run saved.
    pub(crate) recalled: bool,
    /// When the own lease ends unless it is renewed; null where leases do not end.
    pub(crate) lease_ends: Option<u64>,
    /// Why it could not be renewed last; in Kubernetes, what is wrong with the own node's object.
    pub(crate) lease_trouble: Option<String>,
}

/// Peers by how far they are. Those of probes are null while there are no probes.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PeerCounts {
    /// Leases of other nodes.
    pub(crate) known: usize,
    /// Nodes that this one can use.
    pub(crate) usable: usize,
    /// Nodes to which the kernel has everything that it needs.
    pub(crate) programmed: usize,
    pub(crate) reachable: Option<usize>,
    pub(crate) degraded: Option<usize>,
    pub(crate) unreachable: Option<usize>,
    /// Leases that can't be used, by the class of the reason.
    pub(crate) skipped: BTreeMap<String, usize>,
    /// The first of these with their reasons, by key.
    pub(crate) skipped_why: BTreeMap<String, String>,
}

/// The kernel as the loop saw it last, and as it is now where that was asked for.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct KernelStatus {
    /// How many objects there should be, by kind.
    pub(crate) desired: BTreeMap<String, usize>,
    /// When the loop saw the kernel last.
    pub(crate) seen: Option<u64>,
    /// The kernel was then as desired, but for what follows.
    pub(crate) settled: bool,
    /// Changes that the kernel refused, with its reason; the first of them.
    pub(crate) refused: Vec<String>,
    /// What another program undoes again and again.
    pub(crate) fights: Vec<String>,
    /// What differs now, by kind; only with `/status?look`, which reads the kernel and changes nothing.
    pub(crate) differing: Option<BTreeMap<String, usize>>,
    /// The changes that would make it as desired; the first of them.
    pub(crate) changes: Vec<String>,
}

/// Traffic rules.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RulesStatus {
    /// `nftables` or `iptables`.
    pub(crate) mode: String,
    /// When they were last found or put right.
    pub(crate) sound: Option<u64>,
    /// What keeps packets from passing and can't be put right.
    pub(crate) obstacles: Vec<String>,
    /// Chains of other programs that end forwarded packets; a way through them is made.
    pub(crate) dropping_chains: usize,
    /// Why rules could not be read or made.
    pub(crate) failed: Option<String>,
}

/// What the host's kernel counts.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Host {
    /// The external interface, tunnel devices and the bridge of the pods.
    pub(crate) devices: Vec<Device>,
    /// UDP datagrams with a wrong checksum, of both families.
    pub(crate) checksum_errors: u64,
    /// How many of them came since the agent started, and when the last one was noticed.
    pub(crate) checksum_errors_new: u64,
    pub(crate) checksum_errors_at: Option<u64>,
    /// ICMP echo requests that arrived, of both families.
    pub(crate) echo_requests: Option<u64>,
    pub(crate) process: Process,
}

/// A device's counters.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// Bytes, packets, errors, dropped.
    pub(crate) receive: [u64; 4],
    pub(crate) transmit: [u64; 4],
}

/// The agent as a process.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Process {
    pub(crate) cpu_seconds: f64,
    pub(crate) resident_bytes: u64,
    pub(crate) open_fds: u64,
}

/// The addresses for pods of one family.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Pool {
    pub(crate) subnet: String,
    /// Where reservations are.
    pub(crate) directory: String,
    pub(crate) size: u64,
    pub(crate) used: u64,
    /// Of the used ones, those that no pod of this node has; null if that could not be found out.
    pub(crate) leaked: Option<u64>,
}

/// What probes found.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProbeStatus {
    /// Why this node does not probe; null if it does.
    pub(crate) off: Option<String>,
    /// Time between two rounds of one peer.
    pub(crate) interval_seconds: f64,
    /// Answers that fit no request.
    pub(crate) rejected: u64,
    /// By `underlay`, `overlay` and `large`.
    pub(crate) paths: BTreeMap<String, ProbedPath>,
    /// For metrics, while there are few peers.
    #[serde(skip)]
    pub(crate) peers: Vec<ProbedPeer>,
}

/// Probes of one kind, counted since the start.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProbedPath {
    pub(crate) answered: u64,
    pub(crate) lost: u64,
    pub(crate) late: u64,
    pub(crate) duplicate: u64,
    /// Upper bounds of classes of round trips in seconds, with how many are in each; longer ones are in none.
    pub(crate) classes: Vec<(f64, u64)>,
    /// Sum of round trips in seconds.
    pub(crate) sum: f64,
}

/// WireGuard peers by the state of their session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SessionCounts {
    /// The last handshake is less than three minutes ago.
    pub(crate) current: usize,
    /// There is no session, and none is asked for.
    pub(crate) idle: usize,
    /// Handshakes are not answered.
    pub(crate) failing: usize,
}

/// The last handshake with a peer, in seconds since 1970.
#[derive(Clone, Default)]
pub(crate) struct PeerHandshake {
    /// The node's name, or the subnet.
    pub(crate) peer: String,
    pub(crate) at: u64,
}

/// A peer whose bytes are counted.
#[derive(Clone, Default)]
pub(crate) struct CountedPeer {
    /// The node's name, or the subnet.
    pub(crate) peer: String,
    pub(crate) received: u64,
    pub(crate) transmitted: u64,
}

/// A peer with its own series.
#[derive(Clone, Default)]
pub(crate) struct ProbedPeer {
    /// The node's name, or the subnet.
    pub(crate) peer: String,
    pub(crate) up: bool,
    pub(crate) loss: f64,
    pub(crate) rtt_seconds: Option<f64>,
    pub(crate) path_mtu: Option<u32>,
}

/// Network policies.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Policy {
    pub(crate) changes: u64,
    pub(crate) repairs: u64,
    pub(crate) add_failures: u64,
    pub(crate) apply: Times,
    pub(crate) add: Times,
    pub(crate) generation: u64,
    pub(crate) policies: u64,
    pub(crate) elements: u64,
    pub(crate) pods_known: u64,
    pub(crate) pods_local: u64,
    pub(crate) isolated_addresses: u64,
    pub(crate) ignored: u64,
    pub(crate) steering: u64,
    pub(crate) watches: u64,
}

/// What happened since the start.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Counters {
    /// Turns of the loop, by what woke it.
    pub(crate) converges: BTreeMap<String, u64>,
    pub(crate) converge: Times,
    pub(crate) last_converge: Option<u64>,
    pub(crate) changes: Vec<ChangeCount>,
    /// Changes that no snapshot asked for: another program had undone them.
    pub(crate) repairs: BTreeMap<String, u64>,
    pub(crate) last_repair: Option<Repair>,
    /// Notifications of the kernel that were lost because the buffer was full.
    pub(crate) overruns: u64,
    /// Snapshots of all leases that differed from the one before, by `store` and `saved`.
    pub(crate) snapshots: BTreeMap<String, u64>,
    pub(crate) store_errors: BTreeMap<String, u64>,
    /// Renewals of the own lease, by `done` and `failed`.
    pub(crate) renewals: BTreeMap<String, u64>,
}

/// Changes of one kind.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ChangeCount {
    pub(crate) object: String,
    pub(crate) action: String,
    /// `done` or `refused`.
    pub(crate) result: String,
    pub(crate) count: u64,
}

/// The last repair.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Repair {
    pub(crate) at: u64,
    pub(crate) what: String,
}

/// What `/peers` says.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PeerList {
    pub(crate) schema: u32,
    pub(crate) at: u64,
    /// Ordered by subnet.
    pub(crate) peers: Vec<PeerEntry>,
}

impl PeerEntry {
    /// Whether WireGuard leads to it.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.way.as_deref().is_some_and(|way| way.starts_with("wireguard"))
    }
}

/// One lease of another node, in one family.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PeerEntry {
    pub(crate) name: Option<String>,
    /// The key of the lease, which both families of a node have in common; empty from an older agent.
    pub(crate) lease: String,
    pub(crate) subnet: String,
    pub(crate) public: Option<IpAddr>,
    /// By which backend it is reached.
    pub(crate) way: Option<String>,
    /// `skipped`, `refused` or `programmed`, and with probes `reachable`, `degraded` or `unreachable`.
    pub(crate) state: String,
    /// Why it is skipped.
    pub(crate) why: Option<String>,
    /// What probes say is wrong, and what to do.
    pub(crate) cause: Option<String>,
    pub(crate) remedy: Option<String>,
    /// What probes found; null without them.
    pub(crate) loss: Option<f64>,
    pub(crate) rtt_seconds: Option<f64>,
    pub(crate) path_mtu: Option<u32>,
    /// When the last handshake of WireGuard succeeded; null: never, or it is reached otherwise.
    pub(crate) handshake: Option<u64>,
    /// Bytes from and to its pods; null unless they are counted (`--peer-counters`) or it is a peer of WireGuard.
    pub(crate) received_bytes: Option<u64>,
    pub(crate) transmitted_bytes: Option<u64>,
    /// Since when it has been in this state.
    pub(crate) since: Option<u64>,
    /// All that probes found.
    pub(crate) probe: Option<PeerReport>,
}
