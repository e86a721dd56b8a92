//! One agent starting in a cluster of five or twenty thousand nodes.

use bench::figure::{Figure, Limit, Record};
use bench::process::{cpu_time, resident_mib};

use super::bed::{Cluster, Peer, received};
use super::kernel::ensure_equal;
use crate::Stage;
use crate::bed::SETTLE;

pub(crate) const PEERS: u16 = 5000;

/// Measures it with nodes as large as real ones, and with as much of each as its metadata has.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let limits = [Limit::Median(2000.0), Limit::Median(1000.0), Limit::Median(15.0)];
    whole(stage, record, (PEERS, "10 KB of status"), limits, Peer::large)?;
    whole(stage, record, (PEERS, "no status"), [Limit::None; 3], Peer::without_status)
}

/// Measures it with twenty thousand nodes as large as real ones.
pub(crate) fn measure_20000(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let limits = [Limit::Median(2500.0), Limit::None, Limit::Median(24.0)];
    whole(stage, record, (20_000, "10 KB of status"), limits, Peer::large)
}

fn whole(
    stage: &Stage,
    record: &mut Record,
    (peers, kind): (u16, &str),
    limits: [Limit; 3],
    object: fn(Peer) -> serde_json::Value,
) -> anyhow::Result<()> {
    let title = format!("start-{peers}: {kind}");
    stage.progress.step(&format!("{title}: making {peers} nodes"))?;
    let cluster = Cluster::new(stage)?;
    (0..peers).for_each(|number| cluster.api.put_node(object(Peer::new(number))));
    let mut complete = Figure::new(format!("{title}: exec to all in place"), "ms", limits[0]);
    let mut cpu = Figure::new(format!("{title}: CPU until then"), "ms", limits[1]);
    let mut memory = Figure::new(format!("{title}: VmRSS 10 s later"), "MiB", limits[2]);
    let mut bytes = Figure::new(format!("{title}: received"), "MB", Limit::None);
    for round in stage.rounds(u32::MAX) {
        let mut member = cluster.start()?;
        let pid = member.agent.process().id();
        let file = member.time_to_subnet_file()?;
        let used = cpu_time(pid)?;
        let whole = member.time_to_peers(file, peers)?;
        complete.push_ms(whole);
        cpu.push_ms(used);
        stage.progress.pause(SETTLE)?;
        memory.rounds.push(resident_mib(pid)?);
        bytes.rounds.push(received(&member)? as f64 / 1e6);
        ensure_equal(&member, (0..peers).map(Peer::new))?;
        stage.progress.step(&format!(
            "{title}: round {round}: subnet file after {file:.0?}, whole after {whole:.0?}, CPU {used:.0?}, {:.1} MiB",
            memory.rounds.last().copied().unwrap_or_default()
        ))?;
        cluster.remove(member)?;
    }
    [complete, cpu, memory, bytes].iter().try_for_each(|figure| record.put(figure))
}
