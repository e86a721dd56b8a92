//! From rtnetlink messages to facts about links, addresses, routes, neighbours and the FDB.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoIpTunnel, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, TunnelEncapType,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteScope, RouteType,
};
use subnet::{Family, Mac};

use crate::state::host::{HostAddr, HostLink};
use crate::state::name::Name;
use crate::state::nexthop::NexthopId;
use crate::state::{
    BLACKHOLE_METRIC, IpipIdentity, Link, LinkIdentity, LinkSettings, PROTOCOL_BOOT, ROUTE_PROTOCOL, Route,
    VxlanIdentity,
};

/// A link as the host has it, and as a tunnel device if it is one.
pub(super) struct LinkFacts {
    pub(super) host: HostLink,
    pub(super) tunnel: Link,
}

/// A link; `None` for messages about bridge ports and the like, which say nothing about the link itself.
pub(super) fn link(message: &LinkMessage) -> Option<LinkFacts> {
    if message.header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let (mut name, mut mtu, mut mac, mut controller) = (None, 0, Mac([0; 6]), None);
    let (mut kind, mut data) = (String::new(), None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse::<Name>().ok(),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::Controller(index) => controller = Some(*index),
            LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().map_or(mac, Mac),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(found) => kind = found.to_string(),
                        LinkInfo::Data(found) => data = Some(found),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let up = message.header.flags.contains(LinkFlags::Up);
    let carrier = message.header.flags.contains(LinkFlags::LowerUp);
    let bridge = kind == "bridge";
    let (identity, lower, local, learning) = tunnel_facts(kind, data);
    Some(LinkFacts {
        host: HostLink {
            index: message.header.index,
            name: name?,
            mtu,
            up,
            carrier,
            bridge,
            controller,
            mac,
            addresses: Vec::new(),
        },
        tunnel: Link {
            identity,
            settings: LinkSettings {
                up,
                mtu,
                mac,
                lower,
                local,
                learning,
                tx_checksum: None,
                accept_ra: None,
                accept_local: None,
            },
        },
    })
}

/// What a device is, the device underneath, the tunnel's source address, and whether it learns.
fn tunnel_facts(kind: String, data: Option<&InfoData>) -> (LinkIdentity, u32, IpAddr, bool) {
    let none = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    match data {
        Some(InfoData::Vxlan(data)) => {
            let (identity, lower, local, learning) = vxlan_facts(data);
            (LinkIdentity::Vxlan(identity), lower, local, learning)
        }
        // Tunnels of other kinds have the same attributes.
        Some(InfoData::IpTunnel(data)) if kind == "ipip" => {
            (LinkIdentity::Ipip(ipip_facts(data)), 0, none, false)
        }
        _ if kind == "wireguard" => (LinkIdentity::Wireguard, 0, none, false),
        _ => (LinkIdentity::Other(kind), 0, none, false),
    }
}

fn vxlan_facts(data: &[InfoVxlan]) -> (VxlanIdentity, u32, IpAddr, bool) {
    let mut identity =
        VxlanIdentity { vni: 0, port: None, gbp: false, family: Family::V4, foreign_modes: false };
    let (mut lower, mut local, mut learning) = (0, IpAddr::V4(Ipv4Addr::UNSPECIFIED), false);
    for item in data {
        match item {
            InfoVxlan::Id(vni) => identity.vni = *vni,
            InfoVxlan::Port(port) => identity.port = Some(*port),
            InfoVxlan::Gbp => identity.gbp = true,
            InfoVxlan::Link(index) => lower = *index,
            InfoVxlan::Local(v4) => local = (*v4).into(),
            InfoVxlan::Local6(v6) => {
                local = (*v6).into();
                identity.family = Family::V6;
            }
            InfoVxlan::Learning(on) => learning = *on,
            InfoVxlan::Group(_)
            | InfoVxlan::Group6(_)
            | InfoVxlan::L2Miss(true)
            | InfoVxlan::L3Miss(true)
            | InfoVxlan::Proxy(true)
            | InfoVxlan::Rsc(true)
            | InfoVxlan::CollectMetadata(true)
            | InfoVxlan::Vnifilter(true) => identity.foreign_modes = true,
            _ => {}
        }
    }
    (identity, lower, local, learning)
}

fn ipip_facts(data: &[InfoIpTunnel]) -> IpipIdentity {
    let mut identity = IpipIdentity { local: Ipv4Addr::UNSPECIFIED, foreign_modes: false };
    for item in data {
        identity.foreign_modes |= match item {
            InfoIpTunnel::Local(IpAddr::V4(v4)) => {
                identity.local = *v4;
                false
            }
            InfoIpTunnel::Remote(remote) => !remote.is_unspecified(),
            InfoIpTunnel::Link(link) => *link != 0,
            InfoIpTunnel::Ttl(ttl) => *ttl != 0,
            InfoIpTunnel::Tos(tos) => *tos != 0,
            InfoIpTunnel::PMtuDisc(on) => *on,
            // Any, or IPv4; another one is not for us.
            InfoIpTunnel::Protocol(protocol) => !matches!(i32::from(*protocol), 0 | 4),
            InfoIpTunnel::EncapType(kind) => *kind != TunnelEncapType::None,
            InfoIpTunnel::FwMark(mark) => *mark != 0,
            InfoIpTunnel::CollectMetadata => true,
            _ => false,
        };
    }
    identity
}

/// An address with the index of its link.
pub(super) fn address(message: &AddressMessage) -> Option<(u32, HostAddr)> {
    let (mut local, mut peer, mut flags) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(addr) => local = Some(*addr),
            AddressAttribute::Address(addr) => peer = Some(*addr),
            AddressAttribute::Flags(all) => flags = Some(*all),
            _ => {}
        }
    }
    let header = message.header.flags;
    let has = |short: AddressHeaderFlags, long: AddressFlags| {
        flags.map_or(header.contains(short), |flags| flags.contains(long))
    };
    let addr = HostAddr {
        net: IpNet::new(local.or(peer)?, message.header.prefix_len).ok()?,
        deprecated: has(AddressHeaderFlags::Deprecated, AddressFlags::Deprecated),
        permanent: has(AddressHeaderFlags::Permanent, AddressFlags::Permanent),
        temporary: has(AddressHeaderFlags::Secondary, AddressFlags::Secondary),
    };
    Some((message.header.index, addr))
}

/// A route of the main table with the index of its device.
pub(super) struct RouteFacts {
    pub(super) route: Route,
    pub(super) link: Option<u32>,
    /// It is a blackhole of a flanneld.
    pub(super) blackhole: Option<Blackhole>,
}

impl RouteFacts {
    pub(super) fn family(&self) -> Family {
        Family::of(self.route.dst.addr())
    }
}

/// Who made a blackhole route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blackhole {
    /// We: it has our protocol number and the worst metric.
    Ours,
    /// Perhaps a Go flannel (`--ip-blackhole-route`): it has the number of boot scripts and no metric.
    Go,
}

/// A route; `None` for other tables, other types of service and cached clones. `name_of` gives the name
/// of a link's index, where it is known.
pub(super) fn route(message: &RouteMessage, name_of: impl Fn(u32) -> Option<Name>) -> Option<RouteFacts> {
    let header = &message.header;
    let family = match header.address_family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    if header.tos != 0 || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let (mut dst, mut via, mut link, mut nexthop) = (subnet::net::addr_of(family, 0), None, None, None);
    let (mut metric, mut table) = (0, u32::from(header.table));
    let mut foreign = header.kind != RouteType::Unicast;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(addr) => dst = ip(addr)?,
            RouteAttribute::Gateway(addr) => via = ip(addr),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::NhId(number) => nexthop = NexthopId::new(*number),
            // Answers of the kernel, not properties of the route.
            RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) | RouteAttribute::Uid(_) => {}
            _ => foreign = true,
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    match family {
        Family::V4 => {
            // Where a route leads that shows only its object (`net.ipv4.nexthop_compat_mode=0`) is not known yet.
            let hop = via.is_some() || nexthop.is_some() && link.is_none();
            let usual = if hop { RouteScope::Universe } else { RouteScope::Link };
            foreign |= header.scope != usual;
        }
        // The kernel turns "no metric" into IP6_RT_PRIO_USER (net/ipv6/route.c).
        Family::V6 if metric == 1024 => metric = 0,
        Family::V6 => {}
    }
    let dst = IpNet::new(dst, header.destination_prefix_length).ok()?.trunc();
    foreign |= nexthop.is_some_and(|id: NexthopId| !id.is_for(dst));
    let route = Route {
        dst,
        via,
        dev: link.and_then(name_of),
        onlink: header.flags.contains(RouteFlags::Onlink),
        nexthop,
        protocol: header.protocol.into(),
        metric,
        foreign,
    };
    let blackhole = match (header.kind, route.protocol, route.metric) {
        (RouteType::BlackHole, ROUTE_PROTOCOL, BLACKHOLE_METRIC) => Some(Blackhole::Ours),
        (RouteType::BlackHole, PROTOCOL_BOOT, 0) => Some(Blackhole::Go),
        _ => None,
    };
    Some(RouteFacts { route, link, blackhole })
}

pub(super) fn ip(addr: &RouteAddress) -> Option<IpAddr> {
    match addr {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// An entry of the neighbour table or of a device's FDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NeighbourFacts {
    /// A neighbour (ARP, NDP). `answers` is unknown while the kernel asks for the first time.
    Neighbour { link: u32, ip: IpAddr, mac: Mac, permanent: bool, answers: Option<bool> },
    /// A forwarding entry that was configured, not learned. `dst` is unspecified where the entry says
    /// more than a destination, which ours never do.
    Fdb { link: u32, mac: Mac, dst: IpAddr },
}

/// An entry; `None` for proxies, learned and multicast forwarding entries and those of bridges.
pub(super) fn neighbour(message: &NeighbourMessage) -> Option<NeighbourFacts> {
    let header = &message.header;
    let (mut dst, mut mac, mut plain) = (None, None, true);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(addr) => dst = neighbour_ip(addr),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(Mac);
            }
            NeighbourAttribute::Port(_) | NeighbourAttribute::Vni(_) | NeighbourAttribute::IfIndex(_) => {
                plain = false;
            }
            _ => {}
        }
    }
    let link = header.ifindex;
    let state = u16::from(header.state);
    if header.family == AddressFamily::Bridge {
        let configured = state & u16::from(NeighbourState::Permanent) != 0
            || state & u16::from(NeighbourState::Noarp) != 0;
        let own =
            header.flags.contains(NeighbourFlags::Own) && !header.flags.contains(NeighbourFlags::ExtLearned);
        let mac = mac.filter(|mac| configured && own && mac.is_unicast())?;
        let dst = dst.filter(|_| plain).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        return Some(NeighbourFacts::Fdb { link, mac, dst });
    }
    if header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let permanent = state == u16::from(NeighbourState::Permanent);
    let is = |one: NeighbourState| state & u16::from(one) != 0;
    let answers = match () {
        () if is(NeighbourState::Failed) => Some(false),
        () if state == 0 || is(NeighbourState::Incomplete) => None,
        () => Some(true),
    };
    Some(NeighbourFacts::Neighbour { link, ip: dst?, mac: mac.unwrap_or(Mac([0; 6])), permanent, answers })
}

fn neighbour_ip(addr: &NeighbourAddress) -> Option<IpAddr> {
    match addr {
        NeighbourAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        NeighbourAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        // Entries of a bridge family carry the address as it is.
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(|b| IpAddr::V4(Ipv4Addr::from(b))),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(|b| IpAddr::V6(Ipv6Addr::from(b))),
            _ => None,
        },
        _ => None,
    }
}
