//! Routes.

use std::net::IpAddr;

use ipnet::IpNet;

use super::address::{family, from_octets, octets};
use super::message::{Message, Reply, attribute, attributes, number};
use super::socket::Socket;
use super::{Errno, link};

/// `RTAX_MTU` and `RTAX_ADVMSS`, in `RTA_METRICS`.
const METRIC_MTU: u16 = 2;
const METRIC_ADVMSS: u16 = 8;
/// `RTA_VIA`: a gateway of the other family.
const VIA: u16 = 18;

/// A route by a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) destination: IpNet,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) mtu: u32,
    pub(crate) advmss: u32,
    pub(crate) priority: u32,
    pub(crate) table: Option<u32>,
    pub(crate) scope: Option<u8>,
}

/// Adds a route by the link.
pub(crate) fn add(index: u32, route: &Route) -> Message {
    let destination = route.destination.addr();
    // As Go does: what has no gateway leads to neighbours.
    let universe = libc::RT_SCOPE_UNIVERSE;
    let scope = route.scope.unwrap_or(if route.gateway.is_some() { universe } else { libc::RT_SCOPE_LINK });
    let table = route.table.unwrap_or(libc::RT_TABLE_MAIN.into());
    let fixed = [
        family(destination) as u8,
        route.destination.prefix_len(),
        0,
        0,
        u8::try_from(table).unwrap_or(libc::RT_TABLE_UNSPEC),
        libc::RTPROT_BOOT,
        scope,
        libc::RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    // Without NLM_F_EXCL, as in Go: two interfaces of a pod may have a route to the same network.
    let create = libc::NLM_F_CREATE | libc::NLM_F_ACK;
    let mut message = Message::new(libc::RTM_NEWROUTE, create, &fixed);
    if route.destination.prefix_len() > 0 {
        message = message.with(libc::RTA_DST, &octets(route.destination.network()));
    }
    if let Some(gateway) = route.gateway {
        message = message.with(libc::RTA_GATEWAY, &octets(gateway));
    }
    message = message.with_u32(libc::RTA_OIF, index).with_u32(libc::RTA_TABLE, table);
    if route.priority != 0 {
        message = message.with_u32(libc::RTA_PRIORITY, route.priority);
    }
    if route.mtu == 0 && route.advmss == 0 {
        return message;
    }
    message.nested(libc::RTA_METRICS, |mut metrics| {
        for (kind, value) in [(METRIC_MTU, route.mtu), (METRIC_ADVMSS, route.advmss)] {
            if value != 0 {
                metrics = metrics.with_u32(kind, value);
            }
        }
        metrics
    })
}

/// A route that the kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) destination: IpNet,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) table: u32,
}

/// All routes of a family.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn all(socket: &mut Socket, ipv6: bool) -> Result<Vec<Found>, Errno> {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    let mut fixed = [0; 12];
    fixed[0] = family as u8;
    match socket.ask(Message::new(libc::RTM_GETROUTE, libc::NLM_F_DUMP, &fixed)) {
        Ok(replies) => Ok(replies.iter().filter_map(parse).collect()),
        // Nothing was ever routed in this namespace.
        Err(Errno::NO_ENTRY) => Ok(Vec::new()),
        Err(errno) => Err(errno),
    }
}

/// The name of the link by which an address is reached.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn link_to(socket: &mut Socket, address: IpAddr) -> Result<Option<String>, Errno> {
    let bytes = octets(address);
    let mut fixed = [0; 12];
    fixed[0] = family(address) as u8;
    fixed[1] = (bytes.len() * 8) as u8;
    let message = Message::new(libc::RTM_GETROUTE, libc::NLM_F_ACK, &fixed).with(libc::RTA_DST, &bytes);
    let replies = socket.ask(message)?;
    let index =
        replies.first().and_then(|reply| attribute(reply.payload.get(12..)?, libc::RTA_OIF)).map(number);
    match index {
        Some(index) => link::name_of(socket, index),
        None => Ok(None),
    }
}

fn parse(reply: &Reply) -> Option<Found> {
    let (fixed, rest) = reply.payload.split_at_checked(12)?;
    let nowhere: IpAddr = if i32::from(fixed[0]) == libc::AF_INET6 { [0; 16].into() } else { [0; 4].into() };
    let mut found =
        Found { destination: IpNet::new(nowhere, fixed[1]).ok()?, gateway: None, table: fixed[4].into() };
    for (kind, payload) in attributes(rest) {
        match kind {
            libc::RTA_DST => found.destination = IpNet::new(from_octets(payload)?, fixed[1]).ok()?,
            libc::RTA_GATEWAY => found.gateway = from_octets(payload),
            libc::RTA_TABLE => found.table = number(payload),
            _ => {}
        }
    }
    if found.gateway.is_none() {
        found.gateway = attribute(rest, VIA).and_then(|via| from_octets(via.get(2..)?));
    }
    Some(found)
}
