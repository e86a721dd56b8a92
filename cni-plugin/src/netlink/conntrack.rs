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
const SOURCE_ADDRESS: u32 = 1;
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
    for tuple in [ORIGINAL, REPLY] {
        // The flags of the filter are numbered as the tuples are. Kernels before 5.8 tell everything instead.
        let message = Message::new(GET, libc::NLM_F_DUMP, &[family, 0, 0, 0])
            .nested(tuple, |one| one.nested(ADDRESSES, |one| one.with(source, &octets(address))))
            .nested(FILTER, |filter| filter.with_u32(tuple, SOURCE_ADDRESS));
        let found = socket.ask(message)?;
        let own = found.iter().filter(|reply| is_from(reply, tuple, source, address).unwrap_or(false));
        delete(socket, own.filter_map(|reply| deletion(reply, family)).collect())?;
    }
    Ok(())
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
