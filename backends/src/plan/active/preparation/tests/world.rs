//! Two nodes, a store, and a model of the kernel's module: what is sent takes its time, and an initiation that arrives ends the one
//! that was sent (`wg_noise_handshake_consume_initiation`).

use std::sync::Arc;

use subnet::lease::parse_key;
use subnet::{NetworkConfig, PublicAddrs, Vtep};

use super::*;
use crate::plan::backend::{Macs, Node as Place, Peer, PlanInput, Underlay};
use crate::plan::peers::{PeerContext, Peers};
use crate::plan::surroundings::Surroundings;
use crate::plan::wireguard::Wireguard;

const STEP: Duration = Duration::from_millis(10);
/// The module sends an initiation to a peer once in so long.
const RETRY: Duration = Duration::from_secs(5);
/// And so much later at most, which it draws by lot.
const JITTER: Duration = Duration::from_millis(330);

pub(super) fn vtep(node: usize) -> Vtep {
    Vtep { vni: 1, mac: mac(node), port: None }
}

fn mac(node: usize) -> Mac {
    Mac([2, 0, 0, 0, 0, node as u8 + 1])
}

fn subnets(node: usize) -> Subnets {
    parse_key(&format!("10.244.{}.0-24", node + 1)).unwrap()
}

fn subnet(node: usize) -> IpNet {
    subnets(node).iter().next().unwrap()
}

fn public(node: usize) -> PublicAddrs {
    let addr: std::net::IpAddr = format!("192.0.2.{}", node + 1).parse().unwrap();
    [addr].into_iter().collect()
}

fn network(backend: &str) -> NetworkConfig {
    NetworkConfig::parse(&format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))
        .unwrap()
}

/// One node, and what it last wanted of its kernel.
pub(super) struct Node {
    number: usize,
    former: String,
    pub(super) active: ActiveBackends,
    before: KernelState,
    sessions: FoundSessions,
}

impl Node {
    pub(super) fn new(number: usize, former: &str) -> Self {
        let config = network(former);
        let active = ActiveBackends::new(&config.backend, &config).unwrap();
        let (before, sessions) = (KernelState::default(), FoundSessions::default());
        Self { number, former: former.to_owned(), active, before, sessions }
    }

    /// As a node begins that joins a cluster with WireGuard and had no other backend.
    pub(super) fn alone(number: usize, identity: &Arc<Identity>) -> Self {
        let mut node = Self::new(number, "host-gw");
        node.active.all = vec![backend(identity)];
        node
    }

    /// As a change of the configuration leaves it, but for the key, which is no file.
    pub(super) fn switch(&mut self, identity: &Arc<Identity>) {
        let mut next = self.active.clone();
        next.all.insert(0, backend(identity));
        next.preparation = self.active.preparation_for(&next);
        self.active = next;
    }

    /// As an agent begins that is started with WireGuard and had another backend before.
    pub(super) fn restart(&mut self, identity: &Arc<Identity>) {
        let config = network(&self.former);
        self.active = ActiveBackends::new(&config.backend, &config).unwrap();
        self.active.all.insert(0, backend(identity));
    }

    /// It has WireGuard for the sake of peers that announce it.
    pub(super) fn take_up(&mut self, identity: &Arc<Identity>) {
        self.active.all.push(backend(identity));
    }

    pub(super) fn switch_back(&mut self) {
        let mut next = self.active.clone();
        next.all.rotate_left(1);
        next.preparation = self.active.preparation_for(&next);
        self.active = next;
    }

    pub(super) fn session(&mut self, with: usize, is_there: bool) {
        if is_there {
            self.sessions.with.insert(subnet(with));
        } else {
            self.sessions.with.remove(&subnet(with));
        }
    }

    /// When it looked at the sessions last.
    pub(super) fn looked(&mut self, at: Instant, took: Duration) {
        self.sessions.looked = Some((at, took));
    }

    fn macs(&self) -> Macs {
        let mut macs = Macs::default();
        macs.set(Family::V4, mac(self.number));
        macs
    }

    /// What it says in its lease.
    pub(super) fn attachment(&self) -> Attachment {
        self.active.attachment(&self.macs())
    }

    /// Plans with what the nodes say.
    pub(super) fn turn(&mut self, said: &[Attachment], now: Instant) -> HeardKeys {
        let mut all = Leases::default();
        for (node, attachment) in said.iter().enumerate() {
            let (subnets, public, created) = (subnets(node), public(node), node as u64 + 1);
            let attachment = attachment.clone();
            all.leases.insert(subnets, Lease { subnets, public, attachment, created, written: created });
        }
        let own = all.leases[&subnets(self.number)].clone();
        let heard = self.active.hear_keys(&all, &own, &self.sessions, now);
        let context = PeerContext {
            network: &network("wireguard"),
            former: &[],
            own: &own,
            active: &self.active,
            before: &self.before,
            surroundings: &Surroundings::default(),
            undecided: &BTreeSet::new(),
        };
        let peers = Peers::choose(context, &all);
        let usable: Vec<Peer> = peers.usable.values().copied().collect();
        self.active.drop_unused(usable.iter(), now);
        let public = public(self.number);
        let underlay = Underlay { index: 2, name: "eth0".parse().unwrap(), mtu: 1500 };
        let place = Place { underlay, source: public, local: public, public, direct: Default::default() };
        let macs = self.macs();
        let input = PlanInput { node: &place, own: &own.subnets, macs: &macs, peers: &usable, all: &usable };
        self.before = self.active.plan(input);
        heard
    }

    /// Whether packets for the pods of a node go by WireGuard.
    pub(super) fn is_sealed(&self, to: usize) -> bool {
        let routes = &self.before.routes;
        let route = routes.get(&subnet(to)).or_else(|| routes.get(&"10.244.0.0/16".parse().unwrap()));
        route.and_then(|route| route.dev) == Some("flannel-wg".parse().unwrap())
    }

    /// Seconds between keepalives to a node; `None` if the module does not know it.
    pub(super) fn keepalive(&self, to: usize) -> Option<u16> {
        let mut peers = self.before.wireguard.values().flat_map(|device| device.peers.values());
        peers.find(|peer| peer.allowed.contains(&subnet(to))).map(|peer| peer.keepalive)
    }

    /// By which key the module knows a node.
    pub(super) fn key(&self, of: usize) -> Option<PublicKey> {
        let mut peers = self.before.wireguard.values().flat_map(|device| &device.peers);
        peers.find(|(_, peer)| peer.allowed.contains(&subnet(of))).map(|(key, _)| *key)
    }

    /// Whether the module takes packets of a node.
    pub(super) fn hears(&self, of: usize) -> bool {
        self.keepalive(of).is_some()
    }
}

fn backend(identity: &Arc<Identity>) -> ActiveBackend {
    let config = network("wireguard").backend;
    let BackendConfig::Wireguard(settings) = &config else { panic!() };
    let networks = vec!["10.244.0.0/16".parse().unwrap()];
    let backend = Wireguard::new(settings.clone(), Arc::clone(identity), networks).unwrap();
    ActiveBackend { id: BackendId(1), config, backend: Arc::new(backend), idle: None }
}

/// What the module of a node has of the other one.
#[derive(Default)]
struct Module {
    /// The interval of keepalives that it knows.
    keepalive: u16,
    /// It wants a session.
    asking: bool,
    /// When it sent an initiation last, and whether that can still be answered.
    asked: Option<Instant>,
    pending: bool,
    session: bool,
}

#[derive(Clone)]
enum Message {
    Initiation,
    Response,
    Confirmation,
    /// What this node says now.
    Lease(usize, Attachment),
}

pub(super) struct World {
    keys: [Arc<Identity>; 2],
    nodes: [Node; 2],
    modules: [Module; 2],
    /// What is in the store, and what each node has read of it.
    written: [Attachment; 2],
    read: [[Attachment; 2]; 2],
    /// When each node changes, and when it wants another turn.
    changes: [Option<Instant>; 2],
    again: [Option<Instant>; 2],
    delay: Duration,
    /// How long each node's leases take to reach the other one.
    pub(super) stores: [Duration; 2],
    under_way: Vec<(Instant, usize, Message)>,
    now: Instant,
    /// This node comes later and has WireGuard alone, so packets wait for a session.
    alone: Option<usize>,
}

impl World {
    pub(super) fn new(former: &str, keys: [&Arc<Identity>; 2], delay: Duration) -> Self {
        let now = Instant::now();
        let written = [0, 1].map(|node| said(former, node));
        let mut nodes = [0, 1].map(|node| Node::new(node, former));
        for node in &mut nodes {
            node.turn(&written, now);
        }
        Self {
            keys: keys.map(Arc::clone),
            nodes,
            modules: Default::default(),
            read: [written.clone(), written.clone()],
            written,
            changes: [None; 2],
            again: [None; 2],
            delay,
            stores: [Duration::ZERO; 2],
            under_way: Vec::new(),
            now,
            alone: None,
        }
    }

    /// A node hears of the configuration in so many milliseconds.
    pub(super) fn change(&mut self, node: usize, after: u64) {
        self.changes[node] = Some(self.now + Duration::from_millis(after));
    }

    /// A node is not there yet.
    pub(super) fn lacks(&mut self, node: usize) {
        let (other, nothing) = (1 - node, Attachment::Foreign("nothing".into()));
        self.read.iter_mut().for_each(|read| read[node] = nothing.clone());
        let former = self.nodes[other].former.clone();
        self.nodes[other] = Node::new(other, &former);
        self.nodes[other].turn(&self.read[other], self.now);
        self.alone = Some(node);
    }

    /// It joins with WireGuard alone.
    pub(super) fn join_alone(&mut self, node: usize) {
        self.read[node] = self.written.clone();
        self.nodes[node] = Node::alone(node, &self.keys[node]);
        self.again[node] = Some(self.now);
    }

    pub(super) fn restart(&mut self, node: usize) {
        self.nodes[node].restart(&self.keys[node]);
        self.again[node] = Some(self.now);
    }

    pub(super) fn run(&mut self, ms: u64) {
        let end = self.now + Duration::from_millis(ms);
        while self.now < end {
            self.now += STEP;
            for node in [0, 1] {
                self.deliver(node);
                if self.changes[node].take_if(|at| *at <= self.now).is_some() {
                    self.nodes[node].switch(&self.keys[node]);
                    self.turn(node);
                }
                if self.again[node].is_some_and(|at| at <= self.now) {
                    self.turn(node);
                }
                self.ask(node);
            }
            self.check();
        }
    }

    fn send(&mut self, to: usize, after: Duration, message: Message) {
        self.under_way.push((self.now + after, to, message));
    }

    fn turn(&mut self, node: usize) {
        self.nodes[node].session(1 - node, self.modules[node].session);
        self.again[node] = self.nodes[node].turn(&self.read[node], self.now).again;
        let module = &mut self.modules[node];
        let keepalive = self.nodes[node].keepalive(1 - node).unwrap_or(0);
        module.asking |= keepalive > 0 && module.keepalive == 0;
        module.keepalive = keepalive;
        let said = self.nodes[node].attachment();
        if said != self.written[node] {
            self.written[node] = said.clone();
            self.send(node, STEP, Message::Lease(node, said.clone()));
            self.send(1 - node, self.stores[node].max(STEP), Message::Lease(node, said));
        }
    }

    fn deliver(&mut self, to: usize) {
        let now = self.now;
        let due = |(at, node, _): &(Instant, usize, Message)| *node == to && *at <= now;
        let (messages, later) = std::mem::take(&mut self.under_way).into_iter().partition(due);
        self.under_way = later;
        for (_, _, message) in messages {
            self.take(to, message);
        }
    }

    fn take(&mut self, to: usize, message: Message) {
        match message {
            Message::Lease(of, said) => {
                self.read[to][of] = said;
                self.turn(to);
            }
            Message::Initiation if self.nodes[to].hears(1 - to) => {
                assert!(self.alone.is_some() || !self.modules[to].pending, "two initiations cross");
                self.modules[to].pending = false;
                self.send(1 - to, self.delay, Message::Response);
            }
            Message::Initiation => {}
            Message::Response => {
                let module = &mut self.modules[to];
                if std::mem::take(&mut module.pending) {
                    (module.session, module.asking) = (true, false);
                    self.send(1 - to, self.delay, Message::Confirmation);
                }
            }
            Message::Confirmation => {
                let module = &mut self.modules[to];
                (module.session, module.asking) = (true, false);
            }
        }
    }

    /// The module asks for a session if it has none and packets for the peer, or a keepalive.
    fn ask(&mut self, node: usize) {
        let packets = self.nodes[node].is_sealed(1 - node) && self.nodes[node].hears(1 - node);
        let module = &mut self.modules[node];
        module.asking |= packets;
        // Without this, those that cross once do so for ever; where they must never cross it is left out.
        let jitter = if self.alone == Some(node) { JITTER } else { Duration::ZERO };
        if module.asking && !module.session && module.asked.is_none_or(|at| self.now >= at + RETRY + jitter) {
            (module.asked, module.pending) = (Some(self.now), true);
            self.send(1 - node, self.delay, Message::Initiation);
        }
    }

    /// Each node has a packet for the other one in each moment.
    fn check(&self) {
        let both = self.written.iter().all(|said| matches!(said, Attachment::Wireguard(_)));
        for node in [0, 1] {
            let sealed = self.nodes[node].is_sealed(1 - node);
            assert!(sealed || !both, "node {node} sends readable packets");
            if self.alone.is_none() {
                assert!(!sealed || self.modules[node].session, "packets of node {node} wait for a session");
                assert!(!sealed || self.nodes[1 - node].hears(node), "packets of node {node} are refused");
            }
        }
    }

    /// Both nodes have gone on to WireGuard.
    pub(super) fn is_changed(&self) {
        for node in [0, 1] {
            assert_eq!(self.written[node], announcing(&self.keys[node]));
            assert!(self.nodes[node].is_sealed(1 - node));
        }
    }
}
