//! What packets through the masquerade notice of an agent that is killed and started again.

use std::time::Duration;

use bench::bed::TIMEOUT;
use bench::figure::Limit;

use super::bed::{MODES, Setup, look};
use super::traffic;
use crate::Stage;

/// Rounds, of many restarts each, that are enough.
const ROUNDS: u32 = 3;
/// How long an agent lives once it is ready: what it does then must not be noticed, either.
const LIFE: Duration = Duration::from_millis(100);

/// Kills the agent again and again while datagrams go from the pod to the host outside.
pub(crate) fn measure(stage: &Stage, restarts: u32) -> anyhow::Result<()> {
    for (name, flag) in MODES {
        let mut setup = Setup::new(stage, stage.flanneld(), flag)?;
        let mut nft = setup.nft()?;
        let before = look(&mut nft)?;
        let rows = [
            ("datagrams lost", "", Limit::Each(0.0)),
            ("datagrams with another source than the node", "", Limit::Each(0.0)),
            ("answers lost", "", Limit::Each(0.0)),
            ("restarts after which rules were other than before", "", Limit::Each(0.0)),
            ("datagrams sent", "", Limit::None),
            ("connections opened", "", Limit::None),
        ];
        stage.measure(&format!("rules-restart: {name}, {restarts} restarts"), rows, ROUNDS, |_| {
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
            let counts =
                [tally.lost, tally.strange, tally.answers_lost, changed.into(), tally.sent, tally.opened];
            Ok(counts.map(|count| count as f64))
        })?;
    }
    Ok(())
}
