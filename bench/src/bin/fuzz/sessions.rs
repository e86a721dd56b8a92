//! Messages to two WireGuard devices that have a session and are about to have another: most were changed on their way, the
//! others came before. Nothing but what the peer sealed is taken, that once, and the session goes on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use backends::testing::Numbers;
use backends::wg::answers::HandshakeOutcome;
use backends::wg::cookie;
use backends::wg::device::{Device, Heard};
use backends::wg::identity::Identity;
use backends::wg::message::{COOKIE, HEADER, INITIATION, RESPONSE, TAG, WireguardMessage};
use backends::wg::session::Session;
use backends::wg::window::MAX_COUNTER;
use backends::wg::{Now, Opening, Outgoing, PeerSettings, WireguardSettings};

/// So many messages are kept to be changed and sent again.
const KEPT: usize = 64;
/// One message in so many is an initiation that has to be computed: its first code is right.
const COMPUTED: usize = 500;
/// How often time passes in a case: some milliseconds each, so that no session ends.
const STEPS: usize = 1_000;
/// The second code of a handshake message counts only under load.
const SECOND_CODE: usize = 16;

struct Bed {
    numbers: Numbers,
    keys: [Arc<Identity>; 2],
    devices: [Device; 2],
    /// What each node seals with.
    sessions: [Arc<Session>; 2],
    /// What went to each node before.
    kept: [Vec<Vec<u8>>; 2],
    /// The answer to the second handshake, which the first node waits for.
    response: Vec<u8>,
    now: Now,
}

/// Where each node is.
pub(crate) fn at(node: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, node as u8 + 1], 51_820))
}

/// Two devices with these keys that are each other's only peer, and want a session.
pub(crate) fn devices(keys: &[Arc<Identity>; 2], now: Now, out: &mut Vec<Outgoing>) -> [Device; 2] {
    [0, 1].map(|me: usize| {
        let peer = PeerSettings {
            key: *keys[1 - me].public(),
            endpoint: at(1 - me),
            allowed: Vec::new(),
            opening: Opening::Either,
        };
        let identity = Arc::clone(&keys[me]);
        let settings = WireguardSettings { identity, psk: None, keepalive: 1, peers: vec![peer] };
        let device = Device::new(Arc::clone(&keys[me]), 1420);
        device.configure(&settings, 1420, now, out);
        device
    })
}

/// The session whose number a handshake message names as its sender's.
fn session_of(device: &Device, message: &[u8]) -> Arc<Session> {
    let number = u32::from_le_bytes(*message[4..].first_chunk().expect("a handshake message is longer"));
    device.find(number).and_then(|entry| entry.session).expect("the handshake is over")
}

impl Bed {
    fn new(seed: u64) -> Self {
        let keys = [(); 2].map(|()| Arc::new(Identity::generate().expect("32 bytes are a key")));
        let mut now = Now { ms: 10_000, unix: Duration::from_secs(1_700_000_000) };
        let mut out: Vec<Outgoing> = Vec::new();
        let devices = devices(&keys, now, &mut out);
        now.ms += 2_000;
        devices[0].tick(now, &mut out);
        let mut take = || out.pop().expect("something is to be sent").bytes;
        let initiation = take();
        let mut kept = [Vec::new(), vec![initiation.clone()]];
        let mut answer = Vec::new();
        assert_eq!(devices[1].handshake(&initiation, at(0), now, &mut answer), HandshakeOutcome::Answered);
        let response = answer.pop().expect("an initiation is answered").bytes;
        kept[0].push(response.clone());
        assert_eq!(devices[0].handshake(&response, at(1), now, &mut answer), HandshakeOutcome::Established);
        let sessions = [session_of(&devices[0], &initiation), session_of(&devices[1], &response)];
        let mut bed =
            Self { numbers: Numbers(seed), keys, devices, sessions, kept, response: Vec::new(), now };
        let keepalive = answer.pop().expect("the session is confirmed").bytes;
        assert!(bed.deliver(1, &keepalive, at(0)));
        bed.kept[1].push(keepalive);
        bed.begin_another();
        bed
    }

    /// A second handshake, whose answer is under way.
    fn begin_another(&mut self) {
        self.now.ms += 6_000;
        let number = u32::from_le_bytes(*self.kept[1][0][4..].first_chunk().expect("it is longer"));
        let peer = self.devices[0].find(number).expect("there is a session").peer;
        let (mut out, mut answer) = (Vec::new(), Vec::new());
        self.devices[0].want_session(&peer, self.now, &mut out);
        let initiation = out.pop().expect("the last one was seconds ago").bytes;
        let outcome = self.devices[1].handshake(&initiation, at(0), self.now, &mut answer);
        assert_eq!(outcome, HandshakeOutcome::Answered);
        self.kept[1].push(initiation);
        self.response = answer.pop().expect("an initiation is answered").bytes;
        self.kept[0].push(self.response.clone());
    }

    /// What the datapath does with a datagram; says whether a packet was taken.
    fn deliver(&self, to: usize, datagram: &[u8], from: SocketAddr) -> bool {
        let (device, mut out, mut taken) = (&self.devices[to], Vec::new(), false);
        match WireguardMessage::parse(datagram) {
            None => {}
            Some(WireguardMessage::Data { receiver, counter }) => {
                let entry = device.find(receiver);
                match entry.as_ref().and_then(|entry| Some((entry, entry.session.as_ref()?))) {
                    None => device.unknown_session(from, self.now, &mut out),
                    Some((entry, session)) => {
                        if let Ok(len) = session.open(&mut datagram.to_vec(), counter) {
                            let heard = Heard { packets: len > 0, bytes: datagram.len() };
                            device.heard(entry, from, heard, self.now, &mut out);
                            taken = true;
                        }
                    }
                }
            }
            Some(_) => {
                let outcome = device.handshake(datagram, from, self.now, &mut out);
                assert_ne!(outcome, HandshakeOutcome::Answered, "nothing of that is new");
                let covered = self.response.len().saturating_sub(SECOND_CODE);
                let genuine =
                    datagram.len() == self.response.len() && datagram[..covered] == self.response[..covered];
                assert!(outcome != HandshakeOutcome::Established || genuine, "it was changed");
            }
        }
        for Outgoing { to, bytes } in out {
            assert!(to == from || to == at(0) || to == at(1), "{to}");
            assert!(WireguardMessage::parse(&bytes).is_some(), "{} bytes", bytes.len());
        }
        taken
    }

    /// A packet that the peer of this node seals.
    fn sealed(&mut self, to: usize) -> Vec<u8> {
        let len = self.numbers.of(&[0, 16, 32, 64, 128]);
        let mut datagram = vec![0; HEADER + len + TAG];
        self.numbers.fill(&mut datagram);
        self.sessions[1 - to].seal(&mut datagram).expect("the session is young");
        datagram
    }

    fn keep(&mut self, to: usize, datagram: &[u8]) {
        if self.kept[to].len() < KEPT {
            self.kept[to].push(datagram.to_vec());
        } else {
            // The first ones are those of handshakes.
            let number = 8 + self.numbers.below(KEPT - 8);
            self.kept[to][number] = datagram.to_vec();
        }
    }

    fn changed(&mut self, mut datagram: Vec<u8>) -> Vec<u8> {
        match self.numbers.below(6) {
            0 => datagram.truncate(self.numbers.below(datagram.len() + 1)),
            1 => datagram.resize(datagram.len() + self.numbers.within(1..=40), 0x5a),
            2 if datagram.len() >= HEADER => {
                let counter = self.numbers.of(&[0, 1, MAX_COUNTER - 1, MAX_COUNTER, u64::MAX, u64::MAX / 2]);
                datagram[8..16].copy_from_slice(&counter.to_le_bytes());
            }
            3 if datagram.len() >= 4 => {
                let kind = self.numbers.below(6) as u8;
                datagram[..4].copy_from_slice(&[kind, 0, 0, 0]);
            }
            _ => {
                for _ in 0..self.numbers.within(1..=3) {
                    let len = datagram.len();
                    if len > 0 {
                        datagram[self.numbers.below(len)] ^= 1 << self.numbers.below(8);
                    }
                }
            }
        }
        datagram
    }

    /// An initiation for this node with random contents.
    fn computed(&mut self, to: usize) -> Vec<u8> {
        let mut message = self.numbers.bytes(INITIATION);
        message[..4].copy_from_slice(&[1, 0, 0, 0]);
        cookie::address(self.keys[to].public(), &mut message);
        message
    }

    fn noise(&mut self) -> Vec<u8> {
        let len = self.numbers.of(&[0, 3, 4, 31, 32, 48, COOKIE, RESPONSE, INITIATION, 149, 200]);
        let mut noise = self.numbers.bytes(len);
        if len >= 4 && !self.numbers.one_in(8) {
            let kind = self.numbers.within(1..=4) as u8;
            noise[..4].copy_from_slice(&[kind, 0, 0, 0]);
        }
        noise
    }

    /// One datagram to one of the nodes; says whether it was taken.
    fn step(&mut self) -> bool {
        let to = self.numbers.below(2);
        let from = match self.numbers.below(4) {
            0 => SocketAddr::from(([192, 0, 2, 2 - to as u8], 7)),
            1 => SocketAddr::from(([198, 51, 100, self.numbers.below(256) as u8], 7)),
            _ => at(1 - to),
        };
        let (datagram, genuine) = match self.numbers.below(8) {
            0 => (self.noise(), false),
            1 if self.numbers.one_in(COMPUTED / 8) => (self.computed(to), false),
            1 | 2 => {
                let number = self.numbers.below(self.kept[to].len());
                (self.kept[to][number].clone(), false)
            }
            3 => {
                let number = self.numbers.below(self.kept[to].len());
                let kept = self.kept[to][number].clone();
                (self.changed(kept), false)
            }
            4 | 5 => (self.sealed(to), true),
            _ => {
                let sealed = self.sealed(to);
                let changed = self.changed(sealed.clone());
                let same = changed == sealed;
                (changed, same)
            }
        };
        let taken = self.deliver(to, &datagram, from);
        assert_eq!(taken, genuine, "{} bytes to node {to}: {datagram:02x?}", datagram.len());
        if genuine {
            self.keep(to, &datagram);
        }
        taken
    }
}

/// So many messages; gives how many were taken.
pub(crate) fn case(seed: u64, messages: usize) -> u64 {
    let mut bed = Bed::new(seed.rotate_left(17) | 1);
    let every = (messages / STEPS).max(1);
    let mut taken = 0;
    for number in 0..messages {
        if number % every == 0 {
            bed.now.ms += bed.numbers.below(20) as u64;
        }
        taken += u64::from(bed.step());
    }
    let mut out = Vec::new();
    for to in [0, 1] {
        bed.devices[to].tick(bed.now, &mut out);
        let datagram = bed.sealed(to);
        assert!(bed.deliver(to, &datagram, at(1 - to)), "the session does not go on");
    }
    taken
}
