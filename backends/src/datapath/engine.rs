//! The tunnels of this process: devices that exist as long as they are held here, and their datapaths.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::counters::Counters;
use super::queue_steering::QUEUES;
use super::sys::Tun;
use super::threads::Datapath;
use crate::state::forwarding::Forwarding;
use crate::state::name::Name;

/// Whether the kernel is asked to hand over and take many packets at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload(pub bool);

/// All tunnels, by the names of their devices.
pub(crate) struct Engine {
    tunnels: BTreeMap<Name, Tunnel>,
    counters: Arc<Counters>,
    offload: bool,
}

struct Tunnel {
    // Dropped first: it uses the device.
    datapath: Option<Datapath>,
    tun: Arc<Tun>,
    /// The kernel's number for the device, once it is known.
    index: u32,
}

impl Engine {
    /// An engine without tunnels.
    pub(crate) fn new(Offload(offload): Offload) -> Self {
        Self { tunnels: BTreeMap::new(), counters: Arc::default(), offload }
    }

    /// What all its datapaths count.
    pub(crate) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Makes the device, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Of the file `/dev/net/tun`, or EBUSY if another process holds the device.
    pub(crate) fn open(&mut self, name: Name) -> io::Result<()> {
        self.close(&name);
        let tun = Arc::new(Tun::open(&name, QUEUES, self.offload)?);
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
        self.tunnels.insert(name, Tunnel { datapath: None, tun, index: 0 });
        Ok(())
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
        self.tunnels.remove(name);
    }

    /// What the tunnel does, if it does.
    pub(crate) fn forwarding(&self, name: &Name) -> Option<Arc<Forwarding>> {
        self.tunnels.get(name)?.datapath.as_ref()?.forwarding().cloned()
    }

    /// Lets the tunnel do this.
    ///
    /// # Errors
    /// ENODEV without a device; of the socket.
    pub(crate) fn set(&mut self, name: &Name, forwarding: &Arc<Forwarding>) -> io::Result<()> {
        let tunnel = self.tunnels.get_mut(name).ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        match &mut tunnel.datapath {
            Some(datapath) if datapath.may_become(forwarding) => {
                datapath.set(forwarding);
            }
            datapath => {
                // The old one has to let go first. What waits in a socket that stays is not lost.
                let kept = datapath.take().map(Datapath::stop).unwrap_or_default();
                let new = Datapath::start(&tunnel.tun, forwarding, &self.counters, self.offload, kept)?;
                *datapath = Some(new);
            }
        }
        Ok(())
    }

    /// Stops moving packets; the device stays.
    pub(crate) fn stop(&mut self, name: &Name) {
        if let Some(tunnel) = self.tunnels.get_mut(name) {
            tunnel.datapath = None;
        }
    }
}
