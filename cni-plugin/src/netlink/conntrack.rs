//! Connections that the kernel tracks: those of UDP to a port, and those of an address, can be forgotten.

use std::net::IpAddr;

use super::Errno;
use super::address::{family as address_family, octets};
use super::message::{Message, Reply, attribute};
use super::socket::Socket;

/// `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE` of `NFNL_SUBSYS_CTNETLINK`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// `CTA_TUPLE_ORIG`, `CTA_ZONE`; in a tuple `CTA_TUPLE_PROTO`, and in that the protocol and the destination's port.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const ZONE: u16 = 18;
/// `CTA_FILTER`, and in it the flags of which parts of the original and of the reply's tuple have to match.
const FILTER: u16 = 25;
const MATCH_SOURCE: u32 = 1;
const MATCH_PROTOCOL: u32 = 1 << 3;
const MATCH_DESTINATION_PORT: u32 = 1 << 5;
/// In a tuple `CTA_TUPLE_IP`, and in that the source by family.
const ADDRESSES: u16 = 1;
const SOURCE_V4: u16 = 1;
const SOURCE_V6: u16 = 3;
const PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const DESTINATION_PORT: u16 = 3;

/// Forgets the connections of UDP to any of `ports`: what was sent before the port led to a pod would go on as it was.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn forget_udp(socket: &mut Socket, ipv6: bool, ports: &[u16]) -> Result<(), Errno> {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    let to = |port: &u16| {
        let protocol = |one: Message| {
            one.with(PROTOCOL_NUMBER, &[libc::IPPROTO_UDP as u8]).with(DESTINATION_PORT, &port.to_be_bytes())
        };
        Message::new(DELETE, libc::NLM_F_ACK, &[family, 0, 0, 0])
            .nested(ORIGINAL, |one| one.nested(PROTOCOL, protocol))
            .nested(FILTER, |filter| filter.with_u32(ORIGINAL, MATCH_PROTOCOL | MATCH_DESTINATION_PORT))
    };
    if flush(socket, ports.iter().map(to).collect())? {
        return Ok(());
    }
    let found = socket.ask(Message::new(GET, libc::NLM_F_DUMP, &[family, 0, 0, 0]))?;
    let stale = found.iter().filter(|reply| is_udp_to(reply, ports).unwrap_or(false));
    delete(socket, stale.filter_map(|reply| deletion(reply, family)).collect())
}

/// Forgets all connections of an address: those that others began with it, also before it had a pod, and those of the pod
/// that had it before.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn forget_address(socket: &mut Socket, address: IpAddr) -> Result<(), Errno> {
    let family = address_family(address) as u8;
    let source = if address.is_ipv4() { SOURCE_V4 } else { SOURCE_V6 };
    let is_of = |reply: &&Reply, tuple| is_from(reply, tuple, source, address).unwrap_or(false);
    if address.is_ipv6() {
        // A filter by an IPv6 address means all others (`ctnetlink_filter_match_tuple` of Linux 6.18 compares the wrong way round).
        let found = socket.ask(Message::new(GET, libc::NLM_F_DUMP, &[family, 0, 0, 0]))?;
        let own = found.iter().filter(|reply| is_of(reply, ORIGINAL) || is_of(reply, REPLY));
        return delete(socket, own.filter_map(|reply| deletion(reply, family)).collect());
    }
    // The flags of the filter are numbered as the tuples are.
    let about = |kind: u16, flags: i32, tuple: u16| {
        Message::new(kind, flags, &[family, 0, 0, 0])
            .nested(tuple, |one| one.nested(ADDRESSES, |one| one.with(source, &octets(address))))
            .nested(FILTER, |filter| filter.with_u32(tuple, MATCH_SOURCE))
    };
    let tuples = [ORIGINAL, REPLY];
    if flush(socket, tuples.map(|tuple| about(DELETE, libc::NLM_F_ACK, tuple)).into())? {
        return Ok(());
    }
    for tuple in tuples {
        // Kernels before 5.8 know no filter and tell everything.
        let found = socket.ask(about(GET, libc::NLM_F_DUMP, tuple))?;
        let own = found.iter().filter(|reply| is_of(reply, tuple));
        delete(socket, own.filter_map(|reply| deletion(reply, family)).collect())?;
    }
    Ok(())
}

/// Has the kernel forget all that match one of these filters: it passes empty places of its table without locking each,
/// as a dump does, which takes ten times as long. Says whether it can: Linux 6.1 takes the part of a tuple for a
/// whole one and refuses it, 6.18 does not.
fn flush(socket: &mut Socket, filters: Vec<Message>) -> Result<bool, Errno> {
    match socket.execute(filters).map_err(Errno::from) {
        Ok(()) => Ok(true),
        Err(Errno::INVALID | Errno::NOT_SUPPORTED) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn delete(socket: &mut Socket, deletions: Vec<Message>) -> Result<(), Errno> {
    if deletions.is_empty() {
        return Ok(());
    }
    for outcome in socket.outcomes(deletions).map_err(Errno::from)? {
        match outcome {
            Ok(()) | Err(Errno::NO_ENTRY) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn is_from(reply: &Reply, tuple: u16, source: u16, address: IpAddr) -> Option<bool> {
    let addresses = attribute(attribute(reply.payload.get(4..)?, tuple)?, ADDRESSES)?;
    Some(attribute(addresses, source)? == octets(address))
}

fn is_udp_to(reply: &Reply, ports: &[u16]) -> Option<bool> {
    let protocol = attribute(attribute(reply.payload.get(4..)?, ORIGINAL)?, PROTOCOL)?;
    let port = u16::from_be_bytes(attribute(protocol, DESTINATION_PORT)?.try_into().ok()?);
    let udp = attribute(protocol, PROTOCOL_NUMBER)? == [libc::IPPROTO_UDP as u8];
    Some(udp && ports.contains(&port))
}

fn deletion(reply: &Reply, family: u8) -> Option<Message> {
    let attributes = reply.payload.get(4..)?;
    let original = attribute(attributes, ORIGINAL)?;
    let message = Message::new(DELETE, libc::NLM_F_ACK, &[family, 0, 0, 0]);
    let message = message.nested(ORIGINAL, |tuple| tuple.with_raw(original));
    Some(match attribute(attributes, ZONE) {
        Some(zone) => message.with(ZONE, zone),
        None => message,
    })
}
