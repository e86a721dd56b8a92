//! The table of cases against the evaluator and the tables, both without a kernel.

use std::collections::BTreeMap;
use std::time::Instant;

use backends::testing::policy::{Connection, Interpreter, Outcome};
use subnet::Family;

use crate::{FORWARD, Judge, cases};

const NODES: [&str; 2] = ["node1", "node2"];

#[test]
fn the_cases_hold_in_the_evaluator_and_in_the_tables() {
    let cases = cases();
    assert_eq!(cases.cases.len(), 132);
    let mut judged = 0;
    for families in [&[Family::V4][..], &[Family::V6], &Family::BOTH] {
        for case in &cases.cases {
            let mut judges: BTreeMap<&str, Judge> = BTreeMap::new();
            for (number, step) in case.steps.iter().enumerate() {
                let worlds = NODES.map(|node| (node, cases.world(step, node, families)));
                for (node, world) in &worlds {
                    let judge = judges.entry(node).or_insert_with(|| Judge::new(world));
                    world.tell(&mut judge.engine.cluster);
                    judge.update(Instant::now());
                }
                for cell in cases.cells(step) {
                    for family in families {
                        let packet = cases.packet(&cell, *family);
                        let what = || format!("{}, step {number}, {cell:?}, {packet:?}", case.name);
                        let (from, to) = (cases.node_of(&cell.from), cases.node_of(&cell.to));
                        let to_host = NODES.contains(&cell.to.as_str());
                        // What a pod says to its own node, or another node hears itself, no policy is about.
                        let nodes = NODES.iter().filter(|node| match to_host {
                            true => **node == from && from != to,
                            false => [from, to].contains(node),
                        });
                        let (mut evaluated, mut passed) = (true, true);
                        for node in nodes {
                            let (_, world) = worlds.iter().find(|(name, _)| name == node).unwrap();
                            evaluated &= world.allows(&packet);
                            // Without policies there is no table.
                            let Some(table) = &judges[node].table else { continue };
                            let outcome = Interpreter::new(table).run(FORWARD, &packet, Connection::NEW);
                            passed &= outcome != Outcome::Dropped;
                            judged += 1;
                        }
                        assert_eq!((evaluated, passed), (cell.allowed, cell.allowed), "{}", what());
                    }
                }
            }
        }
    }
    assert!(judged > 100_000, "{judged}");
}
