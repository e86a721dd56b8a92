//! What packets through the masquerade notice of an agent that is killed and started again.

use std::time::Duration;

use super::bed::{MODES, Setup, look};
use super::traffic;
use crate::Stage;
use crate::bed::TIMEOUT;
use bench::figure::{Figure, Limit, Record};

/// Rounds, of many restarts each, that are enough.
const ROUNDS: u32 = 3;
/// How long an agent lives once it is ready: what it does then must not be noticed, either.
const LIFE: Duration = Duration::from_millis(100);

/// Kills the agent again and again while datagrams go from the pod to the host outside.
pub(crate) fn measure(stage: &Stage, record: &mut Record, restarts: u32) -> anyhow::Result<()> {
    for (name, flag) in MODES {
        let mut setup = Setup::new(stage, stage.flanneld(), flag)?;
        let mut nft = setup.nft()?;
        let before = look(&mut nft)?;
        let title = format!("rules-restart: {name}, {restarts} restarts");
        let figure = |what: &str, limit| Figure::new(format!("{title}: {what}"), "", limit);
        let mut figures = [
            figure("datagrams lost", Limit::Each(0.0)),
            figure("datagrams with another source than the node", Limit::Each(0.0)),
            figure("answers lost", Limit::Each(0.0)),
            figure("restarts after which rules were other than before", Limit::Each(0.0)),
            figure("datagrams sent", Limit::None),
            figure("connections opened", Limit::None),
        ];
        for round in stage.rounds(ROUNDS) {
            let target = setup.target();
            let Setup { member, pod, outside, .. } = &mut setup;
            let node = member.node.address();
            let work = || {
                let mut changed = 0u32;
                for _ in 0..restarts {
                    member.agent.kill()?;
                    member.start_again()?;
                    member.agent.wait_ready(TIMEOUT)?;
                    stage.progress.pause(LIFE)?;
                    changed += u32::from(look(&mut nft)? != before);
                }
                Ok(changed)
            };
            let (pod, outside) = (pod.namespace(), outside.namespace());
            let (changed, tally) = traffic::during(pod, outside, target, node, work)?;
            stage
                .progress
                .step(&format!("{title}: round {round}: {tally:?}, rules changed {changed} times"))?;
            let counts =
                [tally.lost, tally.strange, tally.answers_lost, changed.into(), tally.sent, tally.opened];
            figures.iter_mut().zip(counts).for_each(|(figure, count)| figure.rounds.push(count as f64));
        }
        figures.iter().try_for_each(|figure| record.put(figure))?;
    }
    Ok(())
}
