//! ICMP errors about packets that can't be carried (RFC 792, RFC 1812 §4.3, RFC 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use pnet::packet::icmp::{self, IcmpCode, IcmpPacket, IcmpType, MutableIcmpPacket};
use pnet::packet::icmpv6::{self, Icmpv6Code, Icmpv6Packet, Icmpv6Type, MutableIcmpv6Packet};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv4::{Ipv4Flags, MutableIpv4Packet};
use pnet::packet::ipv6::MutableIpv6Packet;

use super::packet::{Header, ICMP, ICMPV6, V4_HEADER, V6_HEADER, write_header_checksum};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IcmpError {
    /// No peer has the destination.
    NetUnreachable,
    /// The packet may not be fragmented, and is longer than this.
    TooBig(u16),
    /// Its time to live is over.
    TimeExceeded,
}

impl IcmpError {
    /// Type and code.
    fn v4(self) -> (u8, u8) {
        match self {
            Self::NetUnreachable => (3, 0),
            Self::TooBig(_) => (3, 4),
            Self::TimeExceeded => (11, 0),
        }
    }

    fn v6(self) -> (u8, u8) {
        match self {
            Self::NetUnreachable => (1, 0),
            Self::TooBig(_) => (2, 0),
            Self::TimeExceeded => (3, 0),
        }
    }

    /// Ends the header of the message, in both families (RFC 1191 §4, RFC 4443 §3.2).
    fn mtu(self) -> [u8; 2] {
        if let Self::TooBig(mtu) = self { mtu.to_be_bytes() } else { [0; 2] }
    }
}

const ICMP_HEADER: usize = 8;
/// Bytes of the offending packet after its header, in IPv4.
const QUOTED: usize = 8;
const TTL: u8 = 64;
/// Echo request and reply, timestamp, information, address mask: messages that are no errors.
const QUERIES: [u8; 9] = [0, 8, 9, 10, 13, 14, 15, 16, 17];
/// From here on, messages of ICMPv6 are no errors; but a redirect is as bad.
const FIRST_INFORMATIONAL: u8 = 128;
const REDIRECT: u8 = 137;

/// The longest reply: what every link with IPv6 carries (RFC 4443 §2.4).
pub(crate) const LONGEST: usize = 1280;

/// Writes the error about `packet` into `reply`, and gives its length; `None` where none may be sent
/// (RFC 1812 §4.3.2.7, RFC 4443 §2.4): about errors, about later fragments, to or about groups of hosts.
pub(crate) fn reply(
    trouble: IcmpError,
    from: IpAddr,
    header: &Header,
    packet: &[u8],
    reply: &mut [u8; LONGEST],
) -> Option<usize> {
    // What is in a later fragment is unknown.
    let (protocol, at) = header.transport(packet)?;
    let kind = packet.get(at);
    match (from, header.src, header.dst) {
        (IpAddr::V4(from), IpAddr::V4(src), IpAddr::V4(dst)) if single(src) && single(dst) => {
            let error = protocol == ICMP && kind.is_none_or(|kind| !QUERIES.contains(kind));
            if error { None } else { v4(trouble, (from, src), header, packet, reply) }
        }
        (IpAddr::V6(from), IpAddr::V6(src), IpAddr::V6(dst))
            if !(src.is_unspecified() || src.is_loopback() || src.is_multicast() || dst.is_multicast()) =>
        {
            let error = protocol == ICMPV6
                && kind.is_none_or(|kind| *kind < FIRST_INFORMATIONAL || *kind == REDIRECT);
            if error { None } else { v6(trouble, (from, src), header, packet, reply) }
        }
        _ => None,
    }
}

fn single(addr: Ipv4Addr) -> bool {
    !(addr.is_unspecified() || addr.is_loopback() || addr.is_broadcast() || addr.is_multicast())
}

fn v4(
    trouble: IcmpError,
    (from, to): (Ipv4Addr, Ipv4Addr),
    header: &Header,
    packet: &[u8],
    reply: &mut [u8; LONGEST],
) -> Option<usize> {
    let quoted = &packet[..header.total_len.min(header.header_len + QUOTED)];
    let len = V4_HEADER + ICMP_HEADER + quoted.len();
    let (head, message) = reply[..len].split_at_mut(V4_HEADER);
    head.fill(0);
    let mut ip = MutableIpv4Packet::new(head)?;
    ip.set_version(4);
    ip.set_header_length(5);
    // Network control (RFC 1812 §4.3.2.5).
    ip.set_dscp(0x30);
    ip.set_total_length(len as u16);
    ip.set_flags(Ipv4Flags::DontFragment);
    ip.set_ttl(TTL);
    ip.set_next_level_protocol(IpNextHeaderProtocols::Icmp);
    ip.set_source(from);
    ip.set_destination(to);
    write_header_checksum(head);
    fill(trouble, quoted, message);
    let (kind, code) = trouble.v4();
    let mut error = MutableIcmpPacket::new(message)?;
    error.set_icmp_type(IcmpType(kind));
    error.set_icmp_code(IcmpCode(code));
    let checksum = icmp::checksum(&IcmpPacket::new(message)?);
    MutableIcmpPacket::new(message)?.set_checksum(checksum);
    Some(len)
}

fn v6(
    trouble: IcmpError,
    (from, to): (Ipv6Addr, Ipv6Addr),
    header: &Header,
    packet: &[u8],
    reply: &mut [u8; LONGEST],
) -> Option<usize> {
    let quoted = &packet[..header.total_len.min(LONGEST - V6_HEADER - ICMP_HEADER)];
    let len = V6_HEADER + ICMP_HEADER + quoted.len();
    let (head, message) = reply[..len].split_at_mut(V6_HEADER);
    head.fill(0);
    let mut ip = MutableIpv6Packet::new(head)?;
    ip.set_version(6);
    ip.set_payload_length((len - V6_HEADER) as u16);
    ip.set_next_header(IpNextHeaderProtocols::Icmpv6);
    ip.set_hop_limit(TTL);
    ip.set_source(from);
    ip.set_destination(to);
    fill(trouble, quoted, message);
    let (kind, code) = trouble.v6();
    let mut error = MutableIcmpv6Packet::new(message)?;
    error.set_icmpv6_type(Icmpv6Type(kind));
    error.set_icmpv6_code(Icmpv6Code(code));
    let checksum = icmpv6::checksum(&Icmpv6Packet::new(message)?, &from, &to);
    MutableIcmpv6Packet::new(message)?.set_checksum(checksum);
    Some(len)
}

/// What both families have in common: a header that may end with an MTU, and the packet in question.
fn fill(trouble: IcmpError, quoted: &[u8], message: &mut [u8]) {
    message[..ICMP_HEADER].fill(0);
    message[6..ICMP_HEADER].copy_from_slice(&trouble.mtu());
    message[ICMP_HEADER..].copy_from_slice(quoted);
}

/// Keeps errors from becoming a flood of their own: so many at once, and so many a second on average.
#[derive(Debug)]
pub(crate) struct Limiter {
    tokens: u32,
    since: Instant,
}

impl Limiter {
    const BURST: u32 = 50;
    /// One more each time this is over: 1,000 a second, like the kernel's `icmp_msgs_per_sec`.
    const EVERY: Duration = Duration::from_millis(1);

    /// A limiter that was not used yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: Self::BURST, since: now }
    }

    /// Whether one more may be sent.
    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        let new = now.saturating_duration_since(self.since).as_nanos() / Self::EVERY.as_nanos();
        if new > 0 {
            self.tokens = Self::BURST.min(self.tokens + new.min(Self::BURST.into()) as u32);
            self.since = now;
        }
        let allowed = self.tokens > 0;
        self.tokens -= u32::from(allowed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{TCP, UDP, checksum_ok};
    use super::*;

    const FROM: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 0));
    const FROM_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 0));

    fn packet(protocol: u8, edit: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut packet = vec![0u8; 60];
        packet[0] = 0x45;
        packet[3] = 60;
        packet[8] = 1;
        packet[9] = protocol;
        packet[12..20].copy_from_slice(&[10, 244, 1, 5, 10, 244, 9, 9]);
        packet[20..].iter_mut().zip(1..).for_each(|(byte, number)| *byte = number);
        edit(&mut packet);
        packet
    }

    fn answer(trouble: IcmpError, packet: &[u8]) -> Option<Vec<u8>> {
        let mut room = [0xaa; LONGEST];
        let header = Header::parse(packet).unwrap();
        let from = if header.is_v6() { FROM_V6 } else { FROM };
        reply(trouble, from, &header, packet, &mut room).map(|len| room[..len].to_vec())
    }

    #[test]
    fn an_error_names_the_trouble_and_quotes_the_packet() {
        let offending = packet(UDP, |_| ());
        for (trouble, kind, code, mtu) in [
            (IcmpError::NetUnreachable, 3, 0, [0, 0]),
            (IcmpError::TooBig(1372), 3, 4, [0x05, 0x5c]),
            (IcmpError::TimeExceeded, 11, 0, [0, 0]),
        ] {
            let answer = answer(trouble, &offending).unwrap();
            let header = Header::parse(&answer).unwrap();
            assert_eq!((header.src, header.dst), (FROM, Ipv4Addr::new(10, 244, 1, 5).into()));
            assert_eq!((header.total_len, header.protocol), (answer.len(), ICMP));
            assert!(checksum_ok(&answer[..20]));
            assert_eq!((answer[20], answer[21], [answer[26], answer[27]]), (kind, code, mtu));
            assert_eq!(answer[28..], offending[..28]);
            assert_eq!(pnet::util::checksum(&answer[20..], usize::MAX), 0);
        }
    }

    #[test]
    fn there_is_no_error_about_an_error_a_fragment_or_a_group() {
        assert!(answer(IcmpError::TimeExceeded, &packet(TCP, |_| ())).is_some());
        assert!(answer(IcmpError::TimeExceeded, &packet(ICMP, |packet| packet[20] = 8)).is_some());
        for silent in [
            packet(ICMP, |packet| packet[20] = 3),
            packet(ICMP, |packet| packet[20] = 11),
            packet(UDP, |packet| packet[7] = 1),
            packet(UDP, |packet| packet[16] = 224),
            packet(UDP, |packet| packet[12..16].fill(0)),
        ] {
            assert_eq!(answer(IcmpError::TimeExceeded, &silent), None);
        }
    }

    const POD: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, 5);

    fn packet_v6(protocol: u8, payload: usize, edit: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut packet = vec![0u8; 40 + payload];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&(payload as u16).to_be_bytes());
        (packet[6], packet[7]) = (protocol, 1);
        packet[8..24].copy_from_slice(&POD.octets());
        packet[24..40].copy_from_slice(&Ipv6Addr::new(0xfd00, 0, 0, 9, 0, 0, 0, 9).octets());
        packet[40..].iter_mut().zip((1..=250).cycle()).for_each(|(byte, number)| *byte = number);
        edit(&mut packet);
        packet
    }

    #[test]
    fn an_error_of_ipv6_quotes_as_much_as_every_link_carries() {
        for (payload, quoted) in [(0, 40), (33, 73), (1192, 1232), (1193, 1232), (9000, 1232)] {
            let offending = packet_v6(UDP, payload, |_| ());
            for (trouble, kind, mtu) in [
                (IcmpError::NetUnreachable, 1, [0; 4]),
                (IcmpError::TooBig(1452), 2, [0, 0, 0x05, 0xac]),
                (IcmpError::TimeExceeded, 3, [0; 4]),
            ] {
                let answer = answer(trouble, &offending).unwrap();
                let header = Header::parse(&answer).unwrap();
                assert_eq!((header.src, header.dst), (FROM_V6, POD.into()));
                assert_eq!((header.total_len, header.protocol), (answer.len(), ICMPV6));
                assert_eq!((answer[40], answer[41], &answer[44..48]), (kind, 0, &mtu[..]));
                assert_eq!(answer[48..], offending[..quoted]);
                let message = pnet::packet::icmpv6::Icmpv6Packet::new(&answer[40..]).unwrap();
                let IpAddr::V6(from) = FROM_V6 else { unreachable!() };
                assert_eq!(message.get_checksum(), pnet::packet::icmpv6::checksum(&message, &from, &POD));
            }
        }
    }

    #[test]
    fn there_is_no_error_of_ipv6_about_an_error_a_later_fragment_or_a_group() {
        let hidden = |kind: u8| {
            packet_v6(0, 24, |packet| {
                packet[40..48].copy_from_slice(&[ICMPV6, 0, 1, 4, 0, 0, 0, 0]);
                packet[48] = kind;
            })
        };
        let fragment = |place: u8| {
            packet_v6(44, 24, |packet| packet[40..48].copy_from_slice(&[UDP, 0, 0, place, 0, 0, 0, 0]))
        };
        for told in [
            packet_v6(TCP, 20, |_| ()),
            packet_v6(ICMPV6, 20, |packet| packet[40] = 128),
            hidden(129),
            fragment(1),
        ] {
            assert!(answer(IcmpError::TimeExceeded, &told).is_some());
        }
        for silent in [
            packet_v6(ICMPV6, 20, |packet| packet[40] = 1),
            packet_v6(ICMPV6, 20, |packet| packet[40] = 137),
            packet_v6(ICMPV6, 0, |_| ()),
            hidden(3),
            fragment(8),
            packet_v6(UDP, 20, |packet| packet[8..24].fill(0)),
            packet_v6(UDP, 20, |packet| packet[8] = 0xff),
            packet_v6(UDP, 20, |packet| packet[24] = 0xff),
        ] {
            assert_eq!(answer(IcmpError::TimeExceeded, &silent), None);
        }
    }

    #[test]
    fn errors_are_limited_to_a_thousand_a_second_after_a_burst() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let sent =
            (0..10_000u64).filter(|tenth| limiter.allows(start + Duration::from_micros(100 * tenth))).count();
        assert!((1000..=1060).contains(&sent), "{sent}");
    }
}
