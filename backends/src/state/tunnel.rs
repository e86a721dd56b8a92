//! Which datagrams may enter the tunnels of this node: the decision, without a mechanism.
//!
//! A VXLAN device takes frames from any address, and the udp datapath trusts the address of a datagram, so
//! a process in a pod could speak to the tunnel's port of a node and put packets with any source into the network.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::{Family, SharedSet};

use crate::state::name::Name;

/// What protects the tunnel ports of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelFilter {
    /// The networks of pods, all of one family: the one in force first, then those that are being left.
    pub networks: Vec<IpNet>,
    /// The device that carries packets between nodes.
    pub underlay: Name,
    /// The ports at which tunnels listen.
    pub ports: Vec<TunnelPort>,
    /// The device that takes IP-in-IP packets, if there is one.
    pub ipip: Option<IpipTunnel>,
    /// The public addresses of peers.
    pub peers: SharedSet<IpAddr>,
    /// They are those that an earlier run saved, and there may be more: other addresses that are found in the filter stay.
    pub recalled: bool,
}

impl TunnelFilter {
    /// The family of its addresses.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.networks.first().map_or(IpAddr::V4([0; 4].into()), |network| network.addr()))
    }

    /// Whether there is nothing to protect.
    pub(crate) fn is_empty(&self) -> bool {
        self.ports.is_empty() && self.ipip.is_none()
    }

    /// Whether only peers came or went since `other`.
    pub(crate) fn differs_in_peers_alone(&self, other: &Self) -> bool {
        (&self.networks, self.underlay, &self.ports, self.ipip)
            == (&other.networks, other.underlay, &other.ports, other.ipip)
    }
}

/// A UDP port at which a tunnel listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelPort {
    /// Its number.
    pub number: u16,
    /// The VNIs that this node takes there; datagrams with others belong to somebody else's devices. Empty
    /// where every datagram is for the tunnel.
    pub vnis: BTreeSet<u32>,
    /// Datagrams are taken from peers' public addresses alone (`CheckSources`).
    pub check_sources: bool,
}

/// A device that decapsulates IP-in-IP packets from any sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpipTunnel {
    /// Its name.
    pub device: Name,
    /// Packets are taken from peers' public addresses alone (`CheckSources`).
    pub check_sources: bool,
}

impl TunnelPort {
    /// The ports of several tunnels, those with the same number as one.
    pub(crate) fn merged(all: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut ports: Vec<Self> = Vec::new();
        for port in all {
            match ports.iter_mut().find(|known| known.number == port.number) {
                Some(known) => {
                    known.vnis.extend(port.vnis);
                    known.check_sources &= port.check_sources;
                }
                None => ports.push(port),
            }
        }
        ports.sort_unstable_by_key(|port| port.number);
        ports
    }
}
