//! The `wireguard` backend: encrypted tunnels between the nodes (contract §5.4). This file decides. The kernel's module
//! encrypts, or where there is none [`crate::wg`] with [`crate::datapath`].
//!
//! ```text
//! route  <network> dev flannel-wg
//! peer   <public key> at <public address>:<port>, for <its pod subnets>
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use subnet::net::host;
use subnet::wireguard::{PublicKey, WireguardData};
use subnet::{Attachment, Engine, Family, Mac, Mode, PublicAddrs, WireguardConfig};

use super::backend::{
    Backend, BackendError, MIN_MTU_V6, Macs, Node, Peer, PlanInput, Underlay, WireguardPeer,
};
use crate::state::forwarding::Forwarding;
use crate::state::name::Name;
use crate::state::tunnel::TunnelPort;
use crate::state::wireguard::WireguardDevice;
use crate::state::{KernelState, Link, LinkIdentity, LinkSettings, Route};
use crate::wg::identity::Identity;
use crate::wg::{Opening, PeerSettings, WireguardSettings};

/// The names of the devices of Go flannel.
const DEVICE: &str = "flannel-wg";
const DEVICE_V6: &str = "flannel-wg-v6";
/// IPv6, UDP, and WireGuard's header and tag, in bytes: in every mode, so that all nodes have one MTU.
const OVERHEAD: u32 = 40 + 8 + 32;

/// The backend with its configuration.
#[derive(Clone, Debug)]
pub(crate) struct Wireguard {
    config: WireguardConfig,
    identity: Arc<Identity>,
    tunnels: Vec<WireguardTunnel>,
    /// This process encrypts, and not the kernel.
    in_process: bool,
}

/// A device.
#[derive(Clone, Debug)]
struct WireguardTunnel {
    name: Name,
    port: u16,
    /// The networks of the pods whose packets it carries, at most one of each family.
    networks: Vec<IpNet>,
    /// The families of the addresses between which it carries them.
    outer: Vec<Family>,
}

impl Wireguard {
    /// The backend of the node with this key, for packets of these networks, one of each family at most.
    ///
    /// # Errors
    /// [`BackendError`] when the keys contradict each other or the network.
    pub(crate) fn new(
        config: WireguardConfig,
        identity: Arc<Identity>,
        networks: Vec<IpNet>,
    ) -> Result<Self, BackendError> {
        let of = |network: &IpNet| Family::of(network.addr());
        let families: Vec<Family> = networks.iter().map(of).collect();
        let tunnel = |name: &str, port, networks: Vec<IpNet>, outer| {
            let name = name.parse().map_err(|error| BackendError(format!("{error}")))?;
            Ok(WireguardTunnel { name, port, networks, outer })
        };
        let outer = match config.mode {
            Mode::Separate => None,
            Mode::Auto => Some(families.clone()),
            Mode::V4 => Some(vec![Family::V4]),
            Mode::V6 => Some(vec![Family::V6]),
        };
        if let Some(lacking) = outer.iter().flatten().find(|family| !families.contains(family)) {
            return Err(BackendError(format!(
                "Backend.Mode: \"{}\" needs {lacking}, which this network does not have: set Enable{lacking}, or use \
                 another mode",
                config.mode
            )));
        }
        let tunnels = match outer {
            Some(outer) => vec![tunnel(DEVICE, config.port, networks, outer)?],
            None => {
                let name = |family| if family == Family::V4 { DEVICE } else { DEVICE_V6 };
                let one = |network: &IpNet| {
                    let family = of(network);
                    tunnel(name(family), config.port_of(family), vec![*network], vec![family])
                };
                networks.iter().map(one).collect::<Result<_, _>>()?
            }
        };
        if let [one, other] = tunnels.as_slice()
            && one.port == other.port
        {
            return Err(BackendError(format!(
                "Backend.ListenPort and Backend.ListenPortV6 are both {}: two tunnels need two ports, or set \
                 Backend.Mode to \"auto\"",
                one.port
            )));
        }
        let in_process = config.engine == Engine::Always;
        Ok(Self { config, identity, tunnels, in_process })
    }

    fn tunnel(&self, family: Family) -> Option<&WireguardTunnel> {
        self.tunnels.iter().find(|tunnel| tunnel.carries(family))
    }

    /// What is announced of a family: where it is listened for its packets.
    fn data(&self, family: Family) -> Option<WireguardData> {
        let port = self.tunnel(family)?.port;
        Some(WireguardData { key: *self.identity.public(), port: Some(port) })
    }

    /// What a device is to do about these peers.
    fn settings(&self, tunnel: &WireguardTunnel, node: &Node, peers: &[Peer]) -> WireguardSettings {
        // A node with both families has one key, and is one peer of a device that carries both.
        let mut all: BTreeMap<PublicKey, PeerSettings> = BTreeMap::new();
        for peer in peers.iter().filter(|peer| tunnel.carries(Family::of(peer.subnet.addr()))) {
            let Some((data, endpoint)) =
                peer.wireguard.and_then(|data| Some((data, self.endpoint(tunnel, node, peer, &data)?)))
            else {
                continue;
            };
            let new = || PeerSettings { key: data.key, endpoint, allowed: Vec::new(), opening: data.opening };
            all.entry(data.key).or_insert_with(new).allowed.push(peer.subnet);
        }
        WireguardSettings {
            identity: Arc::clone(&self.identity),
            psk: self.config.psk.clone(),
            keepalive: self.config.keepalive,
            peers: all.into_values().collect(),
        }
    }

    /// Where a peer is reached; `None` if it can't be.
    fn endpoint(
        &self,
        tunnel: &WireguardTunnel,
        node: &Node,
        peer: &Peer,
        data: &WireguardPeer,
    ) -> Option<SocketAddr> {
        let family = match self.config.mode {
            Mode::Separate => Family::of(peer.subnet.addr()),
            Mode::V4 => Family::V4,
            Mode::V6 => Family::V6,
            Mode::Auto => choose(&data.public, &node.public)?,
        };
        let public = data.public.get(family)?;
        // What is sent to an address of the network comes back into the tunnel.
        let inside = self.tunnels.iter().flat_map(|tunnel| &tunnel.networks).any(|net| net.contains(&public));
        let port = match self.config.mode {
            Mode::Separate => data.port,
            // Go flannel announces a second port for IPv6 in these modes too, and nothing listens there.
            _ => data.main_port,
        };
        let reached = !inside && tunnel.outer.contains(&family);
        reached.then(|| SocketAddr::new(public, port.unwrap_or(tunnel.port)))
    }
}

impl WireguardTunnel {
    fn carries(&self, family: Family) -> bool {
        self.networks.iter().any(|network| Family::of(network.addr()) == family)
    }
}

/// Between addresses of which family two nodes speak (contract §5.4): by IPv4 unless the peer's IPv4 address is
/// private and both have global IPv6 ones.
fn choose(peer: &PublicAddrs, own: &PublicAddrs) -> Option<Family> {
    let global_v6 = |addrs: &PublicAddrs| addrs.v6.is_some_and(|v6| v6.segments()[0] & 0xe000 == 0x2000);
    match (peer.v4, peer.v6) {
        (None, None) => None,
        (Some(_), None) => Some(Family::V4),
        (None, Some(_)) => Some(Family::V6),
        (Some(v4), Some(_)) if is_public(v4.into()) => Some(Family::V4),
        _ if global_v6(peer) && global_v6(own) => Some(Family::V6),
        _ => Some(Family::V4),
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let shared = a == 100 && b & 0xc0 == 64;
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || shared
                || a == 0)
        }
        IpAddr::V6(_) => false,
    }
}

/// What a node does about each pod subnet by WireGuard, in some state of its kernel: where it is sent, by key.
pub(crate) fn known(state: &KernelState) -> BTreeMap<IpNet, WireguardPeer> {
    let peer = |key: PublicKey, endpoint: SocketAddr| {
        let public: PublicAddrs = [endpoint.ip()].into_iter().collect();
        let port = Some(endpoint.port());
        WireguardPeer { key, port, main_port: port, public, opening: Opening::Either }
    };
    let settings = state.forwarding.values().filter_map(|forwarding| forwarding.wireguard.as_ref());
    let here = settings.flat_map(|settings| &settings.peers).flat_map(|known| {
        let data = peer(known.key, known.endpoint);
        known.allowed.iter().map(move |net| (*net, data))
    });
    let kernel = state.wireguard.values().flat_map(|device| &device.peers).flat_map(|(key, known)| {
        let data = peer(*key, known.endpoint);
        known.allowed.iter().map(move |net| (*net, data))
    });
    here.chain(kernel).collect()
}

impl Backend for Wireguard {
    fn words(&self) -> String {
        // The devices stay when other keys of the configuration change: ports, secret and mode are set in place.
        "wireguard".into()
    }

    fn attachment(&self, _macs: &Macs) -> Attachment {
        Attachment::of_wireguard(self.data(Family::V4), self.data(Family::V6))
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        matches!(attachment, Attachment::Wireguard(_))
    }

    fn previous_mac(&self, before: &KernelState, subnet: IpNet) -> Option<Mac> {
        let tunnel = self.tunnel(Family::of(subnet.addr()))?;
        let settings = before.forwarding.get(&tunnel.name).and_then(|it| it.wireguard.as_ref());
        let mut here = settings.iter().flat_map(|settings| &settings.peers);
        let kernel = before.wireguard.get(&tunnel.name);
        let mut of_kernel = kernel.iter().flat_map(|device| device.peers.values());
        let known = here.any(|peer| peer.allowed.contains(&subnet))
            || of_kernel.any(|peer| peer.allowed.contains(&subnet));
        known.then_some(Mac([0; 6]))
    }

    fn tunnel_port(&self, family: Family) -> Option<TunnelPort> {
        let number = self.tunnel(family)?.port;
        // The tunnel itself refuses senders without a key, and peers may have other addresses than they announce.
        Some(TunnelPort { number, vnis: Default::default(), check_sources: false })
    }

    fn mtu(&self, underlay: u32) -> u32 {
        self.config.mtu.unwrap_or(underlay).min(underlay).saturating_sub(OVERHEAD)
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        let of = |tunnel: &WireguardTunnel| {
            let name = tunnel.name;
            tunnel.networks.iter().map(|net| (Family::of(net.addr()), name)).collect::<Vec<_>>()
        };
        self.tunnels.iter().flat_map(of).collect()
    }

    fn identity(&self) -> Option<PublicKey> {
        Some(*self.identity.public())
    }

    fn check(&self, node: &Node) -> Result<(), BackendError> {
        let Underlay { name, mtu, .. } = node.underlay;
        for tunnel in &self.tunnels {
            if let Some(family) = tunnel.outer.iter().find(|family| node.source.get(**family).is_none()) {
                return Err(BackendError(format!(
                    "wireguard needs an {family} address and {name} has none: choose another interface with --iface"
                )));
            }
            let room = self.mtu(mtu);
            if tunnel.carries(Family::V6) && room < MIN_MTU_V6 {
                return Err(BackendError(format!(
                    "IPv6 needs an MTU of {MIN_MTU_V6} bytes and wireguard leaves {room} of the {mtu} of {name}: raise \
                     that to {} (and Backend.MTU), or set EnableIPv6 to false",
                    MIN_MTU_V6 + OVERHEAD
                )));
            }
        }
        Ok(())
    }

    fn stands_in(&self) -> Option<&'static str> {
        (self.in_process && self.config.engine == Engine::Auto).then_some(
            "wireguard is encrypted by flanneld, since the kernel has no WireGuard: this takes more CPU, and a restart of \
             flanneld interrupts traffic for a moment; to use the kernel's, load its module (modprobe wireguard) and restart \
             flanneld; to keep it so without this note, set Backend.Userspace to \"always\"",
        )
    }

    fn in_process(&self) -> Option<Arc<dyn Backend>> {
        let may = !self.in_process && self.config.engine == Engine::Auto;
        may.then(|| Arc::new(Self { in_process: true, ..self.clone() }) as Arc<dyn Backend>)
    }

    fn plan(&self, input: PlanInput<'_>) -> KernelState {
        let PlanInput { node, own, all, .. } = input;
        let mut state = KernelState::default();
        for tunnel in &self.tunnels {
            let dev = tunnel.name;
            let local: PublicAddrs =
                tunnel.outer.iter().filter_map(|family| node.source.get(*family)).collect();
            if local == PublicAddrs::default() {
                continue;
            }
            let mut addresses = Vec::new();
            for network in &tunnel.networks {
                let Some(subnet) = own.get(Family::of(network.addr())) else { continue };
                addresses.push(subnet.network());
                state.addresses.insert((dev, host(subnet.network())));
                // The whole network: the tunnel knows which peer has which address. Peers that are reached in another
                // way have routes of their own, which are better.
                state.routes.insert(*network, Route { dev: Some(dev), ..Route::ours(*network) });
            }
            let mtu = self.mtu(node.underlay.mtu);
            let settings = self.settings(tunnel, node, all);
            if !self.in_process {
                let link = LinkSettings { accept_local: None, ..LinkSettings::plain(mtu) };
                state.links.insert(dev, Link { identity: LinkIdentity::Wireguard, settings: link });
                state.wireguard.insert(dev, Arc::new(WireguardDevice::of(&settings, tunnel.port)));
                continue;
            }
            state.links.insert(dev, Link { identity: LinkIdentity::Tun, settings: LinkSettings::plain(mtu) });
            let forwarding = Forwarding {
                local,
                port: tunnel.port,
                addresses: addresses.into_iter().collect(),
                mtu: mtu.try_into().unwrap_or(u16::MAX),
                check_sources: true,
                workers: self.config.workers,
                peers: Vec::new(),
                wireguard: Some(Arc::new(settings)),
            };
            state.forwarding.insert(dev, Arc::new(forwarding));
        }
        state
    }
}

#[cfg(test)]
mod tests;
