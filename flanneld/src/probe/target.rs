//! Whom to probe, from what the agent plans; pure.

use std::net::IpAddr;
use std::sync::Arc;

use backends::echo::MIN_PACKET;
use backends::state::Route;
use backends::{ActiveBackends, BackendId, Peer};
use ipnet::IpNet;
use subnet::SharedMap;
use subnet::env_file::gateway;

use super::pending::Purpose;

/// The peers of this node at one moment, as they are planned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Targets {
    peers: SharedMap<IpNet, Peer>,
    /// Those to a peer's public address need no tunnel.
    routes: SharedMap<IpNet, Route>,
    ways: Vec<ProbedBackend>,
    /// The MTU of pods, in bytes.
    mtu: u16,
}

/// A backend in use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ProbedBackend {
    id: BackendId,
    /// It has a device of its own.
    tunnels: bool,
    words: Arc<str>,
    /// In words where its device is not needed.
    direct: Arc<str>,
}

/// One family of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its pod subnet.
    pub(crate) subnet: IpNet,
    /// Its public address.
    pub(crate) underlay: IpAddr,
    /// Its address for packets that go the pods' way.
    pub(crate) inner: Inner,
    /// The MTU of pods, in bytes.
    pub(crate) mtu: u16,
    /// The backend that leads to it, in words.
    pub(crate) way: Arc<str>,
}

impl Target {
    /// Whether probes to it go the ways of `other`.
    pub(super) fn has_paths_of(&self, other: &Self) -> bool {
        (self.underlay, self.inner) == (other.underlay, other.inner)
    }

    /// The address and the length of a probe.
    pub(super) fn packet(&self, purpose: Purpose) -> (IpAddr, u16) {
        let main = match self.inner {
            Inner::Tunnel(addr) => addr,
            Inner::Bridge(_) => self.underlay,
        };
        match purpose {
            Purpose::Underlay => (self.underlay, MIN_PACKET),
            Purpose::Inner => (self.inner.addr(), MIN_PACKET),
            Purpose::Large(size) => (main, size),
        }
    }
}

/// The address of a peer inside the pod network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inner {
    /// That of its tunnel device, which is always there.
    Tunnel(IpAddr),
    /// That of its bridge, which is there once it has had a pod: there is no tunnel on this way.
    Bridge(IpAddr),
}

impl Inner {
    pub(crate) fn addr(self) -> IpAddr {
        match self {
            Self::Tunnel(addr) | Self::Bridge(addr) => addr,
        }
    }
}

impl Targets {
    /// The peers to which `routes` lead by the backends in use, with `mtu` for pods. Costs nothing for each of them.
    pub(crate) fn of(
        peers: &SharedMap<IpNet, Peer>,
        active: &ActiveBackends,
        routes: &SharedMap<IpNet, Route>,
        mtu: u32,
    ) -> Self {
        let way = |(id, words): (BackendId, String)| ProbedBackend {
            id,
            tunnels: active.backend(id).is_some_and(|backend| !backend.devices().is_empty()),
            direct: format!("{words}, direct route").into(),
            words: words.into(),
        };
        Self {
            peers: peers.clone(),
            routes: routes.clone(),
            ways: active.named().into_iter().map(way).collect(),
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        }
    }

    /// How a peer is probed.
    pub(super) fn get(&self, subnet: &IpNet) -> Option<Target> {
        let peer = self.peers.get(subnet)?;
        let way = self.ways.iter().find(|way| way.id == peer.backend)?;
        let direct = self.routes.get(subnet).is_some_and(|route| route.via == Some(peer.public));
        let (inner, words) = match (way.tunnels, direct) {
            (true, false) => (Inner::Tunnel(subnet.network()), &way.words),
            (true, true) => (Inner::Bridge(gateway(*subnet)), &way.direct),
            (false, _) => (Inner::Bridge(gateway(*subnet)), &way.words),
        };
        let (underlay, way) = (peer.public, Arc::clone(words));
        Some(Target { subnet: *subnet, underlay, inner, mtu: self.mtu, way })
    }

    /// The subnets of peers that may be probed in another way than `before`.
    pub(super) fn changes(&self, before: &Self) -> Vec<IpNet> {
        let mut changed: Vec<IpNet> = if self.mtu == before.mtu && self.ways == before.ways {
            let peers = self.peers.changes(&before.peers).map(|(subnet, ..)| *subnet);
            peers.chain(self.routes.changes(&before.routes).map(|(subnet, ..)| *subnet)).collect()
        } else {
            self.peers.keys().chain(before.peers.keys()).copied().collect()
        };
        changed.sort_unstable();
        changed.dedup();
        changed
    }
}

#[cfg(test)]
impl Targets {
    /// Peers by one way, which tunnels or not.
    pub(super) fn by(tunnels: bool, mtu: u16, peers: impl IntoIterator<Item = (IpNet, IpAddr)>) -> Self {
        let id = BackendId::default();
        let peer = |(subnet, public): (IpNet, IpAddr)| {
            (subnet, Peer { subnet, public, mac: subnet::Mac([0; 6]), wireguard: None, backend: id })
        };
        let words: Arc<str> = if tunnels { "vxlan VNI 1 port 8472" } else { "host-gw" }.into();
        let way = ProbedBackend { id, tunnels, direct: Arc::clone(&words), words };
        Self {
            peers: peers.into_iter().map(peer).collect(),
            routes: SharedMap::default(),
            ways: vec![way],
            mtu,
        }
    }
}
