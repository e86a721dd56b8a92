//! Packets of a flow, written field by field.

use std::net::IpAddr;

use pnet::packet::tcp::{self, TcpPacket};
use pnet::packet::udp::{self, UdpPacket};

use crate::datapath::packet::{TCP, UDP, write_header_checksum};

/// A packet with right checksums.
#[derive(Clone, Debug)]
pub(super) struct Plain {
    pub(super) v6: bool,
    pub(super) flow: u8,
    pub(super) protocol: u8,
    /// Bytes of options, or of an extension header.
    pub(super) options: usize,
    pub(super) id: u16,
    pub(super) place: u16,
    pub(super) ttl: u8,
    pub(super) tos: u8,
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) timestamp: Option<u32>,
    pub(super) payload: Vec<u8>,
}

impl Plain {
    fn l4_len(&self) -> usize {
        match (self.protocol, self.timestamp) {
            (TCP, Some(_)) => 32,
            (TCP, None) => 20,
            _ => 8,
        }
    }

    /// Both addresses.
    fn hosts(&self) -> [IpAddr; 2] {
        let (src, dst) = (self.flow / 2, self.flow / 4);
        match self.v6 {
            false => [[10, 244, 2, src].into(), [10, 244, 1, dst].into()],
            true => {
                [[0xfd00, 0, 0, 2, 0, 0, 0, src.into()].into(), [0xfd00, 0, 0, 1, 0, 0, 0, dst.into()].into()]
            }
        }
    }

    /// Bytes in front of TCP or UDP.
    pub(super) fn head(&self) -> usize {
        self.options + if self.v6 { 40 } else { 20 }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.ip();
        let l4 = self.l4();
        if self.v6 {
            let len = (self.options + l4.len()) as u16;
            bytes[4..6].copy_from_slice(&len.to_be_bytes());
        } else {
            let len = (bytes.len() + l4.len()) as u16;
            bytes[2..4].copy_from_slice(&len.to_be_bytes());
            write_header_checksum(&mut bytes);
        }
        bytes.extend(l4);
        bytes
    }

    /// The IP header, without its length.
    fn ip(&self) -> Vec<u8> {
        let head = self.head();
        let mut bytes = vec![0; head];
        if self.v6 {
            (bytes[0], bytes[1], bytes[6], bytes[7]) = (0x60, self.tos, self.protocol, self.ttl);
            for (room, host) in bytes[8..40].chunks_mut(16).zip(self.hosts()) {
                let IpAddr::V6(host) = host else { unreachable!() };
                room.copy_from_slice(&host.octets());
            }
            if self.options > 0 {
                // Destination options, filled by one that does nothing.
                bytes[6] = 60;
                let len = self.options as u8;
                bytes[40..44].copy_from_slice(&[self.protocol, len / 8 - 1, 1, len - 4]);
            } else if self.place != 0x4000 {
                // There is no such field; fragments are told by a header of their own.
                bytes[6] = 44;
            }
            return bytes;
        }
        bytes[0] = 0x40 | (head / 4) as u8;
        bytes[1] = self.tos;
        bytes[4..6].copy_from_slice(&self.id.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.place.to_be_bytes());
        (bytes[8], bytes[9]) = (self.ttl, self.protocol);
        for (room, host) in bytes[12..20].chunks_mut(4).zip(self.hosts()) {
            let IpAddr::V4(host) = host else { unreachable!() };
            room.copy_from_slice(&host.octets());
        }
        // No-operation, which fills any room for options.
        bytes[20..head].fill(1);
        bytes
    }

    fn l4(&self) -> Vec<u8> {
        let mut room = vec![0; self.l4_len() + self.payload.len()];
        let l4 = &mut room[..];
        l4[..4].copy_from_slice(&[0x80, self.flow, 0x14, 0x51]);
        let at = self.l4_len();
        l4[at..].copy_from_slice(&self.payload);
        if self.protocol == TCP {
            l4[4..8].copy_from_slice(&self.sequence.to_be_bytes());
            l4[8..12].copy_from_slice(&self.acknowledged.to_be_bytes());
            (l4[12], l4[13]) = ((at * 4) as u8, self.flags);
            l4[14..16].copy_from_slice(&self.window.to_be_bytes());
            if let Some(stamp) = self.timestamp {
                l4[20..24].copy_from_slice(&[1, 1, 8, 10]);
                l4[24..28].copy_from_slice(&stamp.to_be_bytes());
            }
            let checksum = l4_checksum(TCP, l4, self.hosts());
            l4[16..18].copy_from_slice(&checksum.to_be_bytes());
        } else {
            l4[4..6].copy_from_slice(&((at + self.payload.len()) as u16).to_be_bytes());
            // A computed 0 is sent as 0xffff; a flag stands for none at all.
            if self.flags & 1 == 0 {
                let checksum = l4_checksum(UDP, l4, self.hosts());
                l4[6..8].copy_from_slice(&checksum.to_be_bytes());
            }
        }
        room
    }
}

/// The right checksum, by pnet.
pub(super) fn l4_checksum(protocol: u8, l4: &[u8], hosts: [IpAddr; 2]) -> u16 {
    let sum = match (protocol, hosts) {
        (TCP, [IpAddr::V4(src), IpAddr::V4(dst)]) => {
            return tcp::ipv4_checksum(&TcpPacket::new(l4).unwrap(), &src, &dst);
        }
        (TCP, [IpAddr::V6(src), IpAddr::V6(dst)]) => {
            return tcp::ipv6_checksum(&TcpPacket::new(l4).unwrap(), &src, &dst);
        }
        (_, [IpAddr::V4(src), IpAddr::V4(dst)]) => {
            udp::ipv4_checksum(&UdpPacket::new(l4).unwrap(), &src, &dst)
        }
        (_, [IpAddr::V6(src), IpAddr::V6(dst)]) => {
            udp::ipv6_checksum(&UdpPacket::new(l4).unwrap(), &src, &dst)
        }
        _ => panic!("two families"),
    };
    if sum == 0 { 0xffff } else { sum }
}

pub(super) fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(31) as u8) ^ seed).collect()
}

pub(super) fn plain(protocol: u8, payload: Vec<u8>) -> Plain {
    Plain {
        v6: false,
        flow: 1,
        protocol,
        options: 0,
        id: 0xfffe,
        place: 0x4000,
        ttl: 64,
        tos: 0,
        sequence: 0xffff_fff0,
        acknowledged: 7,
        flags: if protocol == TCP { 0x10 } else { 0 },
        window: 500,
        timestamp: Some(99),
        payload,
    }
}
