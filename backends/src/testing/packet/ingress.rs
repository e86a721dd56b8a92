//! From the peers to the device: what follows each other is merged, and what the kernel makes of it again is
//! what came in.

use std::collections::BTreeMap;

use crate::datapath::coalesce::{Added, Coalescer, LONGEST_HEAD};
use crate::datapath::packet::Header as Parsed;
use crate::testing::Numbers;
use crate::testing::packet::flow::{Flow, damage};
use crate::testing::packet::{self as model, Header, Offload, TCP, UDP};

/// Datagrams of some flows, in bursts and mixed.
fn batch(numbers: &mut Numbers) -> Vec<Vec<u8>> {
    let mut flows: Vec<Flow> =
        (0..numbers.of(&[1, 3, 9, 150])).map(|number| Flow::new(number, numbers)).collect();
    let mut packets = Vec::new();
    let sizes = [0, 1, 7, 8, 40, 100, 100, 1000, 1420];
    let most = numbers.of(&[10, 40, 40, 200]);
    for _ in 0..numbers.below(40) {
        let number = numbers.below(flows.len());
        let len = numbers.of(&sizes);
        for _ in 0..numbers.of(&[1, 1, 1, 3, 10, 70]) {
            let flow = &mut flows[number];
            let mut one = flow.clone();
            let len = if numbers.one_in(30) { numbers.below(len + 1) } else { len };
            match numbers.below(60) {
                0 => one.place = 0x2000,
                1 => one.place = 0x0010,
                2 => one.ip_options = vec![1; 8],
                3 => one.tos ^= 3,
                4 => one.ttl = numbers.of(&[0, 1, 2, 9]),
                5 => one.window ^= 1,
                6 => one.acknowledged ^= 1,
                7 => one.flags = numbers.next() as u8,
                8 => one.flags |= 0x08,
                9 => flow.place ^= 0x4000,
                10 => one.sequence = numbers.next() as u32,
                11 => flow.id = flow.id.wrapping_add(2),
                12 => one.tcp_options.reverse(),
                13 => one.ports[3] ^= 1,
                14 => one.protocol = numbers.of(&[TCP, UDP, 1]),
                _ => {}
            }
            flow.go_on(len);
            let mut packet = one.packet(&numbers.bytes(len));
            if one.protocol == UDP && numbers.one_in(20) {
                packet[one.head() + 6..][..2].fill(0);
            }
            damage(&mut packet, numbers);
            if numbers.one_in(40) {
                packets.push(packet.clone());
            }
            packets.push(packet);
        }
        if packets.len() > most {
            break;
        }
    }
    packets
}

/// What is to become of a packet, by what a receiver checks.
fn judge(packet: &[u8], header: Header) -> Added {
    let Header { head, total, fragment, extended } = header;
    if !model::checksum_ok(&packet[..head]) {
        return Added::Unsound;
    }
    if model::ttl(packet) <= 1 {
        return Added::Expired;
    }
    if fragment || extended {
        return Added::Sound;
    }
    let l4 = &packet[head..total];
    let right = || model::l4_checksum(&packet[..total], head) == 0;
    let sound = match model::protocol(packet) {
        TCP => {
            let len = l4.get(12).map_or(0, |offset| usize::from(offset >> 4) * 4);
            (20..=l4.len()).contains(&len) && right()
        }
        UDP => l4.len() < 8 || usize::from(model::word(l4, 4)) != l4.len() || l4[6..8] == [0, 0] || right(),
        _ => true,
    };
    if sound { Added::Sound } else { Added::Unsound }
}

/// A packet without what merging may change: identification where fragmenting is forbidden, and which of the
/// two zeros of the sum a right checksum has.
fn comparable(mut packet: Vec<u8>) -> Vec<u8> {
    let Some(Header { head, fragment, .. }) = model::header(&packet) else { return packet };
    if !model::checksum_ok(&packet[..head]) {
        return packet;
    }
    if !model::is_v6(&packet) && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
    }
    model::seal_header(&mut packet[..head]);
    let whole = !fragment && model::protocol(&packet) == TCP && packet.len() >= head + 20;
    if whole && model::l4_checksum(&packet, head) == 0 {
        model::write_header_checksum(&mut packet, head);
    }
    packet
}

/// Whether two packets have to stay in order: they are of one flow, or one of them is a fragment or has
/// options and the other one is between the same hosts.
fn related(a: &[u8], b: &[u8]) -> bool {
    let odd = |packet: &[u8]| model::header(packet).is_none_or(|header| header.fragment || header.extended);
    let ports = |packet: &[u8]| {
        let head = if model::is_v6(packet) { 40 } else { 20 };
        packet.get(head..head + 4).map(<[u8]>::to_vec)
    };
    let odd = odd(a) || odd(b);
    model::addresses(a) == model::addresses(b)
        // What is behind extension headers has another protocol than they have.
        && (model::protocol(a) == model::protocol(b) || odd && model::is_v6(a))
        && (odd || ports(a) == ports(b))
}

/// A batch of datagrams; gives how many, how many were taken, and how many of these were merged.
pub fn case(seed: u64) -> (u64, u64, u64) {
    let mut numbers = Numbers(!seed);
    let udp = !numbers.one_in(4);
    let mut coalescer = Coalescer::new(!numbers.one_in(8), udp);
    let (mut fed, mut taken, mut merged) = (0, 0, 0);
    for _ in 0..=numbers.below(2) {
        let packets = batch(&mut numbers);
        coalescer.clear();
        let mut bytes = packets.concat();
        // What is to be written, and whether it has a place in an order.
        let mut wanted: Vec<(Vec<u8>, bool)> = Vec::new();
        let mut start = 0;
        for packet in &packets {
            let at = start;
            start += packet.len();
            let Ok(header) = Parsed::parse(packet) else {
                assert!(model::header(packet).is_none(), "a packet was refused");
                continue;
            };
            let slow = model::header(packet).expect("a packet was taken");
            let fate = judge(packet, slow);
            assert_eq!(coalescer.add(&mut bytes, at..at + header.total_len, &header), fate, "{header:?}");
            let mut packet = packet[..slow.total].to_vec();
            match fate {
                Added::Expired => continue,
                Added::Unsound if !model::checksum_ok(&packet[..slow.head]) => {}
                Added::Unsound | Added::Sound => model::decrement_ttl(&mut packet),
            }
            wanted.push((packet, fate == Added::Sound));
        }
        fed += packets.len() as u64;
        taken += wanted.len() as u64;
        merged += compare(&coalescer, &bytes, &wanted);
    }
    (fed, taken, merged)
}

/// Checks that the kernel gets the expected packets out of the items; gives how many packets were merged.
fn compare(coalescer: &Coalescer, bytes: &[u8], wanted: &[(Vec<u8>, bool)]) -> u64 {
    let mut found = Vec::new();
    let mut merged = 0;
    for item in coalescer.items() {
        let mut room = [0; LONGEST_HEAD];
        let len = item.head(&mut room);
        let offload = Offload::parse(&room);
        let mut packet = room[10..len].to_vec();
        item.parts().iter().for_each(|part| packet.extend(&bytes[part.clone()]));
        assert!(packet.len() <= 65_535 && item.parts().len() <= 128);
        let each: Vec<&[u8]> = item.each().map(|range| &bytes[range]).collect();
        if item.packets() == 1 {
            assert!(offload.kind == 0 && offload.flags & 1 == 0 && packet == each[0]);
            found.push(packet);
            continue;
        }
        merged += item.packets() as u64;
        let tcp = model::protocol(&packet) == TCP;
        let head = if model::is_v6(&packet) { 40 } else { 20 };
        let l4 = if tcp { usize::from(packet[head + 12] >> 4) * 4 } else { 8 };
        assert!(tcp || item.packets() <= 64);
        let from = usize::from(offload.from);
        assert_eq!((offload.flags, usize::from(offload.header_len), from), (1, head + l4, head));
        assert_eq!(offload.at, if tcp { 16 } else { 6 });
        assert!(model::checksum_ok(&packet[..head]));
        // The kernel goes on from the sum of the pseudo header.
        let at = head + usize::from(offload.at);
        let pseudo = model::pseudo(&packet, packet.len() - head);
        assert_eq!(model::word(&packet, at), !model::checksum(&[&pseudo]));
        let segments = model::segments(&offload, &packet).expect("the kernel takes it");
        assert_eq!(segments.len(), each.len());
        for (segment, received) in segments.iter().zip(each) {
            assert!(comparable(segment.clone()) == comparable(received.to_vec()));
        }
        found.extend(segments);
    }
    assert_eq!(found.len(), wanted.len());
    // Packets that look alike came in the order in which they are found.
    let mut places: BTreeMap<Vec<u8>, Vec<usize>> = BTreeMap::new();
    for (place, packet) in found.into_iter().enumerate().rev() {
        places.entry(comparable(packet)).or_default().push(place);
    }
    let mut placed: BTreeMap<&[u8], Vec<(usize, &[u8])>> = BTreeMap::new();
    for (packet, ordered) in wanted {
        let alike = places.get_mut(&comparable(packet.clone())).expect("a packet is missing");
        let place = alike.pop().expect("a packet is missing");
        if *ordered {
            let placed = placed.entry(model::addresses(packet)).or_default();
            let overtaken = placed.iter().any(|(earlier, other)| *earlier > place && related(other, packet));
            assert!(!overtaken, "out of order: {:?}", model::header(packet));
            placed.push((place, packet));
        }
    }
    merged
}
