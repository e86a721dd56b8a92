//! Random packets through compiled network policies, compared with an evaluator of the policies themselves.

use std::time::{Duration, Instant};

use backends::policy::Engine;
use backends::testing::policy::{Connection, Interpreter, Outcome, Random};

/// A cluster is compared, changed and compared again so often.
const CHANGES: u32 = 6;
const PACKETS: u64 = 100;

/// Packets between pods of a random cluster, which changes several times; gives how many there were, and how many were passed.
pub(crate) fn case(seed: u64) -> (u64, u64) {
    let mut passed = 0;
    let mut random = Random::new(seed);
    let mut world = random.world();
    let mut engine = Engine::new(world.settings.clone(), 24, 42);
    world.tell(&mut engine.cluster);
    let mut now = Instant::now();
    engine.adopt(None, now);
    for _ in 0..CHANGES {
        let table = engine.table();
        let interpreter = table.as_ref().map(Interpreter::new);
        for _ in 0..PACKETS {
            let packet = random.packet(&world);
            let passes = interpreter
                .as_ref()
                .is_none_or(|run| run.run("forward", &packet, Connection::NEW) != Outcome::Dropped);
            assert_eq!(passes, world.allows(&packet), "{packet:?} in {world:#?}");
            passed += u64::from(passes);
        }
        random.change(&mut world, &mut engine.cluster);
        now += Duration::from_secs(2);
        engine.plan(now).expect("the kernel is known");
    }
    (u64::from(CHANGES) * PACKETS, passed)
}
