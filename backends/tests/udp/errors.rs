//! What can't be carried is answered as a router would; what can keeps everything that is in its header.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use backends::datapath::engine::Offload;
use backends::testing::{Namespace, Numbers, uninterrupted};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::bed::{Cluster, LIMIT, Site, UDP as CONFIG};
use crate::packets::{ICMP, Packet, UDP};
use crate::wire::{FAR, Wire, v4};

/// A socket that sends packets as they are written.
fn raw(namespace: &Namespace) -> Socket {
    namespace.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap())
}

fn send(socket: &Socket, packet: &Packet) {
    let to: SockAddr = SocketAddrV4::new(packet.dst, 0).into();
    assert_eq!(socket.send_to(&packet.bytes(), &to).unwrap(), packet.bytes().len());
}

/// A socket that shows every packet of a protocol, put together and with its header.
fn listener(namespace: &Namespace, protocol: u8) -> Socket {
    let protocol = Some(Protocol::from(i32::from(protocol)));
    let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::RAW, protocol).unwrap());
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

fn hear(mut socket: &Socket) -> Packet {
    let mut room = [0; 65_536];
    let len = uninterrupted(|| std::io::Read::read(&mut socket, &mut room)).unwrap();
    Packet::parse(&room[..len])
}

/// The answers to one echo request of a pod with this many hops to live.
fn ping(from: &Namespace, to: Ipv4Addr, hops: u32) -> String {
    let args = ["-n", "-c1", "-W10", "-t", &hops.to_string(), &to.to_string()];
    let output = from.command("ping").args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_hop_of_a_way_through_the_tunnel_can_be_traced() {
    for offload in [Offload(true), Offload(false)] {
        let cluster = Cluster::new(2, CONFIG, offload);
        let (pod, far) = (cluster.pods[0].namespace(), v4(cluster.pods[1].address()));
        cluster.assert_reaches("at first");
        // Bridge of the node, its tunnel, the other tunnel, and the node behind it.
        for (hops, from) in [(1, "10.244.1.1"), (2, "10.244.1.0"), (3, "10.244.2.0"), (4, "10.244.2.0")] {
            let text = ping(pod, far, hops);
            assert!(
                text.contains(&format!("From {from} icmp_seq=1 Time to live exceeded")),
                "{hops}: {text}"
            );
        }
        assert!(ping(pod, far, 5).contains("ttl=60"));
        for (site, dropped, refused) in [(0, 1, 0), (1, 0, 1)] {
            cluster.sites[site].wait_for("counters of the errors", |counters| {
                let found =
                    (counters.dropped_ttl.get(), counters.refused_ttl.get(), counters.icmp_errors.get());
                found == (dropped, refused, 1)
            });
        }
    }
}

#[test]
fn a_pod_hears_that_nobody_has_an_address() {
    let cluster = Cluster::new(2, CONFIG, Offload(true));
    let pod = cluster.pods[0].namespace();
    let text = ping(pod, Ipv4Addr::new(10, 244, 9, 9), 64);
    assert!(text.contains("From 10.244.1.0 icmp_seq=1 Destination Net Unreachable"), "{text}");
    let stream = pod.run(|| std::net::TcpStream::connect_timeout(&([10, 244, 9, 9], 80).into(), LIMIT));
    assert_eq!(stream.unwrap_err().kind(), std::io::ErrorKind::NetworkUnreachable);
    cluster.sites[0].wait_for("counters of the errors", |counters| {
        (counters.dropped_no_peer.get(), counters.icmp_errors.get()) == (2, 2)
    });
}

#[test]
fn a_packet_too_long_for_the_tunnel_is_answered_with_its_mtu() {
    for offload in [Offload(true), Offload(false)] {
        let cluster = Cluster::new(2, CONFIG, offload);
        let pod = cluster.pods[0].namespace();
        widen(&cluster.sites[0], pod);
        let heard = listener(pod, ICMP);
        let raw = raw(pod);
        let mut packet = Packet::udp((v4(cluster.pods[0].address()), 5), (FAR, 6), &[7; 1600]);
        packet.place = 0x4000;
        // First the kernel finds it too long for the device; then the device pretends to take more.
        for answering in [Ipv4Addr::new(10, 244, 1, 1), Ipv4Addr::new(10, 244, 1, 0)] {
            send(&raw, &packet);
            let answer = hear(&heard);
            assert_eq!((answer.src, answer.payload[0], answer.payload[1]), (answering, 3, 4));
            assert_eq!(answer.payload[6..8], 1472u16.to_be_bytes());
            assert_eq!(answer.payload[8 + 4..8 + 6], packet.id.to_be_bytes(), "it quotes the packet");
            cluster.sites[0].ip("link set flannel0 mtu 9000");
        }
        cluster.sites[0].wait_for("counters of the error", |counters| {
            (counters.dropped_too_long.get(), counters.icmp_errors.get()) == (1, 1)
        });
    }
}

/// Lets a pod and its way to the node carry more than the tunnel does.
pub(crate) fn widen(site: &Site, pod: &Namespace) {
    let ports = site.show("ip -o link show master cni0");
    for port in ports.lines() {
        let name = port.split(": ").nth(1).unwrap().split('@').next().unwrap();
        site.ip(&format!("link set {name} mtu 9000"));
    }
    site.ip("link set cni0 mtu 9000");
    pod.ip("link set eth0 mtu 9000").unwrap();
}

#[test]
fn congestion_marks_options_and_absent_checksums_arrive_as_they_were_sent() {
    for offload in [Offload(true), Offload(false)] {
        let cluster = Cluster::new(2, CONFIG, offload);
        let (near, far) = (v4(cluster.pods[0].address()), v4(cluster.pods[1].address()));
        let (raw, heard) = (raw(cluster.pods[0].namespace()), listener(cluster.pods[1].namespace(), UDP));
        let open = cluster.pods[1].namespace().run(|| UdpSocket::bind((far, 6)).unwrap());
        open.set_read_timeout(Some(LIMIT)).unwrap();
        let plain = Packet::udp((near, 5), (far, 6), b"twelve bytes");
        let mut unchecked = plain.clone();
        unchecked.payload[6..8].fill(0);
        // Nothing, and an option of an experiment (RFC 4727).
        let odd = Packet { options: vec![1, 1, 1, 1, 0x9e, 4, 0xab, 0xcd], ..plain.clone() };
        let packets = [
            Packet { tos: 0x01, ..plain.clone() },
            Packet { tos: 0x02, ..plain.clone() },
            Packet { tos: 0xbb, ..plain.clone() },
            Packet { place: 0x4000, ..plain.clone() },
            unchecked.clone(),
            odd.clone(),
            Packet { tos: 3, options: odd.options, ..unchecked },
        ];
        for packet in packets {
            send(&raw, &packet);
            let found = hear(&heard);
            assert_eq!(found, Packet { ttl: packet.ttl - 4, ..packet });
            let mut room = [0; 100];
            assert_eq!(uninterrupted(|| open.recv(&mut room)).unwrap(), 12);
        }
        cluster.assert_sound();
    }
}

/// Packets of one flow, in fragments and whole, as they come out of the tunnel.
#[test]
fn fragments_stay_where_they_were_among_whole_packets() {
    for offload in [Offload(true), Offload(false)] {
        let wire = Wire::new(offload);
        let near = wire.near();
        // Everything that the tunnel's device gives to the node, in order.
        let seen = wire.site.machine.namespace().run(|| {
            let ipv4 = Protocol::from(i32::from(0x0800u16.to_be()));
            Socket::new(Domain::PACKET, Type::DGRAM, Some(ipv4)).unwrap()
        });
        seen.set_read_timeout(Some(LIMIT)).unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&seen, 8 << 20).unwrap();
        let mut numbers = Numbers(3);
        let mut sent = Vec::new();
        for id in 0..400 {
            let mut data = vec![0; 600];
            numbers.fill(&mut data);
            let whole = Packet { id, ..Packet::udp((FAR, 5), (near, 6), &data) };
            // One in four as three fragments of 26 times 8 bytes.
            match numbers.within(0..=3) {
                0 => sent.extend((0..).zip(whole.payload.chunks(208)).map(|(at, part)| {
                    let place = (at * 26) | if at < 2 { 0x2000 } else { 0 };
                    Packet { place, payload: part.to_vec(), ..whole.clone() }
                })),
                _ => sent.push(whole),
            }
        }
        sent.iter().for_each(|packet| wire.send(packet));
        let carried = |packet: &Packet| {
            let head = if packet.place & 0x1fff == 0 { 8 } else { 0 };
            packet.payload[head..].to_vec()
        };
        let wanted: Vec<u8> = sent.iter().flat_map(carried).collect();
        let mut found = Vec::new();
        while found.len() < wanted.len() {
            let packet = hear(&seen);
            // The node shows it once more on its way to the pod.
            if packet.src == FAR && packet.ttl == 63 {
                found.extend(carried(&packet));
            }
        }
        assert!(found == wanted);
        wire.site.wait_for("all", |counters| counters.received_packets.get() == sent.len() as u64);
    }
}
