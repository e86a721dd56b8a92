//! One agent starting in a cluster of two, of five thousand and of twenty thousand nodes, and the size of its image.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use bench::bed::{SETTLE, TIMEOUT};
use bench::figure::{Limit, ms};
use bench::peer::{Peer, ensure_equal, time_to_peers};
use bench::process::{cpu_time, resident_mib};
use serde_json::{Value, json};

use super::{cluster, eth0};
use crate::Stage;

pub(crate) const PEERS: u16 = 5000;
/// How long an agent at rest is watched: a look at the whole kernel falls into so long.
const REST: Duration = Duration::from_secs(60);

/// Measures the files of the image. `make image` fails if there is more in it, or if it is larger.
pub(crate) fn size(stage: &Stage) -> anyhow::Result<()> {
    stage.measure("size", [("files of the image", "MB", Limit::Each(15.0))], 1, |_| {
        let size = |path| fs::metadata(&path).with_context(|| format!("can't look at {path:?}"));
        Ok([(size(stage.flanneld())?.len() + size(stage.plugin())?.len()) as f64 / 1e6])
    })
}

/// Measures the time until a new node is ready, and memory.
pub(crate) fn two(stage: &Stage) -> anyhow::Result<()> {
    let cluster = cluster(stage)?;
    let _peer = cluster.join()?;
    let rows = [
        ("exec to /readyz 200", "ms", Limit::Median(300.0)),
        ("VmRSS 10 s later", "MiB", Limit::Median(12.0)),
    ];
    stage.measure("start-2", rows, u32::MAX, |_| {
        let mut member = cluster.start()?;
        let ready = member.time_to_ready()?;
        stage.progress.pause(SETTLE)?;
        let resident = resident_mib(member.pid())?;
        cluster.remove(member)?;
        Ok([ms(ready), resident])
    })
}

/// Measures an agent at rest, beside one other node, with all that an operator can switch on.
pub(crate) fn idle(stage: &Stage) -> anyhow::Result<()> {
    let cluster = cluster(stage)?;
    cluster.api()?.put_namespace("bench", &[]);
    cluster.api()?.put_policy("bench", "closed", json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    let _peer = cluster.join()?;
    let flags = ["--ip-masq", "--network-policy=on", "--fast-path=on", "--peer-counters"];
    let mut member = cluster.start_with(cluster.node()?, &flags)?;
    member.agent.wait_ready(TIMEOUT)?;
    let rows = [
        ("CPU over 60 s with policies, fast path and peer counters", "%", Limit::Median(0.05)),
        ("VmRSS of it", "MiB", Limit::None),
    ];
    stage.progress.pause(SETTLE)?;
    stage.measure("idle", rows, 3, |_| {
        Ok([stage.cpu_percent(member.pid(), REST)?, resident_mib(member.pid())?])
    })
}

/// Measures it with nodes as large as real ones, and with as much of each as its metadata has.
pub(crate) fn five_thousand(stage: &Stage) -> anyhow::Result<()> {
    let limits = [Limit::Median(2000.0), Limit::Median(1000.0), Limit::Median(15.0)];
    whole(stage, (PEERS, "10 KB of status"), limits, Peer::large)?;
    whole(stage, (PEERS, "no status"), [Limit::None; 3], Peer::without_status)
}

/// Measures it with twenty thousand nodes as large as real ones.
pub(crate) fn twenty_thousand(stage: &Stage) -> anyhow::Result<()> {
    let limits = [Limit::Median(2500.0), Limit::None, Limit::Median(24.0)];
    whole(stage, (20_000, "10 KB of status"), limits, Peer::large)
}

fn whole(
    stage: &Stage,
    (peers, kind): (u16, &str),
    limits: [Limit; 3],
    object: fn(Peer) -> Value,
) -> anyhow::Result<()> {
    let title = format!("start-{peers}: {kind}");
    stage.progress.step(&format!("{title}: making {peers} nodes"))?;
    let cluster = cluster(stage)?;
    let api = cluster.api()?;
    (0..peers).for_each(|number| api.put_node(object(Peer::new(number))));
    let rows = [
        ("exec to all in place", "ms", limits[0]),
        ("CPU until then", "ms", limits[1]),
        ("VmRSS 10 s later", "MiB", limits[2]),
        ("received", "MB", Limit::None),
    ];
    stage.measure(&title, rows, u32::MAX, |_| {
        let mut member = cluster.start()?;
        let file = member.time_to_subnet_file()?;
        let used = cpu_time(member.pid())?;
        let whole = time_to_peers(&member, file, peers)?;
        stage.progress.pause(SETTLE)?;
        let (resident, bytes) = (resident_mib(member.pid())?, eth0(&member)?.received_bytes);
        ensure_equal(&member, (0..peers).map(Peer::new))?;
        cluster.remove(member)?;
        Ok([ms(whole), ms(used), resident, bytes as f64 / 1e6])
    })
}
