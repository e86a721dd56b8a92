//! `host-local`, the IPAM plugin: addresses of a node's ranges, each reserved by a file.

pub(crate) mod store;
