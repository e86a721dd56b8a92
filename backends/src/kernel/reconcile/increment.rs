//! What one lease more or less costs: the kernel is not read when it is known.
//!
//! After a look that found the kernel as desired, it stays so until a notification says otherwise, and each of those has the whole
//! kernel looked at again. In between, what differs between two plans is what differs from the kernel.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Report, converge_but};
use crate::kernel::{Kernel, KernelError, Observed, Scope};
use crate::state::diff::diff;
use crate::state::host::HostView;
use crate::state::{KernelChange, KernelState};

/// The kernel was found as desired, or made so, and nothing was heard since.
#[derive(Clone, Debug)]
pub struct Settled {
    /// What was desired.
    desired: Arc<KernelState>,
    scope: Scope,
    /// The last look, of which only devices and host are kept.
    observed: Observed,
}

impl Settled {
    /// What a run of the reconciler leaves behind, if it found nothing wrong at the end, and nothing is held back.
    pub fn after(report: &Report, desired: &Arc<KernelState>, scope: &Scope) -> Option<Self> {
        let whole = report.settled && report.failed.is_empty() && report.conflicts.is_empty();
        whole.then(|| {
            let KernelState { links, addresses, .. } = &report.observed.state;
            let state =
                KernelState { links: links.clone(), addresses: addresses.clone(), ..KernelState::default() };
            let observed = Observed { state, host: report.observed.host.clone() };
            Self { desired: Arc::clone(desired), scope: scope.clone(), observed }
        })
    }
}

/// As `converge_but`, without a look at the kernel if only peers came or went since it was settled. If the kernel refuses a
/// change, it is looked at.
///
/// # Errors
/// As `converge_but`.
pub fn converge_since<K: Kernel>(
    kernel: &mut K,
    since: Option<&Settled>,
    desired: &KernelState,
    scope: &Scope,
    held: &BTreeSet<String>,
) -> Result<Report, KernelError> {
    let known =
        since.filter(|_| held.is_empty()).and_then(|since| Some((since, changes(since, desired, scope)?)));
    let Some((since, changes)) = known else { return converge_but(kernel, desired, scope, held) };
    let refused = kernel.apply(&changes);
    if refused.is_empty() {
        let observed = since.observed.clone();
        return Ok(Report { applied: changes, settled: true, observed, ..Report::default() });
    }
    let refused: BTreeSet<usize> = refused.into_iter().map(|(index, _)| index).collect();
    let applied = changes.into_iter().enumerate().filter(|(index, _)| !refused.contains(index));
    let mut applied: Vec<KernelChange> = applied.map(|(_, change)| change).collect();
    let mut report = converge_but(kernel, desired, scope, held)?;
    applied.append(&mut report.applied);
    Ok(Report { applied, ..report })
}

/// The changes from one plan to the next, if they are those that a look at the kernel would give.
fn changes(since: &Settled, desired: &KernelState, scope: &Scope) -> Option<Vec<KernelChange>> {
    let host = &since.observed.host;
    (same_surroundings(&since.desired, desired) && same_reach(&since.scope, scope, host))
        .then(|| diff(desired, &since.desired))
        .filter(|changes| !changes.iter().any(|change| may_conflict(change, host)))
}

/// Whether two plans differ in what peers need alone. Devices, and what datapaths of their own have, show themselves in a look.
fn same_surroundings(before: &KernelState, now: &KernelState) -> bool {
    before.links == now.links
        && before.addresses == now.addresses
        && before.blackholes == now.blackholes
        && before.forwarding == now.forwarding
        && before.wireguard == now.wireguard
}

/// Whether nothing else in the kernel is ours now. Records of further leases can only make routes ours that were seen as intruders.
fn same_reach(before: &Scope, now: &Scope, host: &HostView) -> bool {
    let Scope { networks, ranges, subnets, subnet_lens, records, underlay, devices, recalled } = now;
    let known = Arc::ptr_eq(&before.records, records) || host.intruders.is_empty();
    // Between two recalled lists, too, something may have to stay.
    !before.recalled
        && !recalled
        && known
        && before.networks == *networks
        && before.ranges == *ranges
        && before.subnets == *subnets
        && before.subnet_lens == *subnet_lens
        && before.underlay == *underlay
        && before.devices == *devices
}

/// Whether the kernel has a route of its own where this one would be, for an address of the host.
fn may_conflict(change: &KernelChange, host: &HostView) -> bool {
    let KernelChange::SetRoute(route) = change else { return false };
    let mut addresses = host.links.values().flat_map(|link| &link.addresses);
    addresses.any(|address| address.net.trunc() == route.dst)
}

#[cfg(test)]
mod tests;
