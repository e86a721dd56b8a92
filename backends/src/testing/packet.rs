//! The slow and obvious model of packets: headers, checksums, and the segments that a super-packet stands for.
//!
//! Random cases of both directions of the datapath are compared with it: [`egress::case`], [`ingress::case`].

pub mod egress;
mod flow;
pub mod ingress;

/// Protocol numbers.
pub const TCP: u8 = 6;
/// Protocol numbers.
pub const UDP: u8 = 17;

/// RFC 1071, byte pair by byte pair, over parts that begin at even places.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A number of two bytes.
pub fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

/// Whether it begins as IPv6 does.
pub fn is_v6(packet: &[u8]) -> bool {
    packet[0] >> 4 == 6
}

/// What follows the header.
pub fn protocol(packet: &[u8]) -> u8 {
    if is_v6(packet) { packet[6] } else { packet[9] }
}

/// Hops that are left.
pub fn ttl(packet: &[u8]) -> u8 {
    if is_v6(packet) { packet[7] } else { packet[8] }
}

/// Both addresses.
pub fn addresses(packet: &[u8]) -> &[u8] {
    if is_v6(packet) { &packet[8..40] } else { &packet[12..20] }
}

/// The pseudo header of TCP or UDP with so many bytes.
pub fn pseudo(packet: &[u8], len: usize) -> Vec<u8> {
    let mut pseudo = addresses(packet).to_vec();
    if is_v6(packet) {
        pseudo.extend((len as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol(packet)]);
    } else {
        pseudo.extend([0, protocol(packet)]);
        pseudo.extend((len as u16).to_be_bytes());
    }
    pseudo
}

/// The checksum of TCP or UDP over what is there: 0 if a right one is in it.
pub fn l4_checksum(packet: &[u8], head: usize) -> u16 {
    let l4 = &packet[head..];
    checksum(&[&pseudo(packet, l4.len()), l4])
}

/// Whether the header's own checksum is right, where there is one.
pub fn checksum_ok(header: &[u8]) -> bool {
    is_v6(header) || checksum(&[header]) == 0
}

/// Writes the checksum of the header.
pub fn seal_header(header: &mut [u8]) {
    if is_v6(header) {
        return;
    }
    put(header, 10, 0);
    let sum = checksum(&[header]);
    put(header, 10, sum);
}

/// Writes all checksums of a whole packet.
pub fn write_header_checksum(packet: &mut [u8], head: usize) {
    seal_header(&mut packet[..head]);
    let at = match protocol(packet) {
        TCP => head + 16,
        UDP => head + 6,
        _ => return,
    };
    put(packet, at, 0);
    let sum = match l4_checksum(packet, head) {
        0 if protocol(packet) == UDP => 0xffff,
        sum => sum,
    };
    put(packet, at, sum);
}

/// What a header says, if the packet is one.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Bytes of the header.
    pub head: usize,
    /// Bytes of the packet.
    pub total: usize,
    /// A fragment.
    pub fragment: bool,
    /// Options or extension headers.
    pub extended: bool,
}

/// The header, if the packet has a whole one.
pub fn header(bytes: &[u8]) -> Option<Header> {
    if bytes.len() >= 40 && is_v6(bytes) {
        let total = 40 + usize::from(word(bytes, 4));
        let extended = [0, 43, 44, 51, 60, 135, 139, 140].contains(&bytes[6]);
        let header = Header { head: 40, total, fragment: bytes[6] == 44, extended };
        return (total <= bytes.len()).then_some(header);
    }
    if bytes.len() < 20 || bytes[0] >> 4 != 4 {
        return None;
    }
    let (head, total) = (usize::from(bytes[0] % 16) * 4, usize::from(word(bytes, 2)));
    let fits = head >= 20 && head <= total && total <= bytes.len();
    fits.then_some(Header { head, total, fragment: word(bytes, 6) & 0x3fff != 0, extended: head != 20 })
}

/// One hop less; the checksum changes as RFC 1624 says, whether it was right or not.
pub fn decrement_ttl(packet: &mut [u8]) {
    if is_v6(packet) {
        packet[7] -= 1;
        return;
    }
    packet[8] -= 1;
    let sum = u32::from(word(packet, 10)) + 0x100;
    put(packet, 10, ((sum & 0xffff) + (sum >> 16)) as u16);
}

/// The offload header in front of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Offload {
    /// 1: the checksum is left to the device.
    pub flags: u8,
    /// How it is to be cut.
    pub kind: u8,
    /// Bytes of all headers.
    pub header_len: u16,
    /// Bytes of a segment.
    pub segment: u16,
    /// Where the checksum begins.
    pub from: u16,
    /// Where it is written, from there on.
    pub at: u16,
}

impl Offload {
    /// As the kernel has it.
    pub fn bytes(&self) -> [u8; 10] {
        let mut bytes = [self.flags, self.kind, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.header_len, self.segment, self.from, self.at];
        for (place, word) in bytes[2..].chunks_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// From what the kernel has.
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            kind: bytes[1],
            header_len: word(2),
            segment: word(4),
            from: word(6),
            at: word(8),
        }
    }
}

/// A packet with the checksum that was left to the device.
fn summed(offload: &Offload, packet: &[u8], head: usize, never_zero: bool) -> Option<Vec<u8>> {
    let from = usize::from(offload.from);
    let at = from + usize::from(offload.at);
    if from < head || from % 2 != 0 || at + 2 > packet.len() {
        return None;
    }
    let mut whole = packet.to_vec();
    let sum = match checksum(&[&packet[from..]]) {
        0 if never_zero => 0xffff,
        sum => sum,
    };
    put(&mut whole, at, sum);
    Some(whole)
}

/// The packets that one stands for; none where header and packet don't fit together.
pub fn segments(offload: &Offload, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    let Header { head, total, fragment, extended } = header(packet)?;
    let (packet, protocol, v6) = (&packet[..total], protocol(packet), is_v6(packet));
    let step = usize::from(offload.segment);
    let l4 = match offload.kind & 0x7f {
        0 if offload.flags & 1 == 0 => return Some(vec![packet.to_vec()]),
        0 => {
            let never_zero = protocol == UDP || v6 && extended && offload.at == 6;
            return Some(vec![summed(offload, packet, head, never_zero)?]);
        }
        kind if kind == if v6 { 4 } else { 1 }
            && protocol == TCP
            && !fragment
            && step >= 8
            && total >= head + 20 =>
        {
            usize::from(packet[head + 12] >> 4) * 4
        }
        5 if protocol == UDP && !fragment && step > 0 => 8,
        _ => return None,
    };
    if l4 < 8 || protocol == TCP && l4 < 20 || head + l4 >= total {
        return None;
    }
    let parts: Vec<&[u8]> = packet[head + l4..].chunks(step).collect();
    let count = parts.len();
    let segment = |(number, part): (usize, &&[u8])| {
        let mut one = packet[..head + l4].to_vec();
        one.extend(*part);
        let len = one.len() as u16;
        if v6 {
            put(&mut one, 4, len - 40);
        } else {
            put(&mut one, 2, len);
            put(&mut one, 4, word(packet, 4).wrapping_add(number as u16));
        }
        if protocol == TCP {
            let first =
                u32::from_be_bytes([packet[head + 4], packet[head + 5], packet[head + 6], packet[head + 7]]);
            let sequence = first.wrapping_add((number * step) as u32);
            one[head + 4..head + 8].copy_from_slice(&sequence.to_be_bytes());
            if number + 1 < count {
                one[head + 13] &= !0x09;
            }
            if number > 0 {
                one[head + 13] &= !0x80;
            }
        } else {
            put(&mut one, head + 4, len - head as u16);
        }
        write_header_checksum(&mut one, head);
        one
    };
    Some(parts.iter().enumerate().map(segment).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_packets_come_out_as_the_model_says_in_both_directions() {
        let (mut fed, mut taken, mut merged) = (0, 0, 0);
        for seed in 0..600 {
            let (packets, of_them) = egress::case(seed);
            let (datagrams, sound, together) = ingress::case(seed);
            fed += packets + datagrams;
            taken += of_them + sound;
            merged += together;
        }
        // Most is refused or taken, and much of it merged.
        assert!(merged > 3000 && taken > 10_000 && taken < fed, "{fed} {taken} {merged}");
    }
}
