//! Agents starting in a cluster of two nodes.

use std::fs;

use anyhow::Context;

use super::many::{IDLE_ROUNDS, idle_percent};
use crate::Stage;
use crate::bed::{Cluster, SETTLE, TIMEOUT};
use bench::figure::{Figure, Limit, Record};
use bench::process::resident_mib;

/// Measures the time until pods can be attached, on a new node and on one that had an agent, and memory.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let cluster = Cluster::small(stage, "vxlan")?;
    // Its start makes etcd warm.
    let _peer = cluster.join()?;
    let mut new = Figure::new("start-2: exec to subnet.env, new node", "ms", Limit::Median(50.0));
    let mut again = Figure::new("start-2: exec to subnet.env, restart", "ms", Limit::Median(50.0));
    let mut memory = Figure::new("start-2: VmRSS 10 s later", "MiB", Limit::Median(8.0));
    let mut idle = Figure::new("start-2: CPU over 60 s idle", "%", Limit::Median(0.05));
    for round in stage.rounds(u32::MAX) {
        let mut member = cluster.start()?;
        let first = member.time_to_subnet_file()?;
        member.agent.wait_ready(TIMEOUT)?;
        member.agent.terminate(TIMEOUT)?;
        fs::remove_file(member.node.subnet_file()).context("the subnet file can't be removed")?;
        member.start_again()?;
        let second = member.time_to_subnet_file()?;
        member.agent.wait_ready(TIMEOUT)?;
        stage.progress.pause(SETTLE)?;
        let resident = resident_mib(member.agent.process().id())?;
        stage
            .progress
            .step(&format!("start-2: round {round}: {first:.1?}, restart {second:.1?}, {resident:.1} MiB"))?;
        new.push_ms(first);
        again.push_ms(second);
        memory.rounds.push(resident);
        if round <= IDLE_ROUNDS {
            let pid = member.agent.process().id();
            idle.rounds.push(idle_percent(stage, &format!("start-2: round {round}"), pid)?);
        }
        cluster.remove(member)?;
    }
    [new, again, memory, idle].iter().try_for_each(|figure| record.put(figure))
}
