//! What a datapath is to do, as a value.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use subnet::{Family, PublicAddrs};

use crate::wg::WireguardSettings;

/// What a datapath is to do: a value that the reconciler compares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarding {
    /// Where datagrams of each family come in and go out.
    pub local: PublicAddrs,
    /// UDP port, the same one for peers.
    pub port: u16,
    /// Sources of ICMP errors: the addresses of the device.
    pub addresses: PublicAddrs,
    /// The longest packet in bytes.
    pub mtu: u16,
    /// Takes datagrams from peers only, and packets only from the sender's own subnet or address.
    pub check_sources: bool,
    /// Threads for each direction.
    pub workers: u8,
    /// Subnet and public address, of one family, of each peer; no two subnets overlap.
    pub peers: Vec<(IpNet, IpAddr)>,
    /// Encrypts, and has these peers instead.
    pub wireguard: Option<Arc<WireguardSettings>>,
}

impl Forwarding {
    /// The addresses of its sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = SocketAddr> {
        let socket = |family: &Family| Some(SocketAddr::new(self.local.get(*family)?, self.port));
        Family::BOTH.iter().filter_map(socket)
    }
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sockets: Vec<String> = self.sockets().map(|socket| socket.to_string()).collect();
        let peers = self.wireguard.as_ref().map_or(self.peers.len(), |settings| settings.peers.len());
        write!(f, "local {} mtu {} peers {peers}", sockets.join(" and "), self.mtu)?;
        if let Some(settings) = &self.wireguard {
            write!(f, " key {}", settings.identity.public())?;
        }
        Ok(())
    }
}
