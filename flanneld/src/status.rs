//! How this node stands: one value, of which `/metrics`, `/status`, `flanneld status` and `flanneld doctor` are views.
//!
//! The loop publishes what it knows after each turn ([`Board`]), without copying anything that grows with the cluster.
//! A [`NodeStatus`] is made of that when somebody asks (`build`), together with what only the host knows at that moment.

mod board;
mod build;
mod host;
mod look;
pub(crate) mod metrics;
pub(crate) mod model;
pub(crate) mod pool;
mod probed;
mod sessions;
mod sources;
mod times;
mod traffic;

pub(crate) use board::{Board, Published};
pub(crate) use build::{Depth, build, peers};
pub(crate) use host::checksum_errors;
pub(crate) use look::differences;
pub(crate) use model::{
    ChangeCount, Counters, KernelStatus, Node, NodeStatus, PeerEntry, PeerList, Policy, Pool, Repair,
    RulesStatus, SCHEMA, Store,
};
pub(crate) use sources::Sources;
pub(crate) use times::Times;
