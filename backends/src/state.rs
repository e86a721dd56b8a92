//! Kernel state as a value: what there should be, what there is, and the changes in between.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use subnet::{Family, Mac};

use crate::name::Name;
use crate::udp::forwarding::Forwarding;

/// Protocol number (`rtm_protocol`) that marks our routes. Not assigned in
/// include/uapi/linux/rtnetlink.h, and not in iproute2's `rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 70;

/// Protocol number of routes that the kernel makes for addresses (`RTPROT_KERNEL`).
pub const PROTOCOL_KERNEL: u8 = 2;

/// Protocol number that Go flannel's routes carry, like those of boot scripts (`RTPROT_BOOT`).
pub const PROTOCOL_BOOT: u8 = 3;

/// Metric of our blackhole routes: the worst there is, so that any other route to the same subnet, a
/// bridge's above all, wins.
pub const BLACKHOLE_METRIC: u32 = u32::MAX;

/// Everything that this agent makes in the kernel. Maps and sets in one order, so that two states compare
/// and print alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// Tunnel devices.
    pub links: BTreeMap<Name, Link>,
    /// What the datapaths of TUN devices do.
    pub forwarding: BTreeMap<Name, Arc<Forwarding>>,
    /// Addresses on these devices.
    pub addresses: BTreeSet<(Name, IpNet)>,
    /// Forwarding database: which node a destination MAC is behind.
    pub fdb: BTreeMap<(Name, Mac), IpAddr>,
    /// Permanent neighbours: the MAC of each next hop on a tunnel device.
    pub neighbours: BTreeMap<(Name, IpAddr), Mac>,
    /// Routes of the main table with metric 0 and TOS 0, by destination; where several have the same
    /// destination, the one that the kernel uses.
    pub routes: BTreeMap<IpNet, Route>,
    /// Further routes of ours to one of these destinations, which the kernel doesn't use, and ours with a
    /// metric. Never wanted.
    pub surplus: BTreeSet<Route>,
    /// Destinations that end here unless a better route exists ([`BLACKHOLE_METRIC`]).
    pub blackholes: BTreeSet<IpNet>,
}

/// A tunnel device. `identity` can't change without making the device anew; `settings` are corrected in
/// place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// What the device is.
    pub identity: LinkIdentity,
    /// How it is set up.
    pub settings: LinkSettings,
}

/// What a device is, for as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkIdentity {
    /// A VXLAN tunnel endpoint.
    Vxlan(VxlanIdentity),
    /// A TUN device that this process holds.
    Tun,
    /// Something of the same name that is not what we make.
    Other(String),
}

/// The properties of a VXLAN device that the kernel refuses to change (drivers/net/vxlan/vxlan_core.c,
/// `vxlan_changelink`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanIdentity {
    /// Network identifier.
    pub vni: u32,
    /// UDP port; when wanted: `None` takes any.
    pub port: Option<u16>,
    /// Group-based policy extension.
    pub gbp: bool,
    /// Family of the underlay.
    pub family: Family,
    /// Joins a multicast group, or notifies or answers instead of the FDB: never wanted.
    pub foreign_modes: bool,
}

/// How a device is set up; all of it can be changed without losing what hangs on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// Set up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// The device's own address.
    pub mac: Mac,
    /// Index of the device that carries the tunnel.
    pub lower: u32,
    /// Source address of encapsulated packets.
    pub local: IpAddr,
    /// Learns peers from their frames.
    pub learning: bool,
    /// Leaves checksums to the device underneath (`tx-checksum-ip-generic`); when wanted: `None` takes any,
    /// and when found: `None` was not asked for.
    pub tx_checksum: Option<bool>,
    /// Takes router advertisements (`accept_ra`); `None` as with `accept_local`.
    pub accept_ra: Option<bool>,
    /// Takes packets from addresses of this host (`accept_local`); when wanted: `None` takes any, and when
    /// found: `None` can't be known or set.
    pub accept_local: Option<bool>,
}

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Device; `None` for several next hops, or a type that has none.
    pub dev: Option<Name>,
    /// Next hop is taken to be on the device's link (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Metric (`RTA_PRIORITY`).
    pub metric: u32,
    /// It has a type, a scope or attributes that we never set, so it is not the same as one of ours.
    pub odd: bool,
}

/// One change to the kernel. A value, so that it can be logged, counted, compared and dry-run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Removes a device with all that hangs on it.
    DelLink(Name),
    /// Gives a device another name, with all that hangs on it.
    RenameLink(Name, Name),
    /// Makes a device. A TUN device that nobody holds is taken over.
    AddLink(Name, Link),
    /// Corrects the settings of a device: only those that differ, since setting a MAC to the same value
    /// flushes the device's neighbours.
    SetLink(Name, LinkPatch),
    /// Starts the datapath of a TUN device, or changes what it does.
    SetForwarding(Name, Arc<Forwarding>),
    /// Stops the datapath of a TUN device.
    DelForwarding(Name),
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
    /// Adds a route, or replaces the one to the same destination.
    SetRoute(Route),
    /// Removes exactly this route.
    DelRoute(Route),
    /// Adds a blackhole route.
    AddBlackhole(IpNet),
    /// Removes a blackhole route.
    DelBlackhole(IpNet),
}

/// The settings of a device that are to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkPatch {
    /// See [`LinkSettings::up`].
    pub up: Option<bool>,
    /// See [`LinkSettings::mtu`].
    pub mtu: Option<u32>,
    /// See [`LinkSettings::mac`].
    pub mac: Option<Mac>,
    /// See [`LinkSettings::lower`].
    pub lower: Option<u32>,
    /// See [`LinkSettings::local`].
    pub local: Option<IpAddr>,
    /// See [`LinkSettings::learning`].
    pub learning: Option<bool>,
    /// See [`LinkSettings::tx_checksum`].
    pub tx_checksum: Option<bool>,
    /// See [`LinkSettings::accept_ra`].
    pub accept_ra: Option<bool>,
    /// See [`LinkSettings::accept_local`].
    pub accept_local: Option<bool>,
}

impl Route {
    /// A route of ours to `dst`, without next hop and device yet.
    pub fn ours(dst: IpNet) -> Self {
        Self { dst, via: None, dev: None, onlink: false, protocol: ROUTE_PROTOCOL, metric: 0, odd: false }
    }
}

impl LinkIdentity {
    /// Whether a device that is `actual` can serve where `self` is wanted.
    pub fn accepts(&self, actual: &Self) -> bool {
        match (self, actual) {
            (Self::Vxlan(want), Self::Vxlan(have)) => {
                VxlanIdentity { port: have.port, ..*want } == *have
                    && (want.port.is_none() || want.port == have.port)
            }
            _ => self == actual,
        }
    }

    /// Whether a device that is `actual` need not be removed before one that is `self` is made: another
    /// process may hold it.
    pub fn takes_over(&self, actual: &Self) -> bool {
        *self == Self::Tun && matches!(actual, Self::Other(kind) if kind == "tun")
    }
}

impl LinkSettings {
    /// Those of a device that has neither MAC nor device underneath.
    pub fn plain(mtu: u32) -> Self {
        let local = Ipv4Addr::UNSPECIFIED.into();
        Self {
            up: true,
            mtu,
            mac: Mac([0; 6]),
            lower: 0,
            local,
            learning: false,
            tx_checksum: None,
            accept_ra: Some(false),
            // Its own address is the source of the errors that a datapath sends; otherwise the kernel takes
            // them for forged.
            accept_local: Some(true),
        }
    }

    /// What has to change for `self` to become `want`.
    pub fn patch_to(&self, want: &Self) -> LinkPatch {
        fn differing<T: PartialEq>(have: T, want: T) -> Option<T> {
            (have != want).then_some(want)
        }
        fn known(have: Option<bool>, want: Option<bool>) -> Option<bool> {
            want.filter(|want| have.is_some_and(|have| have != *want))
        }
        LinkPatch {
            up: differing(self.up, want.up),
            mtu: differing(self.mtu, want.mtu),
            mac: differing(self.mac, want.mac),
            lower: differing(self.lower, want.lower),
            local: differing(self.local, want.local),
            learning: differing(self.learning, want.learning),
            tx_checksum: want.tx_checksum.filter(|_| self.tx_checksum != want.tx_checksum),
            accept_ra: known(self.accept_ra, want.accept_ra),
            accept_local: known(self.accept_local, want.accept_local),
        }
    }

    /// Applies a patch.
    pub fn patch(&mut self, patch: &LinkPatch) {
        self.up = patch.up.unwrap_or(self.up);
        self.mtu = patch.mtu.unwrap_or(self.mtu);
        self.mac = patch.mac.unwrap_or(self.mac);
        self.lower = patch.lower.unwrap_or(self.lower);
        self.local = patch.local.unwrap_or(self.local);
        self.learning = patch.learning.unwrap_or(self.learning);
        self.tx_checksum = patch.tx_checksum.or(self.tx_checksum);
        self.accept_ra = patch.accept_ra.or(self.accept_ra);
        self.accept_local = patch.accept_local.or(self.accept_local);
    }
}

impl LinkPatch {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Change {
    /// The kind of object, for counting.
    pub fn object(&self) -> &'static str {
        match self {
            Self::DelLink(..) | Self::RenameLink(..) | Self::AddLink(..) | Self::SetLink(..) => "link",
            Self::SetForwarding(..) | Self::DelForwarding(..) => "forwarding",
            Self::AddAddress(..) | Self::DelAddress(..) => "address",
            Self::SetFdb(..) | Self::DelFdb(..) => "fdb",
            Self::SetNeighbour(..) | Self::DelNeighbour(..) => "neighbour",
            Self::SetRoute(..) | Self::DelRoute(..) => "route",
            Self::AddBlackhole(..) | Self::DelBlackhole(..) => "blackhole",
        }
    }

    /// Whether something goes away.
    pub fn is_removal(&self) -> bool {
        matches!(
            self,
            Self::DelLink(..)
                | Self::DelForwarding(..)
                | Self::DelAddress(..)
                | Self::DelFdb(..)
                | Self::DelNeighbour(..)
                | Self::DelRoute(..)
                | Self::DelBlackhole(..)
        )
    }

    /// The device that it names.
    pub fn device(&self) -> Option<Name> {
        match self {
            Self::DelLink(name)
            | Self::RenameLink(name, _)
            | Self::AddLink(name, _)
            | Self::SetLink(name, _)
            | Self::SetForwarding(name, _)
            | Self::DelForwarding(name)
            | Self::AddAddress(name, _)
            | Self::DelAddress(name, _)
            | Self::SetFdb(name, ..)
            | Self::DelFdb(name, _)
            | Self::SetNeighbour(name, ..)
            | Self::DelNeighbour(name, _) => Some(*name),
            Self::SetRoute(route) | Self::DelRoute(route) => route.dev,
            Self::AddBlackhole(_) | Self::DelBlackhole(_) => None,
        }
    }
}

impl KernelState {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes in what `other` has besides; where both have something, `self` stays as it is.
    pub fn join(&mut self, other: Self) {
        fn add<K: Ord, V>(to: &mut BTreeMap<K, V>, from: BTreeMap<K, V>) {
            if to.is_empty() {
                *to = from;
                return;
            }
            for (key, value) in from {
                to.entry(key).or_insert(value);
            }
        }
        add(&mut self.links, other.links);
        add(&mut self.forwarding, other.forwarding);
        add(&mut self.fdb, other.fdb);
        add(&mut self.neighbours, other.neighbours);
        add(&mut self.routes, other.routes);
        self.addresses.extend(other.addresses);
        self.surplus.extend(other.surplus);
        self.blackholes.extend(other.blackholes);
    }

    /// Makes one change to the value, without the side effects that a kernel has.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::DelLink(name) => self.drop_link(name),
            Change::RenameLink(from, to) => self.rename_link(*from, *to),
            Change::AddLink(name, link) => {
                self.drop_link(name);
                self.links.insert(*name, link.clone());
            }
            Change::SetLink(name, patch) => {
                if let Some(link) = self.links.get_mut(name) {
                    link.settings.patch(patch);
                }
            }
            Change::SetForwarding(name, forwarding) => {
                self.forwarding.insert(*name, Arc::clone(forwarding));
            }
            Change::DelForwarding(name) => {
                self.forwarding.remove(name);
            }
            Change::AddAddress(name, net) => {
                self.addresses.insert((*name, *net));
            }
            Change::DelAddress(name, net) => {
                self.addresses.remove(&(*name, *net));
            }
            Change::SetFdb(name, mac, dst) => {
                self.fdb.insert((*name, *mac), *dst);
            }
            Change::DelFdb(name, mac) => {
                self.fdb.remove(&(*name, *mac));
            }
            Change::SetNeighbour(name, ip, mac) => {
                self.neighbours.insert((*name, *ip), *mac);
            }
            Change::DelNeighbour(name, ip) => {
                self.neighbours.remove(&(*name, *ip));
            }
            Change::SetRoute(route) => {
                self.routes.insert(route.dst, *route);
            }
            Change::DelRoute(route) => {
                if !self.surplus.remove(route) && self.routes.get(&route.dst) == Some(route) {
                    self.routes.remove(&route.dst);
                }
            }
            Change::AddBlackhole(dst) => {
                self.blackholes.insert(*dst);
            }
            Change::DelBlackhole(dst) => {
                self.blackholes.remove(dst);
            }
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
        moved(&mut self.fdb, |(dev, mac)| (name(dev), mac));
        moved(&mut self.neighbours, |(dev, ip)| (name(dev), ip));
        self.addresses = self.addresses.iter().map(|(dev, net)| (name(*dev), *net)).collect();
        self.routes.values_mut().for_each(|one| *one = route(*one));
        self.surplus = self.surplus.iter().map(|one| route(*one)).collect();
    }

    /// Removes a device and, like the kernel, everything on it.
    fn drop_link(&mut self, name: &Name) {
        self.links.remove(name);
        self.forwarding.remove(name);
        self.addresses.retain(|(dev, _)| dev != name);
        self.fdb.retain(|(dev, _), _| dev != name);
        self.neighbours.retain(|(dev, _), _| dev != name);
        self.routes.retain(|_, route| route.dev != Some(*name));
        self.surplus.retain(|route| route.dev != Some(*name));
    }
}

impl fmt::Display for Route {
    /// As `ip route` would take it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dst)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if let Some(dev) = self.dev {
            write!(f, " dev {dev}")?;
        }
        if self.onlink {
            f.write_str(" onlink")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        match self.protocol {
            PROTOCOL_BOOT => f.write_str(" proto boot"),
            PROTOCOL_KERNEL => f.write_str(" proto kernel"),
            number => write!(f, " proto {number}"),
        }
    }
}

impl fmt::Display for LinkPatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(up) = self.up {
            f.write_str(if up { " up" } else { " down" })?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(mac) = self.mac {
            write!(f, " address {mac}")?;
        }
        if let Some(lower) = self.lower {
            write!(f, " dev #{lower}")?;
        }
        if let Some(local) = self.local {
            write!(f, " local {local}")?;
        }
        if let Some(learning) = self.learning {
            f.write_str(if learning { " learning" } else { " nolearning" })?;
        }
        if let Some(on) = self.tx_checksum {
            write!(f, " tx-checksum-ip-generic {}", if on { "on" } else { "off" })?;
        }
        for (sysctl, on) in [("accept_ra", self.accept_ra), ("accept_local", self.accept_local)] {
            if let Some(on) = on {
                write!(f, " {sysctl} {}", u8::from(on))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Change {
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
                LinkIdentity::Tun => write!(f, "link add {name} type tun mtu {}", link.settings.mtu),
                LinkIdentity::Other(kind) => write!(f, "link add {name} type {kind}"),
            },
            Self::SetLink(name, patch) => write!(f, "link set {name}{patch}"),
            Self::SetForwarding(name, forwarding) => write!(f, "forwarding set {name} {forwarding}"),
            Self::DelForwarding(name) => write!(f, "forwarding del {name}"),
            Self::AddAddress(name, net) => write!(f, "address add {net} dev {name}"),
            Self::DelAddress(name, net) => write!(f, "address del {net} dev {name}"),
            Self::SetFdb(name, mac, dst) => write!(f, "fdb replace {mac} dst {dst} dev {name}"),
            Self::DelFdb(name, mac) => write!(f, "fdb del {mac} dev {name}"),
            Self::SetNeighbour(name, ip, mac) => write!(f, "neigh replace {ip} lladdr {mac} dev {name}"),
            Self::DelNeighbour(name, ip) => write!(f, "neigh del {ip} dev {name}"),
            Self::SetRoute(route) => write!(f, "route replace {route}"),
            Self::DelRoute(route) => write!(f, "route del {route}"),
            Self::AddBlackhole(dst) => write!(f, "route add blackhole {dst} metric {BLACKHOLE_METRIC}"),
            Self::DelBlackhole(dst) => write!(f, "route del blackhole {dst} metric {BLACKHOLE_METRIC}"),
        }
    }
}
