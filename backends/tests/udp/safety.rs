//! Packets are taken from those only who may send them, unless the operator says otherwise.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use backends::datapath::engine::Offload;
use backends::testing::{Fabric, Namespace, Node as Machine, Pod, uninterrupted};

use crate::bed::{LIMIT, Site, TRUSTING, UDP};
use crate::packets::Packet;
use crate::wire::{PORT, v4};

/// Where the pod listens.
const LISTENING: u16 = 7000;

/// A node with a tunnel, a namespace that is its peer, and one that is no peer.
struct Setup {
    site: Site,
    pod: Pod,
    listener: UdpSocket,
    peer: (Ipv4Addr, UdpSocket),
    stranger: (Ipv4Addr, UdpSocket),
    _machines: Vec<Machine>,
    _fabric: Fabric,
}

/// A socket that doesn't wait for ever.
pub(crate) fn socket(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = address.into();
    let socket = namespace.run(|| UdpSocket::bind((address, port)).unwrap());
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

impl Setup {
    fn new(config: &str) -> Self {
        let fabric = Fabric::new().unwrap();
        let mut site = Site::new(&fabric, config, Offload(true));
        let machines = vec![fabric.node().unwrap(), fabric.node().unwrap()];
        let [peer, stranger] = [0, 1].map(|at| {
            (machines[at].address(), socket(machines[at].namespace(), machines[at].address(), PORT))
        });
        site.peers = vec![(2, peer.0), (4, Ipv4Addr::new(172, 31, 0, 44))];
        site.converge();
        let pod = site.pod();
        let listener = socket(pod.namespace(), pod.address(), LISTENING);
        Self { site, pod, listener, peer, stranger, _machines: machines, _fabric: fabric }
    }

    /// Sends a packet with this inner source to the node.
    fn send(&self, from: &(Ipv4Addr, UdpSocket), source: Ipv4Addr, text: &str) {
        let packet = Packet::udp((source, 9), (v4(self.pod.address()), LISTENING), text.as_bytes());
        from.1.send_to(&packet.bytes(), (self.site.machine.address(), PORT)).unwrap();
    }

    /// The next text that the pod hears.
    fn hear(&self) -> String {
        let mut room = [0; 2000];
        let len = uninterrupted(|| self.listener.recv(&mut room)).unwrap();
        String::from_utf8(room[..len].to_vec()).unwrap()
    }
}

const PEER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 7);
const OTHER_PEER: Ipv4Addr = Ipv4Addr::new(10, 244, 4, 7);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

#[test]
fn nobody_but_a_peer_gets_in_and_a_peer_only_with_its_own_addresses() {
    let setup = Setup::new(UDP);
    let counters = setup.site.counters();
    setup.send(&setup.stranger, PEER, "a stranger who pretends to be the peer's pod");
    setup.site.wait_for("a stranger", |counters| counters.refused_stranger.get() == 1);
    for (number, source) in (1..).zip([OTHER_PEER, OUTSIDE, v4(setup.pod.address()), setup.stranger.0]) {
        setup.send(&setup.peer, source, "a peer who pretends to be somebody else");
        setup.site.wait_for("a wrong source", |counters| counters.refused_source.get() == number);
    }
    // Behind those in the only queue there is: they would have been heard before.
    setup.send(&setup.peer, PEER, "the peer's pod");
    assert_eq!(setup.hear(), "the peer's pod");
    setup.send(&setup.peer, setup.peer.0, "the peer itself");
    assert_eq!(setup.hear(), "the peer itself");
    assert_eq!((counters.refused_stranger.get(), counters.refused_source.get()), (1, 4));
    setup.site.wait_for("two packets", |counters| counters.received_packets.get() == 2);
}

#[test]
fn an_operator_can_let_everybody_in() {
    let setup = Setup::new(TRUSTING);
    setup.send(&setup.stranger, PEER, "a stranger");
    assert_eq!(setup.hear(), "a stranger");
    // A node has no way back to this one, but that is not the tunnel's business.
    setup.send(&setup.peer, OTHER_PEER, "another source");
    assert_eq!(setup.hear(), "another source");
    let counters = setup.site.counters();
    assert_eq!(counters.refused_stranger.get() + counters.refused_source.get(), 0, "{counters}");
}

#[test]
fn a_peer_that_left_is_a_stranger_and_one_that_moved_is_known_at_its_new_address() {
    let mut setup = Setup::new(UDP);
    setup.send(&setup.peer, PEER, "before");
    assert_eq!(setup.hear(), "before");
    let moved = setup.stranger.0;
    setup.site.peers = vec![(2, moved)];
    assert_eq!(
        setup.site.converge(),
        ["forwarding set flannel0 local 172.31.0.1:8285 mtu 1472 peers 1"],
        "the device stays"
    );
    // Batches that were read before may end with the old peers, so this waits for the first refusal.
    setup.send(&setup.peer, PEER, "from the old address");
    setup.site.wait_for("a stranger", |counters| counters.refused_stranger.get() == 1);
    setup.send(&setup.stranger, PEER, "from the new address");
    assert_eq!(setup.hear(), "from the new address");
}
