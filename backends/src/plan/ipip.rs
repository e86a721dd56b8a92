//! The `ipip` backend: packets as the payload of IPv4 packets, by a kernel device and a route for each peer (contract
//! §5.5).
//!
//! ```text
//! route  <peer subnet> via <peer's public address> dev flannel.ipip onlink
//! ```

use ipnet::IpNet;
use subnet::net::host;
use subnet::{Attachment, Family, IpipConfig, Mac};

use super::backend::{Backend, BackendError, Macs, Node, Peer, PlanInput, Underlay};
use crate::state::name::Name;
use crate::state::tunnel::IpipTunnel;
use crate::state::{IPIP_DEVICE, IpipIdentity, KernelState, Link, LinkIdentity, LinkSettings, Route};

/// The outer IPv4 header, in bytes (RFC 2003 §3).
const OVERHEAD: u32 = 20;

/// The least MTU of a device that carries IPv4, in bytes (RFC 791 §3.2).
const MIN_MTU: u32 = 68;

/// The backend with its configuration.
#[derive(Clone, Debug)]
pub(crate) struct Ipip {
    config: IpipConfig,
    device: Name,
}

impl Ipip {
    /// The backend for networks of these families.
    ///
    /// # Errors
    /// [`BackendError`] with IPv6, which these tunnels don't carry.
    pub(crate) fn new(config: IpipConfig, families: &[Family]) -> Result<Self, BackendError> {
        if families.contains(&Family::V6) {
            return Err(BackendError(
                "Backend.Type: \"ipip\" carries IPv4 alone: set EnableIPv6 to false, or use \"vxlan\", \"host-gw\" or \"udp\""
                    .into(),
            ));
        }
        let device = IPIP_DEVICE
            .parse()
            .map_err(|error: crate::state::name::BadName| BackendError(error.to_string()))?;
        Ok(Self { config, device })
    }
}

impl Backend for Ipip {
    fn words(&self) -> String {
        "ipip".into()
    }

    fn attachment(&self, _macs: &Macs) -> Attachment {
        Attachment::Ipip
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        *attachment == Attachment::Ipip
    }

    fn previous_mac(&self, before: &KernelState, subnet: IpNet) -> Option<Mac> {
        let route = before.routes.get(&subnet).filter(|route| route.via.is_some());
        let direct = |route: &Route| self.config.direct_routing && !route.onlink;
        route.filter(|route| route.dev == Some(self.device) || direct(route)).map(|_| Mac([0; 6]))
    }

    fn ipip_tunnel(&self) -> Option<IpipTunnel> {
        Some(IpipTunnel { device: self.device, check_sources: self.config.check_sources })
    }

    fn mtu(&self, underlay: u32) -> u32 {
        underlay.saturating_sub(OVERHEAD)
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        vec![(Family::V4, self.device)]
    }

    fn asks_for_direct(&self) -> bool {
        self.config.direct_routing
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        let Underlay { name, mtu, .. } = node.underlay;
        if node.source.get(Family::V4).is_none() {
            return Err(BackendError(format!(
                "ipip needs an IPv4 address and {name} has none: choose another interface with --iface"
            )));
        }
        if self.mtu(mtu) < MIN_MTU {
            return Err(BackendError(format!(
                "ipip leaves {} of the {mtu} bytes of {name}, and IPv4 needs {MIN_MTU}: raise the MTU of {name}",
                self.mtu(mtu)
            )));
        }
        Ok(())
    }

    fn plans_peers_apart(&self) -> bool {
        true
    }

    fn plan(&self, input: PlanInput<'_>) -> KernelState {
        let PlanInput { node, own, peers, .. } = input;
        let mut state = KernelState::default();
        let Some(local) = node.source.v4 else { return state };
        let dev = self.device;
        let identity = LinkIdentity::Ipip(IpipIdentity { local, foreign_modes: false });
        let settings =
            LinkSettings { accept_local: None, ..LinkSettings::plain(self.mtu(node.underlay.mtu)) };
        state.links.insert(dev, Link { identity, settings });
        state.addresses.extend(own.get(Family::V4).map(|subnet| (dev, host(subnet.network()))));
        let direct = |peer: &Peer| {
            if self.config.direct_routing { node.direct.get(&peer.public).copied() } else { None }
        };
        let route = |peer: &Peer| {
            let beside = direct(peer);
            let via = Some(peer.public);
            Route { via, dev: beside.or(Some(dev)), onlink: beside.is_none(), ..Route::ours(peer.subnet) }
        };
        let peers = peers.iter().filter(|peer| peer.public.is_ipv4());
        state.routes = peers.map(|peer| (peer.subnet, route(peer))).collect();
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::backend::BackendId;
    use crate::state::diff::diff;
    use subnet::{PublicAddrs, Subnets};

    const CONFIG: IpipConfig = IpipConfig { direct_routing: false, fallback: false, check_sources: true };

    fn node(mtu: u32) -> Node {
        let public = PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
        let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu };
        Node { underlay, public, local: public, source: public, direct: Default::default() }
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

    fn plan(config: IpipConfig, node: &Node) -> KernelState {
        let peers = [peer("10.244.2.0/24", "192.0.2.2"), peer("10.244.3.0/24", "198.51.100.3")];
        let own: Subnets = ["10.244.1.0/24".parse().unwrap()].into_iter().collect();
        let backend = Ipip::new(config, &[Family::V4]).unwrap();
        backend.plan(PlanInput { node, own: &own, macs: &Macs::default(), peers: &peers, all: &peers })
    }

    fn words(state: &KernelState) -> Vec<String> {
        diff(state, &KernelState::default()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_peer_is_one_route_through_the_tunnel_to_its_public_address() {
        let state = plan(CONFIG, &node(1500));
        assert_eq!(
            words(&state),
            [
                "link add flannel.ipip type ipip local 192.0.2.1 mtu 1480",
                "address add 10.244.1.0/32 dev flannel.ipip",
                "route replace 10.244.2.0/24 via 192.0.2.2 dev flannel.ipip onlink proto 70",
                "route replace 10.244.3.0/24 via 198.51.100.3 dev flannel.ipip onlink proto 70",
            ]
        );
        assert!(diff(&state, &state).is_empty());
    }

    #[test]
    fn a_peer_on_a_link_of_this_node_is_reached_without_a_tunnel_if_that_is_wanted() {
        let mut node = node(1500);
        node.direct = std::sync::Arc::new([("192.0.2.2".parse().unwrap(), "eth0".parse().unwrap())].into());
        let direct = plan(IpipConfig { direct_routing: true, ..CONFIG }, &node);
        let routes: Vec<String> = direct.routes.values().map(ToString::to_string).collect();
        assert_eq!(
            routes,
            [
                "10.244.2.0/24 via 192.0.2.2 dev eth0 proto 70",
                "10.244.3.0/24 via 198.51.100.3 dev flannel.ipip onlink proto 70"
            ]
        );
        let backend = Ipip::new(IpipConfig { direct_routing: true, ..CONFIG }, &[Family::V4]).unwrap();
        for subnet in direct.routes.keys() {
            assert!(backend.previous_mac(&direct, *subnet).is_some(), "{subnet}");
        }
        assert_eq!(backend.previous_mac(&direct, "10.244.9.0/24".parse().unwrap()), None);
        assert_eq!(plan(CONFIG, &node), plan(CONFIG, &super::tests::node(1500)));
    }

    #[test]
    fn what_a_node_or_a_network_lacks_is_named_with_the_remedy() {
        let error = Ipip::new(CONFIG, &Family::BOTH).unwrap_err().to_string();
        assert!(error.contains("IPv4 alone") && error.contains("EnableIPv6"), "{error}");
        let backend = Ipip::new(CONFIG, &[Family::V4]).unwrap();
        assert!(backend.check(&node(1500)).is_ok());
        let error = backend.check(&node(80)).unwrap_err().to_string();
        assert!(error.contains("60 of the 80 bytes of eth0"), "{error}");
        let none = Node { source: PublicAddrs::default(), ..node(1500) };
        let error = backend.check(&none).unwrap_err().to_string();
        assert!(error.contains("--iface"), "{error}");
    }

    #[test]
    fn a_device_of_go_flannel_is_kept_and_one_with_another_address_is_replaced() {
        let wanted = plan(CONFIG, &node(1500));
        let dev: Name = IPIP_DEVICE.parse().unwrap();
        let with = |identity: LinkIdentity| {
            let mut actual = wanted.clone();
            actual.links.get_mut(&dev).unwrap().identity = identity;
            words_between(&wanted, &actual)
        };
        let local = "192.0.2.1".parse().unwrap();
        assert!(with(LinkIdentity::Ipip(IpipIdentity { local, foreign_modes: false })).is_empty());
        for (other, modes) in [("192.0.2.9", false), ("192.0.2.1", true)] {
            let identity = IpipIdentity { local: other.parse().unwrap(), foreign_modes: modes };
            let changes = with(LinkIdentity::Ipip(identity));
            assert_eq!(changes[0], "link del flannel.ipip");
            assert!(changes[1].starts_with("link add flannel.ipip type ipip local 192.0.2.1"));
            assert!(changes.iter().any(|change| change.starts_with("route replace 10.244.2.0/24")));
        }
        // Another program's is not deleted: the kernel refuses a second one of the name.
        let changes = with(LinkIdentity::Other("dummy".into()));
        assert!(!changes.iter().any(|change| change.starts_with("link del")), "{changes:?}");
    }

    fn words_between(wanted: &KernelState, actual: &KernelState) -> Vec<String> {
        diff(wanted, actual).iter().map(ToString::to_string).collect()
    }
}
