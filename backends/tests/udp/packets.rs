//! Packets written and read byte by byte, as the other end of a wire.

use std::net::Ipv4Addr;

use backends::testing::packet;
pub(crate) use backends::testing::packet::{TCP, UDP, checksum};

pub(crate) const ICMP: u8 = 1;

/// What is said of an IPv4 packet; the rest follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    pub(crate) id: u16,
    /// Flags and fragment offset.
    pub(crate) place: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Packet {
    pub(crate) fn new(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, payload: Vec<u8>) -> Self {
        Self { src, dst, protocol, ttl: 64, tos: 0, id: 7, place: 0, options: Vec::new(), payload }
    }

    /// A UDP datagram with its checksum.
    pub(crate) fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), data: &[u8]) -> Self {
        let mut payload = Vec::new();
        payload.extend(src.1.to_be_bytes());
        payload.extend(dst.1.to_be_bytes());
        payload.extend((8 + data.len() as u16).to_be_bytes());
        payload.extend([0, 0]);
        payload.extend(data);
        Self::new(src.0, dst.0, UDP, payload).with_checksums()
    }

    /// A TCP segment with its checksum; flags as in the header.
    pub(crate) fn tcp(
        src: (Ipv4Addr, u16),
        dst: (Ipv4Addr, u16),
        numbers: (u32, u32),
        flags: u8,
        options: &[u8],
    ) -> Self {
        let mut payload = Vec::new();
        payload.extend(src.1.to_be_bytes());
        payload.extend(dst.1.to_be_bytes());
        payload.extend(numbers.0.to_be_bytes());
        payload.extend(numbers.1.to_be_bytes());
        payload.extend([((20 + options.len()) / 4 * 16) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
        payload.extend(options);
        Self::new(src.0, dst.0, TCP, payload).with_checksums()
    }

    /// Adds data to a TCP segment.
    pub(crate) fn append(&mut self, data: &[u8]) {
        self.payload.extend(data);
        *self = self.clone().with_checksums();
    }

    fn with_checksums(self) -> Self {
        let mut bytes = self.bytes();
        packet::write_header_checksum(&mut bytes, 20 + self.options.len());
        Self::parse(&bytes)
    }

    /// An echo request.
    pub(crate) fn echo(src: Ipv4Addr, dst: Ipv4Addr, id: u16, data: &[u8]) -> Self {
        let mut payload = vec![8, 0, 0, 0];
        payload.extend(id.to_be_bytes());
        payload.extend([0, 1]);
        payload.extend(data);
        let sum = checksum(&[&payload]);
        payload[2..4].copy_from_slice(&sum.to_be_bytes());
        Self::new(src, dst, ICMP, payload)
    }

    /// The checksum over pseudo header and payload: 0 if a right one is in it.
    fn l4_checksum(&self) -> u16 {
        packet::l4_checksum(&self.bytes(), 20 + self.options.len())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let head = 20 + self.options.len();
        let mut bytes = vec![0x40 | (head / 4) as u8, self.tos];
        bytes.extend(((head + self.payload.len()) as u16).to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.place.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(self.src.octets());
        bytes.extend(self.dst.octets());
        bytes.extend(&self.options);
        let sum = checksum(&[&bytes]);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// The one packet that these bytes are; its header's checksum has to be right.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let head = usize::from(bytes[0] & 0xf) * 4;
        assert!(bytes[0] >> 4 == 4 && head >= 20 && head <= bytes.len(), "{bytes:02x?}");
        let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        assert_eq!(usize::from(word(2)), bytes.len(), "total length");
        assert_eq!(checksum(&[&bytes[..head]]), 0, "checksum of the header");
        let address = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
        Self {
            src: address(12),
            dst: address(16),
            protocol: bytes[9],
            ttl: bytes[8],
            tos: bytes[1],
            id: word(4),
            place: word(6),
            options: bytes[20..head].to_vec(),
            payload: bytes[head..].to_vec(),
        }
    }

    /// Whether it is a fragment.
    pub(crate) fn is_fragment(&self) -> bool {
        self.place & 0x3fff != 0
    }

    /// Whether the checksum of what it carries is right; for whole packets of known protocols.
    pub(crate) fn is_right(&self) -> bool {
        match self.protocol {
            ICMP => checksum(&[&self.payload]) == 0,
            // No checksum at all is right, too.
            UDP => self.payload[6..8] == [0, 0] || self.l4_checksum() == 0,
            TCP => self.l4_checksum() == 0,
            other => panic!("protocol {other}"),
        }
    }

    /// What a UDP datagram carries.
    pub(crate) fn data(&self) -> &[u8] {
        assert_eq!(self.protocol, UDP);
        &self.payload[8..]
    }
}
