//! The threads that move packets, and what starts, changes and stops them.

use std::io;
use std::ops::Range;
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

/// What both directions of a worker work with.
pub(super) struct Shared {
    pub(super) tun: Arc<Tun>,
    /// Those of its queues that are read here.
    pub(super) queues: Range<u32>,
    /// One for each family.
    pub(super) wires: Arc<[Wire]>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) counters: Arc<Counters>,
}

/// A running datapath: stops when it is dropped.
pub(super) struct Datapath {
    forwarding: Arc<Forwarding>,
    routing: Arc<ArcSwap<Routing>>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Datapath {
    /// Starts moving packets.
    ///
    /// # Errors
    /// A socket can't be bound, or a thread can't be had.
    pub(super) fn start(
        tun: &Arc<Tun>,
        forwarding: &Arc<Forwarding>,
        counters: &Arc<Counters>,
        offload: bool,
    ) -> io::Result<Self> {
        let routing = Arc::new(ArcSwap::from_pointee(Routing::new(forwarding)));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut this = Self { forwarding: Arc::clone(forwarding), routing, stop, threads: Vec::new() };
        let workers = u32::from(forwarding.workers.max(1));
        for number in 0..workers {
            let wire = |local| {
                let wire = Wire::bind(local, offload, workers > 1)?;
                if number > 0 { wire.sending_apart(local) } else { Ok(wire) }
            };
            let wires: Arc<[Wire]> = forwarding.sockets().map(wire).collect::<io::Result<_>>()?;
            if number == 0
                && let Some(wire) = wires.iter().find(|wire| !wire.has_whole_buffer())
            {
                tracing::warn!(
                    bytes = wire.receive_buffer,
                    "the receive buffer of the tunnel is small, so packets are lost under load: add CAP_NET_ADMIN, \
                     or set net.core.rmem_max to 8388608"
                );
            }
            let shared = Shared {
                tun: Arc::clone(tun),
                queues: share(tun.queues().len() as u32, number, workers),
                wires,
                routing: Arc::clone(&this.routing),
                counters: Arc::clone(counters),
            };
            this.work(number, &shared)?;
        }
        Ok(this)
    }

    /// Starts the threads of a worker.
    fn work(&mut self, number: u32, shared: &Shared) -> io::Result<()> {
        let ingress = Ingress::new(shared);
        let egress = Arc::new(Loan::new(Egress::new(shared), shared.queues.clone())?);
        let suffix = if number > 0 { format!("-{number}") } else { String::new() };
        let (tun, wires, lender) = (Arc::clone(&shared.tun), Arc::clone(&shared.wires), Arc::clone(&egress));
        let stop = Arc::clone(&self.stop);
        self.spawn(&format!("udp{suffix}"), move || worker::serve(&tun, &wires, &lender, ingress, &stop))?;
        let (tun, stop) = (Arc::clone(&shared.tun), Arc::clone(&self.stop));
        self.spawn(&format!("udp-help{suffix}"), move || worker::help(&tun, &egress, &stop))
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

    /// Whether it can do this without being started anew.
    pub(super) fn may_become(&self, forwarding: &Forwarding) -> bool {
        let like = |have: &Arc<Forwarding>| {
            have.sockets().eq(forwarding.sockets()) && have.workers == forwarding.workers
        };
        self.forwarding().is_some_and(like)
    }

    /// Does something else from the next batch on. Only what it [may become](Self::may_become).
    pub(super) fn set(&mut self, forwarding: &Arc<Forwarding>) {
        self.routing.store(Arc::new(Routing::new(forwarding)));
        self.forwarding = Arc::clone(forwarding);
    }
}

/// The queues of one of several workers. A single one is the first worker's, which has the usual port.
fn share(queues: u32, number: u32, workers: u32) -> Range<u32> {
    (queues * number).div_ceil(workers)..(queues * (number + 1)).div_ceil(workers)
}

impl Drop for Datapath {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_has_one_worker() {
        for (queues, workers) in (0..10).flat_map(|queues| (1..=8).map(move |workers| (queues, workers))) {
            let all: Vec<u32> = (0..workers).flat_map(|number| share(queues, number, workers)).collect();
            assert_eq!(all, Vec::from_iter(0..queues), "{queues} queues, {workers} workers");
        }
        assert_eq!((share(8, 1, 3), share(1, 0, 8)), (3..6, 0..1));
    }
}
