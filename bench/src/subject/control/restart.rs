//! What pods and the kernel notice of a restart and of what others write among the leases, and what is left of peers that
//! went while the agent was down.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use backends::testing::Signal;
use bench::bed::{Pair, TIMEOUT};
use bench::figure::{Limit, Row, ms};
use bench::monitor::Monitor;
use bench::peer::{PEER_OBJECTS, lease, mac};

use super::heal::INTERVAL;
use crate::Stage;

/// Peers that leave.
const LEAVING: u8 = 20;
/// How long after the last event an agent is watched.
const AFTER: Duration = Duration::from_secs(1);

/// What is counted while something is done to a node.
const ROWS: [Row<'_>; 2] =
    [("pings lost", "", Limit::Each(0.0)), ("changes to the kernel", "", Limit::Each(0.0))];

const SIGNALS: [(&str, Signal); 2] = [("SIGTERM", Signal::TERM), ("SIGKILL", Signal::KILL)];
/// How long a tunnel that ends with the agent may be silent.
const MAX_SILENCE_MS: f64 = 60.0;

/// Restarts an agent under a ping between pods, twice in each round.
pub(crate) fn loss(stage: &Stage) -> anyhow::Result<()> {
    for backend in ["vxlan", "host-gw"] {
        stage.progress.step(&format!("restart-loss: two nodes with {backend}"))?;
        let cluster = stage.cluster(backend)?;
        let mut pair = cluster.pair()?;
        for (name, signal) in SIGNALS {
            let mut restart = || watched(stage, &mut pair, |pair| restart(pair, signal));
            stage.measure(&format!("restart-loss: {backend}, {name}"), ROWS, u32::MAX, |_| {
                let ([lost, changes], [more_lost, more_changes]) = (restart()?, restart()?);
                Ok([lost + more_lost, changes + more_changes])
            })?;
        }
    }
    in_process(stage)
}

/// The same with WireGuard in process, whose tunnel ends with the agent.
fn in_process(stage: &Stage) -> anyhow::Result<()> {
    stage.progress.step("restart-loss: two nodes with wireguard in process")?;
    let cluster = stage.cluster("wireguard")?;
    let mut pair = cluster.pair()?;
    for (name, signal) in SIGNALS {
        let row = ("silence", "ms", Limit::Median(MAX_SILENCE_MS));
        stage.measure(&format!("restart-loss: wireguard in process, {name}"), [row], u32::MAX, |_| {
            let pinger = pair.pinger()?;
            restart(&mut pair, signal)?;
            pinger.wait_for_reply(TIMEOUT)?;
            stage.progress.pause(AFTER)?;
            Ok([ms(pinger.finish()?.longest_gap.saturating_sub(INTERVAL))])
        })?;
    }
    Ok(())
}

fn restart(pair: &mut Pair, signal: Signal) -> anyhow::Result<()> {
    let process = pair.a.agent.process();
    process.signal(signal)?;
    let start = Instant::now();
    // More often than `wait` looks, whose pauses would count.
    while process.ended()?.is_none() {
        ensure!(start.elapsed() < TIMEOUT, "the agent does not end");
        thread::sleep(Duration::from_micros(300));
    }
    pair.a.start_again()?;
    pair.a.agent.wait_ready(TIMEOUT)
}

/// Writes bad keys and values.
pub(crate) fn bad_keys(stage: &Stage) -> anyhow::Result<()> {
    stage.measure("bad-keys", ROWS, u32::MAX, |_| {
        let cluster = stage.cluster("vxlan")?;
        let foreign = |last: u8| lease(Ipv4Addr::new(172, 31, 0, last), mac(last.into()));
        watched(stage, &mut cluster.pair()?, |pair| {
            for (key, value) in [
                ("hello", foreign(90)),
                ("10.244.77.0-24", "nonsense".to_owned()),
                ("192.168.0.0-16", foreign(91)),
                ("0.0.0.0-0", foreign(92)),
                ("10.244.0.0-16", foreign(93)),
            ] {
                stage.progress.check()?;
                cluster.write(&[(key.to_owned(), value)])?;
                // Each message of the agent about it names it.
                pair.a.wait(&format!("{key} in the log"), || pair.a.agent.log().contains(key))?;
            }
            Ok(())
        })
    })
}

/// Does something to the first node under a ping between pods.
fn watched(
    stage: &Stage,
    pair: &mut Pair,
    work: impl FnOnce(&mut Pair) -> anyhow::Result<()>,
) -> anyhow::Result<[f64; 2]> {
    let pinger = pair.pinger()?;
    let monitor = Monitor::start(&pair.a.node)?;
    work(pair)?;
    stage.progress.pause(AFTER)?;
    let changes = monitor.finish(&pair.a.node)?;
    changes.iter().for_each(|change| eprintln!("          changed: {change}"));
    Ok([pinger.finish()?.lost as f64, changes.len() as f64])
}

/// Lets peers leave while the agent is down.
pub(crate) fn stale(stage: &Stage) -> anyhow::Result<()> {
    let cluster = stage.cluster("vxlan")?;
    let mut member = cluster.join()?;
    // Subnets that aren't its own.
    let first = if member.subnet()?.to_string().starts_with("10.244.2") { 100 } else { 200 };
    let peer = |number: u8| {
        let public = Ipv4Addr::new(172, 31, 0, 100 + number);
        (format!("10.244.{}.0-24", first + number), lease(public, mac(number.into())))
    };
    let leases: Vec<(String, String)> = (1..=LEAVING).map(peer).collect();
    let row = ("stale routes, neighbours, FDB entries", "", Limit::Each(0.0));
    stage.measure("stale-20", [row], u32::MAX, |_| {
        cluster.write(&leases)?;
        let count = |kind: &str| member.count(kind).unwrap_or_default();
        member.wait("all peers", || PEER_OBJECTS.iter().all(|kind| count(kind) == usize::from(LEAVING)))?;
        member.agent.terminate(TIMEOUT)?;
        cluster.delete(leases.iter().map(|(key, _)| key.as_str()))?;
        member.start_again()?;
        member.agent.wait_ready(TIMEOUT)?;
        let stale = PEER_OBJECTS.iter().map(|kind| member.count(kind)).sum::<anyhow::Result<usize>>()?;
        Ok([stale as f64])
    })
}
