//! What the host's own network looks like: the facts from which the external interface is chosen.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::env_file::gateway;
use subnet::{Family, Mac, Subnets};

use crate::state::name::Name;
use crate::state::nexthop::NexthopSupport;
use crate::state::route::Route;

/// The links, addresses and default routes of the network namespace at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostView {
    /// All links by index.
    pub links: BTreeMap<u32, HostLink>,
    /// The default routes of the main table, in the kernel's order: best first within a family.
    pub defaults: Vec<DefaultRoute>,
    /// Other programs' routes into the pod networks ([`Scope::intrudes`](crate::Scope::intrudes)).
    pub intruders: Vec<Route>,
    /// Whether routes can lead through nexthop objects.
    pub nexthops: NexthopSupport,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLink {
    /// The kernel's number for the device.
    pub index: u32,
    /// Its name.
    pub name: Name,
    /// Further names (`ip link property add altname`), which may be longer.
    pub altnames: Vec<String>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is set up (`IFF_UP`), with or without carrier.
    pub up: bool,
    /// Whether it has a carrier (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// Whether it is a bridge.
    pub bridge: bool,
    /// Index of the bridge (or other controller) that it is a port of.
    pub controller: Option<u32>,
    /// Its hardware address; zero for a device without one.
    pub mac: Mac,
    /// Its addresses, in the kernel's order.
    pub addresses: Vec<HostAddr>,
}

/// An address of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddr {
    /// The address with its prefix length.
    pub net: IpNet,
    /// Not to be used for new connections (`IFA_F_DEPRECATED`).
    pub deprecated: bool,
    /// Configured without a lifetime (`IFA_F_PERMANENT`).
    pub permanent: bool,
    /// A privacy address (`IFA_F_TEMPORARY`, IPv6) or a secondary one (IPv4 uses the same bit).
    pub temporary: bool,
}

/// A default route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Its family.
    pub family: Family,
    /// The link that packets leave by; `None` when it has several next hops.
    pub link: Option<u32>,
    /// Its metric; lower is better.
    pub metric: u32,
    /// The router, if there is one and only one.
    pub gateway: Option<IpAddr>,
}

/// The kernel's answer to "which way to this address?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedRoute {
    /// Index of the link that packets leave by.
    pub link: u32,
    /// The source address that they get.
    pub source: Option<IpAddr>,
    /// The router that they are given to, if there is one.
    pub gateway: Option<IpAddr>,
}

/// Public addresses of peers that are reached without a router, and the device behind which they are.
pub type Direct = Arc<BTreeMap<IpAddr, Name>>;

/// A bridge that serves a subnet which this node doesn't hold any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleBridge {
    /// Its name.
    pub name: Name,
    /// The gateway address of the other subnet.
    pub net: IpNet,
    /// How many devices hang on it.
    pub ports: usize,
}

impl HostView {
    /// The bridges that carry the gateway address of a subnet which is not among `own` and of which
    /// `recorded` says that this node held it, or that a peer does: what the bridge plugin leaves when a
    /// node gets another subnet, and then refuses to add pods to.
    pub fn stale_bridges(&self, own: Subnets, recorded: impl Fn(IpNet) -> bool) -> Vec<StaleBridge> {
        let stale = |net: &IpNet| {
            let subnet = net.trunc();
            net.addr() == gateway(subnet)
                && own.get(Family::of(net.addr())) != Some(subnet)
                && recorded(subnet)
        };
        let mut found = Vec::new();
        for link in self.links.values().filter(|link| link.bridge) {
            let ports = self.links.values().filter(|port| port.controller == Some(link.index)).count();
            let nets = link.addresses.iter().map(|address| address.net).filter(stale);
            found.extend(nets.map(|net| StaleBridge { name: link.name, net, ports }));
        }
        found
    }

    /// The bridge that pods of these subnets hang on: the one with a gateway's address.
    pub fn serving_bridge(&self, subnets: &[IpNet]) -> Option<&HostLink> {
        let serves = |net: &IpNet| subnets.iter().any(|subnet| net.addr() == gateway(*subnet));
        let mut bridges = self.links.values().filter(|link| link.bridge);
        bridges.find(|link| link.addresses.iter().any(|address| serves(&address.net)))
    }

    /// Takes an address out of the view, after it was removed.
    pub fn forget_address(&mut self, name: &Name, net: IpNet) {
        for link in self.links.values_mut().filter(|link| link.name == *name) {
            link.addresses.retain(|address| address.net != net);
        }
    }

    /// The link of this name, which may be one of its further names: the kernel gives no name twice.
    pub fn link(&self, name: &str) -> Option<&HostLink> {
        let names =
            |link: &&HostLink| link.name.as_str() == name || link.altnames.iter().any(|one| one == name);
        self.links.values().find(names)
    }
}
