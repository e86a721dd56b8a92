//! Leases that change among twenty thousand: one after the other, and two hundred a second.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bench::bed::{Cluster, Member, SETTLE};
use bench::figure::{Limit, median, ms};
use bench::peer::{Entry, Peer, differences, time_to_peers};
use bench::process::{cpu_time, resident_mib};
use serde_json::Value;

use super::start::{TWENTY, cluster};
use crate::Stage;

/// Single changes in a row, of which the median counts.
const SINGLE: u16 = 30;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(500);
/// How long many leases change, how often, and how many each time.
const CHURN: Duration = Duration::from_secs(120);
/// After this much of it all code that changes need is in memory, and nothing may grow any more.
const WARM: Duration = Duration::from_secs(20);
const EVERY: Duration = Duration::from_millis(100);
const AT_ONCE: u16 = 20;
/// Peers that come and go, of numbers that no other has.
const GUESTS: u16 = 2000;

/// Measures two minutes of many changes.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let (cluster, mut member) = among_many(stage, &[])?;
    let rows = [
        ("CPU of 120 s, 200 changes a second", "%", Limit::None),
        ("VmRSS after it, less that after 20 s of it", "MiB", Limit::Each(2.0)),
        ("VmRSS after it, less that before", "MiB", Limit::None),
        ("objects missing or left at the end", "", Limit::Each(0.0)),
    ];
    stage.measure("churn-20000", rows, 1, |_| {
        let pid = member.pid();
        let (before, memory, begun) = (cpu_time(pid)?, resident_mib(pid)?, Instant::now());
        let warm = churn(&cluster, || resident_mib(pid))?;
        let used = 100.0 * (cpu_time(pid)? - before).as_secs_f64() / begun.elapsed().as_secs_f64();
        stage.progress.pause(SETTLE)?;
        let after = resident_mib(pid)?;
        Ok([
            used,
            after - warm,
            after - memory,
            differences(&member, entries(&member, &cluster)?)?.len() as f64,
        ])
    })?;
    cluster.remove(member)
}

/// Measures what single changes cost one agent. It sends no probes, which it does whether anything changes or not.
pub(crate) fn one_of_many(stage: &Stage) -> anyhow::Result<()> {
    let (cluster, mut member) = among_many(stage, &["--probe-interval=0"])?;
    let rows = [
        ("lease written to route in place", "ms", Limit::Median(30.0)),
        ("CPU for each", "ms", Limit::Median(1.0)),
        ("CPU in as long a time without a change", "ms", Limit::None),
    ];
    stage.measure("one-of-20000", rows, 3, |_| single(stage, &cluster, &mut member))?;
    cluster.remove(member)
}

/// An agent with these flags that has all its peers in place.
fn among_many(stage: &Stage, flags: &[&str]) -> anyhow::Result<(Cluster, Member)> {
    let cluster = cluster(stage, TWENTY, flags)?;
    let member = cluster.start()?;
    let file = member.time_to_subnet_file()?;
    time_to_peers(&member, file, TWENTY.peers)?;
    stage.progress.pause(SETTLE)?;
    Ok((cluster, member))
}

/// A node comes, and goes, again and again. The clock runs from before the writing program starts, and the time of writing
/// a lease without effect is taken off. The CPU is that from the lease until half a second after the route is there, all of it: what the
/// agent uses anyway is measured beside it, in times between changes that are as long. One address is looked up, since a list of all
/// routes takes longer than what is measured. Medians, so that a look at the whole kernel once a minute does not count.
fn single(stage: &Stage, cluster: &Cluster, member: &mut Member) -> anyhow::Result<[f64; 3]> {
    let pid = member.pid();
    let (mut right, mut used, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    for number in TWENTY.peers..TWENTY.peers + SINGLE {
        let (key, value) = Peer::new(number).lease();
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        cluster.delete(["10.250.1.0-24"])?;
        let writing = begun.elapsed();
        stage.progress.pause(PAUSE)?;
        idle.push(ms(cpu_time(pid)?.saturating_sub(before)));
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        cluster.write(&[(key.clone(), value)])?;
        let (destination, address) = (key.replace("-24", "/24"), key.replace(".0-24", ".1"));
        member.wait("the route", || {
            let shown = member.show(&format!("ip -4 route get fibmatch {address}"));
            shown.is_ok_and(|shown| shown.contains(&destination))
        })?;
        right.push(ms(begun.elapsed().saturating_sub(writing)));
        stage.progress.pause(PAUSE)?;
        used.push(ms(cpu_time(pid)?.saturating_sub(before)));
        cluster.delete([key.as_str()])?;
        stage.progress.pause(PAUSE)?;
    }
    Ok([median(right), median(used), median(idle)])
}

/// Guests come, move to another address, and go. The result is what `look` finds after [`WARM`].
fn churn(cluster: &Cluster, look: impl Fn() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let mut due = begun;
    let mut step = 0u16;
    let mut warm = None;
    while begun.elapsed() < CHURN {
        if warm.is_none() && begun.elapsed() >= WARM {
            warm = Some(look()?);
        }
        let first = (step.wrapping_mul(AT_ONCE)) % GUESTS;
        let numbers = (first..first + AT_ONCE).map(|number| TWENTY.peers + 100 + number);
        let round = step / (GUESTS / AT_ONCE);
        if round % 3 == 2 {
            let keys: Vec<String> = numbers.map(|number| Peer::new(number).lease().0).collect();
            cluster.delete(keys.iter().map(String::as_str))?;
        } else {
            let moved = |number: u16| {
                let address = u32::from(number + round % 3 * 10_000);
                Peer { address, ..Peer::new(number) }.lease()
            };
            cluster.write(&numbers.map(moved).collect::<Vec<_>>())?;
        }
        step = step.wrapping_add(1);
        due += EVERY;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    warm.context("the machine was too slow to look")
}

/// What the leases of others in etcd ask for.
fn entries(member: &Member, cluster: &Cluster) -> anyhow::Result<Vec<Entry>> {
    let own = member.subnet()?.network();
    let (leases, mut entries) = (cluster.leases()?, Vec::new());
    for pair in leases.lines().collect::<Vec<_>>().chunks(2) {
        let [key, value] = pair else { continue };
        let first = key.rsplit('/').next().and_then(|key| key.strip_suffix("-24")?.parse().ok());
        let first = first.with_context(|| format!("{key} is no key of a lease"))?;
        let lease: Value = serde_json::from_str(value)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        if own != first {
            let public = text(&lease["PublicIP"]).parse()?;
            entries.push((first, public, text(&lease["BackendData"]["VtepMAC"])));
        }
    }
    ensure!(entries.len() >= usize::from(TWENTY.peers), "etcd has {} leases", entries.len());
    Ok(entries)
}
