//! The udp backend's work on packets: checksums, lookup, splitting and merging.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use backends::datapath::checksum;
use backends::datapath::coalesce::Coalescer;
use backends::datapath::outbox::Outbox;
use backends::datapath::packet::{Header, address_sum};
use backends::datapath::routing::Routing;
use backends::datapath::split::split;
use backends::datapath::vnet::{Gso, Vnet};
use backends::state::forwarding::Forwarding;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use ipnet::{IpNet, Ipv4Net};
use subnet::PublicAddrs;

use crate::SIZES;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 16, 0, 2));

/// IPv4 without options, and TCP with timestamps.
const TCP_HEADERS: usize = 20 + 32;

/// IPv4 without options, and UDP.
const UDP_HEADERS: usize = 20 + 8;

/// Segments of a packet that the kernel hands over at once, as many as fit into a group.
const SEGMENTS: usize = 44;

#[divan::bench(args = [64, 1420, 65_000])]
fn sum(bencher: Bencher<'_, '_>, len: usize) {
    let bytes: Vec<u8> = (0..len).map(|number| number as u8).collect();
    bencher.counter(BytesCount::new(len)).bench_local(|| checksum::sum(black_box(&bytes)));
}

#[divan::bench(args = SIZES)]
fn lookup(bencher: Bencher<'_, '_>, peers: u32) {
    /// How many are looked up, far apart.
    const ADDRESSES: u32 = 1024;
    let base = Ipv4Addr::new(10, 0, 0, 0).to_bits();
    let peer = |number: u32| {
        let subnet = Ipv4Net::new(Ipv4Addr::from_bits(base + (number << 8)), 24).expect("24 is a length");
        let public = Ipv4Addr::from_bits(Ipv4Addr::new(172, 16, 0, 0).to_bits() + number);
        (IpNet::V4(subnet), IpAddr::V4(public))
    };
    let routing = Routing::new(&Forwarding {
        local: PublicAddrs { v4: Some(Ipv4Addr::new(192, 0, 2, 1)), v6: None },
        port: 8285,
        addresses: PublicAddrs { v4: Some(Ipv4Addr::from_bits(base)), v6: None },
        mtu: 1472,
        check_sources: true,
        workers: 1,
        peers: (0..peers).map(peer).collect(),
        wireguard: None,
    });
    let spread = |number: u32| number.wrapping_mul(0x9e37_79b9) % (peers << 8);
    let addresses: Vec<IpAddr> =
        (0..ADDRESSES).map(|number| Ipv4Addr::from_bits(base + spread(number)).into()).collect();
    bencher
        .counter(ItemsCount::new(ADDRESSES))
        .bench_local(|| black_box(&addresses).iter().filter_map(|address| routing.peer_of(*address)).count());
}

#[divan::bench]
fn split_tcp_super_packet(bencher: Bencher<'_, '_>) {
    let (vnet, packet) = tcp(SEGMENTS, 1420);
    split_it(bencher, vnet, &packet, SEGMENTS);
}

#[divan::bench]
fn split_one_small_datagram(bencher: Bencher<'_, '_>) {
    let (vnet, packet) = udp(64);
    split_it(bencher, vnet, &packet, 1);
}

#[divan::bench]
fn merge_tcp_segments(bencher: Bencher<'_, '_>) {
    let (vnet, packet) = tcp(SEGMENTS, 1420);
    merge_it(bencher, vnet, &packet, 1);
}

#[divan::bench]
fn merge_small_datagrams(bencher: Bencher<'_, '_>) {
    let (vnet, packet) = udp(64);
    merge_it(bencher, vnet, &packet, 64);
}

fn split_it(bencher: Bencher<'_, '_>, vnet: Vnet, packet: &[u8], expected: usize) {
    let mut outbox = Outbox::with_capacity(1 << 17);
    bencher.counter(BytesCount::new(packet.len())).bench_local(|| {
        outbox.clear();
        let header = Header::parse(black_box(packet)).expect("it is well-formed");
        split(&vnet, &header, packet, &mut outbox.to(PEER)).expect("it fits");
        assert_eq!(outbox.packets(), expected);
    });
}

/// Merges what splitting `copies` of the packet gives.
fn merge_it(bencher: Bencher<'_, '_>, vnet: Vnet, packet: &[u8], copies: usize) {
    let mut outbox = Outbox::with_capacity(1 << 17);
    let header = Header::parse(packet).expect("it is well-formed");
    for _ in 0..copies {
        split(&vnet, &header, packet, &mut outbox.to(PEER)).expect("it fits");
    }
    let mut coalescer = Coalescer::new(true, true);
    // It takes a hop from the time to live, so it needs new ones each time.
    let fresh = || outbox.bytes().to_vec();
    bencher.counter(BytesCount::new(outbox.bytes().len())).with_inputs(fresh).bench_local_refs(|bytes| {
        coalescer.clear();
        let mut start = 0;
        while start < bytes.len() {
            let header = Header::parse(&bytes[start..]).expect("it is well-formed");
            let end = start + header.total_len;
            coalescer.add(bytes, start..end, &header);
            start = end;
        }
        assert_eq!(coalescer.items().len(), 1);
    });
}

/// A packet of so many segments, as a device with offloads hands it over.
fn tcp(segments: usize, segment: usize) -> (Vnet, Vec<u8>) {
    let mut packet = ipv4(6, TCP_HEADERS + segments * segment);
    packet[20..24].copy_from_slice(&[0x90, 0, 0x14, 0x51]);
    // Data offset and ACK.
    packet[32..34].copy_from_slice(&[0x80, 0x10]);
    // Two times nothing, and timestamps.
    packet[40..44].copy_from_slice(&[1, 1, 8, 10]);
    let vnet = Vnet {
        needs_checksum: true,
        verified: false,
        gso: Gso::TcpV4,
        header_len: TCP_HEADERS as u16,
        segment: segment as u16,
        checksum_from: 20,
        checksum_at: 16,
    };
    (vnet, packet)
}

/// One datagram with a payload of `len` bytes.
fn udp(len: usize) -> (Vnet, Vec<u8>) {
    let mut packet = ipv4(17, UDP_HEADERS + len);
    let l4_len = (8 + len) as u16;
    packet[20..24].copy_from_slice(&[0x90, 0, 0x14, 0x51]);
    packet[24..26].copy_from_slice(&l4_len.to_be_bytes());
    // The kernel puts the sum of the pseudo header there.
    let partial = checksum::fold(checksum::pseudo(address_sum(&packet), 17, l4_len));
    packet[26..28].copy_from_slice(&partial.to_ne_bytes());
    let vnet = Vnet { needs_checksum: true, checksum_from: 20, checksum_at: 6, ..Vnet::PLAIN };
    (vnet, packet)
}

fn ipv4(protocol: u8, len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|number| (number * 7) as u8).collect();
    packet[..20].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    // Don't fragment, and hops left.
    packet[6] = 0x40;
    packet[8..10].copy_from_slice(&[64, protocol]);
    packet[12..20].copy_from_slice(&[10, 244, 1, 2, 10, 244, 2, 2]);
    let checksum = checksum::finish(checksum::sum(&packet[..20]));
    packet[10..12].copy_from_slice(&checksum);
    packet
}
