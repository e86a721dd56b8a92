//! The tunnels of this process as a value that outlives the kernel's, so that another process can take them over.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use super::engine::TunnelEngine;
use super::handover::TunnelFiles;
use crate::wg::ledger::SessionReport;

/// The tunnels of a kernel, also for somebody who outlives it.
#[derive(Clone)]
pub struct Tunnels(Arc<Mutex<TunnelEngine>>);

impl Tunnels {
    pub(crate) fn new(engine: TunnelEngine) -> Self {
        Self(Arc::new(Mutex::new(engine)))
    }

    pub(crate) fn engine(&self) -> MutexGuard<'_, TunnelEngine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets so many milliseconds pass for all sessions, as if they had.
    #[cfg(feature = "testing")]
    pub fn let_pass(&self, ms: u64) {
        self.engine().let_pass(ms);
    }

    /// Bytes from and to each peer of `udp`, by its subnet and without outer headers.
    pub fn bytes(&self, each: impl FnMut(IpNet, u64, u64)) {
        self.engine().bytes(each);
    }

    /// How the session with each WireGuard peer of this process stands, with the addresses of the peer's pods.
    pub fn sessions(&self, each: impl FnMut(&[IpNet], SessionReport)) {
        self.engine().sessions(each);
    }

    /// The files of all tunnels. Packets are moved here until [`Self::stop`].
    ///
    /// # Errors
    /// A file can't be duplicated.
    pub fn files(&self) -> io::Result<Vec<TunnelFiles>> {
        self.engine().files()
    }

    /// Stops moving packets, and lets go of all devices.
    pub fn stop(&self) {
        self.engine().stop_all();
    }

    /// Takes over tunnels of another process. Before the first of them is used or closed, `release` is called, which
    /// stops the other process and returns once it has stopped.
    ///
    /// # Errors
    /// A file is not what it should be.
    pub fn inherit(
        &self,
        files: Vec<TunnelFiles>,
        release: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        self.engine().inherit(files, Box::new(release))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::engine::Offload;
    use super::*;
    use crate::state::name::Name;

    #[test]
    fn the_former_process_stops_once_before_the_first_change_of_any_kind() {
        let name: Name = "flannel0".parse().unwrap();
        let changes: [fn(&mut TunnelEngine, &Name); 2] = [TunnelEngine::stop, TunnelEngine::close];
        for change in changes {
            let stops = Arc::new(AtomicUsize::new(0));
            let tunnels = Tunnels::new(TunnelEngine::new(Offload(true)));
            let counted = Arc::clone(&stops);
            let release = move || {
                counted.fetch_add(1, Ordering::Relaxed);
            };
            tunnels.inherit(Vec::new(), release).unwrap();
            assert_eq!(stops.load(Ordering::Relaxed), 0);
            change(&mut tunnels.engine(), &name);
            change(&mut tunnels.engine(), &name);
            assert_eq!(stops.load(Ordering::Relaxed), 1);
        }
    }
}
