//! Echo requests and answers as bytes; pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use subnet::Family;

/// Random bytes at the begin of a request's data, which an answer has to repeat.
pub type Token = [u8; 16];

/// Bytes of the ICMP header of an echo message.
const HEADER: usize = 8;
/// Bytes of an IPv4 header without options.
const HEADER_V4: usize = 20;
/// Bytes of an IPv6 header without extensions.
const HEADER_V6: usize = 40;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
/// Type of an answer of ICMPv6.
pub(super) const ECHO_REPLY_V6: u8 = 129;

/// Length of the smallest request of either family as an IP packet, in bytes.
pub const MIN_PACKET: u16 = (HEADER_V6 + HEADER + size_of::<Token>()) as u16;

/// Bytes of an IP packet before the data of an echo message.
const fn overhead(family: Family) -> usize {
    HEADER
        + match family {
            Family::V4 => HEADER_V4,
            Family::V6 => HEADER_V6,
        }
}

/// Writes a request that makes an IP packet of `packet` bytes, at least one with the whole token.
///
/// The kernel computes the checksum of ICMPv6, which covers addresses that it chooses.
pub(super) fn write_request(
    into: &mut Vec<u8>,
    family: Family,
    (id, sequence): (u16, u16),
    token: &Token,
    packet: u16,
) {
    let data = usize::from(packet).saturating_sub(overhead(family)).max(token.len());
    into.clear();
    into.extend([if family == Family::V4 { ECHO_REQUEST } else { ECHO_REQUEST_V6 }, 0, 0, 0]);
    into.extend(id.to_be_bytes());
    into.extend(sequence.to_be_bytes());
    into.extend(token);
    into.resize(HEADER + data, 0);
    if family == Family::V4 {
        let sum = checksum(into).to_be_bytes();
        into[2..4].copy_from_slice(&sum);
    }
}

/// What the first bytes of an answer say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The sender's name for the series of requests.
    pub id: u16,
    /// The request that is answered.
    pub sequence: u16,
    /// What the request's data began with.
    pub token: Token,
    /// Bytes of the IP packet, of which `bytes` may be the first.
    pub packet: usize,
}

/// Reads an answer of which the first bytes are known: with its IP header if it is IPv4, without it if it is IPv6, as raw
/// sockets give them. `len` is its whole length. Anything else gives nothing.
pub(super) fn read_answer(family: Family, bytes: &[u8], len: usize) -> Option<Answer> {
    let (header, reply, before) = match family {
        Family::V4 => (4 * usize::from(bytes.first()? & 0xf), ECHO_REPLY, 0),
        Family::V6 => (0, ECHO_REPLY_V6, HEADER_V6),
    };
    let message = bytes.get(header..)?;
    let number = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    (message.first() == Some(&reply) && message.get(1) == Some(&0)).then_some(())?;
    Some(Answer {
        id: number(4)?,
        sequence: number(6)?,
        token: message.get(HEADER..HEADER + size_of::<Token>())?.try_into().ok()?,
        packet: len + before,
    })
}

/// The address without a mapping of IPv4 into IPv6.
pub(super) fn plain(addr: IpAddr) -> IpAddr {
    addr.to_canonical()
}

/// The unspecified address of a family.
pub(super) fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_have_the_length_that_makes_the_packet() {
        let mut bytes = Vec::new();
        for (family, packet, expected) in [
            (Family::V4, 1450, 1430),
            (Family::V6, 1430, 1390),
            (Family::V4, 0, 24),
            (Family::V6, MIN_PACKET, 24),
        ] {
            write_request(&mut bytes, family, (7, 9), &[5; 16], packet);
            assert_eq!(bytes.len(), expected, "{family} {packet}");
            assert_eq!(bytes[4..8], [0, 7, 0, 9]);
        }
        write_request(&mut bytes, Family::V4, (0x1234, 1), &[0xff; 16], 1451);
        assert_eq!(checksum(&bytes), 0, "the checksum of a message with its checksum is 0");
    }

    #[test]
    fn an_answer_is_read_behind_options_and_nothing_else_is_an_answer() {
        let mut message = vec![0, 0, 0, 0, 0x12, 0x34, 0, 3];
        message.extend([7; 16]);
        let expected = Answer { id: 0x1234, sequence: 3, token: [7; 16], packet: 48 };
        for options in [0usize, 4, 40] {
            let mut packet = vec![0x45 + (options / 4) as u8];
            packet.resize(20 + options, 0);
            packet.extend(&message);
            let len = packet.len();
            let read = read_answer(Family::V4, &packet, len);
            assert_eq!(read, Some(Answer { packet: 44 + options, ..expected }));
            assert_eq!(read_answer(Family::V4, &packet[..len - 1], len), None);
            packet[20 + options] = ECHO_REQUEST;
            assert_eq!(read_answer(Family::V4, &packet, len), None);
        }
        message[0] = ECHO_REPLY_V6;
        assert_eq!(read_answer(Family::V6, &message, 24), Some(Answer { packet: 64, ..expected }));
        assert_eq!(read_answer(Family::V6, &message[..23], 24), None);
    }

    proptest! {
        #[test]
        fn arbitrary_packets_never_panic(bytes: Vec<u8>, len: u16) {
            for family in Family::BOTH {
                read_answer(family, &bytes, len.into());
            }
        }
    }
}
