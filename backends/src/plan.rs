//! From leases to the kernel state that this node should have; pure.

pub(crate) mod active;
pub(crate) mod alloc;
pub mod backend;
pub(crate) mod extension;
pub(crate) mod host_gw;
pub(crate) mod ipip;
pub(crate) mod peers;
pub(crate) mod select;
pub mod surroundings;
pub(crate) mod udp;
pub(crate) mod vxlan;
pub(crate) mod wireguard;
