//! Whom to probe, from what the agent plans; pure.

use std::net::IpAddr;
use std::sync::Arc;

use backends::{ActiveBackends, KernelState, Peer};
use ipnet::IpNet;
use subnet::env_file::gateway;

/// The peers of this node at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Targets(pub(crate) Vec<Target>);

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
    /// The peers that `plan` leads to by `ways`, with `mtu` for pods.
    pub(crate) fn of(peers: &[Peer], active: &ActiveBackends, plan: &KernelState, mtu: u32) -> Self {
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        let mut words: Vec<(backends::BackendId, bool, Arc<str>)> = Vec::new();
        let mut target = |peer: &Peer| {
            let backend = active.backend(peer.backend);
            let direct = plan.routes.get(&peer.subnet).is_some_and(|route| route.via == Some(peer.public));
            let has_tunnel = backend.is_some_and(|backend| !backend.devices().is_empty());
            let tunnel = has_tunnel && !direct;
            let inner = match tunnel {
                true => Inner::Tunnel(peer.subnet.network()),
                false => Inner::Bridge(gateway(peer.subnet)),
            };
            let known = words.iter().find(|(id, of_tunnel, _)| (*id, *of_tunnel) == (peer.backend, tunnel));
            let way = known.map(|(.., words)| Arc::clone(words)).unwrap_or_else(|| {
                let text = backend.map_or_else(String::new, |backend| backend.words());
                let text: Arc<str> =
                    if has_tunnel && direct { format!("{text}, direct route") } else { text }.into();
                words.push((peer.backend, tunnel, Arc::clone(&text)));
                text
            });
            Target { subnet: peer.subnet, underlay: peer.public, inner, mtu, way }
        };
        Self(peers.iter().map(&mut target).collect())
    }
}
