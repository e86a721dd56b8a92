//! The tunnels of this process as a value that outlives the kernel's, so that another process can take them over.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::engine::Engine;
use super::handover::TunnelFiles;

/// The tunnels of a kernel, also for somebody who outlives it.
#[derive(Clone)]
pub struct Tunnels(Arc<Mutex<Engine>>);

impl Tunnels {
    pub(crate) fn new(engine: Engine) -> Self {
        Self(Arc::new(Mutex::new(engine)))
    }

    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
