//! What heartbeats of other nodes cost an agent in a cluster of five thousand.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use bench::bed::{Member, SETTLE};
use bench::figure::{Limit, Row, median, ms};
use bench::monitor::Monitor;
use bench::peer::{Peer, ensure_equal};
use bench::process::{cpu_time, resident_mib};
use serde_json::Value;
use subnet::testing::ApiServer;

use super::start::PEERS;
use super::{cluster, eth0};
use crate::Stage;

/// Heartbeats in a round, and the time between two of them: many more than in a cluster of this size.
const BEATS: u32 = 3000;
const APART: Duration = Duration::from_millis(3);
/// The same as in clusters of 20,000 and of 5,000 nodes.
const BEATS_OF_20000: u32 = 1000;
const APART_OF_20000: Duration = Duration::from_millis(15);
const BEATS_OF_5000: u32 = 300;
const APART_OF_5000: Duration = Duration::from_millis(60);
/// CPU is also the median of parts of so many, in which a look at the whole kernel once a minute does not count.
const PART: u32 = 100;
const MAX_ROUNDS: u32 = 3;
/// Of a packet: Ethernet, IPv4, TCP with time stamps.
const HEADERS: u64 = 14 + 20 + 32;

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
    let cluster = cluster(stage)?;
    let api = cluster.api()?;
    api.behave(|behaviour| behaviour.whole_objects = whole);
    (0..PEERS).for_each(|number| api.put_node(Peer::new(number).large()));
    let mut member = cluster.join()?;
    // The witnesses of changes want a bridge.
    member.node.namespace().ip("link add cni0 type bridge\nlink set cni0 up")?;
    stage.progress.pause(SETTLE)?;
    let rows: [Row<'_>; 7] = [
        ("CPU for each", "ms", limits[0]),
        ("CPU for each, 67 a second", "ms", limits[0]),
        ("CPU for each, 17 a second", "ms", Limit::None),
        ("received for each", "KB", limits[1]),
        ("of that HTTP", "KB", Limit::None),
        ("changes to the kernel", "", Limit::Each(0.0)),
        (&format!("VmRSS after {BEATS}"), "MiB", limits[2]),
    ];
    stage.measure(&title, rows, MAX_ROUNDS, |_| {
        let monitor = Monitor::start(&member.node)?;
        let mut round = |beats, apart| round_of(stage, api, &mut member, whole, (beats, apart));
        let fast = round(BEATS, APART)?;
        let (slower, slow) = (round(BEATS_OF_20000, APART_OF_20000)?, round(BEATS_OF_5000, APART_OF_5000)?);
        let changes = monitor.finish(&member.node)?;
        changes.iter().for_each(|change| eprintln!("          changed: {change}"));
        let resident = resident_mib(member.pid())?;
        let [received, http] = fast.kilobytes;
        Ok([fast.mean, slower.median, slow.median, received, http, changes.len() as f64, resident])
    })?;
    ensure_equal(&member, (0..PEERS).map(Peer::new))
}

/// The bytes of a node's metadata that each encoding has: its annotations, and the JSON of its managed fields.
fn metadata_text(node: &Value) -> usize {
    let annotations = node["metadata"]["annotations"].as_object().into_iter().flatten();
    let annotations = annotations.map(|(key, value)| key.len() + value.as_str().map_or(0, str::len));
    let managed = node["metadata"]["managedFields"].as_array().into_iter().flatten();
    let managed = managed.map(|entry| entry["fieldsV1"].to_string().len());
    annotations.chain(managed).sum()
}

/// What each heartbeat of a round costs.
struct Cost {
    /// CPU time of the agent in ms.
    mean: f64,
    median: f64,
    /// Received with the headers of packets, and without.
    kilobytes: [f64; 2],
}

/// Sends heartbeats, and makes sure that the agent has received them.
fn round_of(
    stage: &Stage,
    api: &ApiServer,
    member: &mut Member,
    whole: bool,
    (beats, apart): (u32, Duration),
) -> anyhow::Result<Cost> {
    let name = |beat: u32| Peer::new((beat % u32::from(PEERS)) as u16).name();
    let object = api.node(&name(0)).unwrap_or_default();
    let least = if whole { object.to_string().len() } else { metadata_text(&object) };
    let pid = member.pid();
    let (used, before, start) = (cpu_time(pid)?, eth0(member)?, Instant::now());
    let (mut parts, mut begun) = (Vec::new(), used);
    for beat in 0..beats {
        if beat % PART == 0 && beat > 0 {
            stage.progress.check()?;
            let now = cpu_time(pid)?;
            parts.push(ms(now.saturating_sub(begun)) / f64::from(PART));
            begun = now;
        }
        api.heartbeat(&name(beat));
        thread::sleep((start + apart * (beat + 1)).saturating_duration_since(Instant::now()));
    }
    stage.progress.pause(Duration::from_secs(1))?;
    if let Some(status) = member.agent.process().ended()? {
        bail!("the agent has ended ({status}); its log:\n{}", member.agent.log());
    }
    let (used, after) = (cpu_time(pid)?.saturating_sub(used), eth0(member)?);
    let received = after.received_bytes - before.received_bytes;
    let http = received.saturating_sub((after.received_packets - before.received_packets) * HEADERS);
    let expected = u64::from(beats) * least as u64;
    ensure!(
        received >= expected,
        "only {received} bytes of at least {expected} have arrived; {} watches; the log:\n{}",
        api.watching(),
        member.agent.log()
    );
    let beats = f64::from(beats);
    let kilobytes = [received, http].map(|bytes| bytes as f64 / 1e3 / beats);
    Ok(Cost { mean: ms(used) / beats, median: median(parts), kilobytes })
}
