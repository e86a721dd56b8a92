//! An agent that joins a cluster of one other node.

use bench::figure::{Figure, Limit, Record};
use bench::process::resident_mib;

use super::bed::Cluster;
use crate::Stage;
use crate::bed::{SETTLE, TIMEOUT};

/// Measures the time until a new node is ready, and memory.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let cluster = Cluster::new(stage)?;
    let mut peer = cluster.start()?;
    peer.agent.wait_ready(TIMEOUT)?;
    let mut ready = Figure::new("start-2: exec to /readyz 200", "ms", Limit::Median(300.0));
    let mut memory = Figure::new("start-2: VmRSS 10 s later", "MiB", Limit::Median(12.0));
    for round in stage.rounds(u32::MAX) {
        let mut member = cluster.start()?;
        let time = member.time_to_ready()?;
        let pid = member.agent.process().id();
        stage.progress.pause(SETTLE)?;
        let resident = resident_mib(pid)?;
        stage.progress.step(&format!("start-2: round {round}: {time:.1?}, {resident:.1} MiB"))?;
        ready.push_ms(time);
        memory.rounds.push(resident);
        cluster.remove(member)?;
    }
    [ready, memory].iter().try_for_each(|figure| record.put(figure))
}
