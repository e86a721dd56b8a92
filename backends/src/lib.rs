//! Turns leases into kernel state, and makes the kernel agree.

pub mod host;
pub mod name;

pub use host::HostView;
pub use name::Name;
