//! `host-local`, the IPAM plugin: addresses of a node's ranges, each reserved by a file.

pub(crate) mod allocate;
pub(crate) mod config;
mod range;
mod reclaim;
pub(crate) mod store;
