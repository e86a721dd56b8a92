//! A backend: from leases to the kernel state that this node should have; pure.
//!
//! A new backend is one file with a `plan` and an arm in [`select`].

use ipnet::IpNet;
use subnet::{Attachment, BackendConfig, Family, Mac, NetworkConfig, PublicAddrs};

use crate::host_gw::HostGw;
use crate::name::Name;
use crate::peers::Peer;
use crate::state::KernelState;
use crate::udp::Udp;
use crate::vxlan::Vxlan;

/// This node's place in the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The external interface.
    pub underlay: Underlay,
    /// The addresses that peers send to.
    pub public: PublicAddrs,
    /// The addresses of the external interface; different from `public` behind address translation.
    pub local: PublicAddrs,
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

/// A way for packets from node to node.
pub trait Backend: Send + Sync {
    /// What this node announces to its peers.
    fn attachment(&self, mac: Mac) -> Attachment;

    /// MTU of pods in bytes on an underlay of this MTU (contract §4).
    fn mtu(&self, underlay: u32) -> u32;

    /// The tunnel device whose MAC identifies this node, if the backend has one.
    fn device(&self) -> Option<Name>;

    /// The numbers that tell this network from another on the same host; part of a derived MAC.
    fn seed(&self) -> u32 {
        0
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

    /// The kernel state that reaches every peer.
    fn plan(&self, node: &Node, own: &subnet::Subnets, mac: Mac, peers: &[Peer]) -> KernelState;
}

/// The backend that the configuration asks for.
///
/// # Errors
/// [`BackendError`] naming what is not available in this release and what is.
pub fn select(network: &NetworkConfig) -> Result<Box<dyn Backend>, BackendError> {
    if network.range(Family::V6).is_some() {
        return Err(BackendError(
            "EnableIPv6: true is not available in this release, which carries IPv4 only: set EnableIPv6 to false".into(),
        ));
    }
    match &network.backend {
        BackendConfig::Vxlan(config) if config.direct_routing => Err(BackendError(
            "Backend.DirectRouting: true is not available in this release: leave it out; every peer is then reached \
             through VXLAN, which works between nodes with and without DirectRouting"
                .into(),
        )),
        BackendConfig::Vxlan(config) => Ok(Box::new(Vxlan::new(config.clone())?)),
        BackendConfig::HostGw => Ok(Box::new(HostGw)),
        BackendConfig::Udp { port, check_sources } => match network.range(Family::V4).map(|range| range.network) {
            Some(IpNet::V4(range)) => Ok(Box::new(Udp::new(*port, *check_sources, range)?)),
            _ => Err(BackendError("Backend.Type: \"udp\" carries IPv4 only: set Network and EnableIPv4".into())),
        },
        BackendConfig::Unknown(name) => Err(BackendError(match name.as_str() {
            "wireguard" | "ipip" | "ipsec" | "alloc" | "extension" | "tencent-vpc" => format!(
                "Backend.Type: {name:?} is a backend of Go flannel that this release doesn't have: use \"vxlan\", \"host-gw\" or \"udp\""
            ),
            _ => format!("Backend.Type: {name:?} is no backend: use \"vxlan\", \"host-gw\" or \"udp\""),
        })),
    }
}

/// The MAC of a tunnel device: that of the living device, else the one that our lease announces, else one
/// that follows from what makes this node's place in this network unique, so that it is the same again
/// after a reboot. Never from the machine alone: containers and cloned disks share that.
pub fn choose_mac(
    living: Option<Mac>,
    announced: Option<Mac>,
    seed: u32,
    node: &str,
    public: &PublicAddrs,
) -> Mac {
    living.or(announced).filter(|mac| mac.is_unicast()).unwrap_or_else(|| {
        Mac::derived(&[&seed.to_be_bytes(), node.as_bytes(), public.to_string().as_bytes()])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: &str) -> String {
        let network = NetworkConfig::parse(&format!(r#"{{"Network":"10.1.0.0/16",{config}}}"#)).unwrap();
        select(&network).err().unwrap().to_string()
    }

    #[test]
    fn what_this_release_lacks_is_refused_by_name() {
        for (config, part) in [
            (r#""Backend":{"Type":"wireguard"}"#, "\"wireguard\" is a backend of Go flannel"),
            (r#""Backend":{"Type":"vxlann"}"#, "\"vxlann\" is no backend"),
            (r#""Backend":{"Type":"vxlan","DirectRouting":true}"#, "DirectRouting"),
            (r#""EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}"#, "EnableIPv6"),
        ] {
            let text = refused(config);
            assert!(
                text.contains(part)
                    && (text.contains("host-gw") || text.contains("leave it out") || text.contains("false")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_living_device_keeps_its_mac_and_a_new_one_is_the_same_after_a_reboot() {
        let (living, announced) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
        let public = PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
        assert_eq!(choose_mac(Some(living), Some(announced), 1, "a", &public), living);
        assert_eq!(choose_mac(None, Some(announced), 1, "a", &public), announced);
        let derived = choose_mac(None, None, 1, "a", &public);
        assert_eq!(derived, choose_mac(None, None, 1, "a", &public));
        let other = PublicAddrs { v4: Some("192.0.2.2".parse().unwrap()), v6: None };
        assert_ne!(derived, choose_mac(None, None, 1, "a", &other));
        assert_ne!(derived, choose_mac(None, None, 2, "a", &public));
        assert_ne!(derived, choose_mac(None, None, 1, "b", &public));
    }
}
