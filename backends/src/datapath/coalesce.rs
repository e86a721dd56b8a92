//! From packets off the wire to what the kernel takes at once: packets of one flow that follow each other
//! become one, as the kernel's own receive offload would have merged them (net/ipv4/tcp_offload.c).
//!
//! Payloads stay where they were received; only the headers of a merged packet are rewritten.

use std::ops::Range;

use super::checksum::{fold, pseudo, sum};
use super::packet::{
    Header, TCP, UDP, V4_HEADER, V6_HEADER, address_sum, addresses, decrement_ttl, is_v6,
    write_header_checksum,
};
use super::split::MIN_SEGMENT;
use super::vnet::{self, Gso, Vnet};

const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
/// The most packets in one: for UDP the kernel refuses many more with EINVAL (at about 230).
const MAX_UDP: usize = 64;
const MAX_TCP: usize = MAX_PARTS;
const MAX_BYTES: usize = 65_535;
/// Flows that can be merged at the same time; a power of 2.
const FLOWS: usize = 128;
const HEAD: usize = V6_HEADER + 60;

/// The longest headers of an item: offload header, IPv6 without extension headers, TCP with all options.
pub const LONGEST_HEAD: usize = vnet::LEN + HEAD;
/// The most parts an item has.
pub(crate) const MAX_PARTS: usize = 128;

/// What goes to the device with one write.
#[derive(Debug)]
pub struct SuperPacket {
    /// The headers of the first packet; only where more packets may follow.
    head: [u8; HEAD],
    head_len: usize,
    /// Payload of each packet but the last, and of all.
    segment: usize,
    payload: usize,
    next_sequence: u32,
    next_id: u16,
    push: bool,
    closed: bool,
    /// All checksums are right.
    verified: bool,
    /// The payloads; where the item can't be merged, the packet.
    parts: Vec<Range<usize>>,
}

/// Packets of one batch, merged where that can be done.
#[derive(Debug)]
pub struct Coalescer {
    items: Vec<SuperPacket>,
    count: usize,
    /// The newest item of a flow by the flow's hash: its number and one.
    newest: [u16; FLOWS],
    tcp: bool,
    udp: bool,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It will be written.
    Sound,
    /// It will be written as it is, with a wrong checksum for the kernel to find.
    Unsound,
    /// Its time to live is over; it will not be written.
    Expired,
}

impl Coalescer {
    /// A coalescer for a device that takes merged TCP or UDP packets or both.
    pub fn new(tcp: bool, udp: bool) -> Self {
        Self { items: Vec::new(), count: 0, newest: [0; FLOWS], tcp, udp }
    }

    /// Forgets the batch before.
    pub fn clear(&mut self) {
        self.count = 0;
        self.newest = [0; FLOWS];
    }

    /// What is to be written, in this order.
    pub fn items(&self) -> &[SuperPacket] {
        &self.items[..self.count]
    }

    /// Takes the packet at `at` of `bytes`, whose header this is, and takes one hop from its time to live.
    #[inline]
    pub fn add(&mut self, bytes: &mut [u8], at: Range<usize>, header: &Header) -> Added {
        let packet = &mut bytes[at.clone()];
        if !header.checksum_ok(packet) {
            self.alone(at, false);
            return Added::Unsound;
        }
        if header.ttl <= 1 {
            return Added::Expired;
        }
        decrement_ttl(packet);
        let packet = &*packet;
        if header.fragment || header.extended {
            // What follows must not overtake it by joining what is before it.
            let open = self.items[..self.count].iter_mut().filter(|item| !item.closed);
            open.filter(|item| item.is_between(packet)).for_each(|item| item.closed = true);
            self.alone(at, false);
            return Added::Sound;
        }
        // The same code for both families, each with the numbers of its own header.
        match (header.protocol, header.is_v6()) {
            (TCP, false) => self.tcp::<V4_HEADER>(at, packet, header),
            (TCP, true) => self.tcp::<V6_HEADER>(at, packet, header),
            (UDP, false) => self.udp::<V4_HEADER>(at, packet, header),
            (UDP, true) => self.udp::<V6_HEADER>(at, packet, header),
            _ => {
                self.alone(at, false);
                Added::Sound
            }
        }
    }

    fn tcp<const IP: usize>(&mut self, at: Range<usize>, packet: &[u8], header: &Header) -> Added {
        let l4 = &packet[IP..];
        let l4_len = l4.get(12).map_or(0, |offset| usize::from(offset >> 4) * 4);
        if l4_len < TCP_HEADER || l4_len > l4.len() || !is_right(packet, l4, TCP) {
            self.alone(at, false);
            return Added::Unsound;
        }
        let payload = l4.len() - l4_len;
        let place = slot::<IP>(packet);
        if !self.tcp || l4[13] & !PSH != ACK || payload == 0 {
            self.newest[place] = 0;
            self.alone(at, true);
            return Added::Sound;
        }
        let head_len = IP + l4_len;
        let sequence = u32::from_be_bytes([l4[4], l4[5], l4[6], l4[7]]);
        let push = l4[13] & PSH != 0;
        let item = match self.newest(place, |item| {
            item.next_sequence == sequence
                && item.fits::<IP>(packet, header, head_len, payload, MAX_TCP)
                && item.head[IP + 8..IP + 13] == packet[IP + 8..IP + 13]
                && item.head[IP + 14..IP + 16] == packet[IP + 14..IP + 16]
                && item.head[IP + 18..head_len] == packet[IP + 18..head_len]
        }) {
            Some(item) => item,
            // Nothing is won with such small ones.
            None if payload < MIN_SEGMENT => {
                self.newest[place] = 0;
                self.alone(at, true);
                return Added::Sound;
            }
            None => self.open(place, &packet[..head_len], payload),
        };
        item.join(at.start + head_len..at.end, header.id);
        item.next_sequence = sequence.wrapping_add(payload as u32);
        item.push |= push;
        item.closed |= push;
        Added::Sound
    }

    fn udp<const IP: usize>(&mut self, at: Range<usize>, packet: &[u8], header: &Header) -> Added {
        let l4 = &packet[IP..];
        let len = l4.get(4..6).map_or(0, |len| usize::from(u16::from_be_bytes([len[0], len[1]])));
        let odd = len != l4.len() || len < UDP_HEADER;
        let unchecked = odd || l4[6..8] == [0, 0];
        if !unchecked && !is_right(packet, l4, UDP) {
            self.alone(at, false);
            return Added::Unsound;
        }
        let place = slot::<IP>(packet);
        if !self.udp || unchecked || len == UDP_HEADER {
            self.newest[place] = 0;
            self.alone(at, !unchecked);
            return Added::Sound;
        }
        let head_len = IP + UDP_HEADER;
        let payload = len - UDP_HEADER;
        let item =
            match self.newest(place, |item| item.fits::<IP>(packet, header, head_len, payload, MAX_UDP)) {
                Some(item) => item,
                None => self.open(place, &packet[..head_len], payload),
            };
        item.join(at.start + head_len..at.end, header.id);
        Added::Sound
    }

    /// The newest item in this place, if the next packet may join it.
    #[inline]
    fn newest(&mut self, place: usize, joins: impl Fn(&SuperPacket) -> bool) -> Option<&mut SuperPacket> {
        let index = usize::from(self.newest[place]).checked_sub(1)?;
        self.items.get_mut(index).filter(|item| joins(item))
    }

    /// A new item for packets with such headers.
    fn open(&mut self, place: usize, head: &[u8], segment: usize) -> &mut SuperPacket {
        self.newest[place] = (self.count + 1) as u16;
        let item = self.next();
        item.head[..head.len()].copy_from_slice(head);
        (item.head_len, item.segment, item.verified) = (head.len(), segment, true);
        item
    }

    /// A new item that stays alone.
    fn alone(&mut self, at: Range<usize>, verified: bool) {
        let item = self.next();
        (item.closed, item.verified) = (true, verified);
        item.parts.push(at);
    }

    fn next(&mut self) -> &mut SuperPacket {
        if self.count == self.items.len() {
            self.items.push(SuperPacket::new());
        }
        let item = &mut self.items[self.count];
        self.count += 1;
        let mut parts = std::mem::take(&mut item.parts);
        parts.clear();
        (item.head_len, item.segment, item.payload) = (0, 0, 0);
        (item.push, item.closed, item.verified, item.parts) = (false, false, false, parts);
        item
    }
}

impl SuperPacket {
    fn new() -> Self {
        Self {
            head: [0; HEAD],
            head_len: 0,
            segment: 0,
            payload: 0,
            next_sequence: 0,
            next_id: 0,
            push: false,
            closed: true,
            verified: false,
            parts: Vec::new(),
        }
    }

    /// What TCP and UDP have in common: the same flow, an IP header that follows, room for the payload.
    #[inline]
    fn fits<const IP: usize>(
        &self,
        packet: &[u8],
        header: &Header,
        head_len: usize,
        payload: usize,
        most: usize,
    ) -> bool {
        !self.closed
            && self.head_len == head_len
            && payload <= self.segment
            && self.parts.len() < most
            && head_len + self.payload + payload <= MAX_BYTES
            && (header.dont_fragment || header.id == self.next_id)
            && if IP == V6_HEADER {
                // All but the length.
                self.head[..4] == packet[..4] && self.head[6..IP + 4] == packet[6..IP + 4]
            } else {
                self.head[..2] == packet[..2]
                    && self.head[6..10] == packet[6..10]
                    && self.head[12..IP + 4] == packet[12..IP + 4]
            }
    }

    /// Whether it is of the same two hosts as the packet.
    fn is_between(&self, packet: &[u8]) -> bool {
        is_v6(&self.head) == is_v6(packet) && addresses(&self.head) == addresses(packet)
    }

    #[inline]
    fn join(&mut self, payload: Range<usize>, id: u16) {
        self.payload += payload.len();
        self.closed = payload.len() < self.segment;
        self.next_id = id.wrapping_add(1);
        self.parts.push(payload);
    }

    /// How many packets it holds.
    pub fn packets(&self) -> usize {
        self.parts.len()
    }

    /// Where what follows the head is, in order.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// Where each packet is as it was received, for a device that refuses them merged.
    pub fn each(&self) -> impl Iterator<Item = Range<usize>> {
        self.parts.iter().map(|part| part.start - self.head_len..part.end)
    }

    /// Writes what goes in front of the parts, and gives its length.
    pub fn head(&self, room: &mut [u8; LONGEST_HEAD]) -> usize {
        let head = &mut room[vnet::LEN..vnet::LEN + self.head_len];
        head.copy_from_slice(&self.head[..self.head_len]);
        let vnet = match self.parts.len() {
            1 => Vnet { verified: self.verified, ..Vnet::PLAIN },
            _ => self.merged(head),
        };
        room[..vnet::LEN].copy_from_slice(&vnet.bytes());
        vnet::LEN + self.head_len
    }

    /// Turns the headers of the first packet into those of all.
    fn merged(&self, head: &mut [u8]) -> Vnet {
        let v6 = is_v6(head);
        let (ip_len, protocol) = if v6 { (V6_HEADER, head[6]) } else { (V4_HEADER, head[9]) };
        let l4_len = (head.len() - ip_len + self.payload) as u16;
        if v6 {
            head[4..6].copy_from_slice(&l4_len.to_be_bytes());
        } else {
            head[2..4].copy_from_slice(&(l4_len + V4_HEADER as u16).to_be_bytes());
            write_header_checksum(&mut head[..V4_HEADER]);
        }
        // The kernel makes the checksums of the segments, beginning with this sum.
        let partial = fold(pseudo(address_sum(head), protocol, l4_len)).to_ne_bytes();
        let l4 = &mut head[ip_len..];
        let (gso, checksum_at) = if protocol == TCP {
            l4[13] |= u8::from(self.push) * PSH;
            (if v6 { Gso::TcpV6 } else { Gso::TcpV4 }, 16)
        } else {
            l4[4..6].copy_from_slice(&l4_len.to_be_bytes());
            (Gso::Udp, 6)
        };
        l4[checksum_at..checksum_at + 2].copy_from_slice(&partial);
        Vnet {
            needs_checksum: true,
            verified: false,
            gso,
            header_len: head.len() as u16,
            segment: self.segment as u16,
            checksum_from: ip_len as u16,
            checksum_at: checksum_at as u16,
        }
    }
}

/// Whether the checksum of a TCP segment or UDP datagram is right.
#[inline]
fn is_right(packet: &[u8], l4: &[u8], protocol: u8) -> bool {
    fold(pseudo(address_sum(packet), protocol, l4.len() as u16) + sum(l4)) == 0xffff
}

/// The place of a packet's flow among the newest: a hash of addresses, ports and protocol. Two flows in one
/// place only merge less, because an item is compared before anything joins it.
#[inline]
fn slot<const IP: usize>(packet: &[u8]) -> usize {
    let field =
        |at: usize| packet[at..].first_chunk().map_or(0, |bytes| u64::from(u32::from_ne_bytes(*bytes)));
    let (networks, hosts, protocol) = if IP == V6_HEADER {
        // Networks are mostly the same ones, so they are added: that moves all flows alike.
        let networks = (field(8) ^ field(12)) << 32 | (field(24) ^ field(28));
        (networks, (field(16) ^ field(20)) << 32 | (field(32) ^ field(36)), packet[6])
    } else {
        (0, field(12) << 32 | field(16), packet[9])
    };
    let key = (hosts ^ field(IP).rotate_left(17) ^ u64::from(protocol)).wrapping_add(networks);
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - FLOWS.trailing_zeros())) as usize
}
