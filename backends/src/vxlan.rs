//! The `vxlan` backend: a kernel VXLAN device, and three entries for each peer (contract §5.1).
//!
//! ```text
//! route      <peer subnet> via <first address of peer subnet> dev flannel.1 onlink
//! neighbour  <first address of peer subnet> is at <peer's VtepMAC>
//! FDB        <peer's VtepMAC> is behind <peer's public address>
//! ```

use std::net::IpAddr;

use subnet::net::host;
use subnet::{Attachment, Family, Mac, Subnets, Vtep, VxlanConfig};

use crate::backend::{Backend, BackendError, Node, Underlay};
use crate::name::Name;
use crate::peers::Peer;
use crate::state::{KernelState, Link, LinkIdentity, LinkSettings, Route, VxlanIdentity};

/// Outer IPv4, UDP and VXLAN header and the inner Ethernet header, in bytes (RFC 7348 §5).
const OVERHEAD: u32 = 20 + 8 + 8 + 14;

/// The backend with its configuration.
#[derive(Clone, Debug)]
pub struct Vxlan {
    config: VxlanConfig,
    device: Name,
}

impl Vxlan {
    /// The backend for this configuration.
    ///
    /// # Errors
    /// [`BackendError`] when the VNI doesn't fit into a device name.
    pub fn new(config: VxlanConfig) -> Result<Self, BackendError> {
        let device = format!("flannel.{}", config.vni).parse().map_err(|error: crate::name::BadName| {
            BackendError(format!("Backend.VNI: {}: {error}", config.vni))
        })?;
        Ok(Self { config, device })
    }

    fn link(&self, node: &Node, local: IpAddr, mac: Mac) -> Link {
        let VxlanConfig { vni, port, gbp, learning, .. } = self.config;
        let family = Family::of(local);
        let mtu = self.mtu(node.underlay.mtu);
        Link {
            identity: LinkIdentity::Vxlan(VxlanIdentity { vni, port, gbp, family, foreign_modes: false }),
            settings: LinkSettings { up: true, mtu, mac, lower: node.underlay.index, local, learning },
        }
    }
}

impl Backend for Vxlan {
    fn attachment(&self, mac: Mac) -> Attachment {
        Attachment::Vxlan { v4: Some(Vtep { vni: self.config.vni, mac }), v6: None }
    }

    fn mtu(&self, underlay: u32) -> u32 {
        // The kernel accepts no more than what the device underneath has room for, and pods that believe
        // in more would lose their large packets.
        self.config.mtu.unwrap_or(underlay).min(underlay).saturating_sub(OVERHEAD)
    }

    fn remark(&self, node: &Node) -> Option<String> {
        let Underlay { name, mtu, .. } = node.underlay;
        let wanted = self.config.mtu.filter(|wanted| *wanted > mtu)?;
        Some(format!("Backend.MTU is {wanted}, but {name} carries {mtu} bytes: using {mtu}"))
    }

    fn device(&self) -> Option<Name> {
        Some(self.device)
    }

    fn seed(&self) -> u32 {
        self.config.vni
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        match node.public.v4 {
            Some(_) => Ok(()),
            None => Err(BackendError(format!(
                "vxlan needs a public IPv4 address and {} has none: choose another interface with --iface",
                node.underlay.name
            ))),
        }
    }

    fn plan(&self, node: &Node, own: &Subnets, mac: Mac, peers: &[Peer]) -> KernelState {
        let mut state = KernelState::default();
        let Some(local) = node.public.get(Family::V4) else { return state };
        let dev = self.device;
        state.links.insert(dev, self.link(node, local, mac));
        state.addresses.extend(own.iter().map(|subnet| (dev, host(subnet.network()))));
        // Collected and not inserted one by one: that fills the nodes of the maps, which saves a third of
        // their memory.
        state.fdb = peers.iter().map(|peer| ((dev, peer.mac), peer.public)).collect();
        state.neighbours = peers.iter().map(|peer| ((dev, peer.subnet.network()), peer.mac)).collect();
        let route = |peer: &Peer| Route {
            via: Some(peer.subnet.network()),
            dev: Some(dev),
            onlink: true,
            ..Route::ours(peer.subnet)
        };
        state.routes = peers.iter().map(|peer| (peer.subnet, route(peer))).collect();
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use subnet::PublicAddrs;

    fn node(mtu: u32) -> Node {
        let public = PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
        Node { underlay: Underlay { index: 7, name: "eth0".parse().unwrap(), mtu }, public, local: public }
    }

    fn vxlan(mtu: Option<u32>) -> Vxlan {
        let config = VxlanConfig {
            vni: 1,
            port: None,
            mtu,
            gbp: false,
            learning: false,
            direct_routing: false,
            checksum_offload: subnet::ChecksumOffload::Auto,
            fallback: false,
        };
        Vxlan::new(config).unwrap()
    }

    #[test]
    fn a_peer_is_a_route_a_neighbour_and_a_forwarding_entry() {
        let mac = Mac([2, 0, 0, 0, 0, 2]);
        let peer =
            Peer { subnet: "10.244.2.0/24".parse().unwrap(), public: "192.0.2.2".parse().unwrap(), mac };
        let own = ["10.244.1.0/24".parse().unwrap()].into_iter().collect();
        let state = vxlan(None).plan(&node(1500), &own, Mac([2, 0, 0, 0, 0, 1]), &[peer]);
        let words: Vec<String> =
            crate::diff::diff(&state, &KernelState::default()).iter().map(ToString::to_string).collect();
        assert_eq!(
            words,
            [
                "link add flannel.1 type vxlan id 1 local 192.0.2.1 mtu 1450 address 02:00:00:00:00:01",
                "address add 10.244.1.0/32 dev flannel.1",
                "fdb replace 02:00:00:00:00:02 dst 192.0.2.2 dev flannel.1",
                "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev flannel.1",
                "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto 70",
            ]
        );
    }

    #[test]
    fn the_mtu_follows_the_underlay_or_the_configuration_within_what_the_underlay_carries() {
        let device_mtu = |config, underlay| {
            let state = vxlan(config).plan(&node(underlay), &Subnets::default(), Mac([2; 6]), &[]);
            state.links.values().next().unwrap().settings.mtu
        };
        assert_eq!(device_mtu(None, 1500), 1450);
        assert_eq!(device_mtu(None, 9000), 8950);
        assert_eq!(device_mtu(Some(1400), 1500), 1350);
        assert_eq!(device_mtu(Some(9000), 1500), 1450);
        assert!(vxlan(Some(9000)).remark(&node(1500)).unwrap().contains("9000"));
        assert_eq!(vxlan(Some(1400)).remark(&node(1500)), None);
    }
}
