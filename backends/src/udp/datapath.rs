//! The threads that move packets, and what starts, changes and stops them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use arc_swap::ArcSwap;
use rustix::event::{EventfdFlags, eventfd};

use super::counters::Counters;
use super::egress::Egress;
use super::forwarding::{Forwarding, Routing};
use super::ingress::Ingress;
use super::sys::{Tun, Wire};
use super::worker::{self, Loan};

/// What both directions work with.
pub(super) struct Shared {
    pub(super) tun: Arc<Tun>,
    /// One for each family.
    pub(super) wires: Arc<[Arc<Wire>]>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) counters: Arc<Counters>,
}

/// A running datapath: stops when it is dropped.
pub(super) struct Datapath {
    forwarding: Arc<Forwarding>,
    routing: Arc<ArcSwap<Routing>>,
    wires: Arc<[Arc<Wire>]>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Datapath {
    /// Starts moving packets, with those sockets that are `kept` and still wanted.
    ///
    /// # Errors
    /// A socket can't be bound, or a thread can't be had.
    pub(super) fn start(
        tun: &Arc<Tun>,
        forwarding: &Arc<Forwarding>,
        counters: &Arc<Counters>,
        offload: bool,
        kept: &[Arc<Wire>],
    ) -> io::Result<Self> {
        let wire = |local| match kept.iter().find(|wire| wire.local == local) {
            Some(wire) => Ok(Arc::clone(wire)),
            None => Wire::bind(local, offload).map(Arc::new),
        };
        let wires: Arc<[Arc<Wire>]> = forwarding.sockets().map(wire).collect::<io::Result<_>>()?;
        if let Some(wire) = wires.iter().find(|wire| !wire.has_whole_buffer()) {
            tracing::warn!(
                bytes = wire.receive_buffer,
                "the receive buffer of the tunnel is small, so packets are lost under load: add CAP_NET_ADMIN, or \
                 set net.core.rmem_max to 8388608"
            );
        }
        let routing = Arc::new(ArcSwap::from_pointee(Routing::new(forwarding)));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Shared {
            tun: Arc::clone(tun),
            wires: Arc::clone(&wires),
            routing: Arc::clone(&routing),
            counters: Arc::clone(counters),
        };
        let ingress = Ingress::new(&shared);
        let egress = Arc::new(Loan::new(Egress::new(&shared))?);
        let mut this = Self {
            forwarding: Arc::clone(forwarding),
            routing,
            wires: Arc::clone(&wires),
            stop,
            threads: Vec::new(),
        };
        let (device, lender, halt) = (Arc::clone(tun), Arc::clone(&egress), Arc::clone(&this.stop));
        this.spawn("udp", move || worker::serve(&device, &wires, &lender, ingress, &halt))?;
        let (device, halt) = (Arc::clone(tun), Arc::clone(&this.stop));
        this.spawn("udp-help", move || worker::help(&device, &egress, &halt))?;
        Ok(this)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let work = move || {
            if let Err(error) = work() {
                // The reconciler makes the device again.
                tracing::debug!("the tunnel stopped: {error}");
            }
        };
        self.threads.push(thread::Builder::new().name(name.to_owned()).spawn(work)?);
        Ok(())
    }

    /// What it does; `None` once it has stopped by itself.
    pub(super) fn forwarding(&self) -> Option<&Arc<Forwarding>> {
        self.threads.iter().all(|thread| !thread.is_finished()).then_some(&self.forwarding)
    }

    /// Stops; gives its sockets, which go on taking what comes.
    pub(super) fn stop(self) -> Arc<[Arc<Wire>]> {
        Arc::clone(&self.wires)
    }

    /// Does something else from the next batch on. Not for other sockets.
    pub(super) fn set(&mut self, forwarding: &Arc<Forwarding>) {
        self.routing.store(Arc::new(Routing::new(forwarding)));
        self.forwarding = Arc::clone(forwarding);
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
