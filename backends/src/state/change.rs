//! Changes to the kernel, and what each makes of a state.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::Mac;

use super::KernelState;
use super::forwarding::Forwarding;
use super::link::{IpipIdentity, Link, LinkIdentity, LinkPatch, LinkSettings, VxlanIdentity};
use super::name::Name;
use super::nexthop::NexthopId;
use super::route::{BLACKHOLE_METRIC, Route};
use super::wireguard::WireguardPeers;
use crate::wg::identity::Identity;

/// One change to the kernel. A value, so that it can be logged, counted, compared and dry-run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelChange {
    /// Removes a device with all that hangs on it.
    DelLink(Name),
    /// Gives a device another name, with all that hangs on it.
    RenameLink(Name, Name),
    /// Makes a device. A TUN device that no process holds is taken over.
    AddLink(Name, Link),
    /// Corrects the settings of a device: only those that differ, since setting a MAC to the same value
    /// flushes the device's neighbours.
    SetLink(Name, LinkPatch),
    /// Starts the datapath of a TUN device, or changes what it does.
    SetForwarding(Name, Arc<Forwarding>),
    /// Stops the datapath of a TUN device.
    DelForwarding(Name),
    /// Sets key and port of a WireGuard device of the kernel; its peers stay.
    SetWireguard(Name, u16, Arc<Identity>),
    /// Sets and removes peers of such a device.
    SetWireguardPeers(Name, Arc<WireguardPeers>),
    /// Adds an address.
    AddAddress(Name, IpNet),
    /// Removes an address.
    DelAddress(Name, IpNet),
    /// Adds or redirects a forwarding entry.
    SetFdb(Name, Mac, IpAddr),
    /// Removes a forwarding entry.
    DelFdb(Name, Mac),
    /// Adds or corrects a permanent neighbour.
    SetNeighbour(Name, IpAddr, Mac),
    /// Removes a neighbour.
    DelNeighbour(Name, IpAddr),
    /// Adds a route, or replaces the one to the same destination; before that, its nexthop object.
    SetRoute(Route),
    /// Removes exactly this route.
    DelRoute(Route),
    /// Removes a nexthop object that no route of ours leads through any more.
    DelNexthop(NexthopId),
    /// Adds a blackhole route.
    AddBlackhole(IpNet),
    /// Removes a blackhole route.
    DelBlackhole(IpNet),
}

impl KernelChange {
    /// The kind of object, for counting.
    pub fn object(&self) -> &'static str {
        match self {
            Self::DelLink(..) | Self::RenameLink(..) | Self::AddLink(..) | Self::SetLink(..) => "link",
            Self::SetForwarding(..) | Self::DelForwarding(..) => "forwarding",
            Self::SetWireguard(..) | Self::SetWireguardPeers(..) => "wireguard",
            Self::AddAddress(..) | Self::DelAddress(..) => "address",
            Self::SetFdb(..) | Self::DelFdb(..) => "fdb",
            Self::SetNeighbour(..) | Self::DelNeighbour(..) => "neighbour",
            Self::SetRoute(..) | Self::DelRoute(..) => "route",
            Self::DelNexthop(..) => "nexthop",
            Self::AddBlackhole(..) | Self::DelBlackhole(..) => "blackhole",
        }
    }

    /// What is done to the object, for counting: `add`, `set` or `delete`.
    pub fn action(&self) -> &'static str {
        match self {
            Self::AddLink(..) | Self::AddAddress(..) | Self::AddBlackhole(..) => "add",
            _ if self.is_removal() => "delete",
            _ => "set",
        }
    }

    /// Whether something goes away.
    pub(crate) fn is_removal(&self) -> bool {
        matches!(
            self,
            Self::DelLink(..)
                | Self::DelForwarding(..)
                | Self::DelAddress(..)
                | Self::DelFdb(..)
                | Self::DelNeighbour(..)
                | Self::DelRoute(..)
                | Self::DelNexthop(..)
                | Self::DelBlackhole(..)
        )
    }

    /// The device that it names.
    pub(crate) fn device(&self) -> Option<Name> {
        match self {
            Self::DelLink(name)
            | Self::RenameLink(name, _)
            | Self::AddLink(name, _)
            | Self::SetLink(name, _)
            | Self::SetForwarding(name, _)
            | Self::DelForwarding(name)
            | Self::SetWireguard(name, ..)
            | Self::SetWireguardPeers(name, _)
            | Self::AddAddress(name, _)
            | Self::DelAddress(name, _)
            | Self::SetFdb(name, ..)
            | Self::DelFdb(name, _)
            | Self::SetNeighbour(name, ..)
            | Self::DelNeighbour(name, _) => Some(*name),
            Self::SetRoute(route) | Self::DelRoute(route) => route.dev,
            Self::DelNexthop(_) | Self::AddBlackhole(_) | Self::DelBlackhole(_) => None,
        }
    }
}

impl KernelState {
    /// Makes one change to the value, without the side effects that a kernel has.
    pub(crate) fn apply(&mut self, change: &KernelChange) {
        match change {
            KernelChange::DelLink(name) => self.drop_link(name),
            KernelChange::RenameLink(from, to) => self.rename_link(*from, *to),
            KernelChange::AddLink(name, link) => {
                self.drop_link(name);
                self.links.insert(*name, link.clone());
            }
            KernelChange::SetLink(name, patch) => {
                if let Some(link) = self.links.get_mut(name) {
                    link.settings.patch(patch);
                }
            }
            KernelChange::SetForwarding(name, forwarding) => {
                self.forwarding.insert(*name, Arc::clone(forwarding));
            }
            KernelChange::DelForwarding(name) => {
                self.forwarding.remove(name);
            }
            KernelChange::SetWireguard(name, port, identity) => self.set_wireguard(*name, *port, identity),
            KernelChange::SetWireguardPeers(name, peers) => self.set_wireguard_peers(*name, peers),
            KernelChange::AddAddress(name, net) => {
                self.addresses.insert((*name, *net));
            }
            KernelChange::DelAddress(name, net) => {
                self.addresses.remove(&(*name, *net));
            }
            KernelChange::SetFdb(name, mac, dst) => {
                self.fdb.insert((*name, *mac), *dst);
            }
            KernelChange::DelFdb(name, mac) => {
                self.fdb.remove(&(*name, *mac));
            }
            KernelChange::SetNeighbour(name, ip, mac) => {
                self.neighbours.insert((*name, *ip), *mac);
            }
            KernelChange::DelNeighbour(name, ip) => {
                self.neighbours.remove(&(*name, *ip));
            }
            KernelChange::SetRoute(route) => self.set_route(*route),
            KernelChange::DelRoute(route) => self.del_route(route),
            KernelChange::DelNexthop(id) => self.del_nexthop(*id),
            KernelChange::AddBlackhole(dst) => {
                self.blackholes.insert(*dst);
            }
            KernelChange::DelBlackhole(dst) => {
                self.blackholes.remove(dst);
            }
        }
    }

    /// Sets a route and, like the kernel, what others through the same object lead to.
    fn set_route(&mut self, route: Route) {
        if let Some(id) = route.nexthop {
            self.orphaned_nexthops.remove(&id);
            let (mut same, others) = std::mem::take(&mut self.shadowed_routes)
                .into_iter()
                .partition::<BTreeSet<Route>, _>(|other| other.nexthop == Some(id));
            let Route { via, dev, onlink, .. } = route;
            same = same.into_iter().map(|other| Route { via, dev, onlink, ..other }).collect();
            self.shadowed_routes = others;
            self.shadowed_routes.append(&mut same);
        }
        if let Some(before) = self.routes.insert(route.dst, route) {
            self.note_orphan(&before);
        }
    }

    fn del_route(&mut self, route: &Route) {
        if !self.shadowed_routes.remove(route) && self.routes.get(&route.dst) == Some(route) {
            self.routes.remove(&route.dst);
        }
        self.note_orphan(route);
    }

    /// The object of a route that is gone stays, and may lead nowhere now. Only routes to one destination share one.
    fn note_orphan(&mut self, gone: &Route) {
        let Some(id) = gone.nexthop.filter(|_| !gone.foreign) else { return };
        let uses = |route: &Route| route.nexthop == Some(id);
        if !self.routes.get(&gone.dst).is_some_and(uses) && !self.shadowed_routes.iter().any(uses) {
            self.orphaned_nexthops.insert(id, gone.dev);
        }
    }

    /// Removes an object and, like the kernel, its routes.
    fn del_nexthop(&mut self, id: NexthopId) {
        if self.orphaned_nexthops.remove(&id).is_none() {
            self.routes.retain(|_, route| route.nexthop != Some(id));
            self.shadowed_routes.retain(|route| route.nexthop != Some(id));
        }
    }

    /// Renames a device and, like the kernel, everything on it.
    fn rename_link(&mut self, from: Name, to: Name) {
        fn moved<K: Ord, V>(map: &mut BTreeMap<K, V>, key: impl Fn(K) -> K) {
            *map = std::mem::take(map).into_iter().map(|(old, value)| (key(old), value)).collect();
        }
        let name = |name: Name| if name == from { to } else { name };
        let route = |route: Route| Route { dev: route.dev.map(name), ..route };
        moved(&mut self.links, name);
        moved(&mut self.forwarding, name);
        moved(&mut self.wireguard, name);
        self.fdb = self.fdb.iter().map(|((dev, mac), dst)| ((name(*dev), *mac), *dst)).collect();
        self.neighbours = self.neighbours.iter().map(|((dev, ip), mac)| ((name(*dev), *ip), *mac)).collect();
        self.addresses = self.addresses.iter().map(|(dev, net)| (name(*dev), *net)).collect();
        self.routes.values_mut().for_each(|one| *one = route(*one));
        self.shadowed_routes = self.shadowed_routes.iter().map(|one| route(*one)).collect();
        self.orphaned_nexthops.values_mut().for_each(|dev| *dev = dev.map(name));
    }

    /// Removes a device and, like the kernel, everything on it.
    fn drop_link(&mut self, name: &Name) {
        self.links.remove(name);
        self.forwarding.remove(name);
        self.wireguard.remove(name);
        self.addresses.retain(|(dev, _)| dev != name);
        self.fdb.retain(|(dev, _), _| dev != name);
        self.neighbours.retain(|(dev, _), _| dev != name);
        self.routes.retain(|_, route| route.dev != Some(*name));
        self.shadowed_routes.retain(|route| route.dev != Some(*name));
        self.orphaned_nexthops.retain(|_, dev| *dev != Some(*name));
    }
}

impl fmt::Display for KernelChange {
    /// In the words of `ip` and `bridge`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DelLink(name) => write!(f, "link del {name}"),
            Self::RenameLink(from, to) => write!(f, "link set {from} name {to}"),
            Self::AddLink(name, link) => match &link.identity {
                LinkIdentity::Vxlan(VxlanIdentity { vni, .. }) => {
                    let LinkSettings { mtu, mac, local, .. } = link.settings;
                    write!(f, "link add {name} type vxlan id {vni} local {local} mtu {mtu} address {mac}")
                }
                LinkIdentity::Ipip(IpipIdentity { local, .. }) => {
                    write!(f, "link add {name} type ipip local {local} mtu {}", link.settings.mtu)
                }
                LinkIdentity::Tun => write!(f, "link add {name} type tun mtu {}", link.settings.mtu),
                LinkIdentity::Wireguard => {
                    write!(f, "link add {name} type wireguard mtu {}", link.settings.mtu)
                }
                LinkIdentity::Other(kind) => write!(f, "link add {name} type {kind}"),
            },
            Self::SetLink(name, patch) => write!(f, "link set {name}{patch}"),
            Self::SetForwarding(name, forwarding) => write!(f, "forwarding set {name} {forwarding}"),
            Self::DelForwarding(name) => write!(f, "forwarding del {name}"),
            Self::SetWireguard(name, port, identity) => {
                write!(f, "wireguard set {name} listen-port {port} key {}", identity.public())
            }
            Self::SetWireguardPeers(name, peers) => write!(f, "wireguard peers {name}: {peers}"),
            Self::AddAddress(name, net) => write!(f, "address add {net} dev {name}"),
            Self::DelAddress(name, net) => write!(f, "address del {net} dev {name}"),
            Self::SetFdb(name, mac, dst) => write!(f, "fdb replace {mac} dst {dst} dev {name}"),
            Self::DelFdb(name, mac) => write!(f, "fdb del {mac} dev {name}"),
            Self::SetNeighbour(name, ip, mac) => write!(f, "neigh replace {ip} lladdr {mac} dev {name}"),
            Self::DelNeighbour(name, ip) => write!(f, "neigh del {ip} dev {name}"),
            Self::SetRoute(route) => write!(f, "route replace {route}"),
            Self::DelRoute(route) => write!(f, "route del {route}"),
            Self::DelNexthop(id) => write!(f, "nexthop del id {id}"),
            Self::AddBlackhole(dst) => write!(f, "route add blackhole {dst} metric {BLACKHOLE_METRIC}"),
            Self::DelBlackhole(dst) => write!(f, "route del blackhole {dst} metric {BLACKHOLE_METRIC}"),
        }
    }
}
