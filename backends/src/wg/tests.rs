//! Two nodes on a network that loses, repeats and reorders, with time under control.

mod random;
mod sessions;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use subnet::wireguard::PresharedKey;

use super::answers::HandshakeOutcome;
use super::cookie;
use super::device::{Device, Heard};
use super::identity::Identity;
use super::message::{self, HEADER, WireguardMessage};
use super::{Now, Opening, Outgoing, PeerSettings, WireguardSettings};

const MTU: u16 = 1420;

fn at(number: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number as u8 + 1], 51_820))
}

/// A node, with where it sends from and what it has received.
struct Node {
    device: Device,
    settings: WireguardSettings,
    at: SocketAddr,
    peer: u32,
    got: Vec<Vec<u8>>,
    outcomes: Vec<HandshakeOutcome>,
}

struct World {
    nodes: [Node; 2],
    now: Now,
    /// What is on its way: from and to which node, and from which address.
    wire: Vec<(usize, SocketAddr, Outgoing)>,
}

impl World {
    fn new() -> Self {
        Self::with_secrets([None, None])
    }

    fn with_secrets(secrets: [Option<PresharedKey>; 2]) -> Self {
        let now = Now { ms: 1000, unix: Duration::from_secs(1_700_000_000) };
        let keys = [0, 1].map(|_| Arc::new(Identity::generate().unwrap()));
        let mut number = 0;
        let nodes = secrets.map(|psk| {
            let (me, other) = (number, 1 - number);
            number += 1;
            let peer = PeerSettings {
                key: *keys[other].public(),
                endpoint: at(other),
                allowed: Vec::new(),
                opening: Opening::Either,
            };
            let settings =
                WireguardSettings { identity: Arc::clone(&keys[me]), psk, keepalive: 0, peers: vec![peer] };
            Node::new(settings, at(me), now)
        });
        Self { nodes, now, wire: Vec::new() }
    }

    fn pass(&mut self, ms: u64) {
        self.now.ms += ms;
        self.now.unix += Duration::from_millis(ms);
    }

    fn put(&mut self, from: usize, out: Vec<Outgoing>) {
        let source = self.nodes[from].at;
        self.wire.extend(out.into_iter().map(|outgoing| (1 - from, source, outgoing)));
    }

    /// A node has a packet for the other one.
    fn send(&mut self, from: usize, packet: &[u8]) {
        let (mut out, node) = (Vec::new(), &mut self.nodes[from]);
        let peer = node.device.peer(node.peer).unwrap();
        match peer.session(self.now.ms) {
            Some(session) => {
                node.device.send(&peer, &session, packet, self.now, &mut out);
                node.device.sent(&peer, &session, 0, self.now, &mut out);
            }
            None => {
                node.device.stage(&peer, packet, self.now, &mut out);
            }
        }
        self.put(from, out);
    }

    /// Delivers one datagram; it is lost if no device has its address.
    fn deliver(&mut self, index: usize) {
        let (to, source, outgoing) = self.wire.remove(index);
        if self.nodes[to].at == outgoing.to {
            let out = self.nodes[to].receive(outgoing.bytes, source, self.now);
            self.put(to, out);
        }
    }

    /// Delivers everything.
    fn settle(&mut self) {
        while !self.wire.is_empty() {
            self.deliver(0);
        }
    }

    fn tick(&mut self) -> [Option<Duration>; 2] {
        [0, 1].map(|number| {
            let mut out = Vec::new();
            let next = self.nodes[number].device.tick(self.now, &mut out);
            self.put(number, out);
            next
        })
    }

    /// Lets time pass as the timers ask, up to some milliseconds.
    fn run(&mut self, ms: u64) {
        let end = self.now.ms + ms;
        while self.now.ms < end {
            self.settle();
            let next = self.tick().into_iter().flatten().min().map_or(ms, |next| next.as_millis() as u64);
            self.pass(next.clamp(1, end - self.now.ms));
        }
        self.tick();
        self.settle();
    }

    fn got(&mut self, node: usize) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.nodes[node].got)
    }

    /// What the node starts with after the end of its process.
    fn restart(&mut self, number: usize) {
        let Node { settings, at, .. } = &self.nodes[number];
        self.nodes[number] = Node::new(settings.clone(), *at, self.now);
    }
}

impl Node {
    fn new(settings: WireguardSettings, at: SocketAddr, now: Now) -> Self {
        let device = Device::new(Arc::clone(&settings.identity), MTU);
        let mut out = Vec::new();
        let peer = device.configure(&settings, MTU, now, &mut out)[0];
        assert_eq!(out, []);
        Self { device, settings, at, peer, got: Vec::new(), outcomes: Vec::new() }
    }

    fn receive(&mut self, mut bytes: Vec<u8>, source: SocketAddr, now: Now) -> Vec<Outgoing> {
        let mut out = Vec::new();
        let Some(WireguardMessage::Data { receiver, counter }) = WireguardMessage::parse(&bytes) else {
            self.outcomes.push(self.device.handshake(&bytes, source, now, &mut out));
            return out;
        };
        let Some(entry) = self.device.find(receiver) else {
            self.device.unknown_session(source, now, &mut out);
            return out;
        };
        let Some(session) = entry.session.as_ref().filter(|session| session.can_receive(now.ms)) else {
            return out;
        };
        if let Ok(len) = session.open(&mut bytes, counter) {
            let heard = Heard { packets: len > 0, bytes: bytes.len() };
            self.device.heard(&entry, source, heard, now, &mut out);
            if len > 0 {
                self.got.push(bytes[HEADER..HEADER + len].to_vec());
            }
        }
        out
    }

    fn sessions(&self) -> usize {
        self.device.entries()
    }
}

fn packet(number: u16) -> Vec<u8> {
    // A multiple of the padding, so that it comes out as it went in.
    [&number.to_be_bytes()[..], &[7; 30]].concat()
}

#[test]
fn a_packet_waits_for_the_handshake_that_it_causes_and_both_sides_can_send_then() {
    for first in [0, 1] {
        let mut world = World::new();
        for number in 0..3 {
            world.send(first, &packet(number));
        }
        assert_eq!(world.wire.len(), 1, "one initiation");
        world.deliver(0);
        assert!(
            world.nodes[1 - first].device.connected(world.now).is_empty(),
            "the first packet confirms it"
        );
        world.settle();
        assert_eq!(world.got(1 - first), [0, 1, 2].map(packet));
        world.send(1 - first, &packet(9));
        world.send(first, &packet(8));
        assert_eq!(world.wire.len(), 2, "no further handshake");
        world.settle();
        assert_eq!((world.got(first), world.got(1 - first)), (vec![packet(9)], vec![packet(8)]));
    }
}

#[test]
fn a_packet_is_padded_with_zeros_and_a_keepalive_confirms_where_no_packet_waits() {
    let mut world = World::new();
    let (mut out, node) = (Vec::new(), &world.nodes[0]);
    node.device.want_session(&node.device.peer(node.peer).unwrap(), world.now, &mut out);
    world.put(0, out);
    world.settle();
    assert_eq!(world.nodes[1].device.connected(world.now).len(), 1);
    assert_eq!(world.got(1), Vec::<Vec<u8>>::new());
    world.send(0, &[9; 17]);
    world.settle();
    assert_eq!(world.got(1), [[&[9; 17][..], &[0; 15]].concat()]);
}

#[test]
fn sessions_follow_each_other_without_a_loss_and_old_ones_go() {
    let mut world = World::new();
    for second in 0..600 {
        for from in [0, 1] {
            world.send(from, &packet(second));
            world.settle();
        }
        assert_eq!((world.got(0), world.got(1)), (vec![packet(second)], vec![packet(second)]), "{second}");
        world.run(1000);
        assert!(world.nodes[0].sessions() <= 4 && world.nodes[1].sessions() <= 4, "{second}");
    }
    let established = world.nodes[0].outcomes.iter().chain(&world.nodes[1].outcomes);
    let count = established.filter(|outcome| **outcome == HandshakeOutcome::Established).count();
    assert!((5..=6).contains(&count), "every two minutes: {count}");
    world.run(400_000);
    assert_eq!([world.nodes[0].sessions(), world.nodes[1].sessions()], [0, 0]);
    assert_eq!(world.tick(), [None, None], "nobody waits for anything");
}

#[test]
fn who_only_receives_sends_a_keepalive_and_who_hears_nothing_asks_again() {
    let mut world = World::new();
    world.send(0, &packet(0));
    world.settle();
    world.pass(1000);
    world.send(0, &packet(1));
    world.settle();
    world.run(8_500);
    world.pass(501);
    world.tick();
    let keepalives: Vec<_> =
        world.wire.iter().filter(|(to, _, out)| *to == 0 && out.bytes.len() == 32).collect();
    assert_eq!(keepalives.len(), 1);
    world.settle();
    world.run(30_000);
    assert_eq!(world.nodes[1].outcomes, [HandshakeOutcome::Answered], "the keepalive was an answer");
    // Now it is gone.
    world.send(0, &packet(2));
    world.wire.clear();
    world.pass(14_900);
    assert!(world.tick()[0].is_some() && world.wire.is_empty());
    world.pass(200);
    world.tick();
    assert!(matches!(WireguardMessage::parse(&world.wire[0].2.bytes), Some(WireguardMessage::Initiation(_))));
}

#[test]
fn a_dead_peer_is_asked_every_five_seconds_for_a_minute_and_a_half() {
    let mut world = World::new();
    world.nodes[1].at = at(7);
    world.send(0, &packet(0));
    let mut asked = Vec::new();
    for ms in (0..300_000).step_by(100) {
        asked.extend(world.wire.drain(..).map(|(_, _, out)| (ms, out.bytes.len())));
        world.pass(100);
        world.tick();
    }
    assert!((17..=19).contains(&asked.len()) && asked.iter().all(|(ms, len)| *ms < 96_000 && *len == 148));
    assert_eq!(world.nodes[0].sessions(), 0);
    assert_eq!(world.tick()[0], None);
    // What comes later begins again, and what waited too long is gone.
    world.nodes[1].at = at(1);
    world.send(0, &packet(1));
    world.settle();
    assert_eq!(world.got(1), [packet(1)]);
}

#[test]
fn a_node_that_was_restarted_is_reached_at_once() {
    let mut world = World::new();
    world.send(0, &packet(0));
    world.settle();
    world.restart(1);
    world.pass(30);
    world.send(0, &packet(1));
    world.settle();
    assert_eq!(world.got(1), Vec::<Vec<u8>>::new(), "it can't be read");
    assert_eq!(world.nodes[1].device.connected(world.now).len(), 1, "but a session follows");
    world.send(0, &packet(2));
    world.send(1, &packet(3));
    world.settle();
    assert_eq!((world.got(0), world.got(1)), (vec![packet(3)], vec![packet(2)]));
    // Both at once.
    world.restart(0);
    world.restart(1);
    world.pass(50);
    world.send(1, &packet(4));
    world.settle();
    assert_eq!(world.got(0), [packet(4)]);
}

#[test]
fn nodes_with_other_secrets_get_no_session() {
    let secret = |byte| Some(PresharedKey::from([byte; 32]));
    for (secrets, alike) in [
        ([secret(1), secret(1)], true),
        ([secret(1), secret(2)], false),
        ([secret(1), None], false),
        ([None, secret(2)], false),
    ] {
        let mut world = World::with_secrets(secrets);
        world.send(0, &packet(0));
        world.send(1, &packet(1));
        world.settle();
        world.run(20_000);
        assert_eq!(world.got(1).len() + world.got(0).len(), if alike { 2 } else { 0 });
        assert_eq!(world.nodes[0].device.connected(world.now).len(), usize::from(alike));
    }
}

#[test]
fn what_was_seen_before_is_refused() {
    let mut world = World::new();
    world.send(0, &packet(0));
    let initiation = world.wire[0].2.clone();
    world.settle();
    world.send(0, &packet(1));
    let data = world.wire[0].2.clone();
    world.settle();
    world.got(1);
    world.pass(5_000);
    for replayed in [&initiation, &data] {
        world.wire.push((1, at(0), replayed.clone()));
        world.settle();
    }
    assert_eq!(world.nodes[1].outcomes, [HandshakeOutcome::Answered, HandshakeOutcome::Refused]);
    assert_eq!(world.got(1), Vec::<Vec<u8>>::new());
    world.send(1, &packet(2));
    world.settle();
    assert_eq!(world.got(0), [packet(2)], "what was there still is");
}

#[test]
fn a_peer_that_moves_is_followed_and_one_that_is_gone_is_not_heard() {
    let mut world = World::new();
    world.send(0, &packet(0));
    world.settle();
    world.nodes[0].at = at(9);
    world.send(1, &packet(1));
    world.settle();
    assert_eq!(world.got(0), Vec::<Vec<u8>>::new(), "it moved and has said nothing yet");
    world.send(0, &packet(2));
    world.settle();
    world.send(1, &packet(3));
    world.settle();
    assert_eq!((world.got(0), world.got(1)), (vec![packet(3)], vec![packet(0), packet(2)]));

    let Node { device, settings, .. } = &world.nodes[1];
    let none = WireguardSettings { peers: Vec::new(), ..settings.clone() };
    assert_eq!(device.configure(&none, MTU, world.now, &mut Vec::new()), Vec::<u32>::new());
    assert_eq!(device.entries(), 0);
    world.send(0, &packet(4));
    world.settle();
    world.run(40_000);
    assert_eq!(world.got(1), Vec::<Vec<u8>>::new());
    assert!(world.nodes[1].outcomes[1..].iter().all(|outcome| *outcome == HandshakeOutcome::Refused));
    // It becomes a peer again, and is called without waiting for its next attempt.
    let node = &mut world.nodes[1];
    let mut out = Vec::new();
    node.peer = node.device.configure(&node.settings, MTU, world.now, &mut out)[0];
    assert_eq!(out.len(), 1);
    let out = vec![Outgoing { to: at(9), ..out.remove(0) }];
    world.put(1, out);
    world.settle();
    world.send(0, &packet(5));
    world.settle();
    assert_eq!(world.got(1), [packet(5)]);
}

#[test]
fn a_flood_keeps_neither_a_peer_at_its_address_nor_one_that_moved_from_another_session() {
    for moved in [false, true] {
        let mut world = World::new();
        world.send(0, &packet(0));
        world.settle();
        if moved {
            world.nodes[0].at = at(9);
            world.send(0, &packet(1));
            world.settle();
        }
        world.run(10_000);
        // From a stranger, and from other ports of the peer's address.
        let node = &world.nodes[1];
        let mut initiation = [0x5a; message::INITIATION];
        initiation[..4].copy_from_slice(&[1, 0, 0, 0]);
        cookie::mac1(node.settings.identity.public(), &mut initiation);
        let mut out = Vec::new();
        for port in 1..2_000 {
            for sender in [at(0).ip(), at(77).ip()] {
                node.device.handshake(&initiation, SocketAddr::new(sender, port), world.now, &mut out);
            }
        }
        let replies = out.len();
        assert!((100..=1_000).contains(&replies), "{replies}");
        let (mut out, node) = (Vec::new(), &world.nodes[0]);
        node.device.want_session(&node.device.peer(node.peer).unwrap(), world.now, &mut out);
        world.put(0, out);
        world.settle();
        assert_eq!(world.nodes[1].outcomes.last(), Some(&HandshakeOutcome::Answered), "moved: {moved}");
        assert_eq!(world.nodes[0].outcomes.last(), Some(&HandshakeOutcome::Established), "moved: {moved}");
    }
}

#[test]
fn initiations_are_taken_in_their_order_although_the_clock_stands_still_or_is_set_back() {
    let mut world = World::new();
    for _ in 0..4 {
        world.now.unix -= Duration::from_secs(3600);
        let (mut out, node) = (Vec::new(), &world.nodes[0]);
        node.device.want_session(&node.device.peer(node.peer).unwrap(), world.now, &mut out);
        world.put(0, out);
        world.settle();
        world.now.ms += 6_000;
    }
    assert_eq!(world.nodes[1].outcomes, [HandshakeOutcome::Answered; 4]);
}

#[test]
fn keepalives_come_at_their_interval_and_those_of_many_peers_not_at_once() {
    let identity = Arc::new(Identity::generate().unwrap());
    let peer = |number: usize| {
        let key = *Identity::generate().unwrap().public();
        PeerSettings {
            key,
            endpoint: SocketAddr::from(([10, 0, 0, number as u8], 1)),
            allowed: Vec::new(),
            opening: Opening::Either,
        }
    };
    let peers = (0..40).map(peer).collect();
    let settings = WireguardSettings { identity: Arc::clone(&identity), psk: None, keepalive: 25, peers };
    let device = Device::new(identity, MTU);
    let (mut now, mut out) = (Now { ms: 1_000_000, unix: Duration::ZERO }, Vec::new());
    device.configure(&settings, MTU, now, &mut out);
    let mut most = 0;
    for _ in 0..25 {
        let before = out.len();
        now.ms += 1000;
        device.tick(now, &mut out);
        most = most.max(out.len() - before);
    }
    let asked: std::collections::BTreeSet<_> = out.iter().map(|outgoing| outgoing.to).collect();
    assert_eq!(asked.len(), 40);
    // Those that were not answered are asked again every five seconds.
    assert!(most < 25, "{most} in one second");
}

#[test]
fn of_too_many_packets_that_wait_the_newest_are_kept() {
    let mut world = World::new();
    for number in 0..1000 {
        world.send(0, &packet(number));
    }
    world.settle();
    let got = world.got(1);
    assert_eq!((got.len(), &got[0], &got[127]), (128, &packet(872), &packet(999)));
}
