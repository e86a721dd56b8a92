//! Packets on their way out, in groups that the kernel takes with one call each: packets of one length to
//! one peer, the last of which may be shorter (`UDP_SEGMENT`, Documentation/networking/segmentation-offloads).

use std::net::IpAddr;
use std::ops::Range;

use super::split::SegmentSink;

/// Packets in a group (`UDP_MAX_SEGMENTS` of kernels before 6.9).
const MAX_PACKETS: u16 = 64;
/// Bytes in a group: the payload of the largest UDP datagram over IPv4; IPv6 has room for 20 more.
const MAX_BYTES: usize = 65_507;
/// So many groups back, an open one is looked for.
const WINDOW: usize = 32;

/// Packets to one peer.
#[derive(Debug)]
pub struct Group {
    /// The peer.
    pub to: IpAddr,
    /// Its port; 0: that of all peers.
    pub port: u16,
    /// Bytes of each packet but the last.
    pub segment: u16,
    /// How many packets.
    pub packets: u16,
    /// Where they are, in order; each range holds whole packets.
    pub extents: Vec<Range<usize>>,
    bytes: usize,
    closed: bool,
}

/// The packets and their groups. Packets to one peer stay in order.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    used: usize,
    groups: Vec<Group>,
    count: usize,
    packets: usize,
    margin: Margin,
}

/// Room around each packet, for what it is wrapped in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Margin {
    /// Bytes before and behind it.
    pub(crate) head: usize,
    pub(crate) tail: usize,
    /// Packets become so much longer at most, by one less than a power of 2, to have a multiple of that …
    pub(crate) padding: usize,
    /// … but never longer than this by it.
    pub(crate) longest: usize,
}

impl Margin {
    #[inline]
    fn outer(&self, len: usize) -> usize {
        let padded = self.longest.min((len + self.padding) & !self.padding);
        self.head + len.max(padded) + self.tail
    }
}

impl Outbox {
    /// An outbox that need not grow before it holds so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes], ..Self::default() }
    }

    /// Has other room around each packet from now on.
    pub(crate) fn set_margin(&mut self, margin: Margin) {
        self.margin = margin;
    }

    /// Keeps the groups that are to be sent and that `keep`, which may change them and their packets. A group that
    /// is held back is not among them.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&mut Group, &mut [u8]) -> bool) {
        let (mut kept, held) = (0, self.count);
        for index in 0..held {
            let group = &mut self.groups[index];
            if keep(group, &mut self.bytes[..self.used]) {
                self.groups.swap(kept, index);
                kept += 1;
            } else {
                self.packets -= usize::from(group.packets);
            }
        }
        self.count = kept;
        if held < self.groups.len() {
            self.groups.swap(kept, held);
        }
    }

    /// A sink for packets to `peer`.
    pub fn to(&mut self, peer: IpAddr) -> PeerBatch<'_> {
        PeerBatch { outbox: self, peer }
    }

    /// All groups, in the order in which they are to be sent.
    pub fn groups(&self) -> &[Group] {
        &self.groups[..self.count]
    }

    /// Keeps the last group back if it may still grow, and with it its packets. Says whether it does. Not the
    /// only one, so that something is sent in any case.
    pub(crate) fn hold_back(&mut self) -> bool {
        let last = self.groups[..self.count].last();
        // Few scattered packets are not worth the trouble.
        let may_grow = last.is_some_and(|last| !last.closed && last.extents.len() == 1);
        if !may_grow || self.count < 2 {
            return false;
        }
        self.count -= 1;
        self.packets -= usize::from(self.groups[self.count].packets);
        true
    }

    /// Empties it except for the group that was held back.
    pub(crate) fn resume(&mut self) {
        let held = self.count;
        self.groups.swap(0, held);
        let group = &mut self.groups[0];
        let extent = std::mem::replace(&mut group.extents[0], 0..0);
        group.extents[0] = 0..extent.len();
        (self.used, self.count, self.packets) = (extent.len(), 1, group.packets.into());
        self.bytes.copy_within(extent, 0);
    }

    /// What the groups' extents are parts of.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// How many packets there are.
    #[cfg(any(test, feature = "testing"))]
    pub fn packets(&self) -> usize {
        self.packets
    }

    /// Empties it, and keeps the memory.
    pub fn clear(&mut self) {
        (self.used, self.count, self.packets) = (0, 0, 0);
    }

    fn place(&mut self, to: IpAddr, len: usize) -> Range<usize> {
        let len = self.margin.outer(len);
        let range = self.used..self.used + len;
        if range.end > self.bytes.len() {
            self.bytes.resize(range.end.next_power_of_two(), 0);
        }
        self.used = range.end;
        self.packets += 1;
        let recent = self.count.saturating_sub(WINDOW);
        if let Some(group) = self.groups[recent..self.count].iter_mut().rev().find(|group| group.to == to)
            && group.takes(len)
        {
            group.add(&range);
        } else {
            self.open(to, &range);
        }
        range
    }

    fn open(&mut self, to: IpAddr, range: &Range<usize>) {
        let segment = range.len() as u16;
        if self.count == self.groups.len() {
            self.groups.push(Group {
                to,
                port: 0,
                segment,
                packets: 0,
                extents: Vec::new(),
                bytes: 0,
                closed: false,
            });
        }
        let group = &mut self.groups[self.count];
        self.count += 1;
        (group.to, group.segment, group.packets, group.bytes, group.closed) = (to, segment, 0, 0, false);
        group.port = 0;
        group.extents.clear();
        group.add(range);
    }
}

impl Group {
    #[inline]
    fn takes(&self, len: usize) -> bool {
        !self.closed
            && len <= usize::from(self.segment)
            && self.packets < MAX_PACKETS
            && self.bytes + len <= MAX_BYTES
    }

    #[inline]
    fn add(&mut self, range: &Range<usize>) {
        self.packets += 1;
        self.bytes += range.len();
        self.closed = range.len() < usize::from(self.segment);
        match self.extents.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.extents.push(range.clone()),
        }
    }

    /// Its port, where all others have `usual`.
    #[inline]
    pub(crate) fn port_or(&self, usual: u16) -> u16 {
        if self.port == 0 { usual } else { self.port }
    }

    /// Where each single packet is.
    pub fn each(&self) -> impl Iterator<Item = Range<usize>> {
        let step = usize::from(self.segment).max(1);
        self.extents.iter().flat_map(move |extent| {
            extent.clone().step_by(step).map(move |start| start..extent.end.min(start + step))
        })
    }
}

/// A sink for packets to one peer.
pub struct PeerBatch<'a> {
    outbox: &'a mut Outbox,
    peer: IpAddr,
}

impl SegmentSink for PeerBatch<'_> {
    #[inline]
    fn reserve(&mut self, len: usize) -> &mut [u8] {
        let start = self.outbox.place(self.peer, len).start + self.outbox.margin.head;
        &mut self.outbox.bytes[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// A peer of either family.
    fn peer(number: u8) -> IpAddr {
        match number % 2 {
            0 => [192, 0, 2, number].into(),
            _ => [0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()].into(),
        }
    }

    fn lens(outbox: &Outbox) -> Vec<(u8, u16, Vec<usize>)> {
        let number = |to: IpAddr| match to {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        };
        let lens = |group: &Group| group.each().map(|range| range.len()).collect();
        outbox.groups().iter().map(|group| (number(group.to), group.segment, lens(group))).collect()
    }

    #[test]
    fn a_shorter_packet_ends_a_group_and_a_longer_one_begins_another() {
        let mut outbox = Outbox::default();
        for (number, len) in [(1, 100), (2, 50), (1, 100), (1, 60), (1, 60), (2, 70), (2, 70)] {
            outbox.to(peer(number)).reserve(len).fill(number);
        }
        assert_eq!(
            lens(&outbox),
            [(1, 100, vec![100, 100, 60]), (2, 50, vec![50]), (1, 60, vec![60]), (2, 70, vec![70, 70])]
        );
    }

    #[test]
    fn a_group_that_may_grow_is_held_back_and_goes_on() {
        let mut outbox = Outbox::default();
        let fill = |outbox: &mut Outbox, bytes: std::ops::Range<u8>| {
            bytes.for_each(|byte| outbox.to(peer(1)).reserve(1000).fill(byte));
        };
        fill(&mut outbox, 0..70);
        assert!(outbox.hold_back());
        assert_eq!((outbox.groups().len(), outbox.packets()), (1, 64));
        outbox.resume();
        fill(&mut outbox, 70..100);
        assert_eq!((outbox.groups().len(), outbox.packets()), (1, 36));
        let group = &outbox.groups()[0];
        assert!(group.each().zip(64..).all(|(range, byte)| outbox.bytes()[range] == [byte; 1000]));
        assert!(!outbox.hold_back(), "it is all there is");
        outbox.to(peer(2)).reserve(10).fill(0);
        outbox.to(peer(2)).reserve(9).fill(0);
        assert!(!outbox.hold_back(), "it can't grow");
    }

    #[test]
    fn groups_that_are_taken_out_leave_the_others_and_the_one_that_is_held_back() {
        let mut outbox = Outbox::default();
        outbox.set_margin(Margin { head: 16, tail: 16, padding: 15, longest: 1420 });
        for (number, len) in [(1, 20), (2, 20), (3, 1420), (3, 1410), (4, 64), (5, 33)] {
            outbox.to(peer(number)).reserve(len).fill(number);
        }
        assert!(outbox.hold_back());
        outbox.retain(|group, bytes| {
            group.port = 7;
            assert!(group.each().all(|range| bytes[range.start + 16] > 0));
            group.to == peer(3) || group.to == peer(1)
        });
        assert_eq!(lens(&outbox), [(1, 64, vec![64]), (3, 1452, vec![1452, 1452])]);
        assert_eq!(outbox.packets(), 3);
        outbox.resume();
        assert_eq!((lens(&outbox), outbox.packets()), (vec![(5, 80, vec![80])], 1));
        assert_eq!(outbox.bytes()[16..16 + 33], [5; 33]);
        outbox.clear();
        outbox.to(peer(1)).reserve(5);
        assert_eq!(outbox.groups()[0].port, 0);
    }

    proptest! {
        /// Against a list of packets: nothing is lost or changed, each peer's packets stay in order, and
        /// each group is one that the kernel takes.
        #[test]
        fn groups_hold_every_packet_in_order(
            packets in prop::collection::vec((0u8..5, 1usize..1500, 1usize..80), 0..60),
        ) {
            let mut outbox = Outbox::with_capacity(1000);
            for round in 0..2 {
                outbox.clear();
                let mut wanted: BTreeMap<IpAddr, Vec<Vec<u8>>> = BTreeMap::new();
                let mut number = round;
                for (to, len, times) in &packets {
                    let peer = peer(*to);
                    for _ in 0..*times {
                        number += 1;
                        let mut sink = outbox.to(peer);
                        let room = sink.reserve(*len);
                        room.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at + number) as u8);
                        wanted.entry(peer).or_default().push(room.to_vec());
                    }
                }
                prop_assert_eq!(outbox.packets(), number - round);
                let mut found: BTreeMap<IpAddr, Vec<Vec<u8>>> = BTreeMap::new();
                for group in outbox.groups() {
                    let all: Vec<_> = group.each().map(|range| outbox.bytes()[range].to_vec()).collect();
                    prop_assert_eq!(all.len(), usize::from(group.packets));
                    prop_assert!(all.len() <= 64 && all.iter().map(Vec::len).sum::<usize>() <= MAX_BYTES);
                    let (last, others) = all.split_last().unwrap();
                    prop_assert!(others.iter().all(|packet| packet.len() == usize::from(group.segment)));
                    prop_assert!(last.len() <= usize::from(group.segment));
                    found.entry(group.to).or_default().extend(all);
                }
                prop_assert_eq!(found, wanted);
            }
        }
    }
}
