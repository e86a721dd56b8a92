//! Moves packets between a TUN device and UDP sockets, for the `udp` backend (contract §5.3) and for `wireguard`
//! where the kernel has none (§5.4).
//!
//! | module | what it holds |
//! |---|---|
//! | [`routing`] | lookup tables of a [`Forwarding`](crate::state::forwarding::Forwarding) |
//! | [`packet`], [`checksum`], [`vnet`] | headers |
//! | [`split`], [`outbox`] | from what the kernel hands over at once to groups of packets |
//! | [`coalesce`] | from packets to what the kernel takes at once |
//! | `icmp` | errors about packets that can't be carried |
//! | [`counters`] | what happened |
//! | `seal` | WireGuard, where packets are encrypted ([`crate::wg`]) |
//! | `egress`, `ingress` | one batch in either direction |
//! | `worker`, `threads`, [`engine`] | threads, devices, sockets |
//! | `handover`, `tunnels` | from one process to the next |
//! | `sys`, `buffer` | system calls, and memory for them |

pub mod checksum;
pub mod coalesce;
pub mod counters;
pub mod engine;
pub(crate) mod handover;
pub(crate) mod icmp;
pub mod outbox;
pub mod packet;
pub mod routing;
pub mod split;
pub mod vnet;

mod buffer;
mod egress;
mod icmp_sender;
mod ingress;
mod queue_steering;
mod seal;
mod shared;
mod sys;
#[cfg(test)]
mod tests;
mod threads;
pub(crate) mod tunnels;
mod worker;
