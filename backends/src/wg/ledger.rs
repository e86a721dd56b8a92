//! What this node reports about its session with a peer: the last handshake, bytes, and why there is no session.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::session::REJECT_AFTER;

/// The session with a peer, as metrics and diagnosis need it. Both engines fill it: this process, and the kernel's module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionReport {
    /// When the last handshake succeeded, in seconds since 1970; `None`: never since the peer was configured.
    pub handshake: Option<u64>,
    /// Where packets to the peer go: the address of its lease, or where it was heard from since.
    pub endpoint: Option<SocketAddr>,
    /// Bytes from the peer, as `wg show` counts them: with the headers of WireGuard, handshakes and keepalives.
    pub received: u64,
    /// Bytes to the peer, counted the same way.
    pub sent: u64,
    /// Initiations since the last handshake that were not answered; the kernel's module does not count them.
    pub unanswered: u32,
    /// Why handshakes fail, if messages of the peer say so; the kernel's module does not tell.
    pub fault: Option<HandshakeFault>,
}

/// Whether packets can be sent to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SessionState {
    /// The last handshake is recent enough that its session is valid.
    Current,
    /// There is no valid session, and nothing shows that one is needed.
    Idle,
    /// This node asks for a session and does not get one.
    Failing,
}

/// Why handshakes fail, as far as messages from the peer's address show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HandshakeFault {
    /// The peer answers, and its answer can't be decrypted: the preshared keys differ.
    PresharedKey = 1,
    /// The peer uses a public key that is not in its lease.
    UnknownKey = 2,
    /// The peer addresses another public key than this node's.
    ForeignKey = 3,
}

/// So many bytes are more than one initiation.
const RETRIED: u64 = 2 * super::message::INITIATION as u64;

/// A session is used for so many seconds before another one takes its place.
const FRESH: u64 = 120;

impl SessionReport {
    /// Whether the last handshake was so lately, in seconds since 1970, that its session is in use.
    pub fn is_fresh(&self, now: u64) -> bool {
        self.handshake.is_some_and(|at| now.saturating_sub(at) < FRESH)
    }

    /// The state at this moment, in seconds since 1970.
    pub fn state(&self, now: u64) -> SessionState {
        let current = self.handshake.is_some_and(|at| now.saturating_sub(at) < REJECT_AFTER / 1000);
        if self.unanswered > 1 || self.handshake.is_none() && self.sent >= RETRIED {
            SessionState::Failing
        } else if current {
            SessionState::Current
        } else {
            SessionState::Idle
        }
    }
}

/// The counters behind a [`SessionReport`]: written by all threads that handle packets of the peer.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// In seconds since 1970; 0: never.
    handshake: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    unanswered: AtomicU32,
    fault: AtomicU8,
}

impl Ledger {
    #[inline]
    pub(super) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A handshake has succeeded: both sides have the session.
    pub(super) fn succeeded(&self, unix: u64) {
        self.handshake.store(unix, Ordering::Relaxed);
        self.unanswered.store(0, Ordering::Relaxed);
        self.fault.store(0, Ordering::Relaxed);
    }

    /// An initiation was not answered in time.
    pub(super) fn unanswered(&self) {
        self.unanswered.fetch_add(1, Ordering::Relaxed);
    }

    /// A message from the peer's address shows why handshakes fail.
    pub(super) fn failed(&self, why: HandshakeFault) {
        self.fault.store(why as u8, Ordering::Relaxed);
    }

    pub(super) fn report(&self) -> SessionReport {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let faults = [HandshakeFault::PresharedKey, HandshakeFault::UnknownKey, HandshakeFault::ForeignKey];
        let fault = self.fault.load(Ordering::Relaxed);
        SessionReport {
            handshake: Some(get(&self.handshake)).filter(|at| *at > 0),
            endpoint: None,
            received: get(&self.received),
            sent: get(&self.sent),
            unanswered: self.unanswered.load(Ordering::Relaxed),
            fault: faults.into_iter().find(|known| *known as u8 == fault),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_current_for_three_minutes_and_failing_only_if_it_is_asked_for_in_vain() {
        let now = 10_000;
        let report = |age: Option<u64>, sent, unanswered| SessionReport {
            handshake: age.map(|age| now - age),
            sent,
            unanswered,
            ..SessionReport::default()
        };
        for (report, state) in [
            (report(Some(0), 0, 0), SessionState::Current),
            (report(Some(179), 9000, 1), SessionState::Current),
            (report(Some(30), 9000, 2), SessionState::Failing),
            (report(Some(180), 9000, 0), SessionState::Idle),
            (report(Some(180), 9000, 2), SessionState::Failing),
            (report(None, 0, 0), SessionState::Idle),
            (report(None, 148, 1), SessionState::Idle),
            (report(None, 296, 0), SessionState::Failing),
            // The clock was set back.
            (SessionReport { handshake: Some(now + 500), ..SessionReport::default() }, SessionState::Current),
        ] {
            assert_eq!(report.state(now), state, "{report:?}");
        }
    }

    #[test]
    fn a_handshake_ends_what_failed_before_it() {
        let ledger = Ledger::default();
        assert_eq!(ledger.report(), SessionReport::default());
        ledger.unanswered();
        ledger.failed(HandshakeFault::UnknownKey);
        ledger.failed(HandshakeFault::PresharedKey);
        ledger.sent(148);
        ledger.received(92);
        let failing = SessionReport {
            handshake: None,
            endpoint: None,
            received: 92,
            sent: 148,
            unanswered: 1,
            fault: Some(HandshakeFault::PresharedKey),
        };
        assert_eq!(ledger.report(), failing);
        ledger.succeeded(77);
        assert_eq!(
            ledger.report(),
            SessionReport { handshake: Some(77), unanswered: 0, fault: None, ..failing }
        );
    }
}
