//! The threads that move packets, and what starts, changes and stops them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use rustix::event::{EventfdFlags, eventfd};

use super::counters::Counters;
use super::egress::Egress;
use super::ingress::Ingress;
use super::routing::Routing;
use super::seal::Sealing;
use super::shared::{Shared, Sockets};
use super::sys::{Tun, UdpSocket};
use super::worker::{self, SharedEgress};
use crate::state::forwarding::Forwarding;
use crate::wg::Outgoing;
use crate::wg::device::Device;
use crate::wg::ledger::SessionReport;

/// A running datapath: stops when it is dropped.
pub(super) struct Datapath {
    forwarding: Arc<Forwarding>,
    routing: Arc<ArcSwap<Routing>>,
    /// Of each worker.
    sockets: Vec<Sockets>,
    sealing: Option<Arc<Sealing>>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

/// What outlives a datapath and goes on taking what comes.
#[derive(Default)]
pub(super) struct Kept {
    /// Of each worker.
    sockets: Vec<Sockets>,
    /// With the sessions.
    device: Option<Arc<Device>>,
}

impl Kept {
    /// Sockets of another process, those of each worker.
    pub(super) fn of(sockets: Vec<Sockets>) -> Self {
        Self { sockets, device: None }
    }
}

impl Datapath {
    /// Those of each worker.
    pub(super) fn sockets(&self) -> &[Sockets] {
        &self.sockets
    }

    /// Starts moving packets, with those sockets and sessions that are `kept` and still wanted.
    ///
    /// # Errors
    /// A socket can't be bound, or a thread can't be had.
    pub(super) fn start(
        tun: &Arc<Tun>,
        forwarding: &Arc<Forwarding>,
        counters: &Arc<Counters>,
        offload: bool,
        kept: Kept,
    ) -> io::Result<Self> {
        let workers = usize::from(forwarding.workers.max(1));
        let Kept { sockets: mut kept, device } = kept;
        // Sockets that share an address and one that doesn't are not for each other.
        if kept.len() != workers {
            kept.clear();
        }
        let sealing = sealing(forwarding, device)?;
        let mut said = Vec::new();
        let routing = routing(forwarding, sealing.as_deref(), None, &mut said);
        let routing = Arc::new(ArcSwap::from_pointee(routing));
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut this = Self {
            forwarding: Arc::clone(forwarding),
            routing,
            sockets: Vec::new(),
            sealing,
            stop,
            threads: Vec::new(),
        };
        for number in 0..workers {
            let kept = kept.get(number);
            let socket = |local| socket(local, kept, forwarding, offload, (workers > 1).then_some(number));
            let sockets: Sockets = forwarding.sockets().map(socket).collect::<io::Result<_>>()?;
            if number == 0
                && let Some(socket) = sockets.iter().find(|socket| !socket.has_whole_buffer())
            {
                tracing::warn!(
                    bytes = socket.receive_buffer,
                    "the receive buffer of the tunnel is small, so packets are lost under load: add CAP_NET_ADMIN, \
                     or set net.core.rmem_max to 8388608"
                );
            }
            this.sockets.push(Arc::clone(&sockets));
            let shared = Shared {
                tun: Arc::clone(tun),
                queues: share(tun.queues().len(), number, workers),
                sockets,
                routing: Arc::clone(&this.routing),
                counters: Arc::clone(counters),
                sealing: this.sealing.clone(),
            };
            this.work(number, &shared)?;
        }
        this.keep_time(&mut said, counters)?;
        Ok(this)
    }

    /// Starts the threads of a worker.
    fn work(&mut self, number: usize, shared: &Shared) -> io::Result<()> {
        let ingress = Ingress::new(shared);
        let egress = Arc::new(SharedEgress::new(Egress::new(shared), shared.queues.clone())?);
        let suffix = if number > 0 { format!("-{number}") } else { String::new() };
        let (tun, sockets, lender) =
            (Arc::clone(&shared.tun), Arc::clone(&shared.sockets), Arc::clone(&egress));
        let stop = Arc::clone(&self.stop);
        self.spawn(&format!("udp{suffix}"), move || worker::serve(&tun, &sockets, &lender, ingress, &stop))?;
        let (tun, stop) = (Arc::clone(&shared.tun), Arc::clone(&self.stop));
        self.spawn(&format!("udp-help{suffix}"), move || worker::help(&tun, &egress, &stop))
    }

    /// Starts the thread for what is due by time, if there is such.
    fn keep_time(&mut self, said: &mut Vec<Outgoing>, counters: &Arc<Counters>) -> io::Result<()> {
        let (Some(sealing), Some(sockets)) = (self.sealing.clone(), self.sockets.first().cloned()) else {
            return Ok(());
        };
        sealing.post(said, &sockets);
        let (stop, counters) = (Arc::clone(&self.stop), Arc::clone(counters));
        self.spawn("udp-time", move || sealing.keep_time(&sockets, &counters, &stop))
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

    /// Lets so many milliseconds pass for the sessions, as if they had.
    #[cfg(feature = "testing")]
    pub(super) fn let_pass(&self, ms: u64) {
        self.sealing.iter().for_each(|sealing| sealing.device.let_pass(ms));
    }

    /// Bytes from and to each peer without a session, by its subnet.
    pub(super) fn bytes(&self, mut each: impl FnMut(IpNet, u64, u64)) {
        let routing = self.routing.load();
        for (subnet, public) in self.forwarding.peers.iter().filter(|_| self.sealing.is_none()) {
            if let Some(peer) = routing.bytes(*public) {
                each(*subnet, peer.received.get(), peer.sent.get());
            }
        }
    }

    /// How the session with each WireGuard peer stands, with the addresses of the peer's pods.
    pub(super) fn sessions(&self, mut each: impl FnMut(&[IpNet], SessionReport)) {
        let (Some(settings), Some(sealing)) = (&self.forwarding.wireguard, &self.sealing) else { return };
        let allowed: HashMap<_, _> =
            settings.peers.iter().map(|peer| (peer.key, peer.allowed.as_slice())).collect();
        sealing.device.sessions(|key, report| {
            allowed.get(key).into_iter().for_each(|allowed| each(allowed, report));
        });
    }

    /// Whether it can do this without a restart of its threads.
    pub(super) fn may_become(&self, forwarding: &Forwarding) -> bool {
        let like = |have: &Arc<Forwarding>| {
            let identity = |forwarding: &Forwarding| {
                forwarding.wireguard.as_ref().map(|settings| Arc::clone(&settings.identity))
            };
            have.sockets().eq(forwarding.sockets())
                && have.workers == forwarding.workers
                && identity(have) == identity(forwarding)
        };
        self.forwarding().is_some_and(like)
    }

    /// Stops; gives what goes on taking what comes.
    pub(super) fn stop(mut self) -> Kept {
        let device = self.sealing.as_ref().map(|sealing| Arc::clone(&sealing.device));
        Kept { sockets: std::mem::take(&mut self.sockets), device }
    }

    /// Does something else from the next batch on. Only what it [may become](Self::may_become).
    pub(super) fn set(&mut self, forwarding: &Arc<Forwarding>) {
        let mut said = Vec::new();
        let before = self.routing.load_full();
        let next = routing(forwarding, self.sealing.as_deref(), Some(&before), &mut said);
        self.routing.store(Arc::new(next));
        self.forwarding = Arc::clone(forwarding);
        if let (Some(sealing), Some(sockets)) = (&self.sealing, self.sockets.first()) {
            sealing.post(&mut said, sockets);
        }
    }
}

/// The socket at this address: the one that a worker had before, or a new one.
fn socket(
    local: SocketAddr,
    kept: Option<&Sockets>,
    forwarding: &Forwarding,
    offload: bool,
    worker: Option<usize>,
) -> io::Result<Arc<UdpSocket>> {
    match kept.and_then(|old| old.iter().find(|socket| socket.local == local)) {
        Some(socket) => Ok(Arc::clone(socket)),
        None => {
            let own_ports = forwarding.wireguard.is_none();
            UdpSocket::bind(local, offload, worker, own_ports).map(Arc::new)
        }
    }
}

/// What encrypts, if something does: with the sessions of `before`, if they are of this node's key.
fn sealing(forwarding: &Forwarding, before: Option<Arc<Device>>) -> io::Result<Option<Arc<Sealing>>> {
    let Some(settings) = &forwarding.wireguard else { return Ok(None) };
    let device = before.filter(|before| *before.identity() == settings.identity);
    let device =
        device.unwrap_or_else(|| Arc::new(Device::new(Arc::clone(&settings.identity), forwarding.mtu)));
    Ok(Some(Arc::new(Sealing::new(device)?)))
}

/// The lookup tables, and what is to be said to peers now.
fn routing(
    forwarding: &Forwarding,
    sealing: Option<&Sealing>,
    before: Option<&Routing>,
    said: &mut Vec<Outgoing>,
) -> Routing {
    match (&forwarding.wireguard, sealing) {
        (Some(settings), Some(sealing)) => {
            let numbers = sealing.device.configure(settings, forwarding.mtu, sealing.now(), said);
            Routing::sealed(forwarding, &numbers)
        }
        _ => Routing::following(forwarding, before),
    }
}

/// The queues of one of several workers. A single one is the first worker's, which has the usual port.
fn share(queues: usize, number: usize, workers: usize) -> Range<u32> {
    let end = |number: usize| (queues * number).div_ceil(workers) as u32;
    end(number)..end(number + 1)
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
            assert_eq!(all, Vec::from_iter(0..queues as u32), "{queues} queues, {workers} workers");
        }
        assert_eq!((share(8, 1, 3), share(1, 0, 8)), (3..6, 0..1));
    }
}
