//! From changes to rtnetlink messages, with rtnetlink's builders.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rtnetlink::{
    AddressMessageBuilder, LinkIpIp, LinkMessageBuilder, LinkUnspec, LinkVxlan, RouteMessageBuilder,
};
use subnet::Mac;

use super::nexthop;
use super::socket::Request;
use crate::state::{
    BLACKHOLE_METRIC, KernelChange, Link, LinkIdentity, LinkPatch, LinkSettings, Route, VxlanIdentity,
};

/// The request for a change. `index` is the index of the device that the change names, which every change
/// but the making of a device has.
pub(super) fn request(change: &KernelChange, index: u32) -> io::Result<Request> {
    const ADD: u16 = NLM_F_CREATE | NLM_F_EXCL;
    const SET: u16 = NLM_F_CREATE | NLM_F_REPLACE;
    use RouteNetlinkMessage as Message;
    let (message, flags) = match change {
        KernelChange::DelLink(_) => (Message::DelLink(LinkUnspec::new_with_index(index).build()), 0),
        KernelChange::RenameLink(_, to) => {
            let message = LinkUnspec::new_with_index(index).name(to.to_string()).build();
            (Message::NewLink(message), 0)
        }
        KernelChange::AddLink(name, link) => (Message::NewLink(new_link(name.as_str(), link)?), ADD),
        KernelChange::SetLink(_, patch) => (Message::NewLink(patched(index, patch)), 0),
        KernelChange::SetForwarding(..) | KernelChange::DelForwarding(_) => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "datapaths are not the kernel's"));
        }
        KernelChange::SetWireguard(..) | KernelChange::SetWireguardPeers(..) => {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it has a netlink family of its own"));
        }
        KernelChange::AddAddress(_, net) => {
            (Message::NewAddress(address(index, net.addr(), net.prefix_len())), ADD)
        }
        KernelChange::DelAddress(_, net) => {
            (Message::DelAddress(address(index, net.addr(), net.prefix_len())), 0)
        }
        KernelChange::SetFdb(_, mac, dst) => (Message::NewNeighbour(fdb(index, *mac, Some(*dst))), SET),
        KernelChange::DelFdb(_, mac) => (Message::DelNeighbour(fdb(index, *mac, None)), 0),
        KernelChange::SetNeighbour(_, ip, mac) => {
            (Message::NewNeighbour(neighbour(index, *ip, Some(*mac))), SET)
        }
        KernelChange::DelNeighbour(_, ip) => (Message::DelNeighbour(neighbour(index, *ip, None)), 0),
        KernelChange::SetRoute(wanted) => {
            let index = wanted.nexthop.is_none().then_some(index);
            let mut message = route(wanted, index)?;
            message.header.scope = if wanted.via.is_some() || wanted.dst.addr().is_ipv6() {
                RouteScope::Universe
            } else {
                RouteScope::Link
            };
            (Message::NewRoute(message), SET)
        }
        KernelChange::DelRoute(stale) => {
            let mut message = route(stale, stale.dev.filter(|_| stale.nexthop.is_none()).map(|_| index))?;
            // "Nowhere" and "unspecified" match any scope and type (net/ipv4/fib_trie.c, fib_table_delete).
            message.header.scope = RouteScope::NoWhere;
            message.header.kind = RouteType::Unspec;
            (Message::DelRoute(message), 0)
        }
        KernelChange::DelNexthop(id) => return Ok((nexthop::removal(*id).into(), 0)),
        KernelChange::AddBlackhole(dst) => (Message::NewRoute(blackhole(*dst)?), ADD),
        KernelChange::DelBlackhole(dst) => (Message::DelRoute(blackhole(*dst)?), 0),
    };
    Ok((message.into(), flags))
}

/// The device is not up yet: its sysctls have to be in place before.
fn new_link(name: &str, link: &Link) -> io::Result<LinkMessage> {
    match &link.identity {
        LinkIdentity::Vxlan(identity) => Ok(new_vxlan(name, identity, &link.settings)),
        // The outer header has neither a time to live of its own nor DF: Go flannel's device has neither.
        LinkIdentity::Ipip(identity) => Ok(LinkIpIp::new(name)
            .local(identity.local)
            .pmtudisc(false)
            .protocol(IpProtocol::from(0u8))
            .mtu(link.settings.mtu)
            .build()),
        LinkIdentity::Wireguard => {
            let builder: LinkMessageBuilder<LinkUnspec> =
                LinkMessageBuilder::new_with_info_kind(InfoKind::Wireguard);
            Ok(builder.name(name.to_string()).mtu(link.settings.mtu).build())
        }
        LinkIdentity::Tun | LinkIdentity::Other(_) => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "no device of this kind is ever made by netlink"))
        }
    }
}

fn new_vxlan(name: &str, identity: &VxlanIdentity, settings: &LinkSettings) -> LinkMessage {
    let LinkSettings { mtu, mac, lower, local, learning, .. } = *settings;
    let mut builder = LinkVxlan::new(name, identity.vni)
        .dev(lower)
        .learning(learning)
        .mtu(mtu)
        .address(mac.0.to_vec())
        .txqueuelen(0);
    builder = match local {
        IpAddr::V4(v4) => builder.local(v4),
        IpAddr::V6(v6) => builder.local6(v6),
    };
    if let Some(port) = identity.port {
        builder = builder.port(port);
    }
    if identity.gbp {
        builder = builder.gbp();
    }
    builder.build()
}

/// `RTM_NEWLINK` for an existing index: the only message that changes a tunnel's own properties.
fn patched(index: u32, patch: &LinkPatch) -> LinkMessage {
    let LinkPatch { up, mtu, mac, lower, local, learning, .. } = *patch;
    let mut builder: LinkMessageBuilder<LinkVxlan> = if is_tunnel_patch(patch) {
        LinkMessageBuilder::new_with_info_kind(InfoKind::Vxlan)
    } else {
        LinkMessageBuilder::default()
    };
    builder = builder.index(index);
    if let Some(lower) = lower {
        builder = builder.dev(lower);
    }
    builder = match local {
        Some(IpAddr::V4(v4)) => builder.local(v4),
        Some(IpAddr::V6(v6)) => builder.local6(v6),
        None => builder,
    };
    if let Some(learning) = learning {
        builder = builder.learning(learning);
    }
    if let Some(mtu) = mtu {
        builder = builder.mtu(mtu);
    }
    if let Some(mac) = mac {
        builder = builder.address(mac.0.to_vec());
    }
    match up {
        Some(true) => builder.up().build(),
        Some(false) => builder.down().build(),
        None => builder.build(),
    }
}

fn is_tunnel_patch(patch: &LinkPatch) -> bool {
    patch.lower.is_some() || patch.local.is_some() || patch.learning.is_some()
}

/// A patch as the kernel takes it: it refuses an MTU together with a tunnel's own properties
/// (drivers/net/vxlan/vxlan_core.c, `vxlan_nl2conf`), and may need the new device underneath for the MTU.
pub(super) fn steps(patch: &LinkPatch) -> impl Iterator<Item = LinkPatch> + use<> {
    let LinkPatch { up, mtu, mac, lower, local, learning, .. } = *patch;
    let tunnel = LinkPatch { lower, local, learning, ..LinkPatch::default() };
    let device = LinkPatch { up, mtu, mac, ..LinkPatch::default() };
    [tunnel, device].into_iter().filter(|step| !step.is_empty())
}

fn address(index: u32, addr: IpAddr, len: u8) -> AddressMessage {
    match addr {
        IpAddr::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(v4, len).build(),
        IpAddr::V6(v6) => {
            let mut message = AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(v6, len).build();
            // Leases say that no other node has it, so it need not wait a second to be usable.
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
        }
    }
}

/// Asks the kernel to find out whether a neighbour answers (`NTF_USE`).
pub(super) fn solicitation(index: u32, ip: IpAddr) -> Request {
    let mut message = neighbour(index, ip, None);
    message.header.state = NeighbourState::None;
    message.header.flags = NeighbourFlags::Use;
    (RouteNetlinkMessage::NewNeighbour(message).into(), NLM_F_CREATE)
}

fn neighbour(index: u32, ip: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let mut message = entry(index, family, mac);
    message.attributes.push(NeighbourAttribute::Destination(destination(ip)));
    message
}

/// An entry of the device's own forwarding database; without `dst` it stands for all destinations of `mac`.
fn fdb(index: u32, mac: Mac, dst: Option<IpAddr>) -> NeighbourMessage {
    let mut message = entry(index, AddressFamily::Bridge, Some(mac));
    message.header.flags = NeighbourFlags::Own;
    message.attributes.extend(dst.map(|dst| NeighbourAttribute::Destination(destination(dst))));
    message
}

fn entry(index: u32, family: AddressFamily, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unspec;
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())));
    message
}

fn destination(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }
}

fn route(route: &Route, index: Option<u32>) -> io::Result<RouteMessage> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.dst.network(), route.dst.prefix_len())
        .map_err(invalid)?
        .protocol(RouteProtocol::from(route.protocol));
    if let Some(via) = route.via.filter(|_| route.nexthop.is_none()) {
        builder = builder.gateway(via).map_err(invalid)?;
    }
    if let Some(index) = index {
        builder = builder.output_interface(index);
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    if route.onlink && route.nexthop.is_none() {
        builder = builder.onlink();
    }
    let mut message = builder.build();
    message.attributes.extend(route.nexthop.map(|id| RouteAttribute::NhId(id.get())));
    Ok(message)
}

fn blackhole(dst: IpNet) -> io::Result<RouteMessage> {
    let mut message = route(&Route { metric: BLACKHOLE_METRIC, ..Route::ours(dst) }, None)?;
    message.header.kind = RouteType::BlackHole;
    Ok(message)
}

fn invalid(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
}
