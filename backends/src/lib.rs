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
//! | `wg` | the WireGuard protocol; may be used by all | |
//! | [`echo`] | probes: echo messages through raw sockets | |
//! | [`kernel`] | devices, addresses, routes: reading and changing them | `state`, `netlink`, `datapath` |
//!
//! `.ci/module-cycles` checks the last column.

#[cfg(test)]
mod allocated;
pub mod backtrace;
#[cfg(feature = "testing")]
pub mod datapath;
#[cfg(not(feature = "testing"))]
#[expect(unreachable_pub, reason = "public for tests and measurements only")]
mod datapath;
pub mod echo;
pub mod kernel;
pub mod memory;
mod netlink;
#[cfg(feature = "testing")]
pub mod nft;
#[cfg(not(feature = "testing"))]
#[expect(unreachable_pub, reason = "public for tests and measurements only")]
mod nft;
pub mod orphan;
mod plan;
pub mod policy;
pub mod random;
pub mod state;
#[cfg(feature = "testing")]
pub mod testing;
mod traffic;
#[cfg(feature = "testing")]
pub mod wg;
#[cfg(not(feature = "testing"))]
#[expect(unreachable_pub, reason = "public for tests and measurements only")]
mod wg;

pub use datapath::counters::Counters;
pub use datapath::handover::{SocketFiles, TunnelFiles};
pub use datapath::tunnels::Tunnels;
pub use kernel::fights::Fights;
pub use kernel::netlink::wireguard_sessions;
pub use kernel::reconcile::{Report, Settled, changes, converge, converge_since};
pub use kernel::{Kernel, KernelError, Observed, Scope, fights, prerequisites};
pub use nft::trace;
pub use nft::{Moved, NftError, NftListener, Watched, ruleset_text};
pub use plan::active::{ActiveBackends, FoundSessions, HeardKeys};
pub use plan::backend::{BackendId, Macs, Node, Peer, PlanInput, Underlay};
pub use plan::peers::{PeerContext, Peers};
pub use plan::surroundings::Surroundings;
pub use plan::{backend, surroundings};
pub use state::host::HostView;
pub use state::name::Name;
pub use state::tunnel::TunnelFilter;
#[cfg(feature = "testing")]
pub use state::tunnel::TunnelPort;
pub use state::{KernelChange, KernelState, diff, host, name};
pub use traffic::firewall::{Firewall, FirewallError, FirewallReport, Look};
pub use traffic::peer_counters::{PeerCounters, PeerTraffic};
pub use traffic::rules::{Masquerade, Traffic};
pub use traffic::{fast_path, firewall, iptables};
pub use wg::ledger::{HandshakeFault, SessionReport, SessionState};

/// The files with this host's WireGuard key, which may not exist.
pub fn key_files() -> Vec<std::path::PathBuf> {
    wg::key_file::KeyFiles::of_environment().paths()
}

/// Replaces the host's WireGuard key that has this public key; gives the public key of the one that is there then.
///
/// # Errors
/// A sentence that names the file and the remedy.
pub fn renew_key(former: &subnet::wireguard::PublicKey) -> Result<subnet::wireguard::PublicKey, String> {
    wg::key_file::KeyFiles::of_environment().renew(former)
}
