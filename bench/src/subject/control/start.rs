//! Agents starting in a cluster of two and of thousands of nodes, at rest in it, and scraped.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bench::bed::{Cluster, SETTLE, TIMEOUT};
use bench::figure::{Limit, ms};
use bench::peer::{Peer, time_to_peers};
use bench::process::{cpu_time, resident_mib};

use crate::Stage;

/// How many nodes there are, and what one agent among them may take.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    name: &'static str,
    pub(super) peers: u16,
    /// Milliseconds from exec to all in place, and of CPU.
    start: f64,
    cpu: Limit,
    /// MiB.
    memory: f64,
    /// How long idling is measured: the agent looks at the kernel once in so long.
    idle: Duration,
}

/// Five thousand nodes.
pub(crate) const FIVE: Size = Size {
    name: "start-5000",
    peers: 5000,
    start: 300.0,
    cpu: Limit::Median(300.0),
    memory: 12.0,
    idle: IDLE,
};
/// Twenty thousand nodes.
pub(crate) const TWENTY: Size = Size {
    name: "start-20000",
    peers: 20_000,
    start: 1200.0,
    cpu: Limit::None,
    memory: 24.0,
    idle: Duration::from_secs(240),
};

/// How long idling is measured.
const IDLE: Duration = Duration::from_secs(60);
/// Scrapes in a row, of which the mean counts.
const SCRAPES: u32 = 100;

/// Measures the time until pods can be attached, on a new node and on one that had an agent, and memory.
pub(crate) fn two(stage: &Stage) -> anyhow::Result<()> {
    let cluster = stage.cluster("vxlan")?;
    // Its start makes etcd warm.
    let _peer = cluster.join()?;
    let rows = [
        ("exec to subnet.env, new node", "ms", Limit::Median(50.0)),
        ("exec to subnet.env, restart", "ms", Limit::Median(50.0)),
        ("VmRSS 10 s later", "MiB", Limit::Median(8.0)),
        ("CPU over 60 s idle", "%", Limit::Median(0.05)),
    ];
    stage.measure("start-2", rows, u32::MAX, |_| {
        let mut member = cluster.start()?;
        let new = member.time_to_subnet_file()?;
        member.agent.wait_ready(TIMEOUT)?;
        member.agent.terminate(TIMEOUT)?;
        fs::remove_file(member.node.subnet_file()).context("the subnet file can't be removed")?;
        member.start_again()?;
        let again = member.time_to_subnet_file()?;
        member.agent.wait_ready(TIMEOUT)?;
        stage.progress.pause(SETTLE)?;
        let resident = resident_mib(member.pid())?;
        let idle = stage.cpu_percent(member.pid(), IDLE)?;
        cluster.remove(member)?;
        Ok([ms(new), ms(again), resident, idle])
    })
}

/// Measures an agent among thousands, and what the kernel alone needs for the same objects.
pub(crate) fn many(stage: &Stage, size: Size) -> anyhow::Result<()> {
    let Size { name, peers, .. } = size;
    let cluster = cluster(stage, size, &[])?;
    let idling = format!("CPU over {} s idle", size.idle.as_secs());
    let rows = [
        ("exec to all in place", "ms", Limit::Median(size.start)),
        ("CPU until then", "ms", size.cpu),
        ("VmRSS 10 s later", "MiB", Limit::Median(size.memory)),
        (idling.as_str(), "%", Limit::Median(0.05)),
        ("CPU of a scrape of /metrics", "ms", Limit::Median(10.0)),
        ("size of /metrics", "kB", Limit::Median(60.0)),
    ];
    stage.measure(name, rows, u32::MAX, |_| {
        let mut member = cluster.start()?;
        let pid = member.pid();
        let file = member.time_to_subnet_file()?;
        let used = cpu_time(pid)?;
        let whole = time_to_peers(&member, file, peers)?;
        stage.progress.pause(SETTLE)?;
        let resident = resident_mib(pid)?;
        let idle = stage.cpu_percent(pid, size.idle)?;
        let (before, mut exposition) = (cpu_time(pid)?, 0);
        for _ in 0..SCRAPES {
            let (code, text) = member.agent.get("/metrics")?;
            ensure!(code == 200, "/metrics answers {code}");
            exposition = text.len();
        }
        let scrape = cpu_time(pid)?.saturating_sub(before) / SCRAPES;
        cluster.remove(member)?;
        Ok([ms(whole), ms(used), resident, idle, ms(scrape), exposition as f64 / 1000.0])
    })?;
    let alone = [("the same by ip and bridge -batch", "ms", Limit::None)];
    stage.measure(name, alone, u32::MAX, |_| Ok([ms(bare_kernel(&cluster, peers)?)]))
}

/// An etcd with so many leases, for agents with these flags.
pub(super) fn cluster(
    stage: &Stage,
    Size { name, peers, .. }: Size,
    flags: &[&str],
) -> anyhow::Result<Cluster> {
    stage.progress.step(&format!("{name}: writing {peers} leases into a fresh etcd"))?;
    let config = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
    let cluster = Cluster::new(stage.flanneld(), config, flags)?;
    cluster.write(&(0..peers).map(|number| Peer::new(number).lease()).collect::<Vec<_>>())?;
    Ok(cluster)
}

/// The time that `ip` and `bridge` need to make the same objects on a node without an agent.
fn bare_kernel(cluster: &Cluster, peers: u16) -> anyhow::Result<Duration> {
    let node = cluster.fabric.node()?;
    let address = node.address();
    node.namespace().ip(&format!(
        "link add flannel.1 mtu 1450 type vxlan id 1 local {address} dev eth0 dstport 8472 nolearning\n\
         addr add 10.0.0.0/32 dev flannel.1\n\
         link set flannel.1 up"
    ))?;
    let (mut ip, mut bridge) = (String::new(), String::new());
    for (subnet, public, mac) in (0..peers).map(|number| Peer::new(number).entry()) {
        let id = 0x460a_0000 + (u32::from(subnet) >> 8 & 0xffff);
        ip += &format!("neigh add {subnet} lladdr {mac} dev flannel.1 nud permanent\n");
        ip += &format!("nexthop add id {id} via {subnet} dev flannel.1 onlink proto 70\n");
        ip += &format!("route add {subnet}/24 nhid {id} proto 70\n");
        bridge += &format!("fdb add {mac} dev flannel.1 dst {public} self permanent\n");
    }
    let start = Instant::now();
    for (program, batch) in [("bridge", bridge), ("ip", ip)] {
        let command = node.namespace().command(program).args(["-batch", "-"]).input(batch);
        command.ok().context("the objects of the peers, made by hand")?;
    }
    Ok(start.elapsed())
}
