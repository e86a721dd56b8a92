//! One agent starting in a cluster of thousands of nodes, at rest in it, and scraped.

mod changes;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::Stage;
use crate::bed::{Cluster, SETTLE, lease};
use bench::figure::{Figure, Limit, Record};
use bench::process::{cpu_time, resident_mib};

/// How many nodes there are, and what one agent among them may take.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    name: &'static str,
    peers: u16,
    /// Milliseconds from exec to all in place, and of CPU.
    start: f64,
    cpu: Limit,
    /// MiB.
    memory: f64,
}

/// Five thousand nodes.
pub(crate) const FIVE: Size =
    Size { name: "start-5000", peers: 5000, start: 300.0, cpu: Limit::Median(300.0), memory: 12.0 };
/// Twenty thousand nodes.
pub(crate) const TWENTY: Size =
    Size { name: "start-20000", peers: 20_000, start: 1200.0, cpu: Limit::None, memory: 24.0 };

const IDLE: Duration = Duration::from_secs(60);
/// Scrapes in a row, of which the mean counts.
const SCRAPES: u32 = 100;
/// Rounds in which idling is measured.
pub(super) const IDLE_ROUNDS: u32 = 3;

/// Measures both, and what the kernel alone needs for the same objects.
pub(crate) fn measure(stage: &Stage, record: &mut Record, size: Size) -> anyhow::Result<()> {
    let Size { name, peers, .. } = size;
    let cluster = cluster(stage, size)?;
    let figure = |what: &str, unit, limit| Figure::new(format!("{name}: {what}"), unit, limit);
    let mut complete = figure("exec to all in place", "ms", Limit::Median(size.start));
    let mut cpu = figure("CPU until then", "ms", size.cpu);
    let mut memory = figure("VmRSS 10 s later", "MiB", Limit::Median(size.memory));
    let mut idle = figure("CPU over 60 s idle", "%", Limit::Median(0.05));
    let mut scrape = figure("CPU of a scrape of /metrics", "ms", Limit::Median(10.0));
    let mut exposition = figure("size of /metrics", "kB", Limit::Median(60.0));
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
        stage.progress.step(&format!(
            "{name}: round {round}: subnet file after {file:.0?}, whole after {whole:.0?}, CPU {used:.0?}, {:.1} MiB",
            memory.rounds.last().copied().unwrap_or_default()
        ))?;
        if round <= IDLE_ROUNDS {
            idle.rounds.push(idle_percent(stage, &format!("{name}: round {round}"), pid)?);
        }
        let before = cpu_time(pid)?;
        for _ in 0..SCRAPES {
            let (code, text) = member.agent.get("/metrics")?;
            anyhow::ensure!(code == 200, "/metrics answers {code}");
            if exposition.rounds.len() < round as usize {
                exposition.rounds.push(text.len() as f64 / 1000.0);
            }
        }
        scrape.push_ms(cpu_time(pid)?.saturating_sub(before) / SCRAPES);
        cluster.remove(member)?;
    }
    let mut kernel = figure("the same by ip and bridge -batch", "ms", Limit::None);
    for round in stage.rounds(u32::MAX) {
        kernel.push_ms(bare_kernel(&cluster, peers)?);
        let last = kernel.rounds.last().copied().unwrap_or_default();
        stage.progress.step(&format!("{name}: the kernel alone, round {round}: {last:.0} ms"))?;
    }
    [complete, kernel, cpu, memory, idle, scrape, exposition].iter().try_for_each(|figure| record.put(figure))
}

/// How much of a processor an agent takes while nothing happens, in percent.
pub(super) fn idle_percent(stage: &Stage, what: &str, pid: u32) -> anyhow::Result<f64> {
    let (before, start) = (cpu_time(pid)?, Instant::now());
    stage.progress.pause(IDLE)?;
    let spent = cpu_time(pid)?.saturating_sub(before);
    stage.progress.step(&format!("{what}: {spent:.1?} of CPU in {IDLE:?} idle"))?;
    Ok(100.0 * spent.as_secs_f64() / start.elapsed().as_secs_f64())
}

/// Measures what single changes cost one agent among twenty thousand nodes, and two minutes of many.
pub(crate) fn churn(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let cluster = cluster(stage, TWENTY)?;
    changes::measure(stage, record, &cluster, TWENTY.peers)
}

fn cluster(stage: &Stage, Size { name, peers, .. }: Size) -> anyhow::Result<Cluster> {
    stage.progress.step(&format!("{name}: writing {peers} leases into a fresh etcd"))?;
    let cluster = Cluster::new(
        stage.flanneld(),
        r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
        &[],
    )?;
    cluster.write(&(0..peers).map(peer).collect::<Vec<_>>())?;
    Ok(cluster)
}

/// The key and the lease of the peer with this number; all differ in subnet, address and MAC.
fn peer(number: u16) -> (String, String) {
    let [high, low] = number.to_be_bytes();
    (format!("10.{}.{low}.0-24", 1 + high), lease(public(number), number))
}

fn public(number: u16) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 20, 0, 1)) + u32::from(number))
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
    for number in 0..peers {
        let [high, low] = number.to_be_bytes();
        let (subnet, mac) = (format!("10.{}.{low}.0", 1 + high), format!("02:00:00:01:{high:02x}:{low:02x}"));
        ip += &format!("neigh add {subnet} lladdr {mac} dev flannel.1 nud permanent\n");
        let id = 0x460a_0000 + (u32::from(1 + high) << 8) + u32::from(low);
        ip += &format!("nexthop add id {id} via {subnet} dev flannel.1 onlink proto 70\n");
        ip += &format!("route add {subnet}/24 nhid {id} proto 70\n");
        bridge += &format!("fdb add {mac} dev flannel.1 dst {} self permanent\n", public(number));
    }
    let start = Instant::now();
    for (program, batch) in [("bridge", bridge), ("ip", ip)] {
        let command = node.namespace().command(program).args(["-batch", "-"]).input(batch);
        command.ok().context("the objects of the peers, made by hand")?;
    }
    Ok(start.elapsed())
}
