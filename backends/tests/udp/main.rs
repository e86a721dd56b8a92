//! The udp backend on the real kernel, made by the reconciler as the agent does it, in network namespaces.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod bed;
mod errors;
mod fallback;
mod flows;
mod heal;
mod packets;
mod relay;
mod safety;
mod sockets;
mod traffic;
mod v6;
mod wire;
mod wireguard;
mod workers;
