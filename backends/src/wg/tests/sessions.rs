//! What a device reports about its sessions.

use super::*;
use crate::wg::ledger::{HandshakeFault, SessionReport, SessionState};

fn session(node: &Node) -> SessionReport {
    let mut found = Vec::new();
    node.device.sessions(|_, report| found.push(report));
    assert_eq!(found.len(), node.settings.peers.len());
    found[0]
}

#[test]
fn both_sides_know_their_last_handshake_and_count_the_same_bytes() {
    let mut world = World::new();
    let before = SessionReport { endpoint: Some(at(1)), ..SessionReport::default() };
    assert_eq!(session(&world.nodes[0]), before);
    world.send(0, &packet(0));
    world.deliver(0);
    assert_eq!(
        session(&world.nodes[1]).handshake,
        None,
        "the peer has not shown yet that it has the session"
    );
    world.pass(3_000);
    world.settle();
    let [near, far] = [0, 1].map(|number| session(&world.nodes[number]));
    assert_eq!((near.handshake, far.handshake), (Some(1_700_000_003), Some(1_700_000_003)));
    // An initiation and a packet of 32 bytes one way, a response the other.
    assert_eq!((near.sent, near.received), (148 + 64, 92));
    assert_eq!((far.sent, far.received), (92, 148 + 64));
    assert_eq!(near.state(world.now.unix.as_secs()), SessionState::Current);
    world.run(200_000);
    assert_eq!(session(&world.nodes[0]).state(world.now.unix.as_secs()), SessionState::Idle);
}

#[test]
fn a_peer_that_does_not_answer_is_failing_until_it_does() {
    let mut world = World::new();
    world.nodes[1].at = at(7);
    world.send(0, &packet(0));
    world.run(120_000);
    let report = session(&world.nodes[0]);
    assert!((17..=19).contains(&report.unanswered), "{report:?}");
    assert_eq!((report.state(0), report.fault), (SessionState::Failing, None));
    assert_eq!(world.nodes[0].device.take_unanswered(), u64::from(report.unanswered));
    world.nodes[1].at = at(1);
    world.send(0, &packet(1));
    world.settle();
    let report = session(&world.nodes[0]);
    assert_eq!((report.unanswered, report.state(world.now.unix.as_secs())), (0, SessionState::Current));
}

#[test]
fn the_reason_why_handshakes_fail_is_known_where_messages_show_it() {
    // Different preshared keys: the one who asks can't read the answer.
    let mut world = World::with_secrets([Some(PresharedKey::from([1; 32])), None]);
    world.send(0, &packet(0));
    world.run(20_000);
    let report = session(&world.nodes[0]);
    assert_eq!((report.state(0), report.fault), (SessionState::Failing, Some(HandshakeFault::PresharedKey)));

    // A peer that uses another key than its lease says, and that addresses one which this node doesn't have.
    for (own, fault) in [(true, HandshakeFault::UnknownKey), (false, HandshakeFault::ForeignKey)] {
        let mut world = World::new();
        let other = Arc::new(Identity::generate().unwrap());
        let settings = world.nodes[0].settings.clone();
        let settings = match own {
            true => WireguardSettings { identity: other, ..settings },
            false => {
                let peer = PeerSettings { key: *other.public(), ..settings.peers[0].clone() };
                WireguardSettings { peers: vec![peer], ..settings }
            }
        };
        world.nodes[0] = Node::new(settings, at(0), world.now);
        world.send(0, &packet(0));
        world.send(1, &packet(1));
        world.run(20_000);
        let report = session(&world.nodes[1]);
        assert_eq!((report.state(0), report.fault), (SessionState::Failing, Some(fault)));
    }
}
