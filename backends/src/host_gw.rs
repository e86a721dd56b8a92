//! The `host-gw` backend: a plain route to each peer's subnet through the peer itself (contract §5.2).

use subnet::{Attachment, Mac, Subnets};

use crate::backend::{Backend, BackendError, Node};
use crate::name::Name;
use crate::peers::Peer;
use crate::state::{KernelState, Route};

/// The backend; it has nothing to configure.
#[derive(Clone, Copy, Debug)]
pub struct HostGw;

impl Backend for HostGw {
    fn attachment(&self, _mac: Mac) -> Attachment {
        Attachment::HostGw
    }

    fn mtu(&self, underlay: u32) -> u32 {
        underlay
    }

    fn device(&self) -> Option<Name> {
        None
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        if node.public.v4 == node.local.v4 {
            return Ok(());
        }
        Err(BackendError(format!(
            "host-gw can't cross address translation: the public address {} is not the one of {}, {}: leave --public-ip \
             out, or use the vxlan backend",
            node.public, node.underlay.name, node.local
        )))
    }

    fn plan(&self, node: &Node, _own: &Subnets, _mac: Mac, peers: &[Peer]) -> KernelState {
        let dev = Some(node.underlay.name);
        let route = |peer: &Peer| Route { via: Some(peer.public), dev, ..Route::ours(peer.subnet) };
        KernelState {
            routes: peers.iter().map(|peer| (peer.subnet, route(peer))).collect(),
            ..KernelState::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Underlay;
    use subnet::PublicAddrs;

    fn node(public: &str) -> Node {
        let addrs = |text: &str| PublicAddrs { v4: Some(text.parse().unwrap()), v6: None };
        let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu: 1500 };
        Node { underlay, public: addrs(public), local: addrs("192.0.2.1") }
    }

    #[test]
    fn a_peer_is_one_route_through_the_external_interface() {
        let peer = Peer {
            subnet: "10.244.2.0/24".parse().unwrap(),
            public: "192.0.2.2".parse().unwrap(),
            mac: Mac([0; 6]),
        };
        let state = HostGw.plan(&node("192.0.2.1"), &Subnets::default(), Mac([0; 6]), &[peer]);
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
