//! Network policies in the kernel: what pods may talk to each other, and with whom else.
//!
//! ```text
//! policies, pods, namespaces ──► Cluster ── classes ──► layout ──► Image ─┐
//!                                   │                                     ├─ diff ──► edits ──► one transaction
//!                                   └─ members of selectors ──────────────┤
//! kernel ── table ── (start, damage, refusal) ────────────────────────────┘
//! ```
//!
//! [`Engine`] is a value that is told what changes in the cluster and says what has to change in the kernel, in time
//! that depends on the change and not on the cluster. [`Enforcer`] carries it out. The table and the reasons for it
//! are in `docs/adr/022-network-policy.md`.

mod class;
mod cluster;
mod conntrack;
mod demand;
mod enforcer;
mod engine;
mod generation;
mod groups;
mod image;
mod intern;
mod intervals;
mod keys;
mod layout;
mod members;
mod names;
mod owner;
mod owners;
mod parts;
mod pods;
mod policies;
mod ports;
mod refused;
mod resolved;
mod selecting;
mod selector;
mod settings;
mod slots;
mod steer;
mod touched;

pub use cluster::Cluster;
pub use demand::{Demand, Foresight};
pub use enforcer::{Converged, Enforcer, own_tables, remove_all};
pub use engine::{Engine, Plan, Summary, TableStep};
pub use generation::{RAISE_INTERVAL, REPLIES_PASS};
#[cfg(feature = "testing")]
pub(crate) use image::Edit;
pub use owner::{Owner, owner, remove_tables};
pub use refused::{Refused, RefusedBy, RefusedPackets};
pub use settings::Settings;
pub use steer::{SteerMode, Steering, bridged_packets_are_seen};
