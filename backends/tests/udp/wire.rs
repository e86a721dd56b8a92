//! What goes over the wire, seen and sent by a plain peer as Go flannel's is: a UDP socket whose datagrams
//! are one IPv4 packet each, and nothing else.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use backends::datapath::counters::Counters;
use backends::datapath::engine::Offload;
use backends::testing::{Fabric, Node as Machine, Numbers, Pod, uninterrupted};

use crate::bed::{ChecksumErrors, LIMIT, Site, UDP as CONFIG, checksum_errors};
use crate::packets::{ICMP, Packet, TCP, UDP};

pub(crate) const PORT: u16 = 8285;
/// What a pod behind the plain peer would have.
pub(crate) const FAR: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 9);
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A node with a tunnel and a pod, and its only peer, which is this test.
pub(crate) struct Wire {
    pub(crate) site: Site,
    pub(crate) pod: Pod,
    pub(crate) socket: UdpSocket,
    pub(crate) machine: Machine,
    _fabric: Fabric,
}

pub(crate) fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address}"),
    }
}

impl Wire {
    pub(crate) fn new(offload: Offload) -> Self {
        Self::with(CONFIG, offload)
    }

    pub(crate) fn with(config: &str, offload: Offload) -> Self {
        let fabric = Fabric::new().unwrap();
        let mut site = Site::new(&fabric, config, offload);
        let machine = fabric.node().unwrap();
        let at = (machine.address(), PORT);
        let socket = machine.namespace().run(|| UdpSocket::bind(at).unwrap());
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        site.peers = vec![(2, machine.address())];
        site.converge();
        let pod = site.pod();
        Self { site, pod, socket, machine, _fabric: fabric }
    }

    pub(crate) fn near(&self) -> Ipv4Addr {
        v4(self.pod.address())
    }

    pub(crate) fn send(&self, packet: &Packet) {
        self.socket.send_to(&packet.bytes(), (self.site.machine.address(), PORT)).unwrap();
    }

    /// The next datagram: one packet that a plain peer can take, from the pod.
    pub(crate) fn receive(&self) -> Packet {
        // A plain peer's buffer is its MTU, and the rest of a longer datagram is lost.
        let mut room = [0; 1473];
        let (len, from) = uninterrupted(|| self.socket.recv_from(&mut room)).unwrap();
        assert!(len <= 1472, "longer than the MTU of the tunnel");
        assert_eq!(from, (self.site.machine.address(), PORT).into(), "the port of all nodes");
        let packet = Packet::parse(&room[..len]);
        assert!(packet.is_fragment() || packet.is_right(), "{packet:?}");
        if packet.src == self.near() {
            // The pod's node took one hop, the tunnel another.
            assert_eq!(packet.ttl, 62, "{packet:?}");
        }
        packet
    }

    pub(crate) fn assert_sound(&self) {
        for namespace in [self.pod.namespace(), self.site.machine.namespace()] {
            assert_eq!(checksum_errors(namespace), ChecksumErrors::default());
        }
    }
}

#[test]
fn a_plain_peer_and_a_pod_exchange_echoes_and_datagrams() {
    for offload in [Offload(true), Offload(false)] {
        let wire = Wire::new(offload);
        let near = wire.near();
        for size in [0, 1, 55, 1000, 1422] {
            let mut data = vec![0; size];
            Numbers(7).fill(&mut data);
            wire.send(&Packet::echo(FAR, near, 77, &data));
            let answer = wire.receive();
            assert_eq!((answer.src, answer.dst, answer.protocol), (near, FAR, ICMP));
            assert!(answer.payload[0] == 0 && answer.payload[8..] == data, "an echo of {size} bytes");
        }
        let echo = wire.pod.namespace().run(|| UdpSocket::bind((near, 7)).unwrap());
        echo.set_read_timeout(Some(LIMIT)).unwrap();
        for size in [0, 1, 2, 3, 777, 1422] {
            let mut data = vec![0; size];
            Numbers(8).fill(&mut data);
            wire.send(&Packet::udp((FAR, 4000), (near, 7), &data));
            let mut room = [0; 2000];
            let (len, from) = uninterrupted(|| echo.recv_from(&mut room)).unwrap();
            assert_eq!((&room[..len], from), (&data[..], (FAR, 4000).into()));
            echo.send_to(&room[..len], from).unwrap();
            let answer = wire.receive();
            assert_eq!((answer.protocol, answer.src, answer.dst, answer.data()), (UDP, near, FAR, &data[..]));
        }
        wire.assert_sound();
    }
}

/// The hand-written end of a connection: takes the pod's call, or calls.
struct Connection<'a> {
    wire: &'a Wire,
    port: u16,
    pod_port: u16,
    /// What is sent next, and what is expected.
    next: u32,
    expected: u32,
}

/// A maximum segment size that fits the tunnel.
const MSS: [u8; 4] = [2, 4, 0x05, 0x98];

impl Connection<'_> {
    fn send(&mut self, flags: u8, options: &[u8]) {
        let (src, dst) = ((FAR, self.port), (self.wire.near(), self.pod_port));
        self.wire.send(&Packet::tcp(src, dst, (self.next, self.expected), flags, options));
        self.next = self.next.wrapping_add(u32::from(flags & SYN != 0));
    }

    /// The next segment of this connection: its number, flags and data.
    fn receive(&mut self) -> (u32, u8, Vec<u8>) {
        let packet = self.wire.receive();
        assert_eq!((packet.protocol, packet.src, packet.dst), (TCP, self.wire.near(), FAR));
        let l4 = &packet.payload;
        assert_eq!(l4[2..4], self.port.to_be_bytes());
        self.pod_port = u16::from_be_bytes([l4[0], l4[1]]);
        let number = u32::from_be_bytes([l4[4], l4[5], l4[6], l4[7]]);
        (number, l4[13], l4[usize::from(l4[12] >> 4) * 4..].to_vec())
    }
}

#[test]
fn a_pod_calls_a_plain_peer_and_sends_it_much_at_once() {
    const MUCH: usize = 13_000;
    for offload in [Offload(true), Offload(false)] {
        let wire = Wire::new(offload);
        let mut data = vec![0; MUCH];
        Numbers(9).fill(&mut data);
        let calling = wire.pod.namespace();
        thread::scope(|scope| {
            let stream = scope.spawn(|| {
                let mut stream =
                    calling.run(|| TcpStream::connect_timeout(&(FAR, 8080).into(), LIMIT).unwrap());
                stream.write_all(&data).unwrap();
                stream
            });
            let mut connection = Connection { wire: &wire, port: 8080, pod_port: 0, next: 5000, expected: 0 };
            let (number, flags, _) = connection.receive();
            assert_eq!(flags & (SYN | ACK), SYN);
            connection.expected = number.wrapping_add(1);
            connection.send(SYN | ACK, &MSS);
            // The first window is ten segments, which the pod's kernel hands over at once.
            let mut found = Vec::new();
            while found.len() < MUCH {
                let (number, _, data) = connection.receive();
                let at = number.wrapping_sub(connection.expected) as usize;
                assert!(at <= found.len(), "a segment came before its turn");
                found.truncate(at);
                found.extend(data);
            }
            assert!(found == data);
            connection.expected = connection.expected.wrapping_add(MUCH as u32);
            connection.send(RST | ACK, &[]);
            stream.join().unwrap();
        });
        wire.assert_sound();
        if offload == Offload(true) {
            let at_once = |counters: &Counters| counters.sent_reads.get() < counters.sent_packets.get();
            wire.site.wait_for("several packets with one read", at_once);
        }
    }
}

#[test]
fn a_plain_peer_calls_a_pod_and_a_closed_port() {
    let wire = Wire::new(Offload(true));
    let near = wire.near();
    let listener = wire.pod.namespace().run(|| TcpListener::bind((near, 80)).unwrap());
    let mut connection = Connection { wire: &wire, port: 9000, pod_port: 81, next: 1, expected: 0 };
    connection.send(SYN, &MSS);
    let (_, flags, _) = connection.receive();
    assert_eq!(flags, RST | ACK, "nobody listens there");

    let mut connection =
        Connection { wire: &wire, port: 9001, pod_port: 80, next: u32::MAX - 2000, expected: 0 };
    connection.send(SYN, &MSS);
    let (number, flags, _) = connection.receive();
    assert_eq!(flags, SYN | ACK);
    connection.expected = number.wrapping_add(1);
    // Segments that the tunnel merges, over the end of the sequence numbers.
    let mut data = vec![0; 20 * 1000];
    Numbers(10).fill(&mut data);
    connection.send(ACK, &[]);
    for part in data.chunks(1000) {
        let (src, dst) = ((FAR, 9001), (near, 80));
        let mut packet = Packet::tcp(src, dst, (connection.next, connection.expected), ACK, &[]);
        packet.append(part);
        wire.send(&packet);
        connection.next = connection.next.wrapping_add(1000);
    }
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut found = vec![0; data.len()];
    stream.read_exact(&mut found).unwrap();
    assert!(found == data);
    wire.assert_sound();
}

#[test]
fn a_long_datagram_of_a_pod_is_fragments_in_order() {
    for offload in [Offload(true), Offload(false)] {
        let wire = Wire::new(offload);
        let socket = wire.pod.namespace().run(|| UdpSocket::bind((wire.near(), 7)).unwrap());
        let mut data = vec![0; 9000];
        Numbers(11).fill(&mut data);
        socket.send_to(&data, (FAR, 4000)).unwrap();
        let mut whole = Vec::new();
        loop {
            let fragment = wire.receive();
            assert_eq!(usize::from(fragment.place & 0x1fff) * 8, whole.len(), "in order");
            whole.extend(fragment.payload);
            if fragment.place & 0x2000 == 0 {
                break;
            }
        }
        let whole = Packet::new(wire.near(), FAR, UDP, whole);
        assert!(whole.is_right() && whole.data() == data);
    }
}
