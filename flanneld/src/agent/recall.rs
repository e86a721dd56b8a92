//! What was known before: kept on disk, and good for a start while the store is away.

use std::io;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::config::BackendConfig;
use subnet::saved::{Saved, Written};
use subnet::{Lease, Leases, Mac, NetworkConfig};

use crate::serve::Health;

/// What an earlier run saved. A file that can't be used is named until there is a new one.
pub(super) fn read(path: &Path, store: &str, health: &Health) -> Option<Saved> {
    Saved::read(path, store).unwrap_or_else(|why| {
        let text =
            format!("what was saved of the cluster is not used: {why}; it is replaced once there is a lease");
        tracing::warn!("{text}");
        health.note("saved", vec![text]);
        None
    })
}

/// What is to be kept.
pub(super) struct Keep {
    pub(super) network: NetworkConfig,
    pub(super) former: Vec<BackendConfig>,
    pub(super) left: Vec<IpNet>,
    pub(super) lease: Lease,
    pub(super) hardware: Option<Mac>,
    pub(super) leases: Arc<Leases>,
}

impl Keep {
    /// Writes it to disk; `store` tells which cluster it is about, and `before` what this process wrote last.
    pub(super) fn write(self, path: &Path, store: &str, before: Option<Written>) -> io::Result<Written> {
        let Self { network, former, left, lease, hardware, leases } = self;
        let own = lease.subnets;
        Saved { network, former, left, own, hardware, leases: (*leases).clone() }.write(path, store, before)
    }
}
