//! The peers after a few leases came, changed or went, without looking at all others; pure.
//!
//! As long as each lease counts for itself, a change of one changes nothing of the others. Where a lease may contradict another one,
//! all of them are looked at ([`Peers::choose`]).

use std::collections::BTreeMap;

use ipnet::IpNet;
use subnet::net::overlap;
use subnet::{Lease, Leases};

use super::{PeerContext, Peers, SkipReason, fits_lengths, is_own, judge_alone, key_of, vtep_of};
use crate::plan::backend::Peer;

/// With more changes than this, looking at all leases takes no longer.
const MAX_CHANGES: usize = 500;

impl Peers {
    /// What [`choose`](Self::choose) gives for `all`, where this is what it gave for `before` in the same context. `None` if leases
    /// have to be looked at together.
    pub fn follow(&self, context: PeerContext<'_>, before: &Leases, all: &Leases) -> Option<Self> {
        if !self.independent || !context.active.are_plain() || all.malformed != before.malformed {
            return None;
        }
        let changes: Vec<_> = all.leases.changes(&before.leases).take(MAX_CHANGES + 1).collect();
        let flawed = |lease: &Lease| all.malformed.values().any(|entry| entry.lease == Some(lease.subnets));
        let malformed = |lease: &Lease| all.malformed.contains_key(&key_of(lease)) || flawed(lease);
        let mut leases = changes.iter().flat_map(|(_, was, now)| was.iter().chain(now));
        if changes.len() > MAX_CHANGES || leases.any(|lease| malformed(lease)) {
            return None;
        }
        let mut next = self.clone();
        for lease in changes.iter().filter_map(|(_, was, _)| *was) {
            next.forget(context, lease)?;
        }
        let mut came = Vec::new();
        for lease in changes.iter().filter_map(|(_, _, now)| *now) {
            next.take_in(context, lease, &mut came)?;
        }
        next.have_room_for(&came).then_some(next)
    }

    /// Takes back what a lease was used or left out for.
    fn forget(&mut self, context: PeerContext<'_>, lease: &Lease) -> Option<()> {
        if is_own(context.own, lease) {
            return None;
        }
        let (mut used, mut known) = (false, true);
        judge_alone(context, lease, &BTreeMap::new(), |_, outcome| match outcome {
            Ok((peer, kept)) => {
                used = true;
                known &= !kept && self.usable.remove(&peer.subnet) == Some(peer);
                known &= vtep_of(context, &peer).is_none_or(|vtep| self.vteps.remove(&vtep).is_some());
            }
            Err((reason, _)) => known &= self.count_less(reason),
        });
        self.skipped.remove(&key_of(lease));
        self.nodes -= usize::from(used);
        known.then_some(())
    }

    fn count_less(&mut self, reason: SkipReason) -> bool {
        let Some(count) = self.reasons.get_mut(&reason) else { return false };
        *count -= 1;
        if *count == 0 {
            self.reasons.remove(&reason);
        }
        true
    }

    /// Uses a lease, or leaves it out, as if it were the only one.
    fn take_in(&mut self, context: PeerContext<'_>, lease: &Lease, came: &mut Vec<Peer>) -> Option<()> {
        if is_own(context.own, lease) || !context.active.plainly_reach(lease) {
            return None;
        }
        let (mut used, mut alone) = (false, true);
        judge_alone(context, lease, &BTreeMap::new(), |family, outcome| match outcome {
            Ok((peer, kept)) => {
                used = true;
                alone &= !kept && stands_apart(context, lease, &peer);
                alone &= self.usable.insert(peer.subnet, peer).is_none();
                alone &= vtep_of(context, &peer).is_none_or(|vtep| self.vteps.insert(vtep, ()).is_none());
                came.push(peer);
            }
            Err((reason, why)) => self.skip(context.network, lease, family, reason, why),
        });
        self.nodes += usize::from(used);
        alone.then_some(())
    }

    /// Whether the subnets of peers that came overlap no others.
    fn have_room_for(&self, came: &[Peer]) -> bool {
        came.iter().all(|peer| {
            let beside =
                |other: Option<(&IpNet, &Peer)>| other.is_some_and(|(net, _)| overlap(*net, peer.subnet));
            let next = self.usable.first_after(&peer.subnet);
            !beside(self.usable.last_before(&peer.subnet)) && !beside(next)
        })
    }
}

/// Whether a peer can contradict others by nothing but its own subnet and MAC: its public address is outside of the pods' networks,
/// and its subnet has the length of all.
pub(super) fn stands_apart(context: PeerContext<'_>, lease: &Lease, peer: &Peer) -> bool {
    let networks = context.network.networks();
    let inside = networks.iter().chain(context.former.iter().copied()).any(|net| net.contains(&peer.public));
    !inside && fits_lengths(context.network, lease)
}

#[cfg(test)]
mod tests;
