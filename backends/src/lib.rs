//! Turns leases into kernel state, and makes the kernel agree.

pub mod host;
pub mod name;
#[cfg(feature = "testing")]
pub mod testing;

pub use host::HostView;
pub use name::Name;
