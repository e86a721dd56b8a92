//! Splitting and merging against packets that are written field by field, with checksums by pnet. Random flows are compared with
//! a slow model in `testing::packet`.

use pnet::packet::ipv4;
use proptest::prelude::*;

use super::coalesce::{Added, Coalescer, LONGEST_HEAD};
use super::packet::{Header, TCP, UDP, address_sum, decrement_ttl};
use super::split::{SegmentSink, max_segment_len, split};
use super::vnet::{self, Gso, Vnet};
use plain::{Plain, l4_checksum, payload, plain};

mod plain;

/// Keeps every packet by itself.
#[derive(Default)]
struct Packets(Vec<Vec<u8>>);

impl SegmentSink for Packets {
    fn reserve(&mut self, len: usize) -> &mut [u8] {
        self.0.push(vec![0; len]);
        self.0.last_mut().unwrap()
    }
}

/// All that a receiver looks at: IP checksum and that of TCP or UDP, by pnet.
fn is_right(packet: &[u8]) -> bool {
    let header = Header::parse(packet).unwrap();
    let (protocol, at) = header.transport(packet).unwrap();
    let l4 = &packet[at..];
    let found = if protocol == TCP { &l4[16..18] } else { &l4[6..8] };
    let ip = header.is_v6() || {
        let ip = ipv4::Ipv4Packet::new(packet).unwrap();
        ip.get_checksum() == ipv4::checksum(&ip)
    };
    ip && found == l4_checksum(protocol, l4, [header.src, header.dst]).to_be_bytes()
}

/// What the segments of a super-packet are, made one by one from the definition.
fn segments(whole: &Plain, step: usize) -> Vec<Vec<u8>> {
    let count = whole.payload.chunks(step).len();
    let segment = |(number, part): (usize, &[u8])| {
        let mut one = whole.clone();
        one.payload = part.to_vec();
        one.id = whole.id.wrapping_add(number as u16);
        if whole.protocol == TCP {
            one.sequence = whole.sequence.wrapping_add((number * step) as u32);
            if number + 1 < count {
                one.flags &= !0x09;
            }
            if number > 0 {
                one.flags &= !0x80;
            }
        }
        one.bytes()
    };
    whole.payload.chunks(step).enumerate().map(segment).collect()
}

/// Puts the sum of the pseudo header where the checksum of TCP or UDP belongs, as the kernel does.
fn leave_open(packet: &mut [u8], protocol: u8, from: usize, at: usize) {
    let l4_len = (packet.len() - from) as u16;
    let sum = super::checksum::pseudo(address_sum(packet), protocol, l4_len);
    packet[from + at..from + at + 2].copy_from_slice(&super::checksum::fold(sum).to_ne_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_super_packet_becomes_the_segments_that_it_stands_for(
        tcp in any::<bool>(), len in 1usize..20_000, step in 8usize..1500, seed in any::<u8>(),
        flags in prop::sample::select(vec![0x10u8, 0x18, 0x19, 0x90, 0x50, 0x99]),
        stamp in prop::option::of(any::<u32>()), options in prop::sample::select(vec![0usize, 8, 40]),
        df in any::<bool>(), v6 in any::<bool>(),
    ) {
        let protocol = if tcp { TCP } else { UDP };
        let mut whole = plain(protocol, payload(len, seed));
        whole.timestamp = stamp;
        (whole.v6, whole.options) = (v6, options);
        whole.place = if df || v6 { 0x4000 } else { 0 };
        whole.flags = if tcp { flags } else { 0 };
        let (mut bytes, at) = (whole.bytes(), whole.head());
        let gso = match (tcp, v6) {
            (true, false) => Gso::TcpV4,
            (true, true) => Gso::TcpV6,
            (false, _) => Gso::Udp,
        };
        let checksum_at = if tcp { 16 } else { 6 };
        leave_open(&mut bytes, protocol, at, checksum_at);
        let header = Header::parse(&bytes).unwrap();
        let vnet = Vnet {
            gso,
            segment: step as u16,
            needs_checksum: true,
            checksum_from: at as u16,
            checksum_at: checksum_at as u16,
            ..Vnet::PLAIN
        };
        let mut packets = Packets::default();
        prop_assert!(split(&vnet, &header, &bytes, &mut packets).is_ok());
        let wanted = segments(&whole, step);
        prop_assert_eq!(max_segment_len(&vnet, &header, &bytes), wanted[0].len());
        prop_assert_eq!(&packets.0, &wanted);
        prop_assert!(packets.0.iter().all(|packet| is_right(packet)));
    }

    #[test]
    fn nothing_that_is_read_makes_it_panic(
        head in any::<[u8; vnet::LEN]>(), bytes in prop::collection::vec(any::<u8>(), 0..200),
        version in prop::sample::select(vec![0u8, 4, 6]), gso in prop::option::of(any::<bool>()),
    ) {
        let (mut head, mut bytes) = (head, bytes);
        match (version, &mut bytes[..]) {
            (4, [first, ..]) => *first = 0x45,
            (6, [first, _, _, _, high, low, next, ..]) => {
                (*first, *high, *low, *next) = (0x60, 0, *low % 170, [TCP, UDP, 0, 60, *next][usize::from(*next % 5)]);
            }
            _ => {}
        }
        if let Some(tcp) = gso {
            head[1] = if tcp { 1 + 3 * u8::from(version == 6) } else { 5 };
        }
        if let Ok(header) = Header::parse(&bytes) {
            let vnet = Vnet::parse(&head);
            let _ = max_segment_len(&vnet, &header, &bytes);
            let _ = split(&vnet, &header, &bytes, &mut Packets::default());
            let mut coalescer = Coalescer::new(true, true);
            let at = 0..header.total_len;
            coalescer.add(&mut bytes, at, &header);
        }
    }
}

/// Writes the items of a batch as a device without offload would show them: split again.
fn written(coalescer: &Coalescer, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Packets::default();
    for item in coalescer.items() {
        let mut room = [0; LONGEST_HEAD];
        let len = item.head(&mut room);
        let vnet = Vnet::parse(room.first_chunk().unwrap());
        let mut packet = room[vnet::LEN..len].to_vec();
        item.parts().iter().for_each(|part| packet.extend(&bytes[part.clone()]));
        let header = Header::parse(&packet).unwrap();
        assert_eq!(header.total_len, packet.len());
        assert_eq!(vnet.gso == Gso::None, item.packets() == 1);
        split(&vnet, &header, &packet, &mut all).unwrap();
        let received: usize = item.each().map(|range| range.len()).sum();
        let rewritten: usize = all.0[all.0.len() - item.packets()..].iter().map(Vec::len).sum();
        assert_eq!(received, rewritten);
    }
    all.0
}

/// Merges packets as one batch; gives what is written and how many writes that takes.
fn merged(packets: &[Vec<u8>], udp: bool) -> (Vec<Vec<u8>>, usize) {
    let mut coalescer = Coalescer::new(true, udp);
    let mut bytes = packets.concat();
    let mut start = 0;
    for packet in packets {
        let at = start..start + packet.len();
        let header = Header::parse(packet).unwrap();
        coalescer.add(&mut bytes, at, &header);
        start += packet.len();
    }
    (written(&coalescer, &bytes), coalescer.items().len())
}

/// What must come out for a packet that went in.
fn aged(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    decrement_ttl(&mut packet);
    packet
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_damaged_packet_is_written_alone_as_it_came(
        at in 0usize..1472, bit in 0u8..8, tcp in any::<bool>(), v6 in any::<bool>(), position in 0usize..6,
    ) {
        let protocol = if tcp { TCP } else { UDP };
        let whole = Plain { v6, ..plain(protocol, payload(6 * 1000, 3)) };
        let mut packets = segments(&whole, 1000);
        let len = packets[position].len();
        // No checksum covers the beginning of an IPv6 header; another protocol is another packet.
        let at = if v6 { 8 + at % (len - 8) } else { at % len };
        packets[position][at] ^= 1 << bit;
        let damaged = packets[position].clone();
        let mut coalescer = Coalescer::new(true, true);
        let mut bytes = packets.concat();
        let (mut start, mut unsound) = (0, 0);
        for packet in &packets {
            // Damage to the lengths is found before.
            let Ok(header) = Header::parse(packet) else { return Ok(()) };
            if header.total_len != packet.len() { return Ok(()) };
            unsound += usize::from(coalescer.add(&mut bytes, start..start + packet.len(), &header) == Added::Unsound);
            start += packet.len();
        }
        // A datagram may be shorter than its packet: the kernel has to judge that, too.
        let in_length = !tcp && (whole.head() + 4..whole.head() + 6).contains(&at);
        prop_assert_eq!(unsound, usize::from(!in_length));
        let alone = coalescer.items().iter().filter(|item| item.packets() == 1);
        let mut found = alone.map(|item| bytes[item.each().next().unwrap()].to_vec());
        let untouched = damaged.clone();
        let as_it_came = |packet: Vec<u8>| {
            packet == untouched
                || (Header::parse(&damaged).unwrap().checksum_ok(&damaged) && packet == aged(&damaged))
        };
        prop_assert!(found.any(as_it_came));
    }
}

#[test]
fn a_train_of_segments_is_one_write() {
    for (protocol, udp, writes) in [(TCP, false, 1), (UDP, true, 1), (UDP, false, 40)] {
        for v6 in [false, true] {
            let whole = Plain { v6, ..plain(protocol, payload(40 * 1420, 1)) };
            let packets = segments(&whole, 1420);
            assert_eq!(merged(&packets, udp).1, writes, "protocol {protocol} IPv6 {v6}");
        }
    }
    // What ends a train is in it; what follows begins another one.
    let mut first = plain(TCP, payload(3 * 1000, 1));
    first.flags = 0x18;
    let mut second = first.clone();
    second.sequence = first.sequence.wrapping_add(3000);
    second.id = first.id.wrapping_add(3);
    let packets = [segments(&first, 1000), segments(&second, 1000)].concat();
    assert_eq!(merged(&packets, true).1, 2);
}

#[test]
fn many_flows_at_once_are_merged_each_for_itself() {
    for v6 in [false, true] {
        let train = |flow| segments(&Plain { v6, flow, ..plain(TCP, payload(4 * 1000, flow)) }, 1000);
        let trains: Vec<Vec<Vec<u8>>> = (0..100).map(train).collect();
        let packets: Vec<Vec<u8>> =
            (0..4).flat_map(|number| trains.iter().map(move |train| train[number].clone())).collect();
        let (out, writes) = merged(&packets, true);
        assert_eq!(out.len(), 400);
        // Flows whose hashes meet merge less.
        assert!(writes < 250, "{writes}");
    }
}

#[test]
fn a_packet_whose_time_is_over_is_not_written() {
    for (ttl, v6) in [(0, false), (1, false), (0, true), (1, true)] {
        let mut packet = Plain { v6, ttl, ..plain(UDP, payload(10, 0)) }.bytes();
        let header = Header::parse(&packet).unwrap();
        let mut coalescer = Coalescer::new(true, true);
        let at = 0..packet.len();
        assert_eq!(coalescer.add(&mut packet, at, &header), Added::Expired);
        assert!(coalescer.items().is_empty());
    }
}
