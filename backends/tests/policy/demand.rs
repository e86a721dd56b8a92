//! Which pods of other nodes a node has to know.

use std::time::{Duration, Instant};

use backends::policy::Demand;
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
