//! Random clusters, changed step by step: the tables do what the evaluator says, each step changes what it must, and
//! another run finds nothing to do.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use backends::nft::Table;
use backends::policy::{Engine, Settings};
use backends::testing::policy::{Connection, Interpreter, Outcome, Random, World};
use subnet::policy::{
    Isolation, NamespaceScope, NetworkPolicy, ObjectName, Peer, Peers, Port, PortMatch, Ports, Protocol,
    Requirement, Rule, Selector, Uid,
};

use crate::{FORWARD, Judge, SHIFT};

/// Compares `packets` random packets; `bench/src/bin/fuzz` does very many.
fn compare(random: &mut Random, world: &World, judge: &Judge, packets: usize, what: &str) {
    let interpreter = judge.table.as_ref().map(Interpreter::new);
    // What IPVS sends is judged as what is forwarded.
    let chains: &[&str] = if world.settings.ipvs { &[FORWARD, "output"] } else { &[FORWARD] };
    for _ in 0..packets {
        let packet = random.packet(world);
        for chain in chains {
            let passes = interpreter.as_ref().is_none_or(|interpreter| {
                interpreter.run(chain, &packet, Connection::NEW) != Outcome::Dropped
            });
            let allowed = world.allows(&packet);
            assert_eq!(passes, allowed, "{what}, {chain}: {packet:?} in {world:#?} by {:#?}", judge.table);
        }
    }
}

#[test]
fn the_tables_do_what_the_evaluator_says_through_all_changes() {
    const WORLDS: u64 = 150;
    for seed in 0..WORLDS {
        let mut random = Random::new(seed);
        let mut world = random.world();
        let mut judge = Judge::new(&world);
        let mut now = Instant::now();
        compare(&mut random, &world, &judge, 50, &format!("seed {seed}, new"));
        for step in 0..8 {
            for _ in 0..=random.below(3) {
                random.change(&mut world, &mut judge.engine.cluster);
            }
            now += Duration::from_secs(2);
            judge.update(now);
            let what = format!("seed {seed}, step {step}");
            compare(&mut random, &world, &judge, 20, &what);
            let again = judge.engine.plan(now).unwrap();
            assert!(again.is_empty(), "{what}: nothing changed, and {again:#?} would");
            let mut next = Engine::new(world.settings.clone(), SHIFT, 1);
            world.tell(&mut next.cluster);
            let plan = next.adopt(judge.table.as_ref(), now);
            assert!(plan.is_empty(), "{what}: another run changes {plan:#?}");
        }
    }
}

#[test]
fn another_run_makes_right_what_somebody_changed() {
    for seed in 1000..1060 {
        let mut random = Random::new(seed);
        let mut world = random.world();
        while world.policies.is_empty() {
            world = random.world();
        }
        let mut judge = Judge::new(&world);
        let table = judge.table.as_mut().unwrap();
        // One thing of each kind, at random.
        if !table.sets.is_empty() {
            let at = random.below(table.sets.len());
            let set = &mut table.sets[at];
            let key = set.elements.keys().nth(random.below(set.elements.len())).cloned();
            key.map(|key| set.elements.remove(&key));
        }
        let at = random.below(table.chains.len());
        let chain = &mut table.chains[at];
        if !chain.rules.is_empty() {
            chain.rules.remove(random.below(chain.rules.len()));
        }
        let mut next = Engine::new(world.settings.clone(), SHIFT, 1);
        world.tell(&mut next.cluster);
        let now = Instant::now();
        let plan = next.adopt(judge.table.as_ref(), now);
        judge.carry_out(&plan);
        compare(&mut random, &world, &judge, 50, &format!("seed {seed}"));
        judge.engine = next;
        assert!(judge.engine.adopt(judge.table.as_ref(), now).is_empty(), "seed {seed}");
    }
}

/// The table of a node with so many pods, each isolated for both directions by a policy of its own.
fn isolated(pods: u32) -> Table {
    let net = |text: &str| vec![text.parse().unwrap()];
    let settings = Settings {
        networks: net("10.244.0.0/16"),
        subnets: net("10.244.1.0/24"),
        nodes: BTreeSet::new(),
        strict: false,
        ipvs: false,
        log_group: None,
    };
    let mut engine = Engine::new(settings, SHIFT, 42);
    for number in 0..pods {
        let label = Requirement::equals("app", format!("{number}"));
        let peers = |other: u32| {
            let pods = Selector::new([Requirement::equals("app", format!("{}", (number + other) % pods))]);
            Peers::Of([Peer::Pods { namespaces: NamespaceScope::Own, pods }].into())
        };
        let tcp = Port { protocol: Protocol::Tcp, port: PortMatch::Range(80..=80) };
        let on_port = Rule { peers: peers(1), ports: Ports::Of([tcp].into()) };
        let allowed = Isolation::Isolated([on_port, Rule { peers: peers(2), ports: Ports::Any }].into());
        engine.cluster.set_policy(NetworkPolicy {
            name: ObjectName::new("shop", format!("policy-{number}")),
            pods: Selector::new([label]),
            ingress: allowed.clone(),
            egress: allowed,
        });
        engine.cluster.set_pod(&subnet::policy::Pod {
            uid: Uid(u128::from(number) + 1),
            name: ObjectName::new("shop", format!("pod-{number}")),
            labels: [("app".to_owned(), format!("{number}"))].into(),
            addresses: vec![IpAddr::from([10, 244, 1, number as u8 + 2])],
            ports: Vec::new(),
            created: 0,
            local: true,
        });
    }
    engine.adopt(None, Instant::now());
    engine.table().unwrap()
}

#[test]
fn what_the_kernel_follows_at_a_change_grows_with_the_pods_and_not_with_their_square() {
    let [few, many] = [50, 200].map(|pods| Interpreter::new(&isolated(pods)).steps_of_all_ways(FORWARD));
    assert!(few > 50 * 10 && many < 5 * few, "50 pods: {few}, 200: {many}");
}
