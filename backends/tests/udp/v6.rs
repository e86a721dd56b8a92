//! What is IPv6's own: its errors, what goes over the wire and what is taken from it.

use std::net::{IpAddr, Ipv6Addr, UdpSocket};

use backends::datapath::engine::Offload;
use backends::testing::packet::write_header_checksum;
use backends::testing::{Fabric, Namespace, Node as Machine, Numbers, Pod, uninterrupted};

use crate::bed::{Cluster, Site, UDP_BOTH, UDP_V6};
use crate::errors::widen;
use crate::flows::exchange_by;
use crate::packets::{Packet, UDP};
use crate::safety::socket;
use crate::sockets::with_destination_options;
use crate::wire::PORT;

/// The answers to one echo request of a pod.
fn ping(from: &Namespace, to: impl Into<IpAddr>, options: &str) -> String {
    let to = to.into().to_string();
    let args = ["-n", "-c1", "-W10"].into_iter().chain(options.split_whitespace()).chain([to.as_str()]);
    let output = from.command("ping").args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
}

#[test]
fn every_hop_of_a_way_through_the_tunnel_can_be_traced() {
    for offload in [Offload(true), Offload(false)] {
        let cluster = Cluster::new(2, UDP_V6, offload);
        let (pod, far) = (cluster.pods[0].namespace(), cluster.pods[1].address());
        cluster.assert_reaches("at first");
        // Bridge of the node, its tunnel, the other tunnel, and the node behind it, by one of its addresses.
        let expected = ["fd00:244:0:1::1 ", "fd00:244:0:1:: ", "fd00:244:0:2:: ", "fd00:244:0:2::"];
        for (hops, from) in (1..).zip(expected) {
            let text = ping(pod, far, &format!("-t {hops}"));
            assert!(text.contains(&format!("From {from}")) && text.contains("Hop limit"), "{hops}: {text}");
        }
        assert!(ping(pod, far, "-t 5").contains("ttl=60"));
        for (site, dropped, refused) in [(0, 1, 0), (1, 0, 1)] {
            cluster.sites[site].wait_for("counters of the errors", |counters| {
                let found =
                    (counters.dropped_ttl.get(), counters.refused_ttl.get(), counters.icmp_errors.get());
                found == (dropped, refused, 1)
            });
        }
        cluster.assert_sound();
    }
}

#[test]
fn a_pod_hears_that_nobody_has_an_address_and_that_a_packet_is_too_long() {
    for config in [UDP_V6, UDP_BOTH] {
        let cluster = Cluster::new(2, config, Offload(true));
        let (site, pod) = (&cluster.sites[0], cluster.pods[0].namespace());
        let text = ping(pod, "fd00:244:0:9::9".parse::<IpAddr>().unwrap(), "");
        assert!(text.contains("From fd00:244:0:1:: icmp_seq=1 Destination unreachable: No route"), "{text}");
        // The device pretends to take more than the tunnel.
        widen(site, pod);
        site.ip("link set flannel0 mtu 9000");
        let far = cluster.pods[1].addresses().last().unwrap().addr();
        let text = ping(pod, far, "-M do -s 1600");
        assert!(text.contains("From fd00:244:0:1:: icmp_seq=1 Packet too big: mtu=1452"), "{text}");
        site.wait_for("counters of the errors", |counters| {
            (counters.dropped_no_peer.get(), counters.dropped_too_long.get(), counters.icmp_errors.get())
                == (1, 1, 2)
        });
    }
}

#[test]
fn streams_with_extension_headers_are_split_behind_these() {
    let cluster = Cluster::new(2, UDP_V6, Offload(true));
    // Between the nodes: a kernel that forwards such packets answers many as too big, as it seems because it looks
    // for TCP's header where the options are (net/core/gso.c, `skb_gso_transport_seglen`).
    let [a, b] = [0, 1].map(|at| cluster.sites[at].machine.namespace());
    let before = cluster.sites[0].counters().sent_reads.get();
    let gateway = IpAddr::V6([0xfd00, 0x244, 0, cluster.sites[1].number().into(), 0, 0, 0, 1].into());
    exchange_by(a, b, gateway, 16 << 20, with_destination_options);
    let counters = cluster.sites[0].counters();
    let (packets, reads) = (counters.sent_packets.get(), counters.sent_reads.get() - before);
    assert!(packets > 16 << 9 && reads < packets / 4, "the kernel handed over several at once: {counters}");
    assert_eq!(counters.dropped_malformed.get(), 0, "{counters}");
    // They can't be merged, so each one is written, beside the packets of the other direction.
    let counters = cluster.sites[1].counters();
    assert!(counters.received_writes.get() > 16 << 9, "{counters}");
    cluster.assert_sound();
}

#[test]
fn what_stays_on_a_link_is_dropped_without_a_word() {
    let cluster = Cluster::new(2, UDP_V6, Offload(true));
    let site = &cluster.sites[0];
    let before = site.counters().dropped_not_carried.get();
    for address in ["ff02::1", "ff05::7", "fe80::7"] {
        let args = ["-n", "-c1", "-W1", "-I", "flannel0", address];
        let _ = site.machine.namespace().command("ping").args(args).output().unwrap();
    }
    site.wait_for("three packets", |counters| counters.dropped_not_carried.get() >= before + 3);
    assert_eq!((site.counters().dropped_no_peer.get(), site.counters().icmp_errors.get()), (0, 0));
    cluster.assert_sound();
}

/// A UDP datagram in an IPv6 packet; `extension` is between the headers.
fn packet(src: Ipv6Addr, dst: Ipv6Addr, extension: &[u8], data: &[u8]) -> Vec<u8> {
    let mut l4 = [0, 9, 0, 0, 0, 0, 0, 0].to_vec();
    l4[2..4].copy_from_slice(&LISTENING.to_be_bytes());
    l4[4..6].copy_from_slice(&(8 + data.len() as u16).to_be_bytes());
    l4.extend(data);
    let [high, low] = (l4.len() as u16).to_be_bytes();
    let mut bytes = vec![0x60, 0, 0, 0, high, low, UDP, 64];
    bytes.extend(src.octets());
    bytes.extend(dst.octets());
    bytes.extend(l4);
    // The checksum doesn't cover what is between the headers.
    write_header_checksum(&mut bytes, 40);
    if !extension.is_empty() {
        bytes.splice(40..40, extension.iter().copied());
        let len = (bytes.len() - 40) as u16;
        bytes[4..6].copy_from_slice(&len.to_be_bytes());
        bytes[6] = 60;
    }
    bytes
}

const LISTENING: u16 = 7000;
const PEER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 2, 0, 0, 0, 7);

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V6(address) => address,
        IpAddr::V4(address) => panic!("{address}"),
    }
}

/// A node with a tunnel for both families and a pod; its only peer is this test, and so is somebody else.
struct Wire {
    site: Site,
    pod: Pod,
    listener: UdpSocket,
    peer: UdpSocket,
    /// The peer's IPv4 socket.
    peer_v4: UdpSocket,
    stranger: UdpSocket,
    _machines: Vec<Machine>,
    _fabric: Fabric,
}

impl Wire {
    fn new(config: &str) -> Self {
        let fabric = Fabric::new().unwrap();
        let mut site = Site::new(&fabric, config, Offload(true));
        let machines = vec![fabric.node().unwrap(), fabric.node().unwrap()];
        let [peer, stranger] =
            [0, 1].map(|at| socket(machines[at].namespace(), machines[at].address_v6(), PORT));
        let peer_v4 = socket(machines[0].namespace(), machines[0].address(), PORT);
        site.peers = vec![(2, machines[0].address())];
        site.converge();
        let pod = site.pod();
        let listener = socket(pod.namespace(), pod.addresses().last().unwrap().addr(), LISTENING);
        Self { site, pod, listener, peer, peer_v4, stranger, _machines: machines, _fabric: fabric }
    }

    fn near(&self) -> Ipv6Addr {
        v6(self.pod.addresses().last().unwrap().addr())
    }

    fn send(&self, from: &UdpSocket, bytes: &[u8]) {
        let to: IpAddr = match from.local_addr().unwrap() {
            std::net::SocketAddr::V4(_) => self.site.machine.address().into(),
            std::net::SocketAddr::V6(_) => self.site.machine.address_v6().into(),
        };
        from.send_to(bytes, (to, PORT)).unwrap();
    }

    /// The next text that the pod hears.
    fn hear(&self) -> String {
        let mut room = [0; 2000];
        let len = uninterrupted(|| self.listener.recv(&mut room)).unwrap();
        String::from_utf8(room[..len].to_vec()).unwrap()
    }
}

#[test]
fn a_datagram_is_one_ipv6_packet_and_nothing_else() {
    let wire = Wire::new(UDP_V6);
    let near = wire.near();
    for size in [0, 1, 2, 777, 1402] {
        let mut data = vec![0; size];
        Numbers(8).fill(&mut data);
        wire.send(&wire.peer, &packet(PEER, near, &[], &data));
        let mut room = [0; 2000];
        let (len, from) = uninterrupted(|| wire.listener.recv_from(&mut room)).unwrap();
        assert_eq!((&room[..len], from), (&data[..], (PEER, 9).into()));
        wire.listener.send_to(&data, from).unwrap();
        let (len, from) = uninterrupted(|| wire.peer.recv_from(&mut room)).unwrap();
        assert_eq!(from, (wire.site.machine.address_v6(), PORT).into(), "the port of all nodes");
        let found = &room[..len];
        // The same the other way round, with the kernel's flow label, and a hop less for node and tunnel.
        let mut wanted = packet(near, PEER, &[], &data);
        wanted[..4].copy_from_slice(&found[..4]);
        wanted[7] = 62;
        wanted[40..44].rotate_left(2);
        assert_eq!(found, wanted);
    }
    // What has an extension header is carried as it is.
    let options = [UDP, 0, 1, 4, 0, 0, 0, 0];
    wire.send(&wire.peer, &packet(PEER, near, &options, b"with options"));
    assert_eq!(wire.hear(), "with options");
}

#[test]
fn nobody_but_a_peer_gets_in_and_a_peer_only_with_its_own_addresses_and_family() {
    let wire = Wire::new(UDP_BOTH);
    let near = wire.near();
    let counters = wire.site.counters();
    wire.send(&wire.stranger, &packet(PEER, near, &[], b"a stranger"));
    wire.site.wait_for("a stranger", |counters| counters.refused_stranger.get() == 1);
    let wrong = ["fd00:244:0:4::7", "2001:db8::9", "::", "ff02::7", "fd31::3", &near.to_string()];
    for (number, source) in (1..).zip(wrong) {
        wire.send(&wire.peer, &packet(source.parse().unwrap(), near, &[], b"somebody else"));
        wire.site.wait_for("a wrong source", |counters| counters.refused_source.get() == number);
    }
    // Each family in datagrams of its own.
    let inner_v4 = Packet::udp(([10, 244, 2, 7].into(), 9), ([10, 244, 1, 2].into(), LISTENING), b"IPv4");
    wire.send(&wire.peer, &inner_v4.bytes());
    wire.send(&wire.peer_v4, &packet(PEER, near, &[], b"IPv6 in IPv4"));
    for bytes in [&[][..], &[0x60; 39], &packet(PEER, near, &[], b"cut short")[..50]] {
        wire.send(&wire.peer, bytes);
    }
    wire.site.wait_for("malformed ones", |counters| counters.refused_malformed.get() == 5);
    // Behind those in the only queue there is: they would have been heard before.
    wire.send(&wire.peer, &packet(PEER, near, &[], b"the peer's pod"));
    assert_eq!(wire.hear(), "the peer's pod");
    wire.send(&wire.peer, &packet("fd31::2".parse().unwrap(), near, &[], b"the peer itself"));
    assert_eq!(wire.hear(), "the peer itself");
    let mut damaged = packet(PEER, near, &[], b"damaged");
    damaged[50] ^= 1;
    wire.send(&wire.peer, &damaged);
    wire.site.wait_for("a wrong checksum", |counters| counters.received_unsound.get() == 1);
    assert_eq!((counters.refused_stranger.get(), counters.refused_source.get()), (1, 6));
    wire.site.wait_for("three packets", |counters| counters.received_packets.get() == 3);
}

#[test]
fn an_operator_who_lets_everybody_in_lets_no_family_into_the_other_one() {
    let wire = Wire::new(&UDP_BOTH.replace(r#""Type":"udp""#, r#""Type":"udp","CheckSources":false"#));
    let near = wire.near();
    wire.send(&wire.peer_v4, &packet(PEER, near, &[], b"IPv6 in IPv4"));
    wire.site.wait_for("the other family", |counters| counters.refused_malformed.get() == 1);
    wire.send(&wire.stranger, &packet(PEER, near, &[], b"a stranger"));
    assert_eq!(wire.hear(), "a stranger");
}
