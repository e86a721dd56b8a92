//! Traffic rules and the filter of tunnel ports: what they are, and what carries them out.

pub mod fast_path;
pub mod firewall;
pub mod iptables;
pub(crate) mod peer_counters;
pub(crate) mod rules;
