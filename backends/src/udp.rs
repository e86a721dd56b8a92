//! The `udp` backend: packets through a TUN device and a datapath of our own, as the payload of UDP
//! datagrams and nothing else (contract §5.3).
//!
//! For where the kernel has no VXLAN, or the network between the nodes doesn't pass it. Deciding is pure and
//! apart from moving:
//!
//! | module | what it holds |
//! |---|---|
//! | [`forwarding`] | what a datapath is to do: a value, and its lookup tables |
//! | [`packet`], [`checksum`], [`vnet`] | headers |
//! | [`split`], [`outbox`] | from what the kernel hands over at once to groups of packets |
//! | [`merge`] | from packets to what the kernel takes at once |
//! | [`icmp`] | errors about packets that can't be carried |
//! | [`counters`] | what happened |
//! | `egress`, `ingress` | one batch in either direction |
//! | `datapath`, [`engine`] | threads, devices, sockets |
//! | `sys` | system calls |

pub mod checksum;
pub mod counters;
pub mod engine;
pub mod forwarding;
pub mod icmp;
pub mod merge;
pub mod outbox;
pub mod packet;
pub mod split;
pub mod vnet;

mod complaints;
mod datapath;
mod egress;
mod ingress;
mod steer;
mod sys;
#[cfg(test)]
mod tests;
mod worker;

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use subnet::net::host;
use subnet::{Attachment, Family, Mac};

use crate::backend::{Backend, BackendError, Macs, Node, Scene};
use crate::name::Name;
use crate::peers::Peer;
use crate::state::{KernelState, Link, LinkIdentity, LinkSettings, Route};
use forwarding::Forwarding;

/// Outer IPv4 and UDP header, in bytes.
const OVERHEAD: u32 = 20 + 8;
/// The port unless another one is configured; its device has the name that Go flannel's has.
const USUAL_PORT: u16 = 8285;

/// The backend with its configuration.
#[derive(Clone, Debug)]
pub struct Udp {
    port: u16,
    check_sources: bool,
    workers: u8,
    network: Ipv4Net,
    device: Name,
}

impl Udp {
    /// The backend for this port, for packets of this network.
    pub fn new(port: u16, check_sources: bool, workers: u8, network: Ipv4Net) -> Result<Self, BackendError> {
        let number = if port == USUAL_PORT { 0 } else { port };
        let device = format!("flannel{number}")
            .parse()
            .map_err(|error: crate::name::BadName| BackendError(format!("Backend.Port: {port}: {error}")))?;
        Ok(Self { port, check_sources, workers, network, device })
    }

    fn forwarding(&self, node: &Node, local: Ipv4Addr, own: Ipv4Net, peers: &[Peer]) -> Forwarding {
        let peer = |peer: &Peer| match (peer.subnet, peer.public) {
            (IpNet::V4(subnet), IpAddr::V4(public)) => Some((subnet, public)),
            _ => None,
        };
        Forwarding {
            local: SocketAddrV4::new(local, self.port),
            address: own.network(),
            mtu: self.mtu(node.underlay.mtu).try_into().unwrap_or(u16::MAX),
            check_sources: self.check_sources,
            workers: self.workers,
            peers: peers.iter().filter_map(peer).collect(),
        }
    }
}

impl Backend for Udp {
    fn words(&self) -> String {
        format!("udp port {}", self.port)
    }

    fn attachment(&self, _macs: &Macs) -> Attachment {
        Attachment::Udp
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        *attachment == Attachment::Udp
    }

    fn reached(&self, before: &KernelState, subnet: IpNet) -> Option<Mac> {
        let forwarding = before.forwarding.get(&self.device)?;
        forwarding.peers.iter().any(|(known, _)| IpNet::V4(*known) == subnet).then_some(Mac([0; 6]))
    }

    fn mtu(&self, underlay: u32) -> u32 {
        underlay.saturating_sub(OVERHEAD)
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        vec![(Family::V4, self.device)]
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        match node.local.v4 {
            Some(_) => Ok(()),
            None => Err(BackendError(format!(
                "udp needs an IPv4 address and {} has none: choose another interface with --iface",
                node.underlay.name
            ))),
        }
    }

    fn plan(&self, scene: Scene<'_>) -> KernelState {
        let Scene { node, own, all, .. } = scene;
        let mut state = KernelState::default();
        let (Some(IpAddr::V4(local)), Some(subnet)) = (node.local.get(Family::V4), own.v4) else {
            return state;
        };
        let dev = self.device;
        let settings = LinkSettings::plain(self.mtu(node.underlay.mtu));
        state.links.insert(dev, Link { identity: LinkIdentity::Tun, settings });
        state.addresses.insert((dev, host(subnet.network().into())));
        state.forwarding.insert(dev, Arc::new(self.forwarding(node, local, subnet, all)));
        // The whole network: packets for nobody are answered by the datapath. Peers that are reached in
        // another way have routes of their own, which are better.
        let network = self.network.into();
        state.routes.insert(network, Route { dev: Some(dev), ..Route::ours(network) });
        state
    }
}

#[cfg(test)]
mod plan_tests {
    use super::*;
    use crate::backend::Underlay;
    use subnet::{PublicAddrs, Subnets};

    fn node() -> Node {
        let public = PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
        let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu: 1500 };
        Node { underlay, public, local: public, direct: Default::default() }
    }

    #[test]
    fn the_device_takes_the_whole_network_and_the_datapath_knows_the_peers() {
        let peer = Peer {
            subnet: "10.244.2.0/24".parse().unwrap(),
            public: "192.0.2.2".parse().unwrap(),
            mac: Mac([0; 6]),
            way: 0,
        };
        let own: Subnets = ["10.244.1.0/24".parse().unwrap()].into_iter().collect();
        let udp = Udp::new(8285, true, 1, "10.244.0.0/16".parse().unwrap()).unwrap();
        let (node, macs) = (node(), Macs::default());
        let state = udp.plan(Scene { node: &node, own: &own, macs: &macs, peers: &[peer], all: &[peer] });
        let words: Vec<String> =
            crate::diff::diff(&state, &KernelState::default()).iter().map(ToString::to_string).collect();
        assert_eq!(
            words,
            [
                "link add flannel0 type tun mtu 1472",
                "address add 10.244.1.0/32 dev flannel0",
                "forwarding set flannel0 local 192.0.2.1:8285 mtu 1472 peers 1",
                "route replace 10.244.0.0/16 dev flannel0 proto 70",
            ]
        );
    }

    #[test]
    fn another_port_has_another_device() {
        let udp = Udp::new(8286, true, 1, "10.244.0.0/16".parse().unwrap()).unwrap();
        assert_eq!(udp.devices()[0].1.as_str(), "flannel8286");
    }
}
