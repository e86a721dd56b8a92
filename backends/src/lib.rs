//! Turns leases into kernel state, and makes the kernel agree.
//!
//! ```text
//! leases ── peers ──► plan ──► desired ─┐
//!                                       ├─ diff ──► changes ──► apply ──► kernel
//! kernel ── observe ──► actual ─────────┘
//! ```
//!
//! Everything left of the kernel is pure. The agent does the same after each event: [`converge`] observes,
//! compares and applies until the kernel is as desired.
//!
//! | layer | what it holds | may use |
//! |---|---|---|
//! | `state` | the kernel's state and the host's network as values, and how two states differ | |
//! | `netlink` | the protocol, for all that the kernel is told | |
//! | [`nft`] | nftables as values, and the tables in the kernel | `netlink` |
//! | `plan` | backends, and which peers and ways there are: from leases to state | `state` |
//! | `datapath` | packets of the `udp` backend | `state` |
//! | `traffic` | traffic rules and tunnel filters, by nftables or iptables | `state`, `nft` |
//! | [`policy`] | network policies | `netlink`, `nft` |
//! | [`kernel`] | devices, addresses, routes: reading and changing them | `state`, `netlink`, `datapath` |
//!
//! `.ci/module-cycles` checks the last column.

pub mod datapath;
pub mod kernel;
pub mod memory;
mod netlink;
pub mod nft;
mod plan;
pub mod policy;
pub mod random;
pub mod state;
#[cfg(feature = "testing")]
pub mod testing;
mod traffic;

pub use datapath as udp;
pub use kernel::fights::{self, Fights};
pub use kernel::prerequisites;
pub use kernel::reconcile::{Report, converge, converge_but};
pub use kernel::{Kernel, KernelError, Observed, Scope};
pub use plan::active::Ways;
pub use plan::backend::{self, Backend, BackendError, BackendId, Macs, Node, Peer, Scene, Underlay};
pub use plan::peers::{Outlook, Peers};
pub use plan::surroundings::{self, Surroundings};
pub use state::host::{self, HostView};
pub use state::name::{self, Name};
pub use state::tunnel::{TunnelFilter, TunnelPort};
pub use state::{Change, KernelState, diff};
pub use traffic::firewall::{self, Firewall, FirewallError, FirewallReport, Look};
pub use traffic::iptables;
pub use traffic::rules::{Masquerade, Traffic};
