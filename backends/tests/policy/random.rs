//! Random clusters, changed step by step: the tables do what the evaluator says, each step changes what it must, and
//! another run finds nothing to do.

use std::time::{Duration, Instant};

use backends::policy::Engine;
use backends::testing::policy::{Connection, Interpreter, Outcome, Random, World};

use crate::{FORWARD, Judge, SHIFT};

/// Compares `packets` random packets; `bench/src/bin/fuzz` does very many.
fn compare(random: &mut Random, world: &World, judge: &Judge, packets: usize, what: &str) {
    let interpreter = judge.table.as_ref().map(Interpreter::new);
    for _ in 0..packets {
        let packet = random.packet(world);
        let passes = interpreter
            .as_ref()
            .is_none_or(|interpreter| interpreter.run(FORWARD, &packet, Connection::NEW) != Outcome::Dropped);
        assert_eq!(passes, world.allows(&packet), "{what}: {packet:?} in {world:#?} by {:#?}", judge.table);
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
