//! Turns leases into kernel state, and makes the kernel agree.
//!
//! ```text
//! leases ── peers ──► plan ──► desired ─┐
//!                                       ├─ diff ──► changes ──► apply ──► kernel
//! kernel ── observe ──► actual ─────────┘
//! ```
//!
//! Everything left of the kernel is pure. Whatever wakes the agent, it does the same: [`reconcile`] observes,
//! compares and applies until the kernel is as desired.

pub mod backend;
pub mod diff;
pub mod fights;
pub mod firewall;
pub mod host;
pub mod host_gw;
pub mod iptables;
pub mod kernel;
pub mod memory;
pub mod name;
mod netlink;
pub mod nft;
pub mod peers;
pub mod policy;
pub mod prerequisites;
pub mod random;
pub mod reconcile;
pub mod state;
pub mod surroundings;
#[cfg(feature = "testing")]
pub mod testing;
pub mod traffic;
pub mod tunnel;
pub mod udp;
pub mod vxlan;
pub mod ways;

pub use backend::{Backend, BackendError, Macs, Node, Scene, Underlay};
pub use fights::Fights;
pub use firewall::{Firewall, FirewallError, FirewallReport, Look};
pub use host::HostView;
pub use kernel::{Kernel, KernelError, Observed, Scope};
pub use name::Name;
pub use peers::{Outlook, Peer, Peers};
pub use reconcile::{Report, converge, converge_but};
pub use state::{Change, KernelState};
pub use surroundings::Surroundings;
pub use traffic::{Masquerade, Traffic};
pub use tunnel::{TunnelFilter, TunnelPort};
pub use ways::Ways;
