//! The `host-gw` backend: a plain route to each peer's subnet through the peer itself (contract §5.2).

use ipnet::IpNet;
use subnet::{Attachment, Family, Mac};

use super::backend::{Backend, BackendError, Macs, Node, Peer, PlanInput};
use crate::state::name::Name;
use crate::state::{KernelState, Route};

/// The backend; it has nothing to configure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostGw;

impl Backend for HostGw {
    fn words(&self) -> String {
        "host-gw".into()
    }

    fn attachment(&self, _macs: &Macs) -> Attachment {
        Attachment::HostGw
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        *attachment == Attachment::HostGw
    }

    fn previous_mac(&self, before: &KernelState, subnet: IpNet) -> Option<Mac> {
        let route = before.routes.get(&subnet).filter(|route| !route.onlink && route.via.is_some());
        route.map(|_| Mac([0; 6]))
    }

    fn mtu(&self, underlay: u32) -> u32 {
        underlay
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        Vec::new()
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        if node.public == node.local {
            return Ok(());
        }
        Err(BackendError(format!(
            "host-gw can't cross address translation: the public address {} is not the one of {}, {}: leave --public-ip \
             and --public-ipv6 out, or use the vxlan backend",
            node.public, node.underlay.name, node.local
        )))
    }

    fn plans_peers_apart(&self) -> bool {
        true
    }

    fn plan(&self, input: PlanInput<'_>) -> KernelState {
        let dev = Some(input.node.underlay.name);
        let route = |peer: &Peer| Route { via: Some(peer.public), dev, ..Route::ours(peer.subnet) };
        KernelState {
            routes: input.peers.iter().map(|peer| (peer.subnet, route(peer))).collect(),
            ..KernelState::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::backend::{BackendId, Underlay};
    use subnet::{PublicAddrs, Subnets};

    fn node(public: &str) -> Node {
        let addrs = |text: &str| PublicAddrs { v4: Some(text.parse().unwrap()), v6: None };
        let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu: 1500 };
        let public = addrs(public);
        Node { underlay, public, local: addrs("192.0.2.1"), source: public, direct: Default::default() }
    }

    #[test]
    fn a_peer_is_one_route_through_the_external_interface() {
        let peer = Peer {
            subnet: "10.244.2.0/24".parse().unwrap(),
            public: "192.0.2.2".parse().unwrap(),
            mac: Mac([0; 6]),
            wireguard: None,
            backend: BackendId::default(),
        };
        let (node, own, macs) = (node("192.0.2.1"), Subnets::default(), Macs::default());
        let state =
            HostGw.plan(PlanInput { node: &node, own: &own, macs: &macs, peers: &[peer], all: &[peer] });
        let words: Vec<String> = state.routes.values().map(ToString::to_string).collect();
        assert_eq!(words, ["10.244.2.0/24 via 192.0.2.2 dev eth0 proto 70"]);
    }

    #[test]
    fn a_node_behind_address_translation_is_told_why_it_cannot_take_part() {
        assert!(HostGw.check(&node("192.0.2.1")).is_ok());
        let error = HostGw.check(&node("198.51.100.1")).unwrap_err().to_string();
        assert!(error.contains("198.51.100.1") && error.contains("vxlan"), "{error}");
    }
}
