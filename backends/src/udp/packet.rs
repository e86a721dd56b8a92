//! IPv4 headers: checked before anything else looks at a packet.

use std::net::Ipv4Addr;

use super::checksum::{finish, sum};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP: u8 = 1;
/// Bytes of a header without options.
pub(super) const PLAIN_HEADER: usize = 20;

/// Why bytes are no packet that can be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// They are fewer than a header has.
    Short,
    /// The version is not 4.
    Version,
    /// The header says that it is shorter than 20 bytes, or longer than the packet.
    HeaderLength,
    /// The packet says that it is shorter than its header, or longer than what is there.
    TotalLength,
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Header {
    /// Bytes of the header.
    pub header_len: usize,
    /// Bytes of the packet.
    pub total_len: usize,
    /// Identification.
    pub id: u16,
    /// Must not be fragmented.
    pub dont_fragment: bool,
    /// It is a fragment, be it the first or the last one.
    pub fragment: bool,
    /// It is a fragment that lacks the beginning.
    pub later_fragment: bool,
    /// Hops left.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
}

impl Ipv4Header {
    /// Reads the header of the packet at the start of `bytes`.
    ///
    /// # Errors
    /// [`Malformed`] when the lengths don't fit together.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let Some(head) = bytes.first_chunk::<PLAIN_HEADER>() else {
            return Err(if bytes.first().is_some_and(|first| first >> 4 != 4) {
                Malformed::Version
            } else {
                Malformed::Short
            });
        };
        if head[0] >> 4 != 4 {
            return Err(Malformed::Version);
        }
        let header_len = usize::from(head[0] & 0xf) * 4;
        if header_len < PLAIN_HEADER || header_len > bytes.len() {
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
            ttl: head[8],
            protocol: head[9],
            src: Ipv4Addr::new(head[12], head[13], head[14], head[15]),
            dst: Ipv4Addr::new(head[16], head[17], head[18], head[19]),
        })
    }
}

/// Takes one hop from the packet's time to live, which must not be 0, and mends its checksum (RFC 1624).
#[inline]
pub fn age(packet: &mut [u8]) {
    packet[8] -= 1;
    let old = u32::from(u16::from_be_bytes([packet[10], packet[11]]));
    // The word of TTL and protocol is 0x100 less, so the complement of the sum is that much more.
    let new = old + 0x100;
    let new = (new & 0xffff) + (new >> 16);
    packet[10..12].copy_from_slice(&(new as u16).to_be_bytes());
}

/// Whether the header's checksum is right.
#[inline]
pub fn is_sound(header: &[u8]) -> bool {
    finish(sum(header)) == [0, 0]
}

/// Makes the header's checksum anew.
#[inline]
pub(super) fn seal(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = finish(sum(header));
    header[10..12].copy_from_slice(&checksum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use pnet::packet::ipv4::{Ipv4Packet, MutableIpv4Packet, checksum};
    use proptest::prelude::*;

    #[test]
    fn lengths_that_do_not_fit_are_told_apart() {
        let mut good = [0u8; 28];
        good[0] = 0x45;
        good[3] = 28;
        assert_eq!(Ipv4Header::parse(&good).unwrap().total_len, 28);
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Ipv4Header::parse(&bytes)
        };
        assert_eq!(Ipv4Header::parse(&[]), Err(Malformed::Short));
        assert_eq!(Ipv4Header::parse(&good[..19]), Err(Malformed::Short));
        assert_eq!(Ipv4Header::parse(&[0x60; 19]), Err(Malformed::Version));
        assert_eq!(with(0, 0x65), Err(Malformed::Version));
        assert_eq!(with(0, 0x44), Err(Malformed::HeaderLength));
        assert_eq!(with(0, 0x48), Err(Malformed::HeaderLength));
        assert_eq!(with(3, 19), Err(Malformed::TotalLength));
        assert_eq!(with(3, 29), Err(Malformed::TotalLength));
        assert_eq!(with(3, 27).unwrap().total_len, 27);
    }

    proptest! {
        #[test]
        fn fields_are_those_that_pnet_reads(bytes in prop::collection::vec(any::<u8>(), 20..80)) {
            let mut bytes = bytes;
            bytes[0] = 0x40 | (5 + bytes[0] % 11);
            let Ok(header) = Ipv4Header::parse(&bytes) else { return Ok(()) };
            let pnet = Ipv4Packet::new(&bytes).unwrap();
            prop_assert_eq!(header.header_len, usize::from(pnet.get_header_length()) * 4);
            prop_assert_eq!(header.total_len, usize::from(pnet.get_total_length()));
            prop_assert_eq!(header.id, pnet.get_identification());
            prop_assert_eq!(header.dont_fragment, pnet.get_flags() & 2 != 0);
            prop_assert_eq!(header.later_fragment, pnet.get_fragment_offset() != 0);
            prop_assert_eq!(header.fragment, pnet.get_fragment_offset() != 0 || pnet.get_flags() & 1 != 0);
            prop_assert_eq!(header.ttl, pnet.get_ttl());
            prop_assert_eq!(header.protocol, pnet.get_next_level_protocol().0);
            prop_assert_eq!((header.src, header.dst), (pnet.get_source(), pnet.get_destination()));
        }

        #[test]
        fn ageing_keeps_the_checksum_right(bytes in prop::collection::vec(any::<u8>(), 20), ttl in 1u8..) {
            let mut bytes = bytes;
            bytes[0] = 0x45;
            let mut packet = MutableIpv4Packet::new(&mut bytes).unwrap();
            packet.set_ttl(ttl);
            let right = checksum(&packet.to_immutable());
            packet.set_checksum(right);
            prop_assert!(is_sound(&bytes));
            age(&mut bytes);
            prop_assert_eq!(bytes[8], ttl - 1);
            prop_assert!(is_sound(&bytes));
            let incremental = bytes.clone();
            seal(&mut bytes);
            // 0 and 0xffff are the same number to this sum.
            prop_assert!(incremental == bytes || incremental[10..12] == [0xff, 0xff]);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Ipv4Header::parse(&bytes);
        }
    }
}
