//! Real packets through the real kernel.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use backends::nft::Change;
use backends::policy::{REPLIES_PASS, TableStep, own_tables, remove_all};
use backends::testing::policy::Case;
use backends::testing::{Namespace, uninterrupted, wait_for};
use subnet::Family;

use crate::bed::{Bed, SameNode};

/// What is allowed has to get through within this time, on however busy a machine.
const TIMEOUT: Duration = Duration::from_secs(20);

fn all_cases(same_node: SameNode) {
    let mut bed = Bed::new(same_node);
    let cases = std::mem::take(&mut bed.cases.cases);
    assert_eq!(cases.len(), 132);
    for (number, Case { name, steps }) in cases.iter().enumerate() {
        for (at, step) in steps.iter().enumerate() {
            bed.enforce(step);
            let wrong = bed.wrong(step);
            assert!(wrong.is_empty(), "{name}, step {at}: {wrong:#?}\n{}", bed.nodes[0].ruleset());
        }
        // `nft` can print everything in the tables.
        if number % 16 == 0 {
            bed.nodes.iter().for_each(|node| drop(node.ruleset()));
        }
    }
    bed.cases.cases = cases;
}

#[test]
fn the_cases_hold_where_frames_between_pods_are_steered() {
    all_cases(SameNode::Steered);
}

#[test]
fn the_cases_hold_where_br_netfilter_sees_frames_between_pods() {
    all_cases(SameNode::Netfilter);
}

fn case<'a>(cases: &'a [Case], name: &str) -> &'a Case {
    cases.iter().find(|case| case.name == name).unwrap()
}

#[test]
fn without_steering_and_br_netfilter_pods_of_one_node_reach_each_other() {
    // What shows that the test above can fail.
    let mut bed = Bed::new(SameNode::Unseen);
    let cases = std::mem::take(&mut bed.cases.cases);
    let step = &case(&cases, "all pods: ingress denied").steps[0];
    bed.enforce(step);
    let wrong = bed.wrong(step);
    assert!(wrong.iter().any(|line| line.contains("x/c -> x/a Tcp 80 was let through")), "{wrong:#?}");
    assert!(!wrong.iter().any(|line| line.contains("x/b -> x/a")), "of another node: {wrong:#?}");
}

/// A stream from one pod of the table to another, on which what is sent comes back.
fn stream(bed: &Bed, from: &str, to: &str, family: Family) -> TcpStream {
    let target = SocketAddr::new(bed.cases.address(to, family), 80);
    let stream = bed.pods[from]
        .namespace()
        .run(|| TcpStream::connect_timeout(&target, Duration::from_secs(10)))
        .unwrap();
    stream.set_nonblocking(true).unwrap();
    stream
}

/// Whether something that is sent now comes back.
fn echoes(stream: &mut TcpStream, limit: Duration) -> bool {
    if stream.write_all(b"?").is_err() {
        return false;
    }
    let mut buffer = [0; 16];
    wait_for("an echo", limit, || uninterrupted(|| stream.read(&mut buffer)).is_ok_and(|len| len > 0)).is_ok()
}

#[test]
fn a_change_cuts_streams_that_it_forbids_and_no_others() {
    for same_node in [SameNode::Steered, SameNode::Netfilter] {
        let mut bed = Bed::new(same_node);
        let cases = std::mem::take(&mut bed.cases.cases);
        bed.enforce(&case(&cases, "no policy").steps[0]);
        // From the same node and from another, in both families, before there is any policy.
        let pairs = Family::BOTH.map(|family| [("x/c", family), ("x/b", family)]);
        let mut streams: Vec<_> = pairs
            .as_flattened()
            .iter()
            .map(|(from, family)| (*from, stream(&bed, from, "x/a", *family)))
            .collect();
        bed.enforce(&case(&cases, "ingress: pods: all of the namespace").steps[0]);
        for (from, stream) in &mut streams {
            assert!(echoes(stream, TIMEOUT), "{same_node:?}: {from} is still allowed");
        }
        bed.enforce(&case(&cases, "ingress: pods: b of the namespace").steps[0]);
        for (from, stream) in &mut streams {
            let allowed = *from == "x/b";
            let limit = if allowed { TIMEOUT } else { Duration::from_millis(500) };
            assert_eq!(echoes(stream, limit), allowed, "{same_node:?}: {from}");
        }
    }
}

#[test]
fn a_restart_changes_nothing_and_a_flush_is_made_good() {
    let mut bed = Bed::new(SameNode::Steered);
    let cases = std::mem::take(&mut bed.cases.cases);
    let step = &case(&cases, "all three namespaces closed, same namespace allowed").steps[0];
    bed.enforce(step);
    let world = bed.world(step, "node1");
    let now = Instant::now();
    let node = &mut bed.nodes[0];
    let before = node.ruleset();
    for _ in 0..2 {
        let done = node.restart(&world, now).unwrap();
        assert_eq!((done.changes, done.table), (0, TableStep::Keep));
        assert!(!node.enforcer.steer(node.steering().as_ref()).unwrap());
    }
    let plain = |text: String| {
        text.lines().filter(|line| !line.contains("expires")).map(str::to_owned).collect::<Vec<_>>()
    };
    let without_counters = |text: String| {
        let lines = plain(text).into_iter();
        lines
            .map(|line| line.split("counter packets").next().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(without_counters(node.ruleset()), without_counters(before.clone()));

    let flush = own_tables().map(Change::DeleteTable);
    node.nft().commit(&flush).unwrap();
    node.enforcer.engine.forget_kernel();
    let done = node.enforcer.converge(now).unwrap();
    assert_eq!(done.table, TableStep::Add);
    assert!(node.enforcer.steer(node.steering().as_ref()).unwrap());
    assert_eq!(bed.wrong(step), Vec::<String>::new());

    // Off means clean.
    for node in &bed.nodes {
        assert!(remove_all(&mut node.nft()).unwrap());
        assert!(!node.ruleset().contains("flannel-policy"));
        assert!(!remove_all(&mut node.nft()).unwrap());
    }
}

#[test]
fn what_is_made_of_nothing_in_two_steps_is_what_the_next_run_wants() {
    let mut bed = Bed::new(SameNode::Steered);
    let empty = Namespace::new().unwrap();
    let cases = std::mem::take(&mut bed.cases.cases);
    for (number, case) in cases.iter().enumerate() {
        let world = bed.world(&case.steps[0], "node1");
        let (node, now) = (&mut bed.nodes[0], Instant::now());
        remove_all(&mut node.nft()).unwrap();
        let made = node.restart(&world, now).unwrap();
        assert_eq!(made.table == TableStep::Add, !world.policies.is_empty(), "{}", case.name);
        if number % 8 == 0 {
            node.read_back(&empty);
        }
        let again = node.restart(&world, now).unwrap();
        assert_eq!((again.changes, again.table), (0, TableStep::Keep), "{}", case.name);
    }
}

#[test]
fn a_table_of_which_only_the_sets_were_made_is_completed_and_counts_for_none() {
    let mut bed = Bed::new(SameNode::Steered);
    let cases = std::mem::take(&mut bed.cases.cases);
    let step = &case(&cases, "ingress: pods: b of the namespace").steps[0];
    let world = bed.world(step, "node1");
    bed.enforce(step);
    let node = &mut bed.nodes[0];
    assert!(node.enforcer.is_there().unwrap());
    // What a run leaves that is killed before the second transaction: all sets of pods' addresses, and nothing else.
    let [filter, ..] = own_tables();
    let mut table = node.nft().dump_tables(std::slice::from_ref(&filter)).unwrap().tables.remove(0);
    table.chains.clear();
    table.sets.retain(|set| set.name.starts_with("s4-") || set.name.starts_with("s6-"));
    assert!(table.sets.iter().any(|set| !set.elements.is_empty()));
    node.nft().apply(&[table]).unwrap();
    assert!(!node.enforcer.is_there().unwrap());
    node.restart(&world, Instant::now()).unwrap();
    assert!(node.enforcer.is_there().unwrap());
    assert_eq!(bed.wrong(step), Vec::<String>::new());
}

#[test]
fn steering_follows_br_netfilter_and_the_bridge() {
    let mut bed = Bed::new(SameNode::Steered);
    let node = &mut bed.nodes[0];
    assert!(node.ruleset().contains("ip saddr 10.244.0.0/24 ip daddr 10.244.0.0/24"));
    let steered = node.steering().unwrap();
    assert_eq!(steered.subnets.len(), 2);
    node.node.namespace().sysctl("bridge/bridge-nf-call-iptables", "1").unwrap();
    let steering = node.steering();
    assert_eq!(steering.as_ref().unwrap().subnets, [steered.subnets[1]], "only IPv6 is left to steer");
    assert!(node.enforcer.steer(steering.as_ref()).unwrap());
    assert!(!node.ruleset().contains("ip saddr 10.244.0.0/24 ip daddr 10.244.0.0/24"));
    node.node.namespace().ip("link set cni0 address 02:00:00:00:00:42").unwrap();
    node.steer();
    assert!(node.ruleset().contains("ether daddr 02:00:00:00:00:42 accept"));
    node.node.namespace().sysctl("bridge/bridge-nf-call-ip6tables", "1").unwrap();
    assert_eq!(node.steering(), None);
    assert!(node.enforcer.steer(None).unwrap());
    assert!(!node.ruleset().contains("flannel-policy"));
    assert!(!node.enforcer.steer(None).unwrap());
}

#[test]
fn before_a_number_comes_round_connections_with_old_marks_lose_them() {
    let mut bed = Bed::new(SameNode::Steered);
    let cases = std::mem::take(&mut bed.cases.cases);
    bed.enforce(&case(&cases, "ingress: pods: b of the namespace").steps[0]);
    let marks = |bed: &Bed| {
        let table = bed.nodes[0]
            .node
            .namespace()
            .run(|| std::fs::read_to_string("/proc/thread-self/net/nf_conntrack"));
        let table = table.unwrap();
        let lines = table.lines().filter(|line| line.contains("dport=80 ") && line.contains("ESTABLISHED"));
        lines
            .map(|line| {
                line.split("mark=").nth(1).unwrap().split(' ').next().unwrap().parse::<u32>().unwrap()
            })
            .collect::<Vec<_>>()
    };
    let mut kept = stream(&bed, "x/b", "x/a", Family::V4);
    assert!(echoes(&mut kept, TIMEOUT));
    let mark = |bed: &Bed| u32::from(bed.nodes[0].enforcer.engine.summary().generation) << crate::SHIFT;
    let old = mark(&bed);
    assert_eq!(marks(&bed), [old]);
    let walk = |bed: &mut Bed, now| bed.nodes[0].enforcer.forget_old_generations(now).unwrap();
    assert_eq!(walk(&mut bed, Instant::now()), 0, "what is in force stays");

    bed.enforce(&case(&cases, "ingress: pods: all of the namespace").steps[0]);
    assert_ne!(mark(&bed), old);
    assert_eq!(walk(&mut bed, Instant::now()), 0, "replies of it still pass");
    assert_eq!(walk(&mut bed, Instant::now() + REPLIES_PASS * 2), 1);
    assert_eq!(marks(&bed), [0]);
    assert!(echoes(&mut kept, TIMEOUT), "it is judged again, and allowed");
    assert_eq!(marks(&bed), [mark(&bed)]);
}

#[test]
fn a_table_that_comes_again_trusts_in_no_mark_of_an_earlier_one() {
    let mut bed = Bed::new(SameNode::Steered);
    let cases = std::mem::take(&mut bed.cases.cases);
    let step = |bed: &mut Bed, name: &str| drop(bed.enforce(&case(&cases, name).steps[0]));
    step(&mut bed, "ingress: pods: all of the namespace");
    let mut stream = stream(&bed, "x/c", "x/a", Family::V4);
    assert!(echoes(&mut stream, TIMEOUT));
    step(&mut bed, "no policy");
    assert!(!bed.nodes[0].ruleset().contains("inet flannel-policy"));
    step(&mut bed, "ingress: pods: b of the namespace");
    assert!(
        !echoes(&mut stream, Duration::from_millis(500)),
        "the first generation has the same number again"
    );
}

#[test]
fn what_has_connections_judged_anew_removes_the_fast_path_and_nothing_else_does() {
    let mut bed = Bed::new(SameNode::Steered);
    let cases = std::mem::take(&mut bed.cases.cases);
    bed.nodes[0].enforcer.fast_path = true;
    let mut stays = |name: &str| {
        let words = "add table ip flannel-fast-path; add table ip6 flannel-fast-path";
        bed.nodes.iter().for_each(|node| drop(node.node.namespace().command("nft").arg(words).ok().unwrap()));
        bed.enforce(&case(&cases, name).steps[0]);
        let [first, second] =
            [0, 1].map(|node: usize| bed.nodes[node].ruleset().contains("flannel-fast-path"));
        assert!(second, "an agent without a fast path leaves that of another one");
        first
    };
    assert!(!stays("ingress: pods: all of the namespace"), "from now on there are policies");
    assert!(!stays("ingress: pods: b of the namespace"), "a right is taken away");
    assert!(stays("ingress: pods: b of the namespace"), "nothing has changed");
    assert!(!stays("no policy"));
}
