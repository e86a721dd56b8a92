//! Nodes that go on to WireGuard while packets flow, with the kernel's module as a model.

mod world;

use std::sync::Arc;

use proptest::prelude::*;
use subnet::WireguardEnds;
use subnet::wireguard::WireguardData;

use super::*;
use crate::wg::identity::Identity;
use world::{Node, World, vtep};

const FORMER: [&str; 3] = ["vxlan", "host-gw", "udp"];

/// Two identities, that with the smaller public key first.
fn identities() -> [Arc<Identity>; 2] {
    let mut both = [(); 2].map(|()| Arc::new(Identity::generate().unwrap()));
    both.sort_by_key(|identity| *identity.public().bytes());
    both
}

fn ends(identity: &Identity) -> WireguardEnds {
    let data = WireguardData { key: *identity.public(), port: Some(51_820) };
    WireguardEnds { v4: Some(data), v6: None }
}

fn announcing(identity: &Identity) -> Attachment {
    let WireguardEnds { v4, v6 } = ends(identity);
    Attachment::of_wireguard(v4, v6)
}

/// How a node with this former backend is reached that has not changed.
fn said(former: &str, node: usize) -> Attachment {
    match former {
        "vxlan" => Attachment::Vxlan { v4: Some(vtep(node)), v6: None },
        "host-gw" => Attachment::HostGw,
        _ => Attachment::Udp,
    }
}

/// A node that has told its key, with the peer that says this, and what it does at once.
fn told(former: &str, mine: &Arc<Identity>, peer: &Attachment) -> (Node, Instant) {
    let now = Instant::now();
    let mut node = Node::new(0, former);
    node.turn(&[said(former, 0), said(former, 1)], now);
    node.switch(mine);
    node.turn(&[said(former, 0), peer.clone()], now);
    let lease = node.attachment();
    assert_eq!(lease, said(former, 0).preparing(ends(mine)), "{former}");
    node.turn(&[lease, peer.clone()], now);
    (node, now)
}

#[test]
fn each_pair_of_stages_has_one_way_with_a_session_and_one_without() {
    for former in FORMER {
        let [mine, theirs] = identities();
        for (announced, with, without) in [(false, false, false), (true, true, false)] {
            let plain = said(former, 1);
            let peer = if announced { announcing(&theirs) } else { plain.clone().preparing(ends(&theirs)) };
            let (mut node, now) = told(former, &mine, &peer);
            let own = node.attachment();
            for (session, sealed) in [(false, without), (true, with)] {
                node.session(1, session);
                node.turn(&[own.clone(), peer.clone()], now);
                assert_eq!(node.is_sealed(1), sealed, "{former}: the peer announces: {announced}, {session}");
                assert!(node.hears(1), "what the peer seals is taken");
            }
        }
        // A node that announces WireGuard, and a peer that prepares it.
        let (mut node, mut now) = told(former, &mine, &said(former, 1));
        now += LISTEN;
        let own = node.attachment();
        node.turn(&[own, said(former, 1)], now);
        assert_eq!(node.attachment(), announcing(&mine), "nobody else has told a key: {former}");
        let peer = said(former, 1).preparing(ends(&theirs));
        node.turn(&[announcing(&mine), peer.clone()], now);
        for session in [false, true, false, true] {
            node.session(1, session);
            node.turn(&[announcing(&mine), peer.clone()], now);
            assert_eq!(node.is_sealed(1), session, "{former}");
        }
        node.session(1, false);
        node.turn(&[announcing(&mine), announcing(&theirs)], now);
        assert!(node.is_sealed(1), "both announce it, so nothing is readable, session or not");
    }
}

#[test]
fn the_node_with_the_smaller_key_begins_after_a_moment_and_the_other_one_never() {
    let [small, great] = identities();
    for (mine, theirs, begins) in [(&small, &great, true), (&great, &small, false)] {
        for peer in [said("vxlan", 1).preparing(ends(theirs)), announcing(theirs)] {
            let (mut node, now) = told("vxlan", mine, &peer);
            let own = node.attachment();
            assert_eq!(node.keepalive(1), Some(0));
            for (after, keepalive) in
                [(LEAD / 2, 0), (LEAD, 5 * u16::from(begins)), (LIMIT / 2, 5 * u16::from(begins))]
            {
                node.turn(&[own.clone(), peer.clone()], now + after);
                assert_eq!(node.keepalive(1), Some(keepalive), "{after:?}");
            }
            // Once both announce it, each begins when it has packets.
            node.turn(&[own.clone(), peer.clone()], now + LIMIT);
            node.turn(&[announcing(mine), announcing(theirs)], now + LIMIT);
            assert_eq!(node.keepalive(1), Some(0));
        }
    }
}

#[test]
fn a_peer_that_never_gets_a_session_holds_a_node_up_for_fifteen_seconds_and_one_without_a_key_not_at_all() {
    let [mine, theirs] = identities();
    for former in FORMER {
        let plain = said(former, 1);
        for (peer, wait) in [
            (plain.clone(), LISTEN),
            (Attachment::Foreign("ipsec".into()), LISTEN),
            (plain.clone().preparing(ends(&theirs)), LIMIT),
            (announcing(&theirs), LIMIT),
            // Its key is this node's own, from a copied disk: no session will ever be.
            (plain.preparing(ends(&mine)), LISTEN),
        ] {
            let (mut node, now) = told(former, &mine, &peer);
            let own = node.attachment();
            node.turn(&[own.clone(), peer.clone()], now + wait - Duration::from_millis(1));
            assert_eq!(node.attachment(), own, "{former}: {peer:?}");
            let heard = node.turn(&[own, peer.clone()], now + wait);
            assert_eq!(node.attachment(), announcing(&mine), "{former}: {peer:?}");
            assert_eq!(heard.ended_without, Some(usize::from(wait == LIMIT)));
            // What is left of a dead peer is nothing to ask about for ever.
            let again = node.turn(&[announcing(&mine), peer.clone()], now + LIMIT + GONE).again;
            assert_eq!(again, None, "{former}: {peer:?}");
            assert!(!node.active.wants_sessions());
        }
    }
}

#[test]
fn a_change_that_is_taken_back_leaves_the_former_backend_as_it_was() {
    let [mine, theirs] = identities();
    for former in FORMER {
        let peer = said(former, 1).preparing(ends(&theirs));
        let (mut node, now) = told(former, &mine, &peer);
        node.session(1, true);
        let own = node.attachment();
        node.turn(&[own.clone(), peer.clone()], now);
        node.switch_back();
        assert_eq!(node.attachment(), said(former, 0), "{former}");
        for peer in [peer, said(former, 1)] {
            node.turn(&[own.clone(), peer], now);
            assert!(!node.is_sealed(1), "{former}");
        }
    }
}

#[test]
fn a_key_that_was_heard_this_moment_has_no_session_whatever_the_kernel_said_of_another_one() {
    let [mine, theirs] = identities();
    let peer = said("vxlan", 1).preparing(ends(&theirs));
    let (mut node, now) = told("vxlan", &mine, &said("vxlan", 1));
    node.session(1, true);
    let own = node.attachment();
    node.turn(&[own.clone(), said("vxlan", 1)], now + LISTEN);
    node.turn(&[announcing(&mine), peer.clone()], now + LISTEN);
    assert!(!node.is_sealed(1));
    node.turn(&[announcing(&mine), peer], now + LISTEN);
    assert!(node.is_sealed(1));
}

#[test]
fn a_node_that_has_told_no_key_reaches_a_peer_with_wireguard_as_before_if_it_did() {
    for former in FORMER {
        let [mine, theirs] = identities();
        for known in [true, false] {
            let mut node = Node::new(0, former);
            if known {
                node.turn(&[said(former, 0), said(former, 1)], Instant::now());
            }
            // As after a restart, where the configuration of the store waits for the one before.
            node.take_up(&mine);
            node.turn(&[said(former, 0), announcing(&theirs)], Instant::now());
            assert_eq!(node.is_sealed(1), !known, "{former}");
            assert!(node.hears(1), "what the peer seals is taken: {former}");
        }
    }
}

#[test]
fn a_node_with_wireguard_alone_reaches_a_peer_that_prepares_it_by_the_key_that_is_told() {
    for former in FORMER {
        let [mine, theirs] = identities();
        let (mut node, now) = (Node::alone(0, &mine), Instant::now());
        let peer = said(former, 1).preparing(ends(&theirs));
        for (after, keepalive) in [(Duration::ZERO, 0), (LEAD, 5)] {
            node.turn(&[announcing(&mine), peer.clone()], now + after);
            assert!(node.is_sealed(1), "{former}: nothing else leads to it");
            assert_eq!(node.keepalive(1), Some(keepalive), "{former}: the smaller key begins");
        }
        let other = Arc::new(Identity::generate().unwrap());
        node.turn(&[announcing(&mine), said(former, 1).preparing(ends(&other))], now + LEAD);
        assert_eq!(node.key(1), Some(*other.public()), "{former}: the peer has another key");
        for useless in [said(former, 1), said(former, 1).preparing(ends(&mine))] {
            node.turn(&[announcing(&mine), useless.clone()], now + LEAD);
            let wanted = node.key(1).filter(|key| key == mine.public());
            assert_eq!(wanted, None, "{former}: {useless:?}");
        }
    }
}

#[test]
fn a_node_that_joins_with_wireguard_alone_holds_up_nobody_who_prepares_it() {
    for smaller_joins in [true, false] {
        let mut keys = identities();
        if smaller_joins {
            keys.reverse();
        }
        // With packets both ways handshakes may cross, so that the second ones count.
        for (delay, begins) in [1, 20, 100].into_iter().flat_map(|delay| [(delay, 0), (delay, 700)]) {
            let mut world = World::new("vxlan", [&keys[0], &keys[1]], Duration::from_millis(delay));
            world.lacks(1);
            world.change(0, begins);
            world.run(500);
            world.join_alone(1);
            world.run(10_000);
            world.is_changed();
        }
    }
}

#[test]
fn a_node_that_leaves_wireguard_reaches_a_peer_that_has_not_left_it_as_before() {
    for former in FORMER {
        let [mine, theirs] = identities();
        let (mut node, mut now) = told(former, &mine, &announcing(&theirs));
        now += LIMIT;
        node.turn(&[node.attachment(), announcing(&theirs)], now);
        node.turn(&[node.attachment(), announcing(&theirs)], now);
        assert_eq!(node.attachment(), announcing(&mine), "{former}");
        node.switch_back();
        for _ in 0..4 {
            node.turn(&[node.attachment(), announcing(&theirs)], now);
            assert!(node.is_sealed(1), "{former}: that node has no other backend");
            now += Duration::from_secs(1);
        }
    }
}

#[test]
fn an_agent_that_starts_again_in_the_middle_announces_wireguard_and_is_reached_by_the_former_backend_until_there_is_a_session()
 {
    let [small, great] = identities();
    for (mine, theirs) in [(&small, &great), (&great, &small)] {
        let mut world = World::new("vxlan", [mine, theirs], Duration::from_millis(400));
        world.change(0, 0);
        world.change(1, 0);
        world.run(700);
        world.restart(0);
        world.run(30_000);
        world.is_changed();
    }
}

#[test]
fn a_session_is_one_for_each_family_of_the_peers_pods_that_the_tunnels_carry() {
    let [own, key] = identities().map(|identity| *identity.public());
    let (v4, v6): (IpNet, IpNet) = ("10.244.2.0/24".parse().unwrap(), "fd00:2::/64".parse().unwrap());
    let (four, six, both) = (vec![v4], vec![v6], vec![v4, v6]);
    let lease = &Lease {
        subnets: Subnets::default(),
        public: subnet::PublicAddrs::default(),
        attachment: Attachment::HostGw,
        created: 1,
        written: 1,
    };
    for (peer, carried, sessions, is_one) in [
        (&both, &Family::BOTH[..], &both, true),
        (&both, &Family::BOTH[..], &four, false),
        (&both, &Family::BOTH[..], &six, false),
        (&both, &[Family::V4][..], &four, true),
        (&both, &[Family::V6][..], &four, false),
        (&four, &Family::BOTH[..], &four, true),
        (&six, &[Family::V4][..], &both, false),
    ] {
        let (all, now) = (&Leases::default(), Instant::now());
        let sessions = &FoundSessions { with: sessions.iter().copied().collect(), looked: None };
        let carried = carried.iter().copied().collect();
        let facts = Facts { own, lease, all, carried, sessions, now };
        let pair = facts.pair(peer.iter().copied().collect(), key, false, Some(now));
        assert_eq!(pair.session.is_some(), is_one, "{peer:?} {sessions:?}");
    }
}

#[test]
fn a_look_at_the_sessions_of_many_peers_is_rarer_the_longer_it_takes() {
    let [mine, theirs] = identities();
    let peer = said("vxlan", 1).preparing(ends(&theirs));
    for (took, pause) in [(0, 250), (12, 250), (13, 260), (200, 4000)] {
        let (mut node, now) = told("vxlan", &mine, &peer);
        let own = node.attachment();
        node.looked(now, Duration::from_millis(took));
        for after in [0, 100, 200] {
            let heard = node.turn(&[own.clone(), peer.clone()], now + Duration::from_millis(after));
            let look = now + Duration::from_millis(pause);
            assert_eq!(heard.again, Some(look.min(now + LEAD)), "{took}: counted from the last look");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn no_packet_is_readable_or_lost_and_no_handshakes_cross(
        former in proptest::sample::select(&FORMER[..]),
        delay in 0_u64..=400,
        stores in [0_u64..=1500, 0_u64..=1500],
        start in [0_u64..=6000, 0_u64..=6000],
        together: bool,
        smaller_first: bool,
    ) {
        let mut keys = identities();
        if !smaller_first {
            keys.reverse();
        }
        let mut world = World::new(former, [&keys[0], &keys[1]], Duration::from_millis(delay));
        world.stores = stores.map(Duration::from_millis);
        for node in [0, 1] {
            world.change(node, start[if together { 0 } else { node }]);
        }
        world.run(30_000);
        world.is_changed();
    }
}
