//! WireGuard without I/O: datagrams and the time go in, datagrams come out.
//!
//! | module | what it holds |
//! |---|---|
//! | [`message`] | the four messages and their lengths |
//! | [`identity`] | this node's key; `key_file` keeps it on disk |
//! | `handshake` | Noise IKpsk2, by `snow` |
//! | [`cookie`], [`gate`] | the codes of handshake messages; which of these are computed, and of whom |
//! | [`session`], [`window`] | what encrypts and decrypts packets: values that all threads share |
//! | [`peer`], `roaming` | a peer's sessions, and what its timers are about; where peers are that moved |
//! | [`ledger`] | what is reported about a peer's session |
//! | [`device`] | all of them |
//! | [`answers`], `timers` | what follows from a handshake message, and from time |
//!
//! A session is immutable but for a counter and a window, so every thread seals and opens for a peer at the same time,
//! and a new session takes the place of the old one between two batches. See docs/adr/024-wireguard.md.

pub mod answers;
pub mod cookie;
pub mod device;
pub mod gate;
mod handshake;
pub mod identity;
pub mod indices;
pub mod key_file;
pub mod ledger;
pub mod message;
pub mod peer;
mod roaming;
pub mod session;
mod settings;
mod timers;
pub mod window;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::time::Duration;

pub use settings::{Opening, PeerSettings, WireguardSettings};

/// The time: since some moment, which only grows, and since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds; never 0.
    pub ms: u64,
    /// What a clock on the wall says.
    pub unix: Duration,
}

/// A datagram that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Where to.
    pub to: SocketAddr,
    /// What.
    pub bytes: Vec<u8>,
}
