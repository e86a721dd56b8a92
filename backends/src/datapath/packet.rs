//! IP headers of both families: checked before anything else looks at a packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::checksum::{finish, sum};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP: u8 = 1;
pub(super) const ICMPV6: u8 = 58;
/// Bytes of an IPv4 header without options.
pub(super) const V4_HEADER: usize = 20;
/// Bytes of an IPv6 header, without the extension headers behind it.
pub(super) const V6_HEADER: usize = 40;

/// Extension headers of IPv6 (RFC 8200 §4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
/// Mobility, HIP, Shim6.
const OTHERS: [u8; 3] = [135, 139, 140];

/// Why bytes are no packet that can be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// They are fewer than a header has.
    Short,
    /// The version is neither 4 nor 6.
    Version,
    /// The header says that it is shorter than 20 bytes, or longer than the packet.
    HeaderLength,
    /// The packet says that it is shorter than its header, or longer than what is there.
    TotalLength,
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the header, without extension headers.
    pub header_len: usize,
    /// Bytes of the packet.
    pub total_len: usize,
    /// Identification; IPv6 has none.
    pub id: u16,
    /// Must not be fragmented on its way; always so in IPv6.
    pub dont_fragment: bool,
    /// It is a fragment, be it the first or the last one.
    pub fragment: bool,
    /// It is a fragment that lacks the beginning.
    pub later_fragment: bool,
    /// There are options, or extension headers.
    pub extended: bool,
    /// Hops left.
    pub ttl: u8,
    /// Protocol of what follows the header.
    pub protocol: u8,
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
}

impl Header {
    /// Reads the header of the packet at the start of `bytes`.
    ///
    /// # Errors
    /// [`Malformed`] when the lengths don't fit together.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        match bytes.first().map(|first| first >> 4) {
            Some(4) => Self::v4(bytes),
            Some(6) => Self::v6(bytes),
            Some(_) => Err(Malformed::Version),
            None => Err(Malformed::Short),
        }
    }

    #[inline]
    fn v4(bytes: &[u8]) -> Result<Self, Malformed> {
        let head = bytes.first_chunk::<V4_HEADER>().ok_or(Malformed::Short)?;
        let header_len = usize::from(head[0] & 0xf) * 4;
        if header_len < V4_HEADER || header_len > bytes.len() {
            return Err(Malformed::HeaderLength);
        }
        let total_len = usize::from(u16::from_be_bytes([head[2], head[3]]));
        if total_len < header_len || total_len > bytes.len() {
            return Err(Malformed::TotalLength);
        }
        let place = u16::from_be_bytes([head[6], head[7]]);
        Ok(Self {
            header_len,
            total_len,
            id: u16::from_be_bytes([head[4], head[5]]),
            dont_fragment: place & 0x4000 != 0,
            fragment: place & 0x3fff != 0,
            later_fragment: place & 0x1fff != 0,
            extended: header_len != V4_HEADER,
            ttl: head[8],
            protocol: head[9],
            src: Ipv4Addr::new(head[12], head[13], head[14], head[15]).into(),
            dst: Ipv4Addr::new(head[16], head[17], head[18], head[19]).into(),
        })
    }

    #[inline]
    fn v6(bytes: &[u8]) -> Result<Self, Malformed> {
        let head = bytes.first_chunk::<V6_HEADER>().ok_or(Malformed::Short)?;
        let total_len = V6_HEADER + usize::from(u16::from_be_bytes([head[4], head[5]]));
        if total_len > bytes.len() {
            return Err(Malformed::TotalLength);
        }
        let protocol = head[6];
        let address = |at: usize| {
            let octets: [u8; 16] = head[at..].first_chunk().copied().unwrap_or_default();
            IpAddr::V6(Ipv6Addr::from(octets))
        };
        // Only what follows at once; only ICMP needs what is farther behind.
        let place = match bytes.get(V6_HEADER + 2..V6_HEADER + 4) {
            Some(place) if protocol == FRAGMENT => u16::from_be_bytes([place[0], place[1]]),
            _ => 0,
        };
        Ok(Self {
            header_len: V6_HEADER,
            total_len,
            id: 0,
            dont_fragment: true,
            fragment: protocol == FRAGMENT,
            later_fragment: place & 0xfff8 != 0,
            extended: is_extension(protocol),
            ttl: head[7],
            protocol,
            src: address(8),
            dst: address(24),
        })
    }

    /// Whether it is an IPv6 header.
    #[inline]
    pub fn is_v6(&self) -> bool {
        self.dst.is_ipv6()
    }

    /// Whether its checksum is right; IPv6 has none.
    #[inline]
    pub(crate) fn checksum_ok(&self, packet: &[u8]) -> bool {
        self.is_v6() || checksum_ok(&packet[..self.header_len])
    }

    /// The protocol behind all extension headers of the packet, and where its header begins; `None` for a
    /// later fragment, and where they don't end in the packet.
    pub(super) fn transport(&self, packet: &[u8]) -> Option<(u8, usize)> {
        let (mut protocol, mut at) = (self.protocol, self.header_len);
        if !self.is_v6() {
            return (!self.later_fragment).then_some((protocol, at));
        }
        while is_extension(protocol) {
            let head = packet[..self.total_len].get(at..)?.first_chunk::<8>()?;
            if protocol == FRAGMENT && u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0 {
                return None;
            }
            at += match protocol {
                FRAGMENT => 8,
                AUTHENTICATION => (usize::from(head[1]) + 2) * 4,
                _ => (usize::from(head[1]) + 1) * 8,
            };
            protocol = head[0];
        }
        (at <= self.total_len).then_some((protocol, at))
    }
}

#[inline]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION)
        || OTHERS.contains(&protocol)
}

/// Whether a packet that has a header is one of IPv6.
#[inline]
pub(super) fn is_v6(packet: &[u8]) -> bool {
    packet[0] >> 4 == 6
}

/// Where source and destination lie in a packet, next to each other.
#[inline]
pub(super) fn addresses(packet: &[u8]) -> &[u8] {
    if is_v6(packet) { &packet[8..V6_HEADER] } else { &packet[12..V4_HEADER] }
}

/// The sum of both addresses, as pseudo headers want it.
#[inline]
pub fn address_sum(packet: &[u8]) -> u64 {
    // With lengths that are known, an IPv4 sum is two additions.
    if is_v6(packet) { sum(&packet[8..V6_HEADER]) } else { sum(&packet[12..V4_HEADER]) }
}

/// Takes one hop from the packet's time to live, which must not be 0; of IPv4, mends the checksum (RFC 1624).
#[inline]
pub fn decrement_ttl(packet: &mut [u8]) {
    if is_v6(packet) {
        packet[7] -= 1;
        return;
    }
    packet[8] -= 1;
    let old = u32::from(u16::from_be_bytes([packet[10], packet[11]]));
    // The word of TTL and protocol is 0x100 less, so the complement of the sum is that much more.
    let new = old + 0x100;
    let new = (new & 0xffff) + (new >> 16);
    packet[10..12].copy_from_slice(&(new as u16).to_be_bytes());
}

/// Whether an IPv4 header's checksum is right.
#[inline]
pub(crate) fn checksum_ok(header: &[u8]) -> bool {
    // With a length that is known, five additions.
    let total = match <&[u8; V4_HEADER]>::try_from(header) {
        Ok(plain) => sum(plain),
        Err(_) => sum(header),
    };
    finish(total) == [0, 0]
}

/// Computes an IPv4 header's checksum again.
#[inline]
pub(super) fn write_header_checksum(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = finish(sum(header));
    header[10..12].copy_from_slice(&checksum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use pnet::packet::ipv4::{Ipv4Packet, MutableIpv4Packet, checksum};
    use pnet::packet::ipv6::Ipv6Packet;
    use proptest::prelude::*;

    #[test]
    fn lengths_that_do_not_fit_are_told_apart() {
        let mut good = [0u8; 28];
        good[0] = 0x45;
        good[3] = 28;
        assert_eq!(Header::parse(&good).unwrap().total_len, 28);
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Header::parse(&bytes)
        };
        assert_eq!(Header::parse(&[]), Err(Malformed::Short));
        assert_eq!(Header::parse(&good[..19]), Err(Malformed::Short));
        assert_eq!(Header::parse(&[0x50; 19]), Err(Malformed::Version));
        assert_eq!(with(0, 0x55), Err(Malformed::Version));
        assert_eq!(with(0, 0x44), Err(Malformed::HeaderLength));
        assert_eq!(with(0, 0x48), Err(Malformed::HeaderLength));
        assert_eq!(with(3, 19), Err(Malformed::TotalLength));
        assert_eq!(with(3, 29), Err(Malformed::TotalLength));
        assert_eq!(with(3, 27).unwrap().total_len, 27);
    }

    /// A packet of IPv6 with these bytes behind its header.
    fn v6(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        (packet[0], packet[5], packet[6], packet[7]) = (0x60, payload.len() as u8, protocol, 64);
        packet.extend(payload);
        packet
    }

    #[test]
    fn ipv6_says_how_long_it_is() {
        let good = v6(59, &[0; 3]);
        assert_eq!(Header::parse(&good).unwrap().total_len, 43);
        assert_eq!(Header::parse(&good[..39]), Err(Malformed::Short));
        assert_eq!(Header::parse(&good[..42]), Err(Malformed::TotalLength));
    }

    #[test]
    fn what_is_behind_extension_headers_is_found() {
        let transport = |packet: &[u8]| Header::parse(packet).unwrap().transport(packet);
        assert_eq!(transport(&v6(TCP, &[0; 20])), Some((TCP, 40)));
        let options = [60, 0, 1, 4, 0, 0, 0, 0];
        let more = [UDP, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let both = [&options[..], &more, &[0; 8]].concat();
        assert_eq!(transport(&v6(0, &both)), Some((UDP, 64)));
        assert_eq!(transport(&v6(0, &both[..20])), None, "they don't end");
        let fragment = |place: u8| v6(FRAGMENT, &[ICMPV6, 0, 0, place, 0, 0, 0, 7, 1, 2]);
        assert_eq!(transport(&fragment(1)), Some((ICMPV6, 48)));
        assert_eq!(transport(&fragment(8)), None);
        let header = |place| Header::parse(&fragment(place)).unwrap();
        assert!(header(1).fragment && !header(1).later_fragment && header(8).later_fragment);
        assert!(header(1).extended && !Header::parse(&v6(UDP, &[])).unwrap().extended);
    }

    proptest! {
        #[test]
        fn fields_are_those_that_pnet_reads(bytes in prop::collection::vec(any::<u8>(), 20..80)) {
            let mut bytes = bytes;
            bytes[0] = 0x40 | (5 + bytes[0] % 11);
            let Ok(header) = Header::parse(&bytes) else { return Ok(()) };
            let pnet = Ipv4Packet::new(&bytes).unwrap();
            prop_assert_eq!(header.header_len, usize::from(pnet.get_header_length()) * 4);
            prop_assert_eq!(header.total_len, usize::from(pnet.get_total_length()));
            prop_assert_eq!(header.id, pnet.get_identification());
            prop_assert_eq!(header.dont_fragment, pnet.get_flags() & 2 != 0);
            prop_assert_eq!(header.later_fragment, pnet.get_fragment_offset() != 0);
            prop_assert_eq!(header.fragment, pnet.get_fragment_offset() != 0 || pnet.get_flags() & 1 != 0);
            prop_assert_eq!(header.ttl, pnet.get_ttl());
            prop_assert_eq!(header.protocol, pnet.get_next_level_protocol().0);
            prop_assert_eq!((header.src, header.dst), (pnet.get_source().into(), pnet.get_destination().into()));
        }

        #[test]
        fn fields_of_ipv6_are_those_that_pnet_reads(bytes in prop::collection::vec(any::<u8>(), 40..120)) {
            let mut bytes = bytes;
            (bytes[0], bytes[4], bytes[5]) = (0x60 | (bytes[0] & 0xf), 0, bytes[5] % 80);
            let Ok(header) = Header::parse(&bytes) else { return Ok(()) };
            let pnet = Ipv6Packet::new(&bytes).unwrap();
            prop_assert_eq!(header.header_len, 40);
            prop_assert_eq!(header.total_len, 40 + usize::from(pnet.get_payload_length()));
            prop_assert_eq!((header.ttl, header.protocol), (pnet.get_hop_limit(), pnet.get_next_header().0));
            prop_assert_eq!((header.src, header.dst), (pnet.get_source().into(), pnet.get_destination().into()));
            prop_assert!(header.dont_fragment && header.is_v6() && header.checksum_ok(&bytes));
            if header.ttl > 0 {
                decrement_ttl(&mut bytes);
                prop_assert_eq!(Header::parse(&bytes).unwrap(), Header { ttl: header.ttl - 1, ..header });
            }
        }

        #[test]
        fn ageing_keeps_the_checksum_right(bytes in prop::collection::vec(any::<u8>(), 20), ttl in 1u8..) {
            let mut bytes = bytes;
            bytes[0] = 0x45;
            let mut packet = MutableIpv4Packet::new(&mut bytes).unwrap();
            packet.set_ttl(ttl);
            let right = checksum(&packet.to_immutable());
            packet.set_checksum(right);
            prop_assert!(checksum_ok(&bytes));
            decrement_ttl(&mut bytes);
            prop_assert_eq!(bytes[8], ttl - 1);
            prop_assert!(checksum_ok(&bytes));
            let incremental = bytes.clone();
            write_header_checksum(&mut bytes);
            // 0 and 0xffff are the same number to this sum.
            prop_assert!(incremental == bytes || incremental[10..12] == [0xff, 0xff]);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), extended in any::<bool>()) {
            let mut bytes = bytes;
            if extended && bytes.len() > 40 {
                (bytes[0], bytes[4], bytes[5], bytes[6]) = (0x60, 0, (bytes.len() - 40) as u8, bytes[6] % 61);
            }
            if let Ok(header) = Header::parse(&bytes) {
                let transport = header.transport(&bytes);
                prop_assert!(transport.is_none_or(|(_, at)| (header.header_len..=header.total_len).contains(&at)));
            }
        }
    }
}
