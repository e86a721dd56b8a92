//! Which pods of other nodes a node has to know.

use std::time::{Duration, Instant};

use backends::policy::{Demand, Foresight};
use backends::testing::policy::{Connection, Interpreter, Outcome, Random};
use subnet::Family;

use crate::{FORWARD, Judge, cases};

fn demand(case: &str, node: &str) -> Demand {
    let cases = cases();
    let case = cases.cases.iter().find(|one| one.name == case).unwrap();
    Judge::new(&cases.world(&case.steps[0], node, &Family::BOTH)).engine.demand()
}

fn namespaces(names: &[&str]) -> Demand {
    Demand::Namespaces(names.iter().map(|name| (*name).to_owned()).collect())
}

#[test]
fn only_namespaces_that_policies_of_local_pods_speak_of_are_demanded() {
    assert_eq!(demand("no policy", "node1"), namespaces(&[]));
    assert_eq!(demand("pod a: ingress denied", "node1"), namespaces(&[]));
    assert_eq!(demand("ingress: pods: b of the namespace", "node1"), namespaces(&["pt-x"]));
    assert_eq!(demand("ingress: pods: b of the namespace", "node2"), namespaces(&[]), "no such pod is there");
    assert_eq!(demand("ingress: namespaces: In y, z", "node1"), namespaces(&["pt-y", "pt-z"]));
    assert_eq!(
        demand("ingress: namespaces: all", "node1"),
        namespaces(&[]),
        "each pod is known by its address"
    );
    assert_eq!(demand("ingress: all namespaces and pod", "node1"), Demand::Everything);
    assert_eq!(demand("egress ports: named, from everywhere", "node1"), Demand::Everything);
}

#[test]
fn what_is_not_demanded_makes_no_difference() {
    for seed in 5000..5100 {
        let mut random = Random::new(seed);
        let world = random.world();
        let mut judge = Judge::new(&world);
        let Demand::Namespaces(demanded) = judge.engine.demand() else { continue };
        for pod in world.pods.iter().filter(|pod| !pod.local && !demanded.contains(&*pod.name.namespace)) {
            judge.engine.cluster.remove_pod(pod.uid);
        }
        judge.update(Instant::now() + Duration::from_secs(2));
        let interpreter = judge.table.as_ref().map(Interpreter::new);
        for _ in 0..50 {
            let packet = random.packet(&world);
            // Two pods that claim one address are told apart only where both are known.
            let claimed = |address| world.pods.iter().filter(|pod| pod.addresses.contains(&address)).count();
            if claimed(packet.source).max(claimed(packet.destination)) > 1 {
                continue;
            }
            let passes = interpreter
                .as_ref()
                .is_none_or(|run| run.run(FORWARD, &packet, Connection::NEW) != Outcome::Dropped);
            assert_eq!(passes, world.allows(&packet), "seed {seed}: {packet:?}");
        }
    }
}

#[test]
fn what_a_plan_will_demand_is_known_before_it() {
    for seed in 6000..6150 {
        let mut random = Random::new(seed);
        let mut world = random.world();
        let mut judge = Judge::new(&world);
        let (mut foresight, mut now) = (Foresight::default(), Instant::now());
        for step in 0..8 {
            let policies = world.policies.clone();
            random.change(&mut world, &mut judge.engine.cluster);
            if world.policies != policies {
                foresight.policies_changed();
            }
            let foreseen = foresight.demand(&judge.engine.cluster);
            now += Duration::from_secs(2);
            judge.update(now);
            let demanded = judge.engine.demand();
            let covered = match (&foreseen, &demanded) {
                (Demand::Everything, _) => true,
                (Demand::Namespaces(foreseen), Demand::Namespaces(demanded)) => demanded.is_subset(foreseen),
                (Demand::Namespaces(_), Demand::Everything) => false,
            };
            assert!(covered, "seed {seed}, step {step}: {foreseen:?} was foreseen, {demanded:?} is demanded");
        }
    }
}

#[test]
fn what_is_foreseen_is_no_more_than_policies_of_local_pods_speak_of() {
    let foreseen = |case: &str, node: &str| {
        let cases = cases();
        let case = cases.cases.iter().find(|one| one.name == case).unwrap();
        let judge = Judge::new(&cases.world(&case.steps[0], node, &Family::BOTH));
        (Foresight::default().demand(&judge.engine.cluster), judge.engine.demand())
    };
    for case in [
        "no policy",
        "pod a: ingress denied",
        "ingress: pods: b of the namespace",
        "ingress: namespaces: In y, z",
        "ingress: namespaces: all",
        "ingress: all namespaces and pod",
        "egress ports: named, from everywhere",
    ] {
        for node in ["node1", "node2"] {
            let (foreseen, demanded) = foreseen(case, node);
            assert_eq!(foreseen, demanded, "{case}, {node}");
        }
    }
}
