//! Connections that exist when something changes.

use std::time::{Duration, Instant};

use backends::nft::{CtState, Set, Span};
use backends::policy::{RAISE_INTERVAL, REPLIES_PASS, TableStep};
use backends::testing::policy::{Cases, Connection, Interpreter, Outcome, Packet, World};
use subnet::Family;

use crate::{FORWARD, Judge, SHIFT, cases};

const FAMILIES: [Family; 1] = [Family::V4];

/// The world of a case at its step, on the first node.
fn world(cases: &Cases, name: &str, step: usize) -> World {
    let case = cases.cases.iter().find(|case| case.name == name).unwrap();
    cases.world(&case.steps[step], "node1", &FAMILIES)
}

/// A TCP packet between pods of the table.
fn packet(cases: &Cases, from: &str, to: &str) -> Packet {
    Packet {
        source: cases.address(from, Family::V4),
        destination: cases.address(to, Family::V4),
        protocol: 6,
        source_port: 40_000,
        destination_port: 80,
    }
}

fn reversed(packet: Packet) -> Packet {
    Packet {
        source: packet.destination,
        destination: packet.source,
        source_port: packet.destination_port,
        destination_port: packet.source_port,
        ..packet
    }
}

const ACK: u8 = 0x10;

impl Judge {
    fn first(&self, packet: Packet) -> Outcome {
        Interpreter::new(self.table.as_ref().unwrap()).run(FORWARD, &packet, Connection::NEW)
    }

    /// A later packet of the client.
    fn later(&self, packet: Packet, mark: u32) -> Outcome {
        let connection = Connection { state: CtState::ESTABLISHED, reply: false, mark };
        Interpreter::new(self.table.as_ref().unwrap()).run_with(FORWARD, &packet, connection, ACK)
    }

    /// An answer to `packet`.
    fn answer(&self, packet: Packet, mark: u32) -> Outcome {
        let connection = Connection { state: CtState::ESTABLISHED, reply: true, mark };
        Interpreter::new(self.table.as_ref().unwrap()).run_with(FORWARD, &reversed(packet), connection, ACK)
    }

    fn fresh(&self) -> &Set {
        let mut sets = self.table.as_ref().unwrap().sets.iter().filter(|set| set.name.starts_with("fresh-"));
        let set = sets.next().unwrap();
        assert_eq!(sets.next(), None);
        set
    }
}

fn mark(outcome: Outcome) -> u32 {
    match outcome {
        Outcome::Accepted(mark) => mark,
        Outcome::Dropped => panic!("dropped"),
    }
}

#[test]
fn a_connection_that_is_not_allowed_any_more_is_cut_and_one_that_is_goes_on() {
    let cases = cases();
    let allowing = world(&cases, "ingress: pods: all of the namespace", 0);
    let mut judge = Judge::new(&allowing);
    let (cut, kept) = (packet(&cases, "x/b", "x/a"), packet(&cases, "x/c", "x/c"));
    let cut_mark = mark(judge.first(cut));
    assert_eq!(mark(judge.later(cut, cut_mark)), cut_mark);
    assert_eq!(mark(judge.answer(cut, cut_mark)), cut_mark);
    let now = Instant::now();

    world(&cases, "pod a: ingress denied", 0).tell(&mut judge.engine.cluster);
    let plan = judge.update(now);
    assert_eq!(plan.table, TableStep::Keep);
    assert_eq!(judge.later(cut, cut_mark), Outcome::Dropped);
    assert_eq!(judge.first(cut), Outcome::Dropped);
    // What the server still says passes for half a minute, until the kernel forgets the generation.
    assert_eq!(mark(judge.answer(cut, cut_mark)), cut_mark);
    let lifetime = judge.fresh().lifetimes[&Span::mark(cut_mark)];
    assert_eq!(lifetime, REPLIES_PASS);
    assert!(mark(judge.later(kept, cut_mark)) != 0);
    let table = judge.table.as_mut().unwrap();
    for set in table.sets.iter_mut().filter(|set| set.name.starts_with("fresh-")) {
        set.elements.clear();
    }
    assert_eq!(judge.answer(cut, cut_mark), Outcome::Dropped);
}

#[test]
fn what_is_still_allowed_is_marked_anew_with_its_next_packet() {
    let cases = cases();
    let mut judge = Judge::new(&world(&cases, "ingress: pods: all of the namespace", 0));
    let kept = packet(&cases, "x/b", "x/a");
    let before = mark(judge.first(kept));
    world(&cases, "ingress: pods: b of the namespace", 0).tell(&mut judge.engine.cluster);
    judge.update(Instant::now());
    assert_eq!(mark(judge.answer(kept, before)), before, "the answer passes before the client speaks");
    let after = mark(judge.later(kept, before));
    assert_eq!(after >> SHIFT, (before >> SHIFT) + 1);
    assert_eq!(mark(judge.answer(kept, after)), after);
    // Other bits of the mark belong to others.
    assert_eq!(mark(judge.later(kept, before | 0x00ab_cdef)), after | 0x00ab_cdef);
}

#[test]
fn connections_from_before_any_policy_go_on_if_they_are_allowed() {
    let cases = cases();
    let judge = Judge::new(&world(&cases, "ingress: pods: b of the namespace", 0));
    let (allowed, forbidden) = (packet(&cases, "x/b", "x/a"), packet(&cases, "x/c", "x/a"));
    assert_eq!(mark(judge.answer(allowed, 0)), 0, "for a while");
    assert!(mark(judge.later(allowed, 0)) != 0);
    assert_eq!(judge.later(forbidden, 0), Outcome::Dropped);
}

#[test]
fn a_reply_that_nobody_vouches_for_is_dropped() {
    let cases = cases();
    let judge = Judge::new(&world(&cases, "all pods: both denied", 0));
    assert_eq!(judge.answer(packet(&cases, "x/b", "x/a"), 99 << SHIFT), Outcome::Dropped);
}

#[test]
fn a_connection_picked_up_in_the_middle_waits_for_its_client() {
    let cases = cases();
    let judge = Judge::new(&world(&cases, "ingress: pods: all of the namespace", 0));
    let connection = packet(&cases, "x/b", "x/a");
    // The kernel takes the first packet that it sees for the client's.
    assert_eq!(judge.later(reversed(connection), 0), Outcome::Dropped);
    assert!(mark(judge.later(connection, 0)) != 0);
}

#[test]
fn an_icmp_error_about_an_allowed_connection_passes() {
    let cases = cases();
    let judge = Judge::new(&world(&cases, "all pods: both denied", 0));
    let error = Packet { protocol: 1, ..packet(&cases, "x/b", "x/a") };
    let interpreter = Interpreter::new(judge.table.as_ref().unwrap());
    let run = |state| interpreter.run(FORWARD, &error, Connection { state, reply: true, mark: 0 });
    assert_eq!(run(CtState::RELATED), Outcome::Accepted(0));
    // All replies of connections from before pass for a while.
    assert_eq!(run(CtState::INVALID), Outcome::Accepted(0));
    let fresh = Connection { state: CtState::INVALID, reply: false, mark: 0 };
    assert_eq!(interpreter.run(FORWARD, &error, fresh), Outcome::Dropped);
}

#[test]
fn the_generation_is_raised_once_a_second_at_most_and_the_rest_waits() {
    let cases = cases();
    let mut judge = Judge::new(&world(&cases, "ingress: pods: all of the namespace", 0));
    let now = Instant::now();
    let change = |judge: &mut Judge, name: &str, now| {
        world(&cases, name, 0).tell(&mut judge.engine.cluster);
        judge.update(now)
    };
    assert_eq!(change(&mut judge, "ingress: pods: b of the namespace", now).again, None);
    assert_eq!(judge.engine.summary().generation, 43);
    let soon = now + Duration::from_millis(100);
    let plan = change(&mut judge, "pod a: ingress denied", soon);
    assert_eq!(plan.again, Some(now + RAISE_INTERVAL));
    assert_eq!(judge.engine.summary().generation, 43);
    assert_eq!(judge.first(packet(&cases, "x/b", "x/a")), Outcome::Dropped, "rules are in force at once");
    let plan = judge.update(now + RAISE_INTERVAL);
    assert!(!plan.is_empty() && plan.again.is_none());
    assert_eq!(judge.engine.summary().generation, 44);
}

#[test]
fn what_takes_no_right_away_raises_nothing() {
    let cases = cases();
    let before = world(&cases, "one of two policies removed", 0);
    let mut judge = Judge::new(&before);
    let mut now = Instant::now();
    let mut generation_after = |world: &World, judge: &mut Judge| {
        now += RAISE_INTERVAL * 2;
        world.tell(&mut judge.engine.cluster);
        judge.update(now);
        judge.engine.summary().generation
    };
    assert_eq!(generation_after(&before, &mut judge), 42);
    // A pod on the other node comes, and goes.
    let mut more = before.clone();
    let mut pod = more.pods.iter().find(|pod| !pod.local).unwrap().clone();
    pod.uid.0 += 1000;
    pod.addresses = vec!["10.244.1.77".parse().unwrap()];
    more.pods.push(pod);
    assert_eq!(generation_after(&more, &mut judge), 42);
    assert_eq!(generation_after(&before, &mut judge), 42);
    // But an address that passes to another pod inherits nothing.
    let mut other = more.clone();
    let last = other.pods.last_mut().unwrap();
    last.uid.0 += 1;
    last.labels.clear();
    assert_eq!(generation_after(&more, &mut judge), 42 + 1, "it had an owner that mattered");
    assert_eq!(generation_after(&other, &mut judge), 42 + 2);
}

#[test]
fn without_policies_there_is_no_table() {
    let cases = cases();
    let mut judge = Judge::new(&world(&cases, "no policy", 0));
    assert_eq!(judge.table, None);
    let now = Instant::now();
    world(&cases, "pod a: ingress denied", 0).tell(&mut judge.engine.cluster);
    assert_eq!(judge.update(now).table, TableStep::Add);
    world(&cases, "no policy", 0).tell(&mut judge.engine.cluster);
    assert_eq!(judge.update(now).table, TableStep::Remove);
    assert_eq!(judge.table, None);
    assert!(judge.update(now).is_empty());
}

#[test]
fn strict_cuts_off_local_addresses_that_no_pod_is_known_for() {
    let cases = cases();
    let mut world = world(&cases, "no policy", 0);
    world.settings.strict = true;
    let judge = Judge::new(&world);
    let known = packet(&cases, "x/a", "x/b");
    let unknown = Packet { source: "10.244.0.99".parse().unwrap(), ..known };
    assert!(matches!(judge.first(known), Outcome::Accepted(_)));
    assert_eq!(judge.first(unknown), Outcome::Dropped);
    assert_eq!(judge.first(reversed(unknown)), Outcome::Dropped);
}
