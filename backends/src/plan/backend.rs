//! A backend: from leases to the kernel state that this node should have; pure.
//!
//! A new backend is one file beside this one, and an arm in `select`.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::wireguard::PublicKey;
use subnet::{Attachment, Family, Mac, PublicAddrs, Subnets};

use crate::state::KernelState;
pub use crate::state::host::Direct;
use crate::state::name::Name;
use crate::state::tunnel::{IpipTunnel, TunnelPort};
use crate::wg::Opening;

/// The least MTU of a device that carries IPv6, in bytes (RFC 8200 §5); below it the kernel takes IPv6 off.
pub(crate) const MIN_MTU_V6: u32 = 1280;

/// This node's place in the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The external interface.
    pub underlay: Underlay,
    /// The addresses that peers send to.
    pub public: PublicAddrs,
    /// The addresses of the external interface; different from `public` behind address translation.
    pub local: PublicAddrs,
    /// The addresses that tunnels send from: those of `public` that this host has, and `local` for others.
    pub source: PublicAddrs,
    /// The peers on this node's own links that answer there, by public address; empty where it isn't asked.
    pub direct: Direct,
}

/// The device that carries packets between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The kernel's number for the device.
    pub index: u32,
    /// Its name.
    pub name: Name,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// The configuration can't be carried out on this node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// The MAC of this node's tunnel device of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Macs {
    v4: Option<Mac>,
    v6: Option<Mac>,
}

impl Macs {
    /// That of one family.
    pub fn get(&self, family: Family) -> Option<Mac> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// Sets that of one family.
    pub fn set(&mut self, family: Family, mac: Mac) {
        match family {
            Family::V4 => self.v4 = Some(mac),
            Family::V6 => self.v6 = Some(mac),
        }
    }
}

/// One family of a peer that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its pod subnet.
    pub subnet: IpNet,
    /// Where to send packets for it.
    pub public: IpAddr,
    /// The MAC of its VXLAN tunnel endpoint; zero for other backends.
    pub mac: Mac,
    /// What WireGuard needs, if it announces or announced it.
    pub wireguard: Option<WireguardPeer>,
    /// Which of this node's backends leads to it.
    pub backend: BackendId,
}

/// How WireGuard reaches a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireguardPeer {
    /// Its public key.
    pub key: PublicKey,
    /// The port that it announces for packets of this family; `None`: that of this node.
    pub port: Option<u16>,
    /// The port that it announces for IPv4, or for IPv6 alone.
    pub main_port: Option<u16>,
    /// All its public addresses.
    pub public: PublicAddrs,
    /// Who begins the first handshake.
    pub opening: Opening,
}

/// Names one of the backends that a node has at a time, for as long as it has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendId(pub(super) u8);

/// What a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// This node's place in the underlay.
    pub node: &'a Node,
    /// Its pod subnets.
    pub own: &'a Subnets,
    /// Its tunnel devices' MACs.
    pub macs: &'a Macs,
    /// The peers to reach by the backend that makes the plan.
    pub peers: &'a [Peer],
    /// All peers: any of them may send by a way that this node has announced.
    pub all: &'a [Peer],
}

/// A way for packets from node to node.
pub trait Backend: Send + Sync {
    /// What distinguishes its devices from another one's: of two with the same words, one takes the
    /// other's place without any object being recreated.
    fn words(&self) -> String;

    /// What this node announces to its peers.
    fn attachment(&self, macs: &Macs) -> Attachment;

    /// Whether it leads to peers that announce this.
    fn reaches(&self, attachment: &Attachment) -> bool;

    /// Whether it leads there if no other way does: Go flannel doesn't compare VNIs, for example.
    fn compatible_with(&self, _attachment: &Attachment) -> bool {
        false
    }

    /// Whether it led to `subnet` in this state of the kernel, and to which MAC: good for a peer that has
    /// moved on to something that this node doesn't know yet, and accepts what it accepted.
    fn previous_mac(&self, before: &KernelState, subnet: IpNet) -> Option<Mac>;

    /// The same with devices of other names, to make room for a backend that needs these; `None` if that is
    /// never so.
    fn on_spare_devices(&self) -> Option<Arc<dyn Backend>> {
        None
    }

    /// VNI and UDP port of its tunnel endpoints, if it has such.
    fn vtep(&self) -> Option<(u32, u16)> {
        None
    }

    /// The port at which its tunnel for packets of this family listens, if it has one.
    fn tunnel_port(&self, _family: Family) -> Option<TunnelPort> {
        None
    }

    /// This node's public key, if peers know it by such.
    fn identity(&self) -> Option<PublicKey> {
        None
    }

    /// Why this backend does its work in the process, if the configuration would rather have the kernel do it.
    fn stands_in(&self) -> Option<&'static str> {
        None
    }

    /// The same without the kernel's part, where that is allowed and this has one.
    fn in_process(&self) -> Option<Arc<dyn Backend>> {
        None
    }

    /// The device at which its IP-in-IP packets arrive, if it has one.
    fn ipip_tunnel(&self) -> Option<IpipTunnel> {
        None
    }

    /// MTU of pods in bytes on an underlay of this MTU (contract §4).
    fn mtu(&self, underlay: u32) -> u32;

    /// The tunnel devices whose MACs identify this node, if the backend has such.
    fn devices(&self) -> Vec<(Family, Name)>;

    /// Whether it wants to know which peers are on this node's own links ([`Node::direct`]).
    fn asks_for_direct(&self) -> bool {
        false
    }

    /// Whether this node can take part at all.
    ///
    /// # Errors
    /// [`BackendError`] naming what stands in the way and the remedy.
    fn check(&self, node: &Node) -> Result<(), BackendError>;

    /// Something in the configuration that this node can't follow to the letter, for the log.
    fn remark(&self, _node: &Node) -> Option<String> {
        None
    }

    /// The kernel state that reaches the peers.
    fn plan(&self, input: PlanInput<'_>) -> KernelState;

    /// Whether a plan is one entry or more of `fdb`, `neighbours` and `routes` for each peer, which depend on that peer alone, and
    /// else nothing that depends on peers.
    fn plans_peers_apart(&self) -> bool {
        false
    }
}

/// The MAC of a tunnel device: the first that this node has already and that no peer announces, or else a
/// new one. It is never made from what others can know: a host that knows it can send frames to this node's pods.
pub fn choose_mac(known: impl IntoIterator<Item = Mac>, foreign: impl Fn(Mac) -> bool, new: Mac) -> Mac {
    known.into_iter().find(|mac| mac.is_unicast() && !foreign(*mac)).unwrap_or(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_that_the_node_has_is_kept_unless_another_announces_it() {
        let [living, announced, group, new] = [2, 6, 1, 10].map(|first| Mac([first, 0, 0, 0, 0, 1]));
        let nobody = |_| false;
        assert_eq!(choose_mac([living, announced], nobody, new), living);
        assert_eq!(choose_mac([group, announced], nobody, new), announced);
        assert_eq!(choose_mac([living, announced], |mac| mac == living, new), announced);
        assert_eq!(choose_mac([living], |mac| mac == living, new), new);
        assert_eq!(choose_mac([], nobody, new), new);
    }
}
