//! Connections that the kernel tracks: those of UDP to a port can be forgotten.

use super::Errno;
use super::message::{Message, Reply, attribute};
use super::socket::Socket;

/// `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE` of `NFNL_SUBSYS_CTNETLINK`.
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// `CTA_TUPLE_ORIG`, `CTA_ZONE`; in a tuple `CTA_TUPLE_PROTO`, and in that the protocol and the destination's port.
const ORIGINAL: u16 = 1;
const ZONE: u16 = 18;
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
    let stale: Vec<_> = found.iter().filter_map(|reply| deletion(reply, family, ports)).collect();
    if stale.is_empty() {
        return Ok(());
    }
    for outcome in socket.outcomes(stale).map_err(Errno::from)? {
        match outcome {
            Ok(()) | Err(Errno::NO_ENTRY) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn deletion(reply: &Reply, family: u8, ports: &[u16]) -> Option<Message> {
    let attributes = reply.payload.get(4..)?;
    let original = attribute(attributes, ORIGINAL)?;
    let protocol = attribute(original, PROTOCOL)?;
    let port = u16::from_be_bytes(attribute(protocol, DESTINATION_PORT)?.try_into().ok()?);
    let udp = attribute(protocol, PROTOCOL_NUMBER)? == [libc::IPPROTO_UDP as u8];
    if !udp || !ports.contains(&port) {
        return None;
    }
    let message = Message::new(DELETE, libc::NLM_F_ACK, &[family, 0, 0, 0]);
    let message = message.nested(ORIGINAL, |tuple| tuple.with_raw(original));
    Some(match attribute(attributes, ZONE) {
        Some(zone) => message.with(ZONE, zone),
        None => message,
    })
}
