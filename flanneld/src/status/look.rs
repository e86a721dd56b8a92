//! The reconciler with its hands tied: what differs between the plan and the kernel, without changing anything.

use std::collections::BTreeMap;

use backends::kernel::netlink::Netlink;
use backends::state::{KernelChange, LinkIdentity};
use backends::{Kernel, KernelError, KernelState, Scope};

use super::model;

/// How many changes are listed.
pub(super) const LISTED: usize = 32;

/// Reads the kernel and compares it.
///
/// # Errors
/// The kernel can't be read.
pub(crate) fn differences(desired: &KernelState, scope: &Scope) -> Result<Vec<KernelChange>, KernelError> {
    let mut observed = Netlink::open()?.observe(desired, scope)?.state;
    // A TUN device belongs to the datapath that holds it, which only the agent's own handle sees.
    for (name, link) in desired.links.iter().filter(|(_, link)| link.identity == LinkIdentity::Tun) {
        if let Some(found) = observed.links.get_mut(name) {
            found.identity = link.identity.clone();
            observed.forwarding.extend(desired.forwarding.get(name).map(|all| (*name, all.clone())));
        }
    }
    Ok(backends::changes(desired, &observed, scope))
}

/// Puts that into the value.
pub(super) fn report(kernel: &mut model::KernelStatus, desired: &KernelState, scope: &Scope) {
    match differences(desired, scope) {
        Ok(changes) => {
            kernel.differing = Some(counted(&changes));
            kernel.changes = changes.iter().take(LISTED).map(ToString::to_string).collect();
        }
        Err(error) => kernel.refused.push(error.to_string()),
    }
}

fn counted(changes: &[KernelChange]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for change in changes {
        *counts.entry(change.object().to_owned()).or_default() += 1;
    }
    counts
}

/// How many objects of each kind there should be.
pub(super) fn objects(desired: &KernelState) -> BTreeMap<String, usize> {
    [
        ("link", desired.links.len()),
        ("forwarding", desired.forwarding.len()),
        ("address", desired.addresses.len()),
        ("fdb", desired.fdb.len()),
        ("neighbour", desired.neighbours.len()),
        ("route", desired.routes.len()),
        ("nexthop", desired.routes.values().filter(|route| route.nexthop.is_some()).count()),
        ("blackhole", desired.blackholes.len()),
    ]
    .into_iter()
    .map(|(kind, count)| (kind.to_owned(), count))
    .collect()
}
