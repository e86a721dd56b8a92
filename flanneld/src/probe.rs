//! Probes: ICMP echo requests to every peer's public address and to its address in the pod network.
//!
//! ```text
//! agent ── peers ──► Targets ──► Table ── due ──► requests ──► raw sockets
//!                                  ▲                               │
//!                                  └── answered, expired ◄─────────┘
//!                                  ├──► Report: status, metrics, doctor
//!                                  └──► News: log
//! ```
//!
//! Everything but the task ([`Probes`]) is pure: [`path::Path`] is the state of one path, [`mtu::MtuSearch`] finds the longest
//! packet, [`Verdict`] says what both mean together. Nothing is needed on the peer but its kernel.

mod moment;
mod mtu;
mod path;
mod peer;
mod pending;
mod report;
mod table;
mod target;
mod task;
mod verdict;

pub(crate) use path::PathState;
pub(crate) use report::{PathTotals, PeerReport, ProbeMode, RTT_BOUNDS, Report};
pub(crate) use table::VerdictChange;
pub(crate) use target::Targets;
pub(crate) use task::Probes;
pub(crate) use verdict::Verdict;
