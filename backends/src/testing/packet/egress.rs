//! From the device to the peers: what is read is cut to packets, which wait in groups.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::datapath::outbox::Outbox;
use crate::datapath::packet::{Header, decrement_ttl};
use crate::datapath::split::{max_segment_len, split};
use crate::datapath::vnet::Vnet;
use crate::testing::Numbers;
use crate::testing::packet::flow::{Flow, damage};
use crate::testing::packet::{self as model, Offload, TCP, UDP};

/// What the kernel could hand over, or could not.
fn read(numbers: &mut Numbers) -> (Offload, Vec<u8>) {
    let flow = numbers.below(60);
    let mut flow = Flow::new(flow, numbers);
    flow.ip_options = vec![1; numbers.of(&[0, 0, 0, 0, 4, 40])];
    flow.flags = numbers.of(&[0x10, 0x18, 0x19, 0x90, 0x99, 0xd8, 0x02, 0x04]);
    flow.place = numbers.of(&[0x4000, 0x4000, 0, 0, 0x2000, 5]);
    let len = numbers.of(&[0, 1, 7, 8, 100, 1400, 1401, 3000, 20_000, 65_000]);
    let len = numbers.below(len + 1).min(65_535 - 40 - 60 - 60);
    let head = flow.head();
    let payload = numbers.bytes(len);
    let mut packet = flow.packet(&payload);
    let at = if flow.protocol == TCP { 16 } else { 6 };
    let mut offload = Offload::default();
    if matches!(flow.protocol, TCP | UDP) && !numbers.one_in(4) {
        // Left open: the sum of the pseudo header is in its place, or something else.
        offload = Offload { flags: 1, from: head as u16, at, ..offload };
        let place = head + usize::from(at);
        let sum = numbers.next() as u16;
        packet[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        if numbers.one_in(2) {
            let tcp = if flow.v6 { 4 } else { 1 };
            offload.kind = if flow.protocol == TCP { tcp } else { 5 } | numbers.of(&[0, 0, 0x80]);
            offload.segment = numbers.of(&[1420, 1400, 1000, 536, 100, 48, 9, 8]);
            offload.header_len = numbers.next() as u16;
        }
    }
    damage(&mut packet, numbers);
    match numbers.below(60) {
        0 => offload.flags ^= 1,
        1 => offload.kind = numbers.next() as u8,
        2 => offload.segment = numbers.of(&[0, 1, 7, 65_535]),
        3 => offload.from = numbers.below(70) as u16,
        4 => offload.at = numbers.of(&[0, 1, 65_535, 1000]),
        5 => offload = Offload::parse(&numbers.bytes(10)),
        _ => {}
    }
    (offload, packet)
}

/// A batch of packets; gives how many, and how many of them were taken.
pub fn case(seed: u64) -> (u64, u64) {
    let mut numbers = Numbers(seed);
    let mut outbox = Outbox::with_capacity(numbers.of(&[0, 1000, 200_000]));
    let (mut fed, mut taken) = (0, 0);
    for _ in 0..=numbers.below(2) {
        outbox.clear();
        let mut wanted: BTreeMap<IpAddr, Vec<Vec<u8>>> = BTreeMap::new();
        for _ in 0..=numbers.below(24) {
            let (offload, mut packet) = read(&mut numbers);
            fed += 1;
            let vnet = Vnet::parse(&offload.bytes());
            let Ok(header) = Header::parse(&packet) else {
                assert!(model::header(&packet).is_none(), "a packet was refused");
                continue;
            };
            if header.is_v6() && header.extended && offload.kind & 0x7f != 0 {
                // What is cut behind extension headers depends on the sum that the kernel has left.
                let _ = split(&vnet, &header, &packet, &mut Outbox::default().to(header.dst));
                continue;
            }
            let longest = max_segment_len(&vnet, &header, &packet);
            if header.ttl <= 1 {
                continue;
            }
            let mut slow = packet.clone();
            decrement_ttl(&mut packet);
            model::decrement_ttl(&mut slow);
            assert!(packet == slow);
            let peer = IpAddr::V4(Ipv4Addr::new(192, 0, 2, numbers.below(5) as u8));
            let before = outbox.packets();
            let outcome = split(&vnet, &header, &packet, &mut outbox.to(peer));
            let Some(segments) = model::segments(&offload, &slow) else {
                assert!(outcome.is_err(), "{offload:?} {header:?} was taken");
                assert_eq!(outbox.packets(), before, "what is refused leaves nothing behind");
                continue;
            };
            assert!(outcome.is_ok(), "{offload:?} {header:?} was refused");
            assert_eq!(outbox.packets() - before, segments.len());
            assert_eq!(segments.iter().map(Vec::len).max(), Some(longest), "{offload:?} {header:?}");
            taken += 1;
            wanted.entry(peer).or_default().extend(segments);
        }
        check(&outbox, &wanted);
    }
    (fed, taken)
}

/// All packets are there, each peer's in order, in groups that the kernel takes.
fn check(outbox: &Outbox, wanted: &BTreeMap<IpAddr, Vec<Vec<u8>>>) {
    let mut found: BTreeMap<IpAddr, Vec<Vec<u8>>> = BTreeMap::new();
    for group in outbox.groups() {
        let all: Vec<Vec<u8>> = group.each().map(|range| outbox.bytes()[range].to_vec()).collect();
        assert_eq!(all.len(), usize::from(group.packets));
        let bytes: usize = all.iter().map(Vec::len).sum();
        assert!((1..=64).contains(&all.len()) && (all.len() == 1 || bytes <= 65_507), "{group:?}");
        assert_eq!(bytes, group.extents.iter().map(ExactSizeIterator::len).sum::<usize>());
        for (number, one) in all.iter().enumerate() {
            let last = number + 1 == all.len();
            assert!(
                one.len() == usize::from(group.segment) || last && one.len() < usize::from(group.segment)
            );
        }
        found.entry(group.to).or_default().extend(all);
    }
    assert!(found == *wanted, "packets differ");
}
