//! The threads that move packets, and what starts, changes and stops them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use arc_swap::ArcSwap;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::counters::Counters;
use super::egress::{Egress, Turn};
use super::fair::Crowd;
use super::forwarding::{Forwarding, Routing};
use super::ingress::Ingress;
use super::sys::{Tun, Wire};

/// What both directions work with.
pub(super) struct Shared {
    pub(super) tun: Arc<Tun>,
    pub(super) wire: Arc<Wire>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) counters: Arc<Counters>,
    pub(super) crowd: Arc<Crowd>,
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
    /// The socket can't be bound, or a thread can't be had.
    pub(super) fn start(
        tun: &Arc<Tun>,
        forwarding: &Arc<Forwarding>,
        counters: &Arc<Counters>,
        offload: bool,
    ) -> io::Result<Self> {
        let wire = Arc::new(Wire::bind(forwarding.local, offload)?);
        if !wire.has_whole_buffer() {
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
            wire: Arc::clone(&wire),
            routing: Arc::clone(&routing),
            counters: Arc::clone(counters),
            crowd: Arc::new(Crowd::new()),
        };
        let (mut egress, mut ingress) = (Egress::new(&shared), Ingress::new(&shared));
        let mut this = Self { forwarding: Arc::clone(forwarding), routing, stop, threads: Vec::new() };
        let (device, halt) = (Arc::clone(tun), Arc::clone(&this.stop));
        this.spawn("udp-egress", move || run(device.queues(), &halt, || egress.turn()))?;
        let halt = Arc::clone(&this.stop);
        this.spawn("udp-ingress", move || run(&[wire], &halt, || ingress.turn()))?;
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

    /// Does something else from the next batch on. Not for another local address.
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

/// Works until told to stop, and sleeps while there is nothing to do.
fn run(sources: &[impl AsFd], stop: &OwnedFd, mut turn: impl FnMut() -> io::Result<Turn>) -> io::Result<()> {
    loop {
        match turn()? {
            Turn::More => continue,
            Turn::Drained | Turn::Idle => {}
        }
        let all = sources.iter().map(AsFd::as_fd).chain([stop.as_fd()]);
        let mut all: Vec<PollFd<'_>> =
            all.map(|file| PollFd::from_borrowed_fd(file, PollFlags::IN)).collect();
        match poll(&mut all, None) {
            Ok(_) if all.last().is_some_and(|stop| !stop.revents().is_empty()) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
