//! Several workers: each pod keeps to one of them, and all of them take what comes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use backends::datapath::engine::Offload;

use backends::testing::uninterrupted;

use crate::bed::{Cluster, LIMIT, UDP};
use crate::flows::{Datagrams, exchange};
use crate::packets::{ICMP, Packet};
use crate::wire::{FAR, PORT, Wire};

const THREE: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Workers":3}}"#;

/// The sender's port by the source of the packet.
fn ports(wire: &Wire, sources: &[Ipv4Addr], packets: u32) -> BTreeMap<Ipv4Addr, BTreeSet<u16>> {
    let mut ports: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for source in sources {
        let socket = wire.pod.namespace().run(|| UdpSocket::bind((*source, 0)).unwrap());
        (0..packets).for_each(|_| assert_eq!(socket.send_to(b"x", (FAR, 9)).unwrap(), 1));
    }
    for _ in 0..sources.len() * packets as usize {
        let mut room = [0; 1500];
        let (len, from) = uninterrupted(|| wire.socket.recv_from(&mut room)).unwrap();
        assert_eq!(from.ip(), wire.site.machine.address());
        ports.entry(Packet::parse(&room[..len]).src).or_default().insert(from.port());
    }
    ports
}

#[test]
fn a_pod_has_one_source_port_and_the_pods_have_several() {
    let wire = Wire::with(THREE, Offload(true));
    let [a, b, c, _] = wire.near().octets();
    let sources: Vec<Ipv4Addr> = (2..10).map(|last| Ipv4Addr::new(a, b, c, last)).collect();
    for source in &sources[1..] {
        wire.pod.namespace().ip(&format!("address add {source}/24 dev eth0")).unwrap();
    }
    let ports = ports(&wire, &sources, 20);
    assert_eq!(ports.keys().copied().collect::<Vec<_>>(), sources);
    assert!(ports.values().all(|ports| ports.len() == 1), "{ports:?}");
    let all: BTreeSet<u16> = ports.values().flatten().copied().collect();
    assert!(all.len() == 3 && all.contains(&PORT), "one of each worker, {all:?}");
}

#[test]
fn what_comes_from_whichever_port_is_taken() {
    let wire = Wire::with(THREE, Offload(true));
    let to = SocketAddr::from((wire.site.machine.address(), PORT));
    let at = wire.machine.address();
    let socket = || wire.machine.namespace().run(|| UdpSocket::bind((at, 0)).unwrap());
    let senders: Vec<UdpSocket> = (0..40).map(|_| socket()).collect();
    for (sender, number) in senders.iter().zip(0..) {
        sender.send_to(&Packet::echo(FAR, wire.near(), number, b"from anywhere").bytes(), to).unwrap();
    }
    wire.socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answered = BTreeSet::new();
    for _ in &senders {
        let answer = wire.receive();
        assert_eq!((answer.protocol, answer.payload[0]), (ICMP, 0), "{answer:?}");
        answered.insert(answer.payload[4..6].to_vec());
    }
    assert_eq!(answered.len(), senders.len());
}

/// Nodes with several workers and nodes with one work together.
#[test]
fn everything_arrives_in_order() {
    for config in [THREE, UDP] {
        let mut cluster = Cluster::new(2, THREE, Offload(true));
        cluster.sites[1].configure(config);
        let (a, b) = (&cluster.pods[0], &cluster.pods[1]);
        exchange(a.namespace(), b.namespace(), b.address(), 16 << 20);
        Datagrams::new(a.namespace(), b.namespace(), b.address(), 8).run(1000, 12..=1400, 16);
        Datagrams::new(b.namespace(), a.namespace(), a.address(), 8).run(1000, 12..=5000, 16);
        cluster.assert_sound();
    }
}

#[test]
fn another_number_of_workers_takes_no_restart() {
    let mut cluster = Cluster::new(2, UDP, Offload(true));
    for config in [THREE, UDP] {
        cluster.sites[0].configure(config);
        cluster.assert_reaches(config);
    }
}
