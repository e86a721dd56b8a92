//! From what the kernel hands over at once to the packets that go over the wire: cut to segments, with
//! complete checksums, as the peer's kernel gets them from a device without any offload.

use super::checksum::{copy, finish, fold, pseudo, sum, word};
use super::packet::{Header, TCP, UDP, V6_HEADER, address_sum};
use super::vnet::{Gso, Vnet};

/// Where packets go.
pub trait SegmentSink {
    /// Room for the next packet of `len` bytes, all of which are written before the next call.
    fn reserve(&mut self, len: usize) -> &mut [u8];
}

/// The offload header and the packet don't fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidGso;

const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// Less payload than this in a segment makes no sense; the kernel's least maximum segment size is 48
/// (`TCP_MIN_SND_MSS`), options included.
pub(super) const MIN_SEGMENT: usize = 8;

/// Hands the packets that `packet` stands for to `sink`.
///
/// # Errors
/// [`InvalidGso`], before anything is handed over.
#[inline]
pub fn split(
    vnet: &Vnet,
    header: &Header,
    packet: &[u8],
    sink: &mut impl SegmentSink,
) -> Result<(), InvalidGso> {
    let packet = packet.get(..header.total_len).ok_or(InvalidGso)?;
    match vnet.gso {
        Gso::None => whole(vnet, header, packet, sink),
        Gso::TcpV4 if !header.is_v6() => tcp(vnet, header, packet, sink),
        Gso::TcpV6 if header.is_v6() => tcp(vnet, header, packet, sink),
        Gso::Udp => udp(vnet, header, packet, sink),
        _ => Err(InvalidGso),
    }
}

/// The largest packet that [`split`] would make.
pub fn max_segment_len(vnet: &Vnet, header: &Header, packet: &[u8]) -> usize {
    let at = transport_at(vnet, header);
    let l4 = match vnet.gso {
        Gso::None | Gso::Other(_) => return header.total_len,
        Gso::Udp => UDP_HEADER,
        Gso::TcpV4 | Gso::TcpV6 => packet.get(at + 12).map_or(0, |offset| usize::from(offset >> 4) * 4),
    };
    header.total_len.min(at + l4 + usize::from(vnet.segment))
}

/// Where the header of TCP or UDP begins: behind extension headers, where the kernel lets the checksum begin.
#[inline]
fn transport_at(vnet: &Vnet, header: &Header) -> usize {
    let extended = header.is_v6() && header.extended && vnet.needs_checksum;
    if extended { vnet.checksum_from.into() } else { header.header_len }
}

/// The same where it is sure that this protocol's header is there.
#[inline]
fn transport(vnet: &Vnet, header: &Header, packet: &[u8], protocol: u8) -> Result<usize, InvalidGso> {
    let at = transport_at(vnet, header);
    let there = match header.is_v6() && header.extended {
        false => header.protocol == protocol,
        true => header.transport(packet) == Some((protocol, at)),
    };
    if there && !header.fragment { Ok(at) } else { Err(InvalidGso) }
}

fn whole(vnet: &Vnet, header: &Header, packet: &[u8], sink: &mut impl SegmentSink) -> Result<(), InvalidGso> {
    if !vnet.needs_checksum {
        sink.reserve(packet.len()).copy_from_slice(packet);
        return Ok(());
    }
    let from = usize::from(vnet.checksum_from);
    let at = from + usize::from(vnet.checksum_at);
    if from < header.header_len || at + 2 > packet.len() || from % 2 != 0 {
        return Err(InvalidGso);
    }
    // The sum of the pseudo header is in the place of the checksum.
    let mut checksum = finish(sum(&packet[from..]));
    // The kernel doesn't say what is behind extension headers, but no other protocol has its checksum there.
    let udp = header.protocol == UDP || header.is_v6() && header.extended && vnet.checksum_at == 6;
    if udp && checksum == [0, 0] {
        checksum = [0xff, 0xff];
    }
    let room = sink.reserve(packet.len());
    room.copy_from_slice(packet);
    room[at..at + 2].copy_from_slice(&checksum);
    Ok(())
}

/// What all segments have in common.
struct Template<'a> {
    headers: &'a [u8],
    v6: bool,
    /// The IPv4 header without total length, identification and checksum.
    ip_sum: u64,
    id: u16,
    /// The sum of the pseudo header without its length.
    pseudo: u64,
}

impl<'a> Template<'a> {
    /// For segments with `l4_len` bytes from the beginning of TCP's or UDP's header at `at`, whose checksum is
    /// at `checksum` from there.
    fn new(
        header: &Header,
        packet: &'a [u8],
        protocol: u8,
        (at, l4_len, checksum): (usize, usize, usize),
    ) -> Self {
        let v6 = header.is_v6();
        let ip = &packet[..header.header_len];
        let ip_sum = if v6 { 0 } else { sum(&ip[..2]) + sum(&ip[6..10]) + sum(&ip[12..]) };
        let pseudo = if v6 && header.extended {
            // Routing headers and home addresses change it, and the kernel has left its sum.
            let left = sum(&packet[at + checksum..at + checksum + 2]);
            left + u64::from(!((packet.len() - at) as u16).to_be())
        } else {
            pseudo(address_sum(packet), protocol, 0)
        };
        Self { headers: &packet[..at + l4_len], v6, ip_sum, id: header.id, pseudo }
    }

    /// Writes the headers of the segment with this number and the payload, and mends the IP header; gives the
    /// payload's sum.
    #[inline]
    fn write(&self, number: usize, payload: &[u8], room: &mut [u8]) -> u64 {
        let (head, body) = room.split_at_mut(self.headers.len());
        let payload_sum = copy(payload, body);
        head.copy_from_slice(self.headers);
        let len = self.headers.len() + payload.len();
        if self.v6 {
            head[4..6].copy_from_slice(&((len - V6_HEADER) as u16).to_be_bytes());
            return payload_sum;
        }
        let len = len as u16;
        let id = self.id.wrapping_add(number as u16);
        head[2..4].copy_from_slice(&len.to_be_bytes());
        head[4..6].copy_from_slice(&id.to_be_bytes());
        head[10..12].copy_from_slice(&finish(self.ip_sum + word(len) + word(id)));
        payload_sum
    }
}

fn tcp(vnet: &Vnet, header: &Header, packet: &[u8], sink: &mut impl SegmentSink) -> Result<(), InvalidGso> {
    let (at, step) = (transport(vnet, header, packet, TCP)?, usize::from(vnet.segment));
    let l4 = packet[at..].first_chunk::<TCP_HEADER>().ok_or(InvalidGso)?;
    let l4_len = usize::from(l4[12] >> 4) * 4;
    if l4_len < TCP_HEADER || at + l4_len >= packet.len() || step < MIN_SEGMENT {
        return Err(InvalidGso);
    }
    let (sequence, flags) = (u32::from_be_bytes([l4[4], l4[5], l4[6], l4[7]]), l4[13]);
    let template = Template::new(header, packet, TCP, (at, l4_len, 16));
    let options = &packet[at..at + l4_len];
    // Without sequence number, the word with the flags, and checksum.
    let tcp_sum = sum(&options[..4]) + sum(&options[8..12]) + sum(&options[14..16]) + sum(&options[18..]);
    let payload = &packet[at + l4_len..];
    let last = (payload.len() - 1) / step;
    for (number, part) in payload.chunks(step).enumerate() {
        let mut flags = flags;
        if number != last {
            flags &= !(FIN | PSH);
        }
        if number != 0 {
            flags &= !CWR;
        }
        let sequence = sequence.wrapping_add((number * step) as u32);
        let room = sink.reserve(at + l4_len + part.len());
        let payload_sum = template.write(number, part, room);
        let l4 = &mut room[at..];
        l4[4..8].copy_from_slice(&sequence.to_be_bytes());
        l4[13] = flags;
        let total = tcp_sum
            + template.pseudo
            + word((l4_len + part.len()) as u16)
            + u64::from(sequence.to_be())
            + sum(&l4[12..14])
            + payload_sum;
        l4[16..18].copy_from_slice(&finish(total));
    }
    Ok(())
}

fn udp(vnet: &Vnet, header: &Header, packet: &[u8], sink: &mut impl SegmentSink) -> Result<(), InvalidGso> {
    let (at, step) = (transport(vnet, header, packet, UDP)?, usize::from(vnet.segment));
    if at + UDP_HEADER >= packet.len() || step == 0 {
        return Err(InvalidGso);
    }
    let template = Template::new(header, packet, UDP, (at, UDP_HEADER, 6));
    let ports = sum(&packet[at..at + 4]);
    for (number, part) in packet[at + UDP_HEADER..].chunks(step).enumerate() {
        let len = (UDP_HEADER + part.len()) as u16;
        let room = sink.reserve(at + UDP_HEADER + part.len());
        let payload_sum = template.write(number, part, room);
        let l4 = &mut room[at..];
        l4[4..6].copy_from_slice(&len.to_be_bytes());
        // 0 would mean that there is no checksum. The length is in the header and in the pseudo header.
        let checksum = match fold(ports + 2 * word(len) + template.pseudo + payload_sum) {
            0xffff => [0xff, 0xff],
            folded => (!folded).to_ne_bytes(),
        };
        l4[6..8].copy_from_slice(&checksum);
    }
    Ok(())
}
