//! What a WireGuard device is to do, as a value.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::wireguard::{PresharedKey, PublicKey};

use super::identity::Identity;

/// What a device is to do.
#[derive(Clone, PartialEq, Eq)]
pub struct WireguardSettings {
    /// This node's key.
    pub identity: Arc<Identity>,
    /// A secret besides the keys; it is that of all peers.
    pub psk: Option<PresharedKey>,
    /// Seconds between keepalives where nothing else is sent; 0: none.
    pub keepalive: u16,
    /// The peers, each key once.
    pub peers: Vec<PeerSettings>,
}

/// Who begins the first handshake with a peer of WireGuard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Opening {
    /// Whoever has a packet for the other one.
    #[default]
    Either,
    /// This node, now.
    Here,
    /// The peer, or this node later.
    There,
    /// Nobody any more: the peer did not answer.
    Over,
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSettings {
    /// Its key.
    pub key: PublicKey,
    /// Where it is, unless it is heard from somewhere else.
    pub endpoint: SocketAddr,
    /// The addresses of its pods: packets to them go to it, and it may send packets from them only.
    pub allowed: Vec<IpNet>,
    /// Who begins the first handshake.
    pub opening: Opening,
}

impl fmt::Debug for WireguardSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { identity, psk, keepalive, peers } = self;
        f.debug_struct("WireguardSettings")
            .field("key", identity.public())
            .field("psk", &psk.is_some())
            .field("keepalive", keepalive)
            .field("peers", peers)
            .finish()
    }
}
