//! The `udp` backend: packets through a TUN device and a datapath of our own, as the payload of UDP
//! datagrams and nothing else (contract §5.3).
//!
//! For where the kernel has no VXLAN, or the network between the nodes doesn't pass it. This file decides; packets
//! are moved by [`crate::datapath`].

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::net::host;
use subnet::{Attachment, Family, Mac, PublicAddrs};

use super::backend::{Backend, BackendError, MIN_MTU_V6, Macs, Node, Peer, PlanInput, Underlay};
use crate::state::forwarding::Forwarding;
use crate::state::name::Name;
use crate::state::tunnel::TunnelPort;
use crate::state::{KernelState, Link, LinkIdentity, LinkSettings, Route};

/// The port unless another one is configured; its device has the name that Go flannel's has.
const DEFAULT_PORT: u16 = 8285;

/// Outer IP and UDP header, in bytes.
const fn overhead(family: Family) -> u32 {
    let ip = match family {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    ip + 8
}

/// The backend with its configuration.
#[derive(Clone, Debug)]
pub(crate) struct Udp {
    port: u16,
    check_sources: bool,
    workers: u8,
    /// The network of each enabled family, IPv4 first.
    networks: Vec<IpNet>,
    device: Name,
}

impl Udp {
    /// The backend for this port, for packets of these networks, one of each family at most.
    ///
    /// # Errors
    /// [`BackendError`] when the port makes no name of a device.
    pub(crate) fn new(
        port: u16,
        check_sources: bool,
        workers: u8,
        networks: Vec<IpNet>,
    ) -> Result<Self, BackendError> {
        let number = if port == DEFAULT_PORT { 0 } else { port };
        let device = format!("flannel{number}").parse().map_err(|error: crate::state::name::BadName| {
            BackendError(format!("Backend.Port: {port}: {error}"))
        })?;
        Ok(Self { port, check_sources, workers, networks, device })
    }

    fn families(&self) -> impl Iterator<Item = Family> {
        self.networks.iter().map(|network| Family::of(network.addr()))
    }

    fn forwarding(
        &self,
        node: &Node,
        local: PublicAddrs,
        addresses: PublicAddrs,
        peers: &[Peer],
    ) -> Forwarding {
        // What is sent to an address of the network comes back into the tunnel.
        let inside = |public: &IpAddr| self.networks.iter().any(|network| network.contains(public));
        let reached = |peer: &&Peer| local.get(Family::of(peer.public)).is_some() && !inside(&peer.public);
        Forwarding {
            local,
            port: self.port,
            addresses,
            mtu: self.mtu(node.underlay.mtu).try_into().unwrap_or(u16::MAX),
            check_sources: self.check_sources,
            workers: self.workers,
            peers: peers.iter().filter(reached).map(|peer| (peer.subnet, peer.public)).collect(),
            wireguard: None,
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

    fn previous_mac(&self, before: &KernelState, subnet: IpNet) -> Option<Mac> {
        let forwarding = before.forwarding.get(&self.device)?;
        forwarding.peers.iter().any(|(known, _)| *known == subnet).then_some(Mac([0; 6]))
    }

    fn tunnel_port(&self, _family: Family) -> Option<TunnelPort> {
        let (number, check_sources) = (self.port, self.check_sources);
        Some(TunnelPort { number, vnis: Default::default(), check_sources })
    }

    fn mtu(&self, underlay: u32) -> u32 {
        // One device and one MTU for both families.
        let all = self.families().map(|family| underlay.saturating_sub(overhead(family)));
        all.min().unwrap_or(underlay)
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        self.families().map(|family| (family, self.device)).collect()
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        let Underlay { name, mtu, .. } = node.underlay;
        for family in self.families() {
            if node.local.get(family).is_none() {
                return Err(BackendError(format!(
                    "udp needs an {family} address and {name} has none: choose another interface with --iface"
                )));
            }
            let room = self.mtu(mtu);
            if family == Family::V6 && room < MIN_MTU_V6 {
                return Err(BackendError(format!(
                    "IPv6 needs an MTU of {MIN_MTU_V6} bytes and udp leaves {room} of the {mtu} of {name}: raise that to \
                     {}, or set EnableIPv6 to false",
                    MIN_MTU_V6 + overhead(Family::V6)
                )));
            }
        }
        Ok(())
    }

    fn plan(&self, input: PlanInput<'_>) -> KernelState {
        let PlanInput { node, own, all, .. } = input;
        let mut state = KernelState::default();
        let dev = self.device;
        let (mut local, mut addresses) = (Vec::new(), Vec::new());
        for network in &self.networks {
            let family = Family::of(network.addr());
            let (Some(at), Some(subnet)) = (node.local.get(family), own.get(family)) else { continue };
            local.push(at);
            addresses.push(subnet.network());
            state.addresses.insert((dev, host(subnet.network())));
            // The whole network: packets for unknown addresses are answered by the datapath. Peers that are reached in
            // another way have routes of their own, which are better.
            state.routes.insert(*network, Route { dev: Some(dev), ..Route::ours(*network) });
        }
        if local.is_empty() {
            return state;
        }
        let settings = LinkSettings::plain(self.mtu(node.underlay.mtu));
        state.links.insert(dev, Link { identity: LinkIdentity::Tun, settings });
        let (local, addresses) = (local.into_iter().collect(), addresses.into_iter().collect());
        state.forwarding.insert(dev, Arc::new(self.forwarding(node, local, addresses, all)));
        state
    }
}

#[cfg(test)]
mod plan_tests {
    use super::*;
    use crate::plan::backend::BackendId;
    use subnet::Subnets;

    fn node(mtu: u32) -> Node {
        let public =
            PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: Some("2001:db8::1".parse().unwrap()) };
        let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu };
        Node { underlay, public, local: public, source: public, direct: Default::default() }
    }

    fn udp(port: u16, networks: &[&str]) -> Udp {
        Udp::new(port, true, 1, networks.iter().map(|text| text.parse().unwrap()).collect()).unwrap()
    }

    fn peer(subnet: &str, public: &str) -> Peer {
        Peer {
            subnet: subnet.parse().unwrap(),
            public: public.parse().unwrap(),
            mac: Mac([0; 6]),
            wireguard: None,
            backend: BackendId::default(),
        }
    }

    const V4: &str = "10.244.0.0/16";
    const V6: &str = "fd00::/48";

    fn words(networks: &[&str]) -> Vec<String> {
        let peers = [peer("10.244.2.0/24", "192.0.2.2"), peer("fd00:0:0:2::/64", "2001:db8::2")];
        let peers: Vec<Peer> = peers
            .into_iter()
            .filter(|peer| networks.iter().any(|net| net.parse::<IpNet>().unwrap().contains(&peer.subnet)))
            .collect();
        let own: Subnets =
            ["10.244.1.0/24", "fd00:0:0:1::/64"].iter().map(|net| net.parse::<IpNet>().unwrap()).collect();
        let (node, macs) = (node(1500), Macs::default());
        let input = PlanInput { node: &node, own: &own, macs: &macs, peers: &peers, all: &peers };
        let state = udp(8285, networks).plan(input);
        crate::state::diff::diff(&state, &KernelState::default()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_device_takes_the_whole_network_and_the_datapath_knows_the_peers() {
        assert_eq!(
            words(&[V4]),
            [
                "link add flannel0 type tun mtu 1472",
                "address add 10.244.1.0/32 dev flannel0",
                "forwarding set flannel0 local 192.0.2.1:8285 mtu 1472 peers 1",
                "route replace 10.244.0.0/16 dev flannel0 proto 70",
            ]
        );
        assert_eq!(
            words(&[V6]),
            [
                "link add flannel0 type tun mtu 1452",
                "address add fd00:0:0:1::/128 dev flannel0",
                "forwarding set flannel0 local [2001:db8::1]:8285 mtu 1452 peers 1",
                "route replace fd00::/48 dev flannel0 proto 70",
            ]
        );
    }

    #[test]
    fn both_families_share_a_device() {
        assert_eq!(
            words(&[V4, V6]),
            [
                "link add flannel0 type tun mtu 1452",
                "address add 10.244.1.0/32 dev flannel0",
                "address add fd00:0:0:1::/128 dev flannel0",
                "forwarding set flannel0 local 192.0.2.1:8285 and [2001:db8::1]:8285 mtu 1452 peers 2",
                "route replace 10.244.0.0/16 dev flannel0 proto 70",
                "route replace fd00::/48 dev flannel0 proto 70",
            ]
        );
    }

    #[test]
    fn datagrams_to_an_address_inside_the_network_are_not_sent() {
        let peers = [
            peer("10.244.2.0/24", "192.0.2.2"),
            peer("10.244.200.0/24", "10.244.200.5"),
            peer("10.244.201.0/24", "10.244.2.5"),
            peer("fd00:0:0:2::/64", "fd00:0:0:2::5"),
        ];
        let node = node(1500);
        let forwarding = udp(8285, &[V4, V6]).forwarding(&node, node.local, node.local, &peers);
        assert_eq!(forwarding.peers, [("10.244.2.0/24".parse().unwrap(), "192.0.2.2".parse().unwrap())]);
    }

    #[test]
    fn a_node_without_an_address_or_room_for_a_family_is_told_so() {
        let both = udp(8285, &[V4, V6]);
        assert!(both.check(&node(1328)).is_ok());
        let error = both.check(&node(1327)).unwrap_err().to_string();
        assert!(error.contains("1279 of the 1327 of eth0") && error.contains("1328"), "{error}");
        assert!(udp(8285, &[V4]).check(&node(576)).is_ok());
        let mut node = node(1500);
        node.local.v6 = None;
        let error = both.check(&node).unwrap_err().to_string();
        assert!(error.contains("udp needs an IPv6 address and eth0 has none"), "{error}");
        assert!(udp(8285, &[V4]).check(&node).is_ok());
    }

    #[test]
    fn another_port_has_another_device() {
        assert_eq!(udp(8286, &[V4]).devices()[0].1.as_str(), "flannel8286");
    }
}
