//! What pods and the kernel notice of a restart, and what is left of peers that went while the agent was down.

use std::time::Duration;

use backends::testing::Signal;

use crate::Stage;
use crate::bed::{Cluster, PEER_OBJECTS, Pair, TIMEOUT, lease};
use bench::figure::{Figure, Limit, Record};
use bench::monitor::Monitor;

/// Peers that leave.
const LEAVING: u8 = 20;
/// How long after it is ready again an agent is watched.
const AFTER: Duration = Duration::from_secs(1);

/// Restarts an agent under a ping between pods; there are two restarts of each kind in a round.
pub(crate) fn loss(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    for backend in ["vxlan", "host-gw"] {
        stage.progress.step(&format!("restart-loss: two nodes with {backend}"))?;
        let cluster = Cluster::small(stage, backend)?;
        let mut pair = cluster.pair()?;
        for (name, signal) in [("SIGTERM", Signal::TERM), ("SIGKILL", Signal::KILL)] {
            let title = format!("restart-loss: {backend}, {name}");
            let mut lost = Figure::new(format!("{title}: pings lost"), "", Limit::Each(0.0));
            let mut changes = Figure::new(format!("{title}: changes to the kernel"), "", Limit::Each(0.0));
            for _ in 0..2 * stage.rounds {
                stage.progress.check()?;
                let (pings, changed) = restart(stage, &mut pair, signal)?;
                lost.rounds.push(pings as f64);
                changes.rounds.push(changed as f64);
            }
            stage.progress.step(&format!("{title}: lost {:?}, changes {:?}", lost.rounds, changes.rounds))?;
            record.put(&lost)?;
            record.put(&changes)?;
        }
    }
    Ok(())
}

/// Pings lost and changes made.
fn restart(stage: &Stage, pair: &mut Pair, signal: Signal) -> anyhow::Result<(u64, usize)> {
    let pinger = pair.pinger()?;
    let monitor = Monitor::start(&pair.a.node)?;
    pair.a.agent.process().signal(signal)?;
    pair.a.agent.process().wait(TIMEOUT)?;
    pair.a.start_again()?;
    pair.a.agent.wait_ready(TIMEOUT)?;
    stage.progress.pause(AFTER)?;
    let changes = monitor.finish(&pair.a.node)?;
    changes.iter().for_each(|change| eprintln!("          changed: {change}"));
    Ok((pinger.finish()?.lost, changes.len()))
}

/// Lets peers leave while the agent is down.
pub(crate) fn stale(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let cluster = Cluster::small(stage, "vxlan")?;
    let mut member = cluster.join()?;
    let mut left = Figure::new("stale-20: stale routes, neighbours, FDB entries", "", Limit::Each(0.0));
    let own = member.subnet()?;
    // Twenty subnets that aren't its own.
    let leases = |number: u8| -> (String, String) {
        let third = if own.to_string().starts_with("10.244.2") { 100 } else { 200 } + number;
        (
            format!("10.244.{third}.0-24"),
            lease(std::net::Ipv4Addr::new(172, 31, 0, 100 + number), number.into()),
        )
    };
    for round in stage.rounds(u32::MAX) {
        let leases: Vec<(String, String)> = (1..=LEAVING).map(leases).collect();
        cluster.write(&leases)?;
        let count = |kind: &str| member.count(kind).unwrap_or_default();
        member.wait("all peers", || PEER_OBJECTS.iter().all(|kind| count(kind) == usize::from(LEAVING)))?;
        member.agent.terminate(TIMEOUT)?;
        cluster.delete(leases.iter().map(|(key, _)| key.as_str()))?;
        member.start_again()?;
        member.agent.wait_ready(TIMEOUT)?;
        let stale =
            PEER_OBJECTS.iter().try_fold(0, |sum, kind| member.count(kind).map(|count| sum + count))?;
        stage.progress.step(&format!("stale-20: round {round}: {stale}"))?;
        left.rounds.push(stale as f64);
    }
    record.put(&left)
}
