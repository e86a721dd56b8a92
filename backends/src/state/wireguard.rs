//! What the kernel's WireGuard has, as a value.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::wireguard::{PresharedKey, PublicKey};

use super::KernelState;
use super::name::Name;
use crate::wg::identity::Identity;
use crate::wg::{Opening, PeerSettings, WireguardSettings};

/// Seconds between keepalives to a peer with which this node begins a handshake: the module sends the first one when the interval is
/// set in place of none, and for that it asks for a session.
pub(crate) const OPENING: u16 = 5;

/// A device of the kernel's module. Two are equal if the keys that belong to their private keys are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireguardDevice {
    /// Where it listens.
    pub port: u16,
    /// Its key; when found: `None` where it has none.
    pub identity: Option<Arc<Identity>>,
    /// Its peers.
    pub peers: BTreeMap<PublicKey, WireguardEntry>,
}

/// A peer of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireguardEntry {
    /// Where it is reached. When found: as desired as long as the peer is heard, since it may be followed to another
    /// address.
    pub endpoint: SocketAddr,
    /// The addresses of its pods.
    pub allowed: BTreeSet<IpNet>,
    /// The secret besides the keys.
    pub psk: Option<PresharedKey>,
    /// Seconds between keepalives; 0: none.
    pub keepalive: u16,
}

/// What changes about the peers of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireguardPeers {
    /// Those that come, or are to have other values.
    pub upsert: BTreeMap<PublicKey, WireguardEntry>,
    /// Those that go.
    pub remove: BTreeSet<PublicKey>,
}

impl WireguardDevice {
    /// A device that does the same as one of this process would.
    pub(crate) fn of(settings: &WireguardSettings, port: u16) -> Self {
        let entry = |peer: &PeerSettings| {
            let entry = WireguardEntry {
                endpoint: peer.endpoint,
                allowed: peer.allowed.iter().copied().collect(),
                psk: settings.psk.clone(),
                keepalive: match peer.opening {
                    Opening::Either => settings.keepalive,
                    Opening::Here => OPENING,
                    Opening::There | Opening::Over => 0,
                },
            };
            (peer.key, entry)
        };
        let peers = settings.peers.iter().map(entry).collect();
        Self { port, identity: Some(Arc::clone(&settings.identity)), peers }
    }

    /// What has to change for `have` to get these peers.
    pub(crate) fn peers_from(&self, have: Option<&Self>) -> WireguardPeers {
        let there = |key: &PublicKey| have.and_then(|have| have.peers.get(key));
        let differing = self.peers.iter().filter(|(key, peer)| there(key) != Some(peer));
        let gone = have.iter().flat_map(|have| have.peers.keys()).filter(|key| !self.peers.contains_key(key));
        WireguardPeers {
            upsert: differing.map(|(key, peer)| (*key, peer.clone())).collect(),
            remove: gone.copied().collect(),
        }
    }

    /// Makes the change to the value.
    pub(crate) fn change(&mut self, change: &WireguardPeers) {
        self.peers.retain(|key, _| !change.remove.contains(key));
        for (key, peer) in &change.upsert {
            // An address has one peer.
            self.peers.values_mut().for_each(|other| other.allowed.retain(|net| !peer.allowed.contains(net)));
            self.peers.insert(*key, peer.clone());
        }
    }
}

impl KernelState {
    /// Sets key and port of a device.
    pub(super) fn set_wireguard(&mut self, name: Name, port: u16, identity: &Arc<Identity>) {
        let device = Arc::make_mut(self.wireguard.entry(name).or_default());
        (device.port, device.identity) = (port, Some(Arc::clone(identity)));
    }

    /// Sets and removes peers of a device.
    pub(super) fn set_wireguard_peers(&mut self, name: Name, peers: &WireguardPeers) {
        Arc::make_mut(self.wireguard.entry(name).or_default()).change(peers);
    }
}

impl WireguardPeers {
    /// Whether nothing changes.
    pub(crate) fn is_empty(&self) -> bool {
        self.upsert.is_empty() && self.remove.is_empty()
    }
}

impl fmt::Display for WireguardPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.upsert.first_key_value(), self.upsert.len(), self.remove.len()) {
            (Some((key, peer)), 1, 0) => write!(f, "{key} endpoint {}", peer.endpoint),
            (_, set, removed) => write!(f, "{set} set, {removed} removed"),
        }
    }
}
