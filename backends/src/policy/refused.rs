//! Packets that policies refuse, as the kernel tells them to the NFLOG group that the tables name.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink::socket::NetlinkSocket;
use crate::netlink::wire::{Head, Message, Writer, find, find_string};

/// `NFNL_SUBSYS_ULOG`, and its messages.
const SUBSYSTEM: u16 = 4 << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIG: u16 = SUBSYSTEM | 1;
/// Attributes of a configuration, `NFULNL_CFG_CMD_BIND`, and `NFULNL_COPY_PACKET`.
const CONFIG_COMMAND: u16 = 1;
const CONFIG_MODE: u16 = 2;
const CONFIG_TIMEOUT: u16 = 4;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
/// Attributes of a packet.
const PAYLOAD: u16 = 9;
const PREFIX: u16 = 10;
/// How much of a packet is told: its headers.
const HEADERS: u32 = 128;
/// Packets are told at most so long after they came, in hundredths of a second.
const DELAY: u32 = 10;
/// How the rules of our tables begin what they log.
const OURS: &str = "flannel-policy ";

/// A packet that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What refused it.
    pub by: RefusedBy,
    /// Who sent it.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// The number of its protocol.
    pub protocol: u8,
    /// The ports of source and destination, of a protocol that has them.
    pub ports: Option<(u16, u16)>,
}

/// What refuses packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedBy {
    /// Policies about the source.
    Egress,
    /// Policies about the destination.
    Ingress,
    /// Something else.
    Other,
}

/// Hears of refused packets.
pub struct RefusedPackets {
    socket: NetlinkSocket,
}

impl RefusedPackets {
    /// Listens to a group in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel's; `EBUSY` when another program listens to the group.
    pub fn listen(group: u16) -> io::Result<Self> {
        let mut socket = NetlinkSocket::open(NETLINK_NETFILTER)?;
        configure(&mut socket, group, |w| w.bytes_attribute(CONFIG_COMMAND, &[BIND]))?;
        configure(&mut socket, group, |w| {
            let [a, b, c, d] = HEADERS.to_be_bytes();
            w.bytes_attribute(CONFIG_MODE, &[a, b, c, d, COPY_PACKET, 0]);
            w.u32(CONFIG_TIMEOUT, DELAY);
        })?;
        Ok(Self { socket })
    }

    /// Waits for packets, some seconds at most.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self) -> io::Result<Vec<Refused>> {
        let mut packets = Vec::new();
        self.socket.hear(|message| packets.extend(read(message)))?;
        Ok(packets)
    }
}

fn configure(socket: &mut NetlinkSocket, group: u16, body: impl FnOnce(&mut Writer)) -> io::Result<()> {
    let [high, low] = group.to_be_bytes();
    let sequence = socket.next_sequence();
    let mut writer = Writer::default();
    let head = Head { kind: CONFIG, flags: NLM_F_REQUEST | NLM_F_ACK, sequence, own: [0, 0, high, low] };
    writer.message(head, body);
    let mut refusal = None;
    socket.batch(writer.bytes(), 1, Some(0), |_, refused| refusal = Some(refused.error))?;
    refusal.map_or(Ok(()), Err)
}

/// A packet of ours. `None` for what another rule logs to the same group.
fn read(message: &Message<'_>) -> Option<Refused> {
    if message.kind != PACKET {
        return None;
    }
    let attributes = message.attributes();
    let prefix = find_string(attributes, PREFIX)?;
    let by = match prefix.strip_prefix(OURS)? {
        chain if chain.starts_with("in-") => RefusedBy::Ingress,
        chain if chain.starts_with("eg-") => RefusedBy::Egress,
        _ => RefusedBy::Other,
    };
    packet(find(attributes, PAYLOAD)?, by)
}

fn packet(bytes: &[u8], by: RefusedBy) -> Option<Refused> {
    let (source, destination, protocol, rest): (IpAddr, IpAddr, u8, &[u8]) = match bytes.first()? >> 4 {
        4 => {
            let header = usize::from(bytes[0] & 15) * 4;
            let at = |offset: usize| <[u8; 4]>::try_from(bytes.get(offset..offset + 4)?).ok();
            // Only the first fragment has ports.
            let first = bytes.get(6..8)?[0] & 0x1f == 0 && bytes[7] == 0;
            let rest = bytes.get(header..).filter(|_| first).unwrap_or_default();
            (at(12)?.into(), at(16)?.into(), *bytes.get(9)?, rest)
        }
        6 => {
            let at = |offset: usize| <[u8; 16]>::try_from(bytes.get(offset..offset + 16)?).ok();
            (at(8)?.into(), at(24)?.into(), *bytes.get(6)?, bytes.get(40..).unwrap_or_default())
        }
        _ => return None,
    };
    let port = |offset: usize| Some(u16::from_be_bytes(rest.get(offset..offset + 2)?.try_into().ok()?));
    let ports = matches!(protocol, 6 | 17 | 132).then(|| port(0).zip(port(2))).flatten();
    Some(Refused { by, source, destination, protocol, ports })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_and_ports_are_read_from_the_headers() {
        let mut v4 = vec![0x46, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 244, 1, 7, 10, 244, 3, 4, 1, 1, 1, 0];
        v4.extend([0x80, 0, 0x15, 0x38]);
        let expected = Refused {
            by: RefusedBy::Ingress,
            source: [10, 244, 1, 7].into(),
            destination: [10, 244, 3, 4].into(),
            protocol: 6,
            ports: Some((32768, 5432)),
        };
        assert_eq!(packet(&v4, RefusedBy::Ingress), Some(expected));
        v4[7] = 9;
        assert_eq!(packet(&v4, RefusedBy::Ingress), Some(Refused { ports: None, ..expected }));
        let mut v6 = vec![0x60, 0, 0, 0, 0, 8, 58, 64];
        v6.extend([0xfd; 32]);
        v6.extend([128, 0, 0, 0]);
        let read = packet(&v6, RefusedBy::Other).unwrap();
        assert_eq!((read.protocol, read.ports, read.source), (58, None, [0xfd; 16].into()));
        assert_eq!(packet(&[0x10; 60], RefusedBy::Other), None);
    }

    proptest! {
        #[test]
        fn arbitrary_packets_never_panic(bytes: Vec<u8>) {
            packet(&bytes, RefusedBy::Other);
            read(&Message { kind: PACKET, flags: 0, sequence: 0, port: 0, payload: &bytes });
        }
    }
}
