//! Leases that change among twenty thousand: one after the other, and two hundred a second.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::ensure;
use bench::bed::{Cluster, Member, SETTLE, lease, time_to_peers};
use bench::figure::{Limit, median, ms};
use bench::process::{cpu_time, resident_mib};
use serde_json::Value;

use super::start::{TWENTY, cluster, peer, public};
use crate::Stage;

/// Single changes in a row, of which the median counts.
const SINGLE: u16 = 30;
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(500);
/// How long many leases change, how often, and how many each time.
const CHURN: Duration = Duration::from_secs(120);
const EVERY: Duration = Duration::from_millis(100);
const AT_ONCE: u16 = 20;
/// Peers that come and go, of numbers that no other has.
const GUESTS: u16 = 2000;

/// Measures what single changes cost one agent, and two minutes of many.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let cluster = cluster(stage, TWENTY)?;
    let mut member = cluster.start()?;
    let file = member.time_to_subnet_file()?;
    time_to_peers(&member, file, TWENTY.peers)?;
    stage.progress.pause(SETTLE)?;
    let rows = [
        ("lease written to route in place", "ms", Limit::Median(30.0)),
        ("CPU for each", "ms", Limit::Median(1.0)),
    ];
    stage.measure("one-of-20000", rows, 1, |_| single(stage, &cluster, &mut member))?;
    let rows = [
        ("CPU of 120 s, 200 changes a second", "%", Limit::None),
        ("VmRSS after it, less that before", "MiB", Limit::Each(2.0)),
        ("objects missing or left at the end", "", Limit::Each(0.0)),
    ];
    stage.measure("churn-20000", rows, 1, |_| {
        let pid = member.pid();
        let (before, memory, begun) = (cpu_time(pid)?, resident_mib(pid)?, Instant::now());
        churn(&cluster)?;
        let used = 100.0 * (cpu_time(pid)? - before).as_secs_f64() / begun.elapsed().as_secs_f64();
        stage.progress.pause(SETTLE)?;
        Ok([used, resident_mib(pid)? - memory, differences(&member, &cluster)? as f64])
    })?;
    cluster.remove(member)
}

/// A node comes, and goes, again and again. The clock runs from before the writing program starts, and the time of writing
/// a lease without effect is taken off; so is from the CPU what the agent uses in the pause before, in which nothing
/// changes. One address is looked up, since a list of all routes takes longer than what is measured. Medians of both, and
/// of the pauses: a resync, which costs more than all changes together, lies in one of some hundred.
fn single(stage: &Stage, cluster: &Cluster, member: &mut Member) -> anyhow::Result<[f64; 2]> {
    let pid = member.pid();
    let (mut right, mut used, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    for number in TWENTY.peers..TWENTY.peers + SINGLE {
        let (key, value) = peer(number);
        let begun = Instant::now();
        cluster.delete(["10.250.1.0-24"])?;
        let writing = begun.elapsed();
        stage.progress.pause(PAUSE)?;
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        stage.progress.pause(PAUSE)?;
        idle.push(cpu_time(pid)?.saturating_sub(before).as_secs_f64() / begun.elapsed().as_secs_f64());
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        cluster.write(&[(key.clone(), value)])?;
        let (destination, address) = (key.replace("-24", "/24"), key.replace(".0-24", ".1"));
        member.wait("the route", || {
            let shown = member.show(&format!("ip -4 route get fibmatch {address}"));
            shown.is_ok_and(|shown| shown.contains(&destination))
        })?;
        right.push(ms(begun.elapsed().saturating_sub(writing)));
        stage.progress.pause(PAUSE)?;
        used.push((cpu_time(pid)?.saturating_sub(before), begun.elapsed()));
        cluster.delete([key.as_str()])?;
        stage.progress.pause(PAUSE)?;
    }
    let idle = median(idle);
    let cpu = used.into_iter().map(|(used, within)| ms(used) - idle * ms(within));
    Ok([median(right), median(cpu.collect())])
}

/// Guests come, move to another address, and go.
fn churn(cluster: &Cluster) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut due = begun;
    let mut step = 0u16;
    while begun.elapsed() < CHURN {
        let first = (step.wrapping_mul(AT_ONCE)) % GUESTS;
        let numbers = (first..first + AT_ONCE).map(|number| TWENTY.peers + 100 + number);
        let round = step / (GUESTS / AT_ONCE);
        if round % 3 == 2 {
            let keys: Vec<String> = numbers.map(|number| peer(number).0).collect();
            cluster.delete(keys.iter().map(String::as_str))?;
        } else {
            let moved = |number: u16| (peer(number).0, lease(public(number + round % 3 * 10_000), number));
            cluster.write(&numbers.map(moved).collect::<Vec<_>>())?;
        }
        step = step.wrapping_add(1);
        due += EVERY;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// How many routes, neighbours and forwarding entries differ from the leases in etcd.
fn differences(member: &Member, cluster: &Cluster) -> anyhow::Result<usize> {
    let own = member.subnet()?.to_string();
    let (mut wanted, mut publics) = (BTreeSet::new(), BTreeSet::new());
    let leases = cluster.leases()?;
    for pair in leases.lines().collect::<Vec<_>>().chunks(2) {
        let [key, value] = pair else { continue };
        let subnet = key.rsplit('/').next().unwrap_or_default().replace('-', "/");
        if subnet != own {
            let lease: Value = serde_json::from_str(value)?;
            publics.insert(lease["PublicIP"].as_str().unwrap_or_default().to_owned());
            wanted.insert(subnet);
        }
    }
    ensure!(wanted.len() >= usize::from(TWENTY.peers), "etcd has {} leases", wanted.len());
    let words = |command: &str, word: usize, suffix: &str| -> anyhow::Result<BTreeSet<String>> {
        let shown = member.show(command)?;
        let words = shown.lines().filter_map(|line| line.split_whitespace().nth(word));
        Ok(words.map(|word| format!("{word}{suffix}")).collect())
    };
    let routes = words("ip -4 route show dev flannel.1", 0, "")?;
    let hops = words("ip -4 neigh show dev flannel.1", 0, "/24")?;
    let entries = words("bridge fdb show dev flannel.1", 2, "")?;
    let apart = |one: &BTreeSet<String>, other| one.symmetric_difference(other).count();
    Ok(apart(&wanted, &routes) + apart(&wanted, &hops) + apart(&publics, &entries))
}
