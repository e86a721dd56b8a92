//! What follows from time alone (WireGuard's paper, section 6).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::device::Device;
use super::peer::{DevicePeer, Negotiation, RETRY, clear};
use super::session::{REJECT_AFTER, Session};
use super::{Now, Outgoing};

/// An initiation is repeated a little later than that, so that two nodes don't repeat theirs at the same moment for
/// ever …
const JITTER: u64 = 333;
/// … for so many milliseconds.
const GIVE_UP: u64 = 90_000;
/// Who receives packets and sends nothing for so long sends a keepalive.
const KEEPALIVE: u64 = 10_000;
/// Who sends packets and receives nothing for so long asks for another session.
const SILENCE: u64 = KEEPALIVE + RETRY;

impl Device {
    /// Does what is due. Says when the next is due; `None`: nothing is until something is sent or received.
    pub fn tick(&self, now: Now, out: &mut Vec<Outgoing>) -> Option<Duration> {
        let table = self.table();
        let next = table.by_number.values().filter_map(|peer| self.tick_peer(peer, now, out)).min()?;
        Some(Duration::from_millis(next.saturating_sub(now.ms).max(1)))
    }

    fn tick_peer(&self, peer: &Arc<DevicePeer>, now: Now, out: &mut Vec<Outgoing>) -> Option<u64> {
        let mut negotiation = peer.negotiation();
        self.end_old(peer, &mut negotiation, now);
        let retry = self.repeat(peer, &mut negotiation, now, out);
        let marks = &peer.marks;

        let mut due = Due { now: now.ms, next: retry };
        if due.is_over(marks.unanswered.load(Ordering::Relaxed), SILENCE) {
            clear(&marks.unanswered);
            self.ask(peer, &mut negotiation, now, out);
        }
        if due.is_over(marks.owed.load(Ordering::Relaxed), KEEPALIVE) {
            clear(&marks.owed);
            if let Some(session) = peer.session(now.ms) {
                self.send(peer, &session, &[], now, out);
            }
        }
        let interval = self.keepalive.load(Ordering::Relaxed) as u64;
        if interval > 0 && due.is_over(marks.traversed.load(Ordering::Relaxed), interval) {
            marks.traversed.store(now.ms, Ordering::Relaxed);
            due.next_is(now.ms + interval);
            match peer.session(now.ms) {
                Some(session) => self.send(peer, &session, &[], now, out),
                None => self.ask(peer, &mut negotiation, now, out),
            }
        }
        let sessions = [&negotiation.current, &negotiation.previous, &negotiation.next];
        sessions.into_iter().flatten().for_each(|session| due.next_is(session.born + REJECT_AFTER));
        if let Some((_, _)) = &negotiation.pending {
            due.next_is(negotiation.asked + RETRY + JITTER);
        }
        due.next
    }

    /// Asks for a session as [`want_session`](Self::want_session) does.
    fn ask(&self, peer: &Arc<DevicePeer>, negotiation: &mut Negotiation, now: Now, out: &mut Vec<Outgoing>) {
        let lately = negotiation.asked != 0 && now.ms < negotiation.asked + RETRY;
        if negotiation.pending.is_none() && !lately {
            negotiation.began = now.ms;
            self.initiate(peer, negotiation, now, out);
        }
    }

    /// Sessions that may not be used any more are removed, and their keys with them.
    fn end_old(&self, peer: &DevicePeer, negotiation: &mut Negotiation, now: Now) {
        let Negotiation { current, previous, next, .. } = negotiation;
        for place in [previous, next, current] {
            let old = |session: &mut Arc<Session>| !session.can_receive(now.ms);
            self.indices.retire(place.take_if(old));
        }
        if negotiation.current.is_none() && peer.sending.load().is_some() {
            peer.sending.store(None);
        }
    }

    /// Repeats an initiation that was not answered, or gives up. Says when to ask again.
    fn repeat(
        &self,
        peer: &Arc<DevicePeer>,
        negotiation: &mut Negotiation,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) -> Option<u64> {
        let (_, index) = negotiation.pending.as_ref()?;
        let due = negotiation.asked + RETRY + u64::from(*index) % JITTER;
        if now.ms < due {
            return Some(due);
        }
        if now.ms < negotiation.began + GIVE_UP {
            self.initiate(peer, negotiation, now, out);
            return None;
        }
        let (_, index) = negotiation.pending.take()?;
        self.indices.remove(index);
        self.was_unanswered(peer);
        self.unstage(negotiation);
        clear(&peer.marks.unanswered);
        None
    }
}

/// What is due, and when the next is.
struct Due {
    now: u64,
    next: Option<u64>,
}

impl Due {
    /// Whether something that began at `since`, if it did, has lasted so long.
    fn is_over(&mut self, since: u64, lasts: u64) -> bool {
        if since == 0 {
            return false;
        }
        let over = self.now >= since + lasts;
        if !over {
            self.next_is(since + lasts);
        }
        over
    }

    fn next_is(&mut self, at: u64) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }
}
