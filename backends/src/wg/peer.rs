//! A peer: where it is, its sessions, and since when what is due.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use subnet::wireguard::PublicKey;

use super::handshake::{Begun, Timestamp};
use super::ledger::Ledger;
use super::session::Session;

/// An initiation is repeated after so many milliseconds without an answer.
pub(super) const RETRY: u64 = 5_000;
/// So many packets wait for a session.
pub(super) const MAX_STAGED: usize = 128;

/// A peer, for as long as it is configured.
pub struct DevicePeer {
    /// Names it in this process; no other peer ever has the same.
    pub(crate) number: u32,
    pub(super) key: PublicKey,
    /// What packets are sent with.
    pub(super) sending: ArcSwapOption<Session>,
    endpoint: Mutex<Endpoint>,
    pub(super) marks: Marks,
    pub(super) ledger: Ledger,
    negotiation: Mutex<Negotiation>,
}

#[derive(Clone, Copy)]
struct Endpoint {
    configured: SocketAddr,
    /// Where it was heard from last, or where it should be.
    current: SocketAddr,
}

/// Since when something is due, in milliseconds; 0: nothing is.
pub(super) struct Marks {
    /// Packets were sent, and nothing was heard since.
    pub(super) unanswered: AtomicU64,
    /// Packets were received, and nothing was sent since.
    pub(super) owed: AtomicU64,
    /// When anything was sent or received last.
    pub(super) traversed: AtomicU64,
}

/// What changes with handshakes alone.
#[derive(Default)]
pub(super) struct Negotiation {
    /// The handshake that this node began, with its number.
    pub(super) pending: Option<(Begun, u32)>,
    /// When the first attempt was made.
    pub(super) began: u64,
    /// When the last initiation was sent; 0: never.
    pub(super) asked: u64,
    pub(super) current: Option<Arc<Session>>,
    /// Packets of it may still be on their way.
    pub(super) previous: Option<Arc<Session>>,
    /// The peer began it, and has not yet shown that it has it.
    pub(super) next: Option<Arc<Session>>,
    /// That of the last initiation of the peer, and when it came.
    pub(super) timestamp: Timestamp,
    pub(super) heard: u64,
    /// The first code of what was sent last, and what the peer demands in the second one, with its time.
    pub(super) mac1: Option<[u8; 16]>,
    pub(super) cookie: Option<([u8; 16], u64)>,
    pub(super) staged: VecDeque<Vec<u8>>,
}

impl DevicePeer {
    pub(super) fn new(number: u32, key: PublicKey, endpoint: SocketAddr, now: u64) -> Self {
        Self {
            number,
            key,
            sending: ArcSwapOption::empty(),
            endpoint: Mutex::new(Endpoint { configured: endpoint, current: endpoint }),
            marks: Marks { unanswered: 0.into(), owed: 0.into(), traversed: now.into() },
            ledger: Ledger::default(),
            negotiation: Mutex::default(),
        }
    }

    /// Where packets for it go.
    pub(crate) fn endpoint(&self) -> SocketAddr {
        self.locked_endpoint().current
    }

    fn locked_endpoint(&self) -> MutexGuard<'_, Endpoint> {
        self.endpoint.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is, or should be, somewhere else than was said last.
    pub(super) fn configure(&self, endpoint: SocketAddr) {
        let mut known = self.locked_endpoint();
        if known.configured != endpoint {
            *known = Endpoint { configured: endpoint, current: endpoint };
        }
    }

    /// Nothing was heard from it for so long that what is configured counts more.
    pub(super) fn forget_endpoint(&self) {
        let mut known = self.locked_endpoint();
        known.current = known.configured;
    }

    /// Whether it is there as far as is known, or should be by its lease.
    pub(super) fn is_expected_at(&self, endpoint: SocketAddr) -> bool {
        let known = self.locked_endpoint();
        known.current == endpoint || known.configured == endpoint
    }

    /// It is there: something came from there that it alone can have sent. Gives where it was, if that is another place.
    pub(super) fn is_at(&self, endpoint: SocketAddr) -> Option<SocketAddr> {
        let mut known = self.locked_endpoint();
        (known.current != endpoint).then(|| std::mem::replace(&mut known.current, endpoint))
    }

    pub(super) fn negotiation(&self) -> MutexGuard<'_, Negotiation> {
        self.negotiation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session for packets to it.
    #[inline]
    pub(crate) fn session(&self, now: u64) -> Option<Arc<Session>> {
        self.sending.load_full().filter(|session| session.can_send(now))
    }
}

impl Marks {
    /// Something was sent: packets, or a keepalive.
    #[inline]
    pub(super) fn sent(&self, now: u64, packets: bool) {
        clear(&self.owed);
        if packets {
            begin(&self.unanswered, now);
        }
        self.traversed.store(now, Ordering::Relaxed);
    }

    /// Something was received.
    #[inline]
    pub(super) fn heard(&self, now: u64, packets: bool) {
        clear(&self.unanswered);
        if packets {
            begin(&self.owed, now);
        }
        self.traversed.store(now, Ordering::Relaxed);
    }
}

#[inline]
fn begin(mark: &AtomicU64, now: u64) {
    if mark.load(Ordering::Relaxed) == 0 {
        mark.store(now, Ordering::Relaxed);
    }
}

#[inline]
pub(super) fn clear(mark: &AtomicU64) {
    if mark.load(Ordering::Relaxed) != 0 {
        mark.store(0, Ordering::Relaxed);
    }
}

impl fmt::Debug for DevicePeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({})", self.key)
    }
}
