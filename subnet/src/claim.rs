//! What a claim means, for every store alike: which subnets a node takes, and whether it still has them.

use crate::allocate::allocate;
use crate::config::NetworkConfig;
use crate::lease::{Lease, Leases};
use crate::net::Subnets;
use crate::store::{Claim, Loss, StoreError, random_below};

/// What has become of the lease that a node holds, seen from the store.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is there and ours.
    Kept,
    /// It is gone and nobody has taken it: put it back.
    Deleted,
    /// Somebody else has it.
    Lost(Loss),
}

/// Compares the lease that a node holds with what the store has now.
pub(crate) fn judge(mine: &Lease, now: Option<&Lease>) -> Verdict {
    match now {
        None => Verdict::Deleted,
        Some(now) if now.public == mine.public && now.attachment == mine.attachment => Verdict::Kept,
        Some(now) if now.public.v4 == mine.public.v4 => {
            Verdict::Lost(Loss::Contested { subnets: mine.subnets, public: mine.public })
        }
        Some(now) => Verdict::Lost(Loss::Taken { subnets: mine.subnets, holder: now.public }),
    }
}

/// The subnets to claim, in the order of [`LeaseStore::acquire`], with the lease that the node holds
/// already. `None` when nothing is free.
pub(crate) fn choose(
    network: &NetworkConfig,
    claim: &Claim<'_>,
    held: Option<&Lease>,
    leases: &Leases,
) -> Option<(Subnets, Option<Lease>)> {
    let held = held.and_then(|held| {
        leases.leases.get(&held.subnets).filter(|now| judge(held, Some(now)) == Verdict::Kept)
    });
    let known = held.or_else(|| leases.by_public(&claim.public)).cloned();
    if let Some(known) = known.as_ref().filter(|known| fits(network, known, leases)) {
        return Some((known.subnets, Some(known.clone())));
    }
    let free = |wanted: &Subnets| !leases.taken().any(|taken| taken.overlaps(wanted));
    if !claim.previous.is_empty() && network.allows(&claim.previous) && free(&claim.previous) {
        return Some((claim.previous, known));
    }
    // A lease of ours that no longer fits goes away with this; its place is used if there is no other.
    let others = leases.taken().filter(|taken| known.as_ref().is_none_or(|known| known.subnets != *taken));
    let subnets =
        allocate(network, leases.taken(), random_below).or_else(|| allocate(network, others, random_below));
    subnets.map(|subnets| (subnets, known))
}

/// Whether a node may keep the lease that it has: the network allows it, and no older lease overlaps it.
fn fits(network: &NetworkConfig, known: &Lease, leases: &Leases) -> bool {
    let older = |other: &&Lease| other.created < known.created && network.allows(&other.subnets);
    network.allows(&known.subnets)
        && !leases.leases.values().filter(older).any(|other| other.subnets.overlaps(&known.subnets))
}

/// Who stands in the way of putting a lease back that is not there any more.
pub(crate) fn rival(mine: &Lease, leases: &Leases) -> Option<Loss> {
    let other = |taken: &Subnets| *taken != mine.subnets && taken.overlaps(&mine.subnets);
    let subnets = leases.taken().find(other)?;
    let holder = leases.leases.get(&subnets).map(|lease| lease.public).unwrap_or_default();
    Some(Loss::Taken { subnets: mine.subnets, holder })
}

/// The error for a network without a free subnet.
pub(crate) fn exhausted(network: &NetworkConfig) -> StoreError {
    let len = network.ranges().next().map_or(0, |range| range.subnet_len);
    StoreError::Exhausted { network: network.networks().to_string(), len }
}

/// The error for a node that can't be recognised again: Flannel's stores know nodes by IPv4 address.
#[cfg(any(feature = "etcd", feature = "file"))]
pub(crate) fn require_ipv4(public: &crate::net::PublicAddrs, store: &str) -> Result<(), StoreError> {
    match public.v4 {
        Some(_) => Ok(()),
        None => Err(StoreError::Unusable(format!(
            "{store} recognises a node by its public IPv4 address and this node has none: give one with --public-ip or --iface"
        ))),
    }
}
