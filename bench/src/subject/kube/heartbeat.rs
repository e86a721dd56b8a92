//! What heartbeats of other nodes cost an agent in a cluster of five thousand.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use bench::figure::{Figure, Limit, Record};
use bench::monitor::Monitor;
use bench::process::{cpu_time, resident_mib};

use super::bed::{Cluster, Peer, received};
use super::kernel::ensure_equal;
use super::many::PEERS;
use crate::Stage;
use crate::bed::{Member, SETTLE, TIMEOUT};

/// Heartbeats in a round.
const BEATS: u32 = 3000;
/// They come apart, so that each wakes the agent: in a real cluster of this size there are about 17 a second.
const APART: Duration = Duration::from_millis(3);
const MAX_ROUNDS: u32 = 3;

/// Measures heartbeats of nodes as large as real ones, which a watch of metadata brings, and of nodes without a status by a
/// server that sends whole objects.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let limits = [Limit::Median(0.05), Limit::Median(3.0), Limit::Median(15.0)];
    beats(stage, record, "metadata", limits, false)?;
    beats(stage, record, "whole nodes with 10 KB of status", [Limit::None; 3], true)
}

fn beats(
    stage: &Stage,
    record: &mut Record,
    kind: &str,
    limits: [Limit; 3],
    whole: bool,
) -> anyhow::Result<()> {
    let title = format!("heartbeat: {kind}");
    stage.progress.step(&format!("{title}: making {PEERS} nodes"))?;
    let cluster = Cluster::new(stage)?;
    cluster.api.behave(|behaviour| behaviour.whole_objects = whole);
    (0..PEERS).for_each(|number| cluster.api.put_node(Peer::new(number).large()));
    let mut member = cluster.start()?;
    member.agent.wait_ready(TIMEOUT)?;
    // The witnesses of changes want a bridge.
    member.node.namespace().ip("link add cni0 type bridge\nlink set cni0 up")?;
    stage.progress.pause(SETTLE)?;
    let pid = member.agent.process().id();
    let mut cpu = Figure::new(format!("{title}: CPU for each"), "ms", limits[0]);
    let mut wire = Figure::new(format!("{title}: received for each"), "KB", limits[1]);
    let mut touched = Figure::new(format!("{title}: changes to the kernel"), "", Limit::Each(0.0));
    let mut resident = Figure::new(format!("{title}: VmRSS after {BEATS}"), "MiB", limits[2]);
    for round in stage.rounds(MAX_ROUNDS) {
        let monitor = Monitor::start(&member.node)?;
        let (time, bytes) = round_of(stage, &cluster, &mut member, (pid, whole))?;
        let changes = monitor.finish(&member.node)?;
        changes.iter().for_each(|change| eprintln!("          changed: {change}"));
        cpu.rounds.push(time.as_secs_f64() * 1e3 / f64::from(BEATS));
        wire.rounds.push(bytes as f64 / 1e3 / f64::from(BEATS));
        touched.rounds.push(changes.len() as f64);
        resident.rounds.push(resident_mib(pid)?);
        stage.progress.step(&format!(
            "{title}: round {round}: CPU {time:.1?} for {BEATS}, {bytes} bytes, {} changes",
            changes.len()
        ))?;
    }
    ensure_equal(&member, (0..PEERS).map(Peer::new))?;
    [cpu, wire, touched, resident].iter().try_for_each(|figure| record.put(figure))
}

/// CPU time of the agent, and bytes received, for all heartbeats of a round.
fn round_of(
    stage: &Stage,
    cluster: &Cluster,
    member: &mut Member,
    (pid, whole): (u32, bool),
) -> anyhow::Result<(Duration, u64)> {
    let name = |beat: u32| Peer::new((beat % u32::from(PEERS)) as u16).name();
    let object = cluster.api.node(&name(0)).unwrap_or_default();
    let least = if whole { object.to_string().len() } else { object["metadata"].to_string().len() };
    let (used, before, start) = (cpu_time(pid)?, received(member)?, Instant::now());
    for beat in 0..BEATS {
        if beat % 100 == 0 {
            stage.progress.check()?;
        }
        cluster.api.heartbeat(&name(beat));
        thread::sleep((start + APART * (beat + 1)).saturating_duration_since(Instant::now()));
    }
    stage.progress.pause(Duration::from_secs(1))?;
    if let Some(status) = member.agent.process().ended()? {
        bail!("the agent has ended ({status}); its log:\n{}", member.agent.log());
    }
    let (used, received) = (cpu_time(pid)?.saturating_sub(used), received(member)? - before);
    let expected = u64::from(BEATS) * least as u64;
    ensure!(
        received >= expected,
        "only {received} bytes of at least {expected} have arrived; {} watches; the log:\n{}",
        cluster.api.watching(),
        member.agent.log()
    );
    Ok((used, received))
}
