//! The `vxlan` backend: a kernel VXLAN device, and three entries for each peer (contract §5.1).
//!
//! ```text
//! route      <peer subnet> via <first address of peer subnet> dev flannel.1 onlink
//! neighbour  <first address of peer subnet> is at <peer's VtepMAC>
//! FDB        <peer's VtepMAC> is behind <peer's public address>
//! ```

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::net::host;
use subnet::{Attachment, ChecksumOffload, Family, Mac, Vtep, VxlanConfig};

use super::backend::{Backend, BackendError, MIN_MTU_V6, Macs, Node, Peer, PlanInput, Underlay};
use crate::state::name::Name;
use crate::state::tunnel::TunnelPort;
use crate::state::{KernelState, Link, LinkIdentity, LinkSettings, Route, SPARE_PREFIXES, VxlanIdentity};

/// The port that the kernel takes where none is configured.
pub(crate) const DEFAULT_PORT: u16 = 8472;

/// The backend with its configuration.
#[derive(Clone, Debug)]
pub(crate) struct Vxlan {
    config: VxlanConfig,
    /// The device of each enabled family, IPv4 first.
    devices: Vec<(Family, Name)>,
    /// The desired `tx-checksum-ip-generic`; `None` leaves it as it is.
    tx_checksum: Option<bool>,
}

/// Outer IP, UDP and VXLAN header and the inner Ethernet header, in bytes (RFC 7348 §5).
const fn overhead(family: Family) -> u32 {
    let ip = match family {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    ip + 8 + 8 + 14
}

impl Vxlan {
    /// The backend for this configuration and these families.
    ///
    /// # Errors
    /// [`BackendError`] when the VNI doesn't fit into a device name.
    pub(crate) fn new(config: VxlanConfig, families: &[Family]) -> Result<Self, BackendError> {
        let name = |family| match family {
            Family::V4 => format!("flannel.{}", config.vni),
            Family::V6 => format!("flannel-v6.{}", config.vni),
        };
        let device = |family: &Family| {
            let name = name(*family).parse().map_err(|_| {
                BackendError(format!(
                    "Backend.VNI: {} makes the device name {} too long: use at most {}",
                    config.vni,
                    name(*family),
                    if *family == Family::V6 { 9999 } else { 9_999_999 }
                ))
            })?;
            Ok((*family, name))
        };
        let devices = families.iter().map(device).collect::<Result<_, BackendError>>()?;
        let tx_checksum = match config.checksum_offload {
            ChecksumOffload::Auto => None,
            ChecksumOffload::On => Some(true),
            ChecksumOffload::Off => Some(false),
        };
        Ok(Self { config, devices, tx_checksum })
    }

    /// The same on a kernel of this release: those before 5.7 compute wrong checksums of packets that are
    /// translated twice (fixed by ea64d8d6c675), so nothing is left to the network card there.
    #[must_use]
    pub(crate) fn on_kernel(mut self, release: &str) -> Self {
        let mut numbers =
            release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().ok());
        let version = (numbers.next().flatten(), numbers.next().flatten());
        if let (ChecksumOffload::Auto, (Some(major), Some(minor))) = (self.config.checksum_offload, version)
            && (major, minor) < (5, 7)
        {
            self.tx_checksum = Some(false);
        }
        self
    }

    fn port(&self) -> u16 {
        self.config.port.unwrap_or(DEFAULT_PORT)
    }

    fn device(&self, family: Family) -> Option<Name> {
        self.devices.iter().find(|(of, _)| *of == family).map(|(_, name)| *name)
    }

    /// MTU of the device of one family. The kernel accepts no more than what the device underneath has
    /// room for, and pods that believe in more would lose their large packets.
    fn device_mtu(&self, family: Family, underlay: u32) -> u32 {
        self.config.mtu.unwrap_or(underlay).min(underlay).saturating_sub(overhead(family))
    }

    fn link(&self, node: &Node, local: IpAddr, mac: Mac) -> Link {
        let VxlanConfig { vni, port, gbp, learning, .. } = self.config;
        let family = Family::of(local);
        let settings = LinkSettings {
            up: true,
            mtu: self.device_mtu(family, node.underlay.mtu),
            mac,
            lower: node.underlay.index,
            local,
            learning,
            tx_checksum: self.tx_checksum,
            // Router advertisements from inside the overlay must not configure the node.
            accept_ra: Some(false),
            accept_local: None,
        };
        let identity = VxlanIdentity { vni, port, gbp, family, foreign_modes: false };
        Link { identity: LinkIdentity::Vxlan(identity), settings }
    }
}

impl Backend for Vxlan {
    fn words(&self) -> String {
        let VxlanConfig { vni, gbp, .. } = self.config;
        format!("vxlan VNI {vni} port {}{}", self.port(), if gbp { " with GBP" } else { "" })
    }

    fn attachment(&self, macs: &Macs) -> Attachment {
        let vtep = |family| {
            let mac = self.device(family).and_then(|_| macs.get(family))?;
            Some(Vtep { vni: self.config.vni, mac, port: None })
        };
        Attachment::Vxlan { v4: vtep(Family::V4), v6: vtep(Family::V6) }
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        let is_ours =
            |vtep: Vtep| vtep.vni == self.config.vni && vtep.port.is_none_or(|port| port == self.port());
        Family::BOTH.iter().any(|family| attachment.vtep(*family).is_some_and(is_ours))
    }

    fn compatible_with(&self, attachment: &Attachment) -> bool {
        matches!(attachment, Attachment::Vxlan { .. })
    }

    fn previous_mac(&self, before: &KernelState, subnet: IpNet) -> Option<Mac> {
        let device = self.device(Family::of(subnet.addr()))?;
        let tunnelled = before.neighbours.get(&(device, subnet.network())).copied();
        // Without a tunnel no MAC was needed, and none is as long as that is so.
        let direct = || before.routes.get(&subnet).filter(|route| !route.onlink && route.via.is_some());
        tunnelled.or_else(|| direct().filter(|_| self.config.direct_routing).map(|_| Mac([0; 6])))
    }

    fn on_spare_devices(&self) -> Option<Arc<dyn Backend>> {
        let name = |family| match family {
            Family::V4 => format!("{}{:x}.{:x}", SPARE_PREFIXES[0], self.config.vni, self.port()),
            Family::V6 => format!("{}{:x}.{:x}", SPARE_PREFIXES[1], self.config.vni, self.port()),
        };
        let mut aside = self.clone();
        // Any port would do for what has the usual one, and so would the device that takes its place.
        aside.config.port = Some(self.port());
        for (family, device) in &mut aside.devices {
            *device = name(*family).parse().ok()?;
        }
        Some(Arc::new(aside))
    }

    fn vtep(&self) -> Option<(u32, u16)> {
        Some((self.config.vni, self.port()))
    }

    fn tunnel_port(&self, _family: Family) -> Option<TunnelPort> {
        let VxlanConfig { vni, check_sources, .. } = self.config;
        Some(TunnelPort { number: self.port(), vnis: [vni].into(), check_sources })
    }

    fn mtu(&self, underlay: u32) -> u32 {
        // A pod has one MTU for both families.
        let all = self.devices.iter().map(|(family, _)| self.device_mtu(*family, underlay));
        all.min().unwrap_or(underlay)
    }

    fn remark(&self, node: &Node) -> Option<String> {
        let Underlay { name, mtu, .. } = node.underlay;
        let wanted = self.config.mtu.filter(|wanted| *wanted > mtu)?;
        Some(format!("Backend.MTU is {wanted}, but {name} carries {mtu} bytes: using {mtu}"))
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        self.devices.clone()
    }

    fn asks_for_direct(&self) -> bool {
        self.config.direct_routing
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        let Underlay { name, mtu, .. } = node.underlay;
        for (family, _) in &self.devices {
            if node.public.get(*family).is_none() {
                return Err(BackendError(format!(
                    "vxlan needs a public {family} address and {name} has none: choose another interface with --iface"
                )));
            }
            let room = self.device_mtu(*family, mtu);
            if *family == Family::V6 && room < MIN_MTU_V6 {
                return Err(BackendError(format!(
                    "IPv6 needs an MTU of {MIN_MTU_V6} bytes and vxlan leaves {room} of the {} of {name}: raise that (or \
                     Backend.MTU) to {}, or set EnableIPv6 to false",
                    self.config.mtu.unwrap_or(mtu).min(mtu),
                    MIN_MTU_V6 + overhead(Family::V6)
                )));
            }
        }
        Ok(())
    }

    fn plans_peers_apart(&self) -> bool {
        true
    }

    fn plan(&self, input: PlanInput<'_>) -> KernelState {
        let PlanInput { node, own, macs, peers, .. } = input;
        let mut state = KernelState::default();
        for (family, dev) in &self.devices {
            let (Some(local), Some(mac)) = (node.source.get(*family), macs.get(*family)) else { continue };
            state.links.insert(*dev, self.link(node, local, mac));
            state.addresses.extend(own.get(*family).map(|subnet| (*dev, host(subnet.network()))));
        }
        let [v4, v6] =
            Family::BOTH.map(|family| self.device(family).filter(|dev| state.links.contains_key(dev)));
        let direct = |peer: &Peer| {
            if self.config.direct_routing { node.direct.get(&peer.public).copied() } else { None }
        };
        let tunnelled = || {
            peers.iter().filter_map(|peer| {
                let dev = if peer.public.is_ipv4() { v4 } else { v6 };
                let known = peer.mac != Mac([0; 6]);
                Some((peer, dev.filter(|_| known && direct(peer).is_none())?))
            })
        };
        // Collected and not inserted one by one: that fills the nodes of the maps, which saves a third of
        // their memory.
        state.fdb = tunnelled().map(|(peer, dev)| ((dev, peer.mac), peer.public)).collect();
        state.neighbours = tunnelled().map(|(peer, dev)| ((dev, peer.subnet.network()), peer.mac)).collect();
        let through = |(peer, dev): (&Peer, Name)| Route {
            via: Some(peer.subnet.network()),
            dev: Some(dev),
            onlink: true,
            ..Route::ours(peer.subnet)
        };
        let beside = |peer: &Peer| {
            let dev = Some(direct(peer)?);
            Some(Route { via: Some(peer.public), dev, ..Route::ours(peer.subnet) })
        };
        let routes = tunnelled().map(through).chain(peers.iter().filter_map(beside));
        state.routes = routes.map(|route| (route.dst, route)).collect();
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::backend::BackendId;
    use subnet::PublicAddrs;

    fn node(mtu: u32) -> Node {
        let public =
            PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: Some("2001:db8::1".parse().unwrap()) };
        let underlay = Underlay { index: 7, name: "eth0".parse().unwrap(), mtu };
        Node { underlay, public, local: public, source: public, direct: Default::default() }
    }

    fn config(mtu: Option<u32>) -> VxlanConfig {
        VxlanConfig {
            vni: 1,
            port: None,
            mtu,
            gbp: false,
            learning: false,
            direct_routing: false,
            checksum_offload: ChecksumOffload::Auto,
            fallback: false,
            check_sources: true,
        }
    }

    fn vxlan(mtu: Option<u32>) -> Vxlan {
        Vxlan::new(config(mtu), &[Family::V4]).unwrap()
    }

    fn macs() -> Macs {
        let mut macs = Macs::default();
        macs.set(Family::V4, Mac([2, 0, 0, 0, 0, 1]));
        macs.set(Family::V6, Mac([2, 6, 0, 0, 0, 1]));
        macs
    }

    fn peer(subnet: &str, public: &str, last: u8) -> Peer {
        Peer {
            subnet: subnet.parse().unwrap(),
            public: public.parse().unwrap(),
            mac: Mac([2, 0, 0, 0, 0, last]),
            wireguard: None,
            backend: BackendId::default(),
        }
    }

    fn words(backend: &Vxlan, node: &Node, own: &[&str], peers: &[Peer]) -> Vec<String> {
        let own = own.iter().map(|net| net.parse::<IpNet>().unwrap()).collect();
        let state = backend.plan(PlanInput { node, own: &own, macs: &macs(), peers, all: peers });
        crate::state::diff::diff(&state, &KernelState::default()).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_peer_is_a_route_a_neighbour_and_a_forwarding_entry() {
        let peers = [peer("10.244.2.0/24", "192.0.2.2", 2)];
        assert_eq!(
            words(&vxlan(None), &node(1500), &["10.244.1.0/24"], &peers),
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
    fn each_family_has_a_device_of_its_own_over_its_own_underlay() {
        let both = Vxlan::new(config(None), &Family::BOTH).unwrap();
        let peers = [peer("10.244.2.0/24", "192.0.2.2", 2), peer("fd00:0:0:2::/64", "2001:db8::2", 3)];
        assert_eq!(
            words(&both, &node(1500), &["10.244.1.0/24", "fd00:0:0:1::/64"], &peers),
            [
                "link add flannel-v6.1 type vxlan id 1 local 2001:db8::1 mtu 1430 address 02:06:00:00:00:01",
                "link add flannel.1 type vxlan id 1 local 192.0.2.1 mtu 1450 address 02:00:00:00:00:01",
                "address add fd00:0:0:1::/128 dev flannel-v6.1",
                "address add 10.244.1.0/32 dev flannel.1",
                "fdb replace 02:00:00:00:00:03 dst 2001:db8::2 dev flannel-v6.1",
                "fdb replace 02:00:00:00:00:02 dst 192.0.2.2 dev flannel.1",
                "neigh replace fd00:0:0:2:: lladdr 02:00:00:00:00:03 dev flannel-v6.1",
                "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev flannel.1",
                "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto 70",
                "route replace fd00:0:0:2::/64 via fd00:0:0:2:: dev flannel-v6.1 onlink proto 70",
            ]
        );
        assert_eq!((both.mtu(1500), vxlan(None).mtu(1500)), (1430, 1450));
        assert!(both.check(&node(1350)).is_ok());
        let error = both.check(&node(1349)).unwrap_err().to_string();
        assert!(error.contains("1279 of the 1349 of eth0") && error.contains("1350"), "{error}");
    }

    #[test]
    fn a_peer_on_a_link_of_this_node_is_reached_without_a_tunnel_if_that_is_wanted() {
        let direct = Vxlan::new(VxlanConfig { direct_routing: true, ..config(None) }, &[Family::V4]).unwrap();
        let mut node = node(1500);
        node.direct = std::sync::Arc::new([("192.0.2.2".parse().unwrap(), "eth0".parse().unwrap())].into());
        let peers = [peer("10.244.2.0/24", "192.0.2.2", 2), peer("10.244.3.0/24", "198.51.100.3", 3)];
        let all = words(&direct, &node, &["10.244.1.0/24"], &peers);
        assert!(
            all.contains(&"route replace 10.244.2.0/24 via 192.0.2.2 dev eth0 proto 70".to_owned()),
            "{all:?}"
        );
        assert!(
            all.iter()
                .any(|line| line.starts_with("route replace 10.244.3.0/24 via 10.244.3.0 dev flannel.1"))
        );
        assert!(!all.iter().any(|line| line.starts_with("fdb") && line.contains("192.0.2.2")), "{all:?}");
        assert!(words(&vxlan(None), &node, &[], &peers).iter().any(|line| line.contains("via 10.244.2.0")));
    }

    #[test]
    fn old_kernels_compute_checksums_themselves() {
        for (release, expected) in [
            ("5.6.19-arch1", Some(false)),
            ("4.19.0", Some(false)),
            ("5.7.0", None),
            ("6.18", None),
            ("?", None),
        ] {
            assert_eq!(vxlan(None).on_kernel(release).tx_checksum, expected, "{release}");
        }
        let on = VxlanConfig { checksum_offload: ChecksumOffload::On, ..config(None) };
        assert_eq!(Vxlan::new(on, &[Family::V4]).unwrap().on_kernel("4.19.0").tx_checksum, Some(true));
    }

    #[test]
    fn the_mtu_follows_the_underlay_or_the_configuration_within_what_the_underlay_carries() {
        assert_eq!(vxlan(None).mtu(1500), 1450);
        assert_eq!(vxlan(None).mtu(9000), 8950);
        assert_eq!(vxlan(Some(1400)).mtu(1500), 1350);
        assert_eq!(vxlan(Some(9000)).mtu(1500), 1450);
        assert!(vxlan(Some(9000)).remark(&node(1500)).unwrap().contains("9000"));
        assert_eq!(vxlan(Some(1400)).remark(&node(1500)), None);
    }
}
