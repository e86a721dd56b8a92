//! ICMP errors about packets that can't be carried (RFC 792, RFC 1812 §4.3).

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use pnet::packet::icmp::{self, IcmpPacket, MutableIcmpPacket};
use pnet::packet::ip::IpNextHeaderProtocols;
use pnet::packet::ipv4::{Ipv4Flags, MutableIpv4Packet};

use super::packet::{ICMP, Ipv4Header, PLAIN_HEADER, seal};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No peer has the destination.
    NetUnreachable,
    /// The packet may not be fragmented, and is longer than this.
    FragmentationNeeded(u16),
    /// Its time to live is over.
    TimeExceeded,
}

/// Type, code, and the field that is only used by "fragmentation needed" (RFC 1191 §4).
const HEADER: usize = 8;
/// Bytes of the offending packet after its header.
const QUOTED: usize = 8;
const TTL: u8 = 64;
/// Echo request and reply, timestamp, information, address mask: messages that are no errors.
const QUERIES: [u8; 9] = [0, 8, 9, 10, 13, 14, 15, 16, 17];

/// The longest reply.
pub const LONGEST: usize = PLAIN_HEADER + HEADER + 60 + QUOTED;

/// Writes the error about `packet` into `reply`, and gives its length; `None` where none may be sent
/// (RFC 1812 §4.3.2.7): about errors, about later fragments, to or about groups of hosts.
pub fn reply(
    trouble: Trouble,
    from: Ipv4Addr,
    header: &Ipv4Header,
    packet: &[u8],
    reply: &mut [u8; LONGEST],
) -> Option<usize> {
    let single = |addr: Ipv4Addr| {
        !(addr.is_unspecified() || addr.is_loopback() || addr.is_broadcast() || addr.is_multicast())
    };
    if header.later_fragment || !single(header.src) || !single(header.dst) {
        return None;
    }
    if header.protocol == ICMP && packet.get(header.header_len).is_none_or(|kind| !QUERIES.contains(kind)) {
        return None;
    }
    let quoted = &packet[..header.total_len.min(header.header_len + QUOTED)];
    let len = PLAIN_HEADER + HEADER + quoted.len();
    let reply = &mut reply[..len];
    reply.fill(0);
    let (ip, message) = reply.split_at_mut(PLAIN_HEADER);
    {
        let mut ip = MutableIpv4Packet::new(ip)?;
        ip.set_version(4);
        ip.set_header_length(5);
        // Network control (RFC 1812 §4.3.2.5).
        ip.set_dscp(0x30);
        ip.set_total_length(len as u16);
        ip.set_flags(Ipv4Flags::DontFragment);
        ip.set_ttl(TTL);
        ip.set_next_level_protocol(IpNextHeaderProtocols::Icmp);
        ip.set_source(from);
        ip.set_destination(header.src);
    }
    seal(ip);
    let (kind, code, mtu) = match trouble {
        Trouble::NetUnreachable => (3, 0, 0),
        Trouble::FragmentationNeeded(mtu) => (3, 4, mtu),
        Trouble::TimeExceeded => (11, 0, 0),
    };
    message[HEADER..].copy_from_slice(quoted);
    message[6..HEADER].copy_from_slice(&mtu.to_be_bytes());
    let mut message = MutableIcmpPacket::new(message)?;
    message.set_icmp_type(icmp::IcmpType(kind));
    message.set_icmp_code(icmp::IcmpCode(code));
    let checksum = icmp::checksum(&IcmpPacket::new(pnet::packet::Packet::packet(&message))?);
    message.set_checksum(checksum);
    Some(len)
}

/// Keeps errors from becoming a flood of their own: so many at once, and so many a second on average.
#[derive(Debug)]
pub struct Limiter {
    tokens: u32,
    since: Instant,
}

impl Limiter {
    const BURST: u32 = 50;
    /// One more each time this is over: 1,000 a second, like the kernel's `icmp_msgs_per_sec`.
    const EVERY: Duration = Duration::from_millis(1);

    /// A limiter that nobody used yet.
    pub fn new(now: Instant) -> Self {
        Self { tokens: Self::BURST, since: now }
    }

    /// Whether one more may be sent.
    pub fn allows(&mut self, now: Instant) -> bool {
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
    use super::super::packet::{TCP, UDP, is_sound};
    use super::*;

    const FROM: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 0);

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

    fn answer(trouble: Trouble, packet: &[u8]) -> Option<Vec<u8>> {
        let mut room = [0xaa; LONGEST];
        let header = Ipv4Header::parse(packet).unwrap();
        reply(trouble, FROM, &header, packet, &mut room).map(|len| room[..len].to_vec())
    }

    #[test]
    fn an_error_names_the_trouble_and_quotes_the_packet() {
        let offending = packet(UDP, |_| ());
        for (trouble, kind, code, mtu) in [
            (Trouble::NetUnreachable, 3, 0, [0, 0]),
            (Trouble::FragmentationNeeded(1372), 3, 4, [0x05, 0x5c]),
            (Trouble::TimeExceeded, 11, 0, [0, 0]),
        ] {
            let answer = answer(trouble, &offending).unwrap();
            let header = Ipv4Header::parse(&answer).unwrap();
            assert_eq!((header.src, header.dst), (FROM, Ipv4Addr::new(10, 244, 1, 5)));
            assert_eq!((header.total_len, header.protocol), (answer.len(), ICMP));
            assert!(is_sound(&answer[..20]));
            assert_eq!((answer[20], answer[21], [answer[26], answer[27]]), (kind, code, mtu));
            assert_eq!(answer[28..], offending[..28]);
            assert_eq!(pnet::util::checksum(&answer[20..], usize::MAX), 0);
        }
    }

    #[test]
    fn there_is_no_error_about_an_error_a_fragment_or_a_group() {
        assert!(answer(Trouble::TimeExceeded, &packet(TCP, |_| ())).is_some());
        assert!(answer(Trouble::TimeExceeded, &packet(ICMP, |packet| packet[20] = 8)).is_some());
        for silent in [
            packet(ICMP, |packet| packet[20] = 3),
            packet(ICMP, |packet| packet[20] = 11),
            packet(UDP, |packet| packet[7] = 1),
            packet(UDP, |packet| packet[16] = 224),
            packet(UDP, |packet| packet[12..16].fill(0)),
        ] {
            assert_eq!(answer(Trouble::TimeExceeded, &silent), None);
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
