//! Random packets: whole ones of a few flows, damaged ones, and bytes that are none.

use crate::testing::Numbers;
use crate::testing::packet::{self as model, TCP, UDP};

/// What a flow's next packet looks like.
#[derive(Clone, Debug)]
pub(super) struct Flow {
    pub(super) v6: bool,
    pub(super) src: [u8; 4],
    pub(super) dst: [u8; 4],
    pub(super) ports: [u8; 4],
    pub(super) protocol: u8,
    pub(super) tos: u8,
    pub(super) ttl: u8,
    pub(super) id: u16,
    pub(super) place: u16,
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) ip_options: Vec<u8>,
    pub(super) tcp_options: Vec<u8>,
}

impl Flow {
    /// One of `count` flows, some of which share their addresses.
    pub(super) fn new(number: usize, numbers: &mut Numbers) -> Self {
        let words = numbers.of(&[0, 0, 0, 3, 10]);
        Self {
            v6: numbers.one_in(2),
            src: [10, 244, 2, (number / 3) as u8],
            dst: [10, 244, 1, (number / 5) as u8],
            ports: [0x80, number as u8, 0x14, 0x51],
            protocol: numbers.of(&[TCP, TCP, TCP, UDP, UDP, 1, 132]),
            tos: numbers.of(&[0, 0, 0, 1, 2, 3, 0xb8]),
            ttl: numbers.of(&[64, 64, 64, 255, 2, 63]),
            id: numbers.next() as u16,
            place: numbers.of(&[0x4000, 0x4000, 0]),
            sequence: numbers.next() as u32,
            acknowledged: numbers.next() as u32,
            flags: 0x10,
            window: numbers.next() as u16,
            ip_options: Vec::new(),
            tcp_options: numbers.bytes(4 * words),
        }
    }

    /// A packet with right checksums.
    pub(super) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut l4 = self.ports.to_vec();
        match self.protocol {
            TCP => {
                l4.extend(self.sequence.to_be_bytes());
                l4.extend(self.acknowledged.to_be_bytes());
                l4.extend([((20 + self.tcp_options.len()) * 4) as u8, self.flags]);
                l4.extend(self.window.to_be_bytes());
                l4.extend([0; 4]);
                l4.extend(&self.tcp_options);
            }
            UDP => {
                l4.extend((8 + payload.len() as u16).to_be_bytes());
                l4.extend([0; 2]);
            }
            _ => {}
        }
        l4.extend(payload);
        if self.v6 {
            return self.packet_v6(&l4);
        }
        let head = 20 + self.ip_options.len();
        let mut packet = vec![0x40 | (head / 4) as u8, self.tos];
        packet.extend(((head + l4.len()) as u16).to_be_bytes());
        packet.extend(self.id.to_be_bytes());
        packet.extend(self.place.to_be_bytes());
        packet.extend([self.ttl, self.protocol, 0, 0]);
        packet.extend(self.src);
        packet.extend(self.dst);
        packet.extend(&self.ip_options);
        packet.extend(l4);
        model::write_header_checksum(&mut packet, head);
        packet
    }

    /// The same over IPv6, where options and fragments have headers of their own.
    fn packet_v6(&self, l4: &[u8]) -> Vec<u8> {
        let place = self.place & 0x3fff;
        let (next, extension): (u8, Vec<u8>) = if place != 0 {
            let [high, low] = ((place & 0x1fff) << 3 | place >> 13).to_be_bytes();
            (44, vec![self.protocol, 0, high, low, 0, 0, 0, 7])
        } else if !self.ip_options.is_empty() {
            (60, vec![self.protocol, 0, 1, 4, 0, 0, 0, 0])
        } else {
            (self.protocol, Vec::new())
        };
        let mut packet = vec![0x60 | self.tos >> 4, self.tos << 4, 0, 7];
        packet.extend(((extension.len() + l4.len()) as u16).to_be_bytes());
        packet.extend([next, self.ttl]);
        for host in [self.src, self.dst] {
            packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            packet.extend(host);
        }
        packet.extend(&extension);
        packet.extend(l4);
        if extension.is_empty() {
            model::write_header_checksum(&mut packet, 40);
        }
        packet
    }

    /// Bytes in front of TCP or UDP.
    pub(super) fn head(&self) -> usize {
        match (self.v6, self.place & 0x3fff == 0 && self.ip_options.is_empty()) {
            (true, plain) => 40 + if plain { 0 } else { 8 },
            (false, _) => 20 + self.ip_options.len(),
        }
    }

    /// The flow after a packet with so much payload.
    pub(super) fn go_on(&mut self, payload: usize) {
        self.sequence = self.sequence.wrapping_add(payload as u32);
        self.id = self.id.wrapping_add(1);
    }
}

/// Damages a packet, or leaves it alone most of the time.
pub(super) fn damage(packet: &mut Vec<u8>, numbers: &mut Numbers) {
    match numbers.below(40) {
        0 => {
            let at = numbers.below(packet.len());
            packet[at] ^= numbers.next() as u8;
        }
        1 => packet.truncate(numbers.below(packet.len()).max(1)),
        2 => packet.extend(numbers.bytes(7)),
        3 => {
            // Where the headers are.
            for _ in 0..3 {
                let at = numbers.below(packet.len().min(40));
                packet[at] = numbers.next() as u8;
            }
        }
        4 => {
            // The same with a header that is right for what it says.
            let at = numbers.below(packet.len().min(40));
            packet[at] = numbers.next() as u8;
            let head = if model::is_v6(packet) { 40 } else { usize::from(packet[0] & 0xf) * 4 };
            if (20..=packet.len()).contains(&head) {
                model::seal_header(&mut packet[..head]);
            }
        }
        5 => {
            *packet = numbers.bytes(packet.len());
            if numbers.one_in(2) {
                packet[0] = numbers.of(&[0x45, 0x60]);
            }
        }
        _ => {}
    }
}
