//! The tunnels of this process: devices that exist as long as they are held here, and their datapaths.
//!
//! A device whose packets are sealed stays when the process ends. Without it they would follow other routes, in clear, until the next
//! process has made it again; and that has less to do. Other devices go with the process: a Go flannel with `udp` would take another
//! name beside one that is there.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use ipnet::IpNet;

use super::counters::Counters;
use super::handover::TunnelFiles;
use super::queue_steering::QUEUES;
use super::sys::Tun;
use super::threads::{Datapath, Kept};
use crate::state::forwarding::Forwarding;
use crate::state::name::Name;
use crate::wg::ledger::SessionReport;

/// Whether the kernel is asked to hand over and take many packets at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload(pub bool);

/// All tunnels, by the names of their devices.
pub(crate) struct TunnelEngine {
    tunnels: BTreeMap<Name, Tunnel>,
    counters: Arc<Counters>,
    offload: bool,
    /// Stops the process that the tunnels are from, which moves their packets until then.
    release: Option<Release>,
}

/// Stops the datapaths of the process that has handed its tunnels over, and returns once they have stopped.
pub(super) type Release = Box<dyn FnOnce() + Send>;

struct Tunnel {
    // Dropped first: it uses the device.
    datapath: Option<Datapath>,
    tun: Arc<Tun>,
    /// Sockets of the process that the tunnel is from.
    kept: Kept,
    /// The kernel's number for the device, once it is known.
    index: u32,
    /// Whether the device was told to stay at the end of the process; `None`: nothing was said.
    stays: Option<bool>,
}

impl TunnelEngine {
    /// An engine without tunnels.
    pub(crate) fn new(Offload(offload): Offload) -> Self {
        Self { tunnels: BTreeMap::new(), counters: Arc::default(), offload, release: None }
    }

    /// What all its datapaths count.
    pub(crate) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Takes over tunnels of another process, which goes on moving their packets until something is done with one.
    pub(super) fn inherit(&mut self, files: Vec<TunnelFiles>, release: Release) -> io::Result<()> {
        for file in files {
            let (name, index) = (file.name, file.index);
            let (tun, kept) = file.open()?;
            self.tunnels
                .insert(name, Tunnel { datapath: None, tun: Arc::new(tun), kept, index, stays: None });
        }
        self.release = Some(release);
        Ok(())
    }

    /// What another process needs to take over the tunnels; this one goes on with them.
    pub(super) fn files(&self) -> io::Result<Vec<TunnelFiles>> {
        let files = |(name, tunnel): (&Name, &Tunnel)| {
            let sockets = tunnel.datapath.as_ref().map_or(&[][..], Datapath::sockets);
            TunnelFiles::of(*name, tunnel.index, &tunnel.tun, sockets)
        };
        self.tunnels.iter().map(files).collect()
    }

    /// Stops all datapaths. Devices stay as long as another process holds them.
    pub(super) fn stop_all(&mut self) {
        self.tunnels.clear();
    }

    /// Before the first change of tunnels that come from another process, that process stops.
    fn begin(&mut self) {
        if let Some(release) = self.release.take() {
            release();
        }
    }

    /// Makes the device, in the network namespace of the calling thread, or takes over one that is `left` there by a process that has
    /// ended.
    ///
    /// # Errors
    /// Of the file `/dev/net/tun`, or EBUSY if another process holds the device.
    pub(crate) fn open(&mut self, name: Name, left: bool) -> io::Result<()> {
        self.close(&name);
        let tun = Arc::new(Tun::open(&name, QUEUES, self.offload, left)?);
        if self.offload && !tun.vnet {
            tracing::warn!(device = %name, "this kernel has no offloads for TUN devices: packets go one by one");
        }
        if let Some(why) = &tun.unsteered {
            tracing::warn!(
                device = %name,
                "all pods share one queue of the device, so that a flood of one costs the others packets: the kernel \
                 refuses the program that keeps them apart ({why}), for which it wants CAP_BPF"
            );
        }
        self.tunnels
            .insert(name, Tunnel { datapath: None, tun, kept: Kept::default(), index: 0, stays: None });
        Ok(())
    }

    /// How many queues of the device this process holds.
    pub(crate) fn queues(&self, name: &Name) -> usize {
        self.tunnels.get(name).map_or(0, |tunnel| tunnel.tun.queues().len())
    }

    /// Notes the kernel's number for a device that was just made.
    pub(crate) fn is_at(&mut self, name: &Name, index: u32) {
        if let Some(tunnel) = self.tunnels.get_mut(name) {
            tunnel.index = index;
        }
    }

    /// Whether this process holds the device with this number.
    pub(crate) fn holds(&self, name: &Name, index: u32) -> bool {
        self.tunnels.get(name).is_some_and(|tunnel| tunnel.index == index)
    }

    /// Ends the tunnel and with it the device.
    pub(crate) fn close(&mut self, name: &Name) {
        self.begin();
        self.tunnels.remove(name);
    }

    /// What the tunnel does, if it does.
    pub(crate) fn forwarding(&self, name: &Name) -> Option<Arc<Forwarding>> {
        self.tunnels.get(name)?.datapath.as_ref()?.forwarding().cloned()
    }

    /// Lets so many milliseconds pass for all sessions, as if they had.
    #[cfg(feature = "testing")]
    pub(super) fn let_pass(&self, ms: u64) {
        let datapaths = self.tunnels.values().filter_map(|tunnel| tunnel.datapath.as_ref());
        datapaths.for_each(|datapath| datapath.let_pass(ms));
    }

    /// Bytes from and to each peer without a session, by its subnet.
    pub(super) fn bytes(&self, mut each: impl FnMut(IpNet, u64, u64)) {
        let datapaths = self.tunnels.values().filter_map(|tunnel| tunnel.datapath.as_ref());
        datapaths.for_each(|datapath| datapath.bytes(&mut each));
    }

    /// How the session with each WireGuard peer stands, with the addresses of the peer's pods.
    pub(super) fn sessions(&self, mut each: impl FnMut(&[IpNet], SessionReport)) {
        let datapaths = self.tunnels.values().filter_map(|tunnel| tunnel.datapath.as_ref());
        datapaths.for_each(|datapath| datapath.sessions(&mut each));
    }

    /// Lets the tunnel do this.
    ///
    /// # Errors
    /// ENODEV without a device; of the socket.
    pub(crate) fn set(&mut self, name: &Name, forwarding: &Arc<Forwarding>) -> io::Result<()> {
        self.begin();
        let tunnel = self.tunnels.get_mut(name).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        match &mut tunnel.datapath {
            Some(datapath) if datapath.may_become(forwarding) => {
                datapath.set(forwarding);
            }
            datapath => {
                // The old one has to let go first. What waits in a socket that stays is not lost.
                let kept = std::mem::take(&mut tunnel.kept);
                let kept = datapath.take().map_or(kept, Datapath::stop);
                let new = Datapath::start(&tunnel.tun, forwarding, &self.counters, self.offload, kept)?;
                *datapath = Some(new);
            }
        }
        tunnel.stay(name, forwarding.wireguard.is_some());
        Ok(())
    }

    /// Stops moving packets; the device stays.
    pub(crate) fn stop(&mut self, name: &Name) {
        self.begin();
        if let Some(tunnel) = self.tunnels.get_mut(name) {
            tunnel.datapath = None;
        }
    }
}

impl Tunnel {
    /// Has the device stay at the end of the process, or not.
    fn stay(&mut self, name: &Name, stays: bool) {
        if self.stays == Some(stays) {
            return;
        }
        match self.tun.stays(stays) {
            Ok(()) => self.stays = Some(stays),
            Err(error) => tracing::warn!(
                device = %name,
                "the device goes with this process, so that packets for its peers follow other routes until the next one has made it \
                 again: the kernel does not let it stay ({error})"
            ),
        }
    }
}
