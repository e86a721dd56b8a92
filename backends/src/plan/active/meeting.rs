//! When a node that moves on to WireGuard begins to send by it.
//!
//! The kernel's module forgets the handshake that it began when the peer's initiation arrives (`wg_noise_handshake_consume_initiation`). If two
//! nodes begin at the same time, neither gets a session, and both try again five seconds later, again at the same time if packets
//! take longer from one to the other than the third of a second by which the module varies that. An initiation to a peer that has
//! not read this node's key is lost, too. So two nodes that are reached in another way do not begin together: each waits until the
//! other is likely to have read its lease, and one of them, which their keys decide, waits until the other has a session.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use subnet::wireguard::PublicKey;
use subnet::{Attachment, Family, Lease, Leases, Mac, Subnets};

use super::{ActiveBackend, ActiveBackends};
use crate::plan::backend::BackendId;
use crate::state::KernelState;

/// How long the node with the smaller key waits, so that the other one has read its lease …
const FIRST: Duration = Duration::from_millis(500);
/// … and how long the other one: half of the five seconds later after which the first one would try again.
const SECOND: Duration = Duration::from_secs(3);

/// The peers that announce WireGuard, while this node does or will and has another backend as well.
#[derive(Clone, Debug, Default)]
pub(super) struct Meetings {
    peers: BTreeMap<Subnets, Meeting>,
    /// This node's lease has its key.
    announced: bool,
    /// When this was decided.
    at: Option<Instant>,
}

/// A peer that announces WireGuard.
#[derive(Clone, Copy, Debug)]
struct Meeting {
    /// It was reached in another way when it was first heard to do so.
    reached: bool,
    /// From when on it is sent to by WireGuard; `None` before this node's lease has its key.
    from: Option<Instant>,
}

impl Meetings {
    /// Takes in what leases say. Says when to ask again.
    fn hear(
        &mut self,
        own: PublicKey,
        lease: &Lease,
        all: &Leases,
        reached: impl Fn(&Subnets) -> bool,
        now: Instant,
    ) -> Option<Instant> {
        self.at = Some(now);
        self.announced = key(&lease.attachment) == Some(own);
        self.peers
            .retain(|subnets, _| all.leases.get(subnets).is_some_and(|of| key(&of.attachment).is_some()));
        for (subnets, other) in all.leases.iter().filter(|(subnets, _)| **subnets != lease.subnets) {
            let Some(key) = key(&other.attachment) else { continue };
            let new = || Meeting { reached: reached(subnets), from: None };
            let meeting = self.peers.entry(*subnets).or_insert_with(new);
            let wait = if own.bytes() < key.bytes() { FIRST } else { SECOND };
            meeting.from = self.announced.then(|| meeting.from.unwrap_or(now + wait));
        }
        let due = self.peers.values().filter(|meeting| meeting.reached).filter_map(|meeting| meeting.from);
        due.filter(|from| *from > now).min()
    }

    /// Whether a peer isn't sent to yet.
    fn is_ahead(&self, subnets: &Subnets) -> bool {
        let (Some(now), Some(meeting)) = (self.at, self.peers.get(subnets)) else { return false };
        meeting.reached && meeting.from.is_none_or(|from| from > now)
    }
}

/// The key that a node announces.
fn key(attachment: &Attachment) -> Option<PublicKey> {
    Family::BOTH.into_iter().find_map(|family| Some(attachment.wireguard(family)?.key))
}

impl ActiveBackends {
    /// Takes in what leases say about keys; `before` is what this node last wanted of the kernel. Says when to ask again.
    pub fn hear_keys(
        &mut self,
        all: &Leases,
        own: &Lease,
        before: &KernelState,
        now: Instant,
    ) -> Option<Instant> {
        let mut meetings = std::mem::take(&mut self.meetings);
        let key = self.current().identity().filter(|_| self.all.len() > 1)?;
        let reached = |peer: &Subnets| {
            peer.iter()
                .any(|subnet| self.others().any(|it| it.backend.previous_mac(before, subnet).is_some()))
        };
        let next = meetings.hear(key, own, all, reached, now);
        self.meetings = meetings;
        next
    }

    /// Another backend, and the MAC there, for a peer that announces `backend` and is not sent to by it yet. The peer accepts what
    /// this node announces, and goes on for some time after that is something else.
    pub(crate) fn before_meeting(
        &self,
        backend: BackendId,
        own: &Lease,
        peer: &Subnets,
        (before, subnet): (&KernelState, IpNet),
    ) -> Option<(BackendId, Mac)> {
        if backend != self.current_id() || !self.meetings.is_ahead(peer) {
            return None;
        }
        let accepted =
            |entry: &&ActiveBackend| self.meetings.announced || entry.backend.reaches(&own.attachment);
        let known = |entry: &ActiveBackend| Some((entry.id, entry.backend.previous_mac(before, subnet)?));
        self.others().filter(accepted).find_map(known)
    }

    /// The backends besides the announced one.
    pub(super) fn others(&self) -> impl Iterator<Item = &ActiveBackend> {
        self.all.iter().skip(1)
    }
}

#[cfg(test)]
mod tests;
