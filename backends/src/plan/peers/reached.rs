//! By which backend a peer is reached; pure.

use ipnet::IpNet;
use subnet::{Lease, Mac};

use super::PeerContext;
use crate::plan::backend::BackendId;

/// How a peer is reached.
pub(super) struct Reached {
    pub(super) backend: BackendId,
    /// The MAC to which packets for it go, if that is none that it announces.
    pub(super) mac: Option<Mac>,
    /// It announces something unknown and is reached as before.
    pub(super) kept: bool,
}

/// How a subnet is reached that has this lease; `None` if it can't be.
pub(super) fn reached(context: PeerContext<'_>, lease: &Lease, subnet: IpNet) -> Option<Reached> {
    let PeerContext { active, before, .. } = context;
    if let Some((backend, mac)) = active.meanwhile(lease, before, subnet) {
        return Some(Reached { backend, mac: Some(mac), kept: false });
    }
    if let Some(backend) = active.reaching(lease).or_else(|| active.reaching_by_prepared_key(lease)) {
        return Some(Reached { backend, mac: None, kept: false });
    }
    let mac = active.previous_mac(&lease.attachment, before, subnet)?;
    Some(Reached { backend: active.current_id(), mac: Some(mac), kept: true })
}
