//! The seam between deciding and doing: everything that touches the kernel is behind [`Kernel`].

#[cfg(any(test, feature = "testing"))]
pub mod fake;
pub mod fights;
pub mod netlink;
mod notified;
pub mod prerequisites;
pub(crate) mod reconcile;
mod scope;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use ipnet::IpNet;
use tokio::sync::Notify;

use crate::state::host::Direct;
use crate::state::host::{HostView, ResolvedRoute};
use crate::state::name::Name;
use crate::state::{KernelChange, KernelState};
use prerequisites::Sysctls;

pub use crate::state::{is_tunnel, is_tunnel_name};
pub use notified::Notified;
pub use scope::{Records, Scope};

/// The kernel refuses, or can't be talked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// One change was refused.
    #[error("{change}: {source}")]
    Refused {
        /// The kind of object, see [`KernelChange::object`].
        object: &'static str,
        /// The device that it is about.
        device: Option<Name>,
        /// The change in the words of `ip`.
        change: String,
        /// The kernel's errno.
        #[source]
        source: io::Error,
    },
    /// A change needs a device that is not there, because making it failed.
    #[error("there is no device {0}")]
    NoDevice(Name),
    /// The netlink conversation failed as a whole.
    #[error("netlink: {what}: {source}")]
    Netlink {
        /// What was being done.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl KernelError {
    /// Whether the node itself is not as it should be, rather than the way to some peers. `own` are the
    /// devices by which this node announces that it is reached: what else it has, it has for peers.
    pub fn concerns_node(&self, own: &[Name]) -> bool {
        match self {
            Self::Refused { object, device, .. } => {
                matches!(*object, "link" | "address" | "forwarding" | "wireguard")
                    && device.is_none_or(|device| own.contains(&device))
            }
            Self::NoDevice(name) => own.contains(name),
            Self::Netlink { .. } => true,
        }
    }
}

/// What was read from the kernel at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// What is ours, and what stands where ours should.
    pub state: KernelState,
    /// The rest of the host's network, as far as it decides how ours looks.
    pub host: HostView,
}

/// What the reconciler cares about at the moment.
#[derive(Clone, Debug, Default)]
pub struct NotificationFilter {
    /// What the kernel should contain.
    pub desired: Arc<KernelState>,
    /// The host as last read.
    pub host: Arc<HostView>,
    /// Whose objects are ours.
    pub scope: Scope,
    /// No external interface is known: any link, address or default route may change that.
    pub choosing: bool,
    /// It is waited for a bridge to lose its last port.
    pub draining: bool,
    /// The kernel refuses a device of ours: another one that goes may be what stands in its way.
    pub refused: bool,
    /// The addresses that [`Kernel::direct`] was asked about and whether they were found to be direct; with
    /// any of them, routes of others matter too.
    pub neighbours: Arc<BTreeMap<IpAddr, bool>>,
}

/// The kernel's network configuration in one network namespace.
pub trait Kernel: Send + 'static {
    /// Reads everything that is ours by `scope`, and what stands where `desired` has something.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the kernel can't be read.
    fn observe(&mut self, desired: &KernelState, scope: &Scope) -> Result<Observed, KernelError>;

    /// Makes the changes in order. One failure doesn't stop the rest; "already so" is success. Returns
    /// the failures with the index of the change.
    fn apply(&mut self, changes: &[KernelChange]) -> Vec<(usize, KernelError)>;

    /// Asks the kernel which way packets to `addr` take.
    ///
    /// # Errors
    /// [`KernelError`] when there is no way, or the kernel can't be asked.
    fn route_to(&mut self, addr: IpAddr) -> Result<ResolvedRoute, KernelError>;

    /// Which of these addresses are on links of this host and answer there, with the device. One of whom
    /// nothing is known stays as it was `before`, and is asked.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the kernel can't be asked.
    fn direct(&mut self, addrs: &[IpAddr], before: &Direct) -> Result<Direct, KernelError>;

    /// Whether the kernel has WireGuard. Its module is loaded if it can be.
    fn has_wireguard(&mut self) -> bool;

    /// The pod subnets of peers for which the WireGuard devices of `desired` have sessions, of the kernel or of this process, from
    /// handshakes of the last two minutes.
    fn wireguard_sessions(&mut self, desired: &KernelState) -> BTreeSet<IpNet>;

    /// The values of these settings below `/proc/sys/net`, without those that this kernel doesn't have.
    fn sysctls(&mut self, keys: &[String]) -> Sysctls;

    /// Sets one of them.
    ///
    /// # Errors
    /// When `/proc/sys` is read-only, as in an unprivileged container.
    fn set_sysctl(&mut self, key: &str, value: &str) -> io::Result<()>;
}

/// The kernel's notifications.
pub trait Notifications: Send + 'static {
    /// Notifies `moved` whenever something of interest moves, and never says what: many notifications
    /// between two looks are one. Returns only when there will be no more.
    fn run(&self, notified: &Mutex<Notified>, moved: &Notify) -> impl Future<Output = KernelError> + Send;
}
