//! What heartbeats of other nodes cost an agent in a cluster of five thousand.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use bench::bed::{Member, SETTLE, TIMEOUT};
use bench::figure::{Limit, Row, ms};
use bench::monitor::Monitor;
use bench::process::{cpu_time, resident_mib};

use super::bed::{Cluster, Peer, ensure_equal, received};
use super::start::PEERS;
use crate::Stage;

/// Heartbeats in a round.
const BEATS: u32 = 3000;
/// They come apart, so that each wakes the agent: in a real cluster of this size there are about 17 a second.
const APART: Duration = Duration::from_millis(3);
const MAX_ROUNDS: u32 = 3;

/// Measures heartbeats of nodes as large as real ones, which a watch of metadata brings, and of nodes without a status by a
/// server that sends whole objects.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let limits = [Limit::Median(0.05), Limit::Median(3.0), Limit::Median(15.0)];
    beats(stage, "metadata", limits, false)?;
    beats(stage, "whole nodes with 10 KB of status", [Limit::None; 3], true)
}

fn beats(stage: &Stage, kind: &str, limits: [Limit; 3], whole: bool) -> anyhow::Result<()> {
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
    let rows: [Row<'_>; 4] = [
        ("CPU for each", "ms", limits[0]),
        ("received for each", "KB", limits[1]),
        ("changes to the kernel", "", Limit::Each(0.0)),
        (&format!("VmRSS after {BEATS}"), "MiB", limits[2]),
    ];
    stage.measure(&title, rows, MAX_ROUNDS, |_| {
        let monitor = Monitor::start(&member.node)?;
        let (time, bytes) = round_of(stage, &cluster, &mut member, whole)?;
        let changes = monitor.finish(&member.node)?;
        changes.iter().for_each(|change| eprintln!("          changed: {change}"));
        let each = |sum: f64| sum / f64::from(BEATS);
        Ok([each(ms(time)), each(bytes as f64 / 1e3), changes.len() as f64, resident_mib(member.pid())?])
    })?;
    ensure_equal(&member, (0..PEERS).map(Peer::new))
}

/// CPU time of the agent, and bytes received, for all heartbeats of a round.
fn round_of(
    stage: &Stage,
    cluster: &Cluster,
    member: &mut Member,
    whole: bool,
) -> anyhow::Result<(Duration, u64)> {
    let name = |beat: u32| Peer::new((beat % u32::from(PEERS)) as u16).name();
    let object = cluster.api.node(&name(0)).unwrap_or_default();
    let least = if whole { object.to_string().len() } else { object["metadata"].to_string().len() };
    let pid = member.pid();
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
