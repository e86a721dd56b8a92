//! All peers of a node with their sessions. What follows from handshake messages is in `answers`, what follows from
//! time in `timers`.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use arc_swap::ArcSwap;
use subnet::wireguard::{PresharedKey, PublicKey};

use super::cookie;
use super::gate::{Gate, Sender};
use super::handshake::{self, Timestamp};
use super::identity::Identity;
use super::indices::{IndexEntry, Indices};
use super::ledger::{HandshakeFault, SessionReport};
use super::message::{MAC, sealed_len};
use super::peer::{DevicePeer, MAX_STAGED, Negotiation, RETRY};
use super::roaming::Roaming;
use super::session::{RECEIVED_OLD, Session};
use super::{Now, Opening, Outgoing, WireguardSettings};

/// So many bytes of packets wait for sessions, of all peers together.
const MAX_STAGED_BYTES: usize = 8 << 20;
/// Keys that are not known yet are remembered for so many milliseconds.
pub(super) const REMEMBERED: u64 = 10_000;
/// Where packets of unknown sessions come from is looked up once in so many milliseconds.
const MIN_BETWEEN_SEARCHES: u64 = 20;

/// A node's end of all its tunnels.
pub struct Device {
    pub(super) identity: Arc<Identity>,
    pub(super) secret: RwLock<Option<PresharedKey>>,
    /// Milliseconds between keepalives; 0: none.
    pub(super) keepalive: AtomicUsize,
    mtu: AtomicUsize,
    pub(super) gate: Mutex<Gate>,
    /// By the number that packets and responses name.
    pub(super) indices: Indices,
    pub(super) table: ArcSwap<PeerTable>,
    roaming: Roaming,
    /// The number of the next new peer.
    number: Mutex<u32>,
    staged: AtomicUsize,
    timestamp: Mutex<Timestamp>,
    /// The keys of refused initiations, and when they came: their nodes may become peers in a moment.
    pub(super) unknown: Mutex<VecDeque<(PublicKey, u64)>>,
    searched: Mutex<u64>,
    /// Initiations that were not answered in time, since this was last read.
    pub(super) unanswered: AtomicU64,
    /// Milliseconds that have passed for this device alone; 0 but in tests.
    passed: AtomicU64,
    /// No caller waits for a timer.
    idle: AtomicBool,
}

/// What came by a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Packets, not only keepalives.
    pub packets: bool,
    /// The length of the datagrams.
    pub bytes: usize,
}

/// The peers.
#[derive(Default)]
pub(super) struct PeerTable {
    pub(super) by_number: HashMap<u32, Arc<DevicePeer>>,
    pub(super) by_key: HashMap<PublicKey, Arc<DevicePeer>>,
    /// The peer that is configured at each address; of several, one.
    pub(super) addresses: HashMap<IpAddr, u32>,
}

impl Device {
    /// A device without peers.
    pub fn new(identity: Arc<Identity>, mtu: u16) -> Self {
        Self {
            gate: Mutex::new(Gate::new(identity.public())),
            identity,
            secret: RwLock::default(),
            keepalive: 0.into(),
            mtu: usize::from(mtu).into(),
            indices: Indices::default(),
            table: ArcSwap::default(),
            roaming: Roaming::default(),
            number: Mutex::new(1),
            staged: 0.into(),
            timestamp: Mutex::default(),
            unknown: Mutex::default(),
            searched: Mutex::default(),
            unanswered: AtomicU64::default(),
            passed: AtomicU64::default(),
            idle: AtomicBool::new(true),
        }
    }

    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Takes over what is to be done. Peers that stay keep their sessions. Gives the number of each peer.
    pub fn configure(
        &self,
        settings: &WireguardSettings,
        mtu: u16,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) -> Vec<u32> {
        *self.secret.write().unwrap_or_else(PoisonError::into_inner) = settings.psk.clone();
        self.keepalive.store(usize::from(settings.keepalive) * 1000, Ordering::Relaxed);
        self.mtu.store(mtu.into(), Ordering::Relaxed);
        let before = self.table.load_full();
        let mut next = PeerTable::default();
        let mut numbers = Vec::with_capacity(settings.peers.len());
        let mut called = Vec::new();
        for peer in &settings.peers {
            let known = before.by_key.get(&peer.key).map(|known| {
                known.configure(peer.endpoint);
                Arc::clone(known)
            });
            let known = known.unwrap_or_else(|| {
                let new = Arc::new(self.new_peer(peer.key, peer.endpoint, now));
                if self.has_called(&peer.key, now) {
                    called.push(Arc::clone(&new));
                }
                new
            });
            if peer.opening == Opening::Here && known.session(now.ms).is_none() {
                called.push(Arc::clone(&known));
            }
            numbers.push(known.number);
            next.addresses.insert(peer.endpoint.ip(), known.number);
            next.by_number.insert(known.number, Arc::clone(&known));
            next.by_key.insert(peer.key, known);
        }
        let gone = before.by_number.values().filter(|peer| !next.by_number.contains_key(&peer.number));
        gone.for_each(|peer| self.forget(peer));
        self.roaming.keep(|number| next.by_number.contains_key(&number));
        self.table.store(Arc::new(next));
        // They wait five seconds before they call again, or for this node to call.
        called.iter().for_each(|peer| self.want_session(peer, now, out));
        numbers
    }

    fn new_peer(&self, key: PublicKey, endpoint: SocketAddr, now: Now) -> DevicePeer {
        let number = {
            let mut next = lock(&self.number);
            *next += 1;
            *next
        };
        // Keepalives of many peers shall not be due in the same moment.
        let interval = self.keepalive.load(Ordering::Relaxed) as u64;
        let spread = u64::from_le_bytes(crate::random::bytes()) % interval.max(1);
        DevicePeer::new(number, key, endpoint, (now.ms + spread).saturating_sub(interval).max(1))
    }

    /// Whether a node with this key has asked for a session lately, and was refused.
    fn has_called(&self, key: &PublicKey, now: Now) -> bool {
        lock(&self.unknown).iter().any(|(known, at)| known == key && now.ms < at + REMEMBERED)
    }

    /// A peer that is gone takes no part any more.
    fn forget(&self, peer: &Arc<DevicePeer>) {
        let mut negotiation = peer.negotiation();
        self.unstage(&mut negotiation);
        peer.sending.store(None);
        let Negotiation { pending, current, previous, next, .. } = std::mem::take(&mut *negotiation);
        for session in [current, previous, next] {
            self.indices.retire(session);
        }
        pending.into_iter().for_each(|(_, index)| self.indices.remove(index));
    }

    pub(super) fn table(&self) -> Arc<PeerTable> {
        self.table.load_full()
    }

    /// The peer with this number.
    pub(crate) fn peer(&self, number: u32) -> Option<Arc<DevicePeer>> {
        self.table.load().by_number.get(&number).cloned()
    }

    /// The time of this device.
    #[inline]
    pub(crate) fn shifted(&self, now: Now) -> Now {
        Now { ms: now.ms + self.passed.load(Ordering::Relaxed), ..now }
    }

    /// Lets so many milliseconds pass for the sessions, as if they had.
    #[cfg(feature = "testing")]
    pub(crate) fn let_pass(&self, ms: u64) {
        self.passed.fetch_add(ms, Ordering::Relaxed);
    }

    /// How the session with each peer stands.
    pub(crate) fn sessions(&self, mut each: impl FnMut(&PublicKey, SessionReport)) {
        for (key, peer) in &self.table.load().by_key {
            each(key, SessionReport { endpoint: Some(peer.endpoint()), ..peer.ledger.report() });
        }
    }

    /// Initiations that were not answered in time, since this was asked last.
    pub(crate) fn take_unanswered(&self) -> u64 {
        self.unanswered.swap(0, Ordering::Relaxed)
    }

    /// An initiation was not answered in time.
    pub(super) fn was_unanswered(&self, peer: &DevicePeer) {
        peer.ledger.unanswered();
        self.unanswered.fetch_add(1, Ordering::Relaxed);
    }

    /// Who can have sent a handshake message from there.
    pub(super) fn sender(&self, from: SocketAddr) -> Sender {
        let table = self.table.load();
        let at_home = table.addresses.get(&from.ip()).copied();
        let expected = [at_home, self.roaming.at(from)]
            .into_iter()
            .flatten()
            .any(|number| table.by_number.get(&number).is_some_and(|peer| peer.is_expected_at(from)));
        match (expected, at_home) {
            (true, _) => Sender::Peer,
            (false, Some(_)) => Sender::PeerAddress,
            (false, None) => Sender::Stranger,
        }
    }

    /// The peer was heard from there.
    #[inline]
    pub(super) fn is_at(&self, peer: &DevicePeer, from: SocketAddr) {
        if let Some(before) = peer.is_at(from) {
            self.roaming.moved(peer.number, before, from);
        }
    }

    /// A message from the address of a peer shows why its handshakes fail.
    pub(super) fn blame(&self, from: IpAddr, why: HandshakeFault) {
        let table = self.table.load();
        let peer = table.addresses.get(&from).and_then(|number| table.by_number.get(number));
        if let Some(peer) = peer {
            peer.ledger.failed(why);
        }
    }

    /// The public keys of the peers with which there is a session.
    #[cfg(any(test, feature = "testing"))]
    pub fn connected(&self, now: Now) -> Vec<PublicKey> {
        let table = self.table.load();
        let with = table.by_key.values().filter(|peer| peer.session(now.ms).is_some());
        with.map(|peer| peer.key).collect()
    }

    /// What a number in a packet stands for.
    #[inline]
    pub fn find(&self, index: u32) -> Option<IndexEntry> {
        self.indices.find(index)
    }

    /// Keeps a packet until there is a session, and asks for one. Of too many the oldest are lost; says whether one was.
    pub fn stage(&self, peer: &Arc<DevicePeer>, packet: &[u8], now: Now, out: &mut Vec<Outgoing>) -> bool {
        let lost = {
            let mut negotiation = peer.negotiation();
            let mut lost = false;
            if negotiation.staged.len() >= MAX_STAGED
                && let Some(oldest) = negotiation.staged.pop_front()
            {
                self.staged.fetch_sub(oldest.len(), Ordering::Relaxed);
                lost = true;
            }
            if self.staged.load(Ordering::Relaxed) + packet.len() > MAX_STAGED_BYTES {
                lost = true;
            } else {
                self.staged.fetch_add(packet.len(), Ordering::Relaxed);
                negotiation.staged.push_back(packet.to_vec());
            }
            lost
        };
        self.want_session(peer, now, out);
        lost
    }

    pub(super) fn unstage(&self, negotiation: &mut Negotiation) -> VecDeque<Vec<u8>> {
        let staged = std::mem::take(&mut negotiation.staged);
        self.staged.fetch_sub(staged.iter().map(Vec::len).sum(), Ordering::Relaxed);
        staged
    }

    /// Packets were sent to a peer by this session, with so many bytes in all.
    #[inline]
    pub fn sent(
        &self,
        peer: &Arc<DevicePeer>,
        session: &Session,
        bytes: usize,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) {
        peer.marks.sent(now.ms, true);
        peer.ledger.sent(bytes);
        if session.is_old(now.ms) {
            self.want_session(peer, now, out);
        }
    }

    /// Something valid came by a session.
    #[inline]
    pub fn heard(
        &self,
        entry: &IndexEntry,
        from: SocketAddr,
        what: Heard,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) {
        let IndexEntry { peer, session: Some(session) } = entry else { return };
        peer.marks.heard(now.ms, what.packets);
        peer.ledger.received(what.bytes);
        self.is_at(peer, from);
        if session.confirm() {
            self.promote(peer, session, now, out);
        } else if session.initiator && now.ms >= session.born + RECEIVED_OLD {
            let is_current =
                peer.sending.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, session));
            if is_current {
                self.want_session(peer, now, out);
            }
        }
    }

    /// The peer has shown that it has the session that it asked for: packets may be sent with it.
    fn promote(&self, peer: &Arc<DevicePeer>, session: &Arc<Session>, now: Now, out: &mut Vec<Outgoing>) {
        let mut negotiation = peer.negotiation();
        if !negotiation.next.as_ref().is_some_and(|next| Arc::ptr_eq(next, session)) {
            return;
        }
        let before = negotiation.current.take();
        self.indices.retire(std::mem::replace(&mut negotiation.previous, before));
        negotiation.current = negotiation.next.take();
        peer.sending.store(Some(Arc::clone(session)));
        peer.ledger.succeeded(now.unix.as_secs());
        self.flush(peer, &mut negotiation, session, now, out);
    }

    /// Sends what waited for a session.
    pub(super) fn flush(
        &self,
        peer: &DevicePeer,
        negotiation: &mut Negotiation,
        session: &Session,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) {
        for packet in self.unstage(negotiation) {
            self.send(peer, session, &packet, now, out);
        }
    }

    /// Sends one packet, or a keepalive, which is an empty one.
    pub(super) fn send(
        &self,
        peer: &DevicePeer,
        session: &Session,
        packet: &[u8],
        now: Now,
        out: &mut Vec<Outgoing>,
    ) {
        let len = sealed_len(packet.len(), self.mtu.load(Ordering::Relaxed));
        let mut bytes = vec![0; len];
        bytes[super::message::HEADER..][..packet.len()].copy_from_slice(packet);
        if session.seal(&mut bytes).is_ok() {
            peer.marks.sent(now.ms, !packet.is_empty());
            peer.ledger.sent(bytes.len());
            out.push(Outgoing { to: peer.endpoint(), bytes });
        }
    }

    /// Asks a peer for a session, unless that was done a moment ago.
    pub fn want_session(&self, peer: &Arc<DevicePeer>, now: Now, out: &mut Vec<Outgoing>) {
        let mut negotiation = peer.negotiation();
        let lately = negotiation.asked != 0 && now.ms < negotiation.asked + RETRY;
        if negotiation.pending.is_none() && !lately {
            negotiation.began = now.ms;
            self.initiate(peer, &mut negotiation, now, out);
        }
    }

    /// Sends an initiation.
    pub(super) fn initiate(
        &self,
        peer: &Arc<DevicePeer>,
        negotiation: &mut Negotiation,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) {
        if let Some((_, before)) = negotiation.pending.take() {
            self.indices.remove(before);
            self.was_unanswered(peer);
        }
        if negotiation.current.as_ref().is_none_or(|session| !session.can_send(now.ms)) {
            peer.forget_endpoint();
        }
        let index = self.indices.file(IndexEntry { peer: Arc::clone(peer), session: None });
        let timestamp = self.timestamp(now);
        let secret = self.secret.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((begun, mut message)) =
            handshake::begin(&self.identity, secret.as_ref(), &peer.key, index, &timestamp)
        else {
            return self.indices.remove(index);
        };
        negotiation.pending = Some((begun, index));
        negotiation.asked = now.ms;
        negotiation.prove(&mut message, now.ms);
        peer.ledger.sent(message.len());
        out.push(Outgoing { to: peer.endpoint(), bytes: message.to_vec() });
    }

    /// The time as peers compare it: never the same or a smaller one again.
    fn timestamp(&self, now: Now) -> Timestamp {
        let mut last = lock(&self.timestamp);
        let mut next = [0; 12];
        next[..8].copy_from_slice(&(0x4000_0000_0000_000a + now.unix.as_secs()).to_be_bytes());
        next[8..].copy_from_slice(&now.unix.subsec_nanos().to_be_bytes());
        if next <= *last {
            // The clock was set back, or stands still.
            let number =
                u128::from_be_bytes(std::array::from_fn(|at| at.checked_sub(4).map_or(0, |at| last[at])));
            next.copy_from_slice(&(number + 1).to_be_bytes()[4..]);
        }
        *last = next;
        next
    }

    /// A packet of a session that is not known came from there. If it is from a peer, this node was started since and
    /// the peer can't know: it is told by a handshake.
    pub fn unknown_session(&self, from: SocketAddr, now: Now, out: &mut Vec<Outgoing>) {
        {
            let mut searched = lock(&self.searched);
            if now.ms < *searched + MIN_BETWEEN_SEARCHES {
                return;
            }
            *searched = now.ms;
        }
        let table = self.table.load();
        if !table.addresses.contains_key(&from.ip()) {
            return;
        }
        let peer = table.by_number.values().find(|peer| peer.endpoint() == from);
        if let Some(peer) = peer.filter(|peer| peer.session(now.ms).is_none()) {
            self.want_session(peer, now, out);
        }
    }

    /// How many sessions and handshakes there are.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.indices.len()
    }

    /// Whether somebody has to be told that there is something to wait for again.
    #[inline]
    pub fn wakes(&self) -> bool {
        // What is due was noted before this looks.
        std::sync::atomic::fence(Ordering::SeqCst);
        self.idle.load(Ordering::Relaxed) && self.idle.swap(false, Ordering::Relaxed)
    }

    /// No caller waits for a timer from now on.
    pub fn sleeps(&self) {
        self.idle.store(true, Ordering::SeqCst);
    }
}

impl Negotiation {
    /// Writes the second code, if the peer demands it, and notes the first one for a demand that may come.
    pub(super) fn prove(&mut self, message: &mut [u8], now: u64) {
        let at = message.len() - 2 * MAC;
        self.mac1 = message[at..at + MAC].try_into().ok();
        if let Some((cookie, _)) = self.cookie.filter(|(_, at)| now < at + cookie::COOKIE_AGE) {
            cookie::mac2(&cookie, message);
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
