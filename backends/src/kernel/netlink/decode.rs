//! From rtnetlink messages to facts about links, addresses, routes, neighbours and the FDB.
//!
//! Links and addresses are few, and decoded by `netlink-packet-route`. Routes, neighbours and forwarding entries may be thousands,
//! so they are read from the bytes of the message.

mod neighbour;
mod route;

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoIpTunnel, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Prop, TunnelEncapType,
};
use netlink_packet_route::route::RouteAddress;
use subnet::{Family, Mac};

use crate::netlink::wire;
use crate::state::host::{HostAddr, HostLink};
use crate::state::name::Name;
use crate::state::{IpipIdentity, Link, LinkIdentity, LinkSettings, VxlanIdentity};

pub(super) use neighbour::{NeighbourFacts, neighbour};
pub(super) use route::{Blackhole, RouteFacts, route};

/// Kinds of messages (include/uapi/linux/rtnetlink.h).
pub(super) const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_DELROUTE: u16 = 25;
pub(super) const RTM_NEWNEIGH: u16 = 28;
pub(super) const RTM_DELNEIGH: u16 = 29;

/// What a message about a link says at its beginning. All of it is decoded only where it matters.
pub(super) struct LinkHead<'a> {
    pub(super) index: u32,
    attributes: &'a [u8],
}

impl<'a> LinkHead<'a> {
    /// `None` for messages about bridge ports and the like.
    pub(super) fn of(payload: &'a [u8]) -> Option<Self> {
        /// `struct ifinfomsg`: the family, the index after four bytes.
        const IFINFOMSG: usize = 16;
        let (family, attributes) = (*payload.first()?, payload.get(IFINFOMSG..)?);
        let index = wire::native_u32(payload, 4)?;
        (family == u8::from(AddressFamily::Unspec)).then_some(Self { index, attributes })
    }

    pub(super) fn name(&self) -> Option<Name> {
        const IFLA_IFNAME: u16 = 3;
        text(wire::find(self.attributes, IFLA_IFNAME)?)?.parse().ok()
    }

    pub(super) fn is_bridge(&self) -> bool {
        const IFLA_LINKINFO: u16 = 18;
        const IFLA_INFO_KIND: u16 = 1;
        let info = wire::find(self.attributes, IFLA_LINKINFO);
        info.and_then(|info| wire::find(info, IFLA_INFO_KIND)).and_then(text) == Some("bridge")
    }
}

/// The text of an attribute, which ends with a zero byte.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()?.split('\0').next()
}

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
    let (mut name, mut altnames) = (None, Vec::new());
    let (mut mtu, mut mac, mut controller) = (0, Mac([0; 6]), None);
    let (mut kind, mut data) = (String::new(), None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse::<Name>().ok(),
            LinkAttribute::PropList(properties) => altnames.extend(properties.iter().filter_map(altname)),
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
            altnames,
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

fn altname(property: &Prop) -> Option<String> {
    match property {
        Prop::AltIfName(name) => Some(name.clone()),
        _ => None,
    }
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

pub(super) fn ip(addr: &RouteAddress) -> Option<IpAddr> {
    match addr {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// An address as it is in an attribute, of the family that its length says.
fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// An address of this family as it is in an attribute.
fn address_in(family: Family, bytes: &[u8]) -> Option<IpAddr> {
    address_of(bytes).filter(|address| Family::of(*address) == family)
}

/// A number as it is in an attribute.
fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::RouteNetlinkMessage;
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::netlink::socket::decode as typed;
    use crate::netlink::multicast::RTM_NEWLINK;

    /// A message about a link: its name and kind, and something between that is not read.
    fn about(family: u8, index: u32, name: &str, kind: &str) -> Vec<u8> {
        let mut attributes = wire::Writer::default();
        attributes.string(3, name);
        attributes.bytes_attribute(1, &[2, 0, 0, 0, 0, 7]);
        attributes.nest(18, |info| info.string(1, kind));
        let mut payload = vec![family, 0, 1, 0];
        payload.extend(index.to_ne_bytes());
        payload.extend([0; 8]);
        payload.extend(attributes.bytes());
        payload
    }

    proptest! {
        #[test]
        fn the_beginning_of_a_message_says_what_all_of_it_says(
            family in prop_oneof![Just(0u8), Just(7)],
            index in 1u32..=i32::MAX as u32,
            name in "[a-z0-9./]{1,16}",
            kind in prop_oneof![Just("bridge"), Just("veth"), Just("vxlan")],
            noise: Vec<u8>,
        ) {
            let payload = about(family, index, &name, kind);
            let message = wire::Message { kind: RTM_NEWLINK, flags: 0, sequence: 0, port: 0, payload: &payload };
            let Some(RouteNetlinkMessage::NewLink(decoded)) = typed(&message) else { panic!("{payload:?}") };
            let all = link(&decoded);
            let head = LinkHead::of(&payload);
            match (all, head) {
                (Some(all), Some(head)) => {
                    prop_assert_eq!(all.host.index, head.index);
                    prop_assert_eq!(Some(all.host.name), head.name());
                    prop_assert_eq!(all.host.bridge, head.is_bridge());
                }
                // A name that no request could have.
                (None, Some(head)) => prop_assert_eq!(head.name(), None),
                (None, None) => prop_assert_eq!(family, 7),
                (Some(_), None) => prop_assert!(false, "left out"),
            }
            let _ = LinkHead::of(&noise).map(|head| (head.name(), head.is_bridge()));
        }
    }
}
