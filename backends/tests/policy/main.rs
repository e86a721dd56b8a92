//! Network policies: a table of cases, random clusters against an evaluator, and real packets through the real kernel.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod bed;
mod cases;
mod demand;
mod explain;
mod generations;
mod kernel;
mod random;

use std::time::Instant;

use backends::nft::{Table, TableFamily, TableId};
use backends::policy::{Engine, Plan};
use backends::testing::policy::{Cases, World, apply};

/// The base chain that judges.
const FORWARD: &str = "forward";
/// Where the generation stands in connections' marks.
const SHIFT: u32 = 24;

/// The table of cases: policies, and the connections that they forbid.
fn cases() -> Cases {
    Cases::read(include_str!("cases.json")).unwrap()
}

/// An engine and a kernel that is a value.
struct Judge {
    engine: Engine,
    table: Option<Table>,
}

impl Judge {
    fn new(world: &World) -> Self {
        let mut engine = Engine::new(world.settings.clone(), SHIFT, 42);
        world.tell(&mut engine.cluster);
        let plan = engine.adopt(None, Instant::now());
        let mut judge = Self { engine, table: None };
        judge.carry_out(&plan);
        judge
    }

    /// Carries out what changed since the last time.
    fn update(&mut self, now: Instant) -> Plan {
        let plan = self.engine.plan(now).unwrap();
        self.carry_out(&plan);
        plan
    }

    fn carry_out(&mut self, plan: &Plan) {
        let empty = Table::new(TableId::new(TableFamily::Inet, "flannel-policy"));
        self.table = apply(self.table.take(), plan, &empty);
    }
}
