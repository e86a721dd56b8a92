//! Leases that change among many: one after the other, and two hundred a second.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::{peer, public};
use crate::Stage;
use crate::bed::{Cluster, Member, SETTLE, lease};
use bench::figure::{Figure, Limit, Record};
use bench::process::{cpu_time, resident_mib};

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

pub(super) fn measure(
    stage: &Stage,
    record: &mut Record,
    cluster: &Cluster,
    peers: u16,
) -> anyhow::Result<()> {
    let mut member = cluster.start()?;
    let file = member.time_to_subnet_file()?;
    member.time_to_peers(file, peers)?;
    stage.progress.pause(SETTLE)?;
    let mut right = Figure::new("one-of-20000: lease written to route in place", "ms", Limit::Median(30.0));
    let mut cpu = Figure::new("one-of-20000: CPU for each", "ms", Limit::Median(1.0));
    single(stage, cluster, &mut member, peers, (&mut right, &mut cpu))?;
    [&right, &cpu].into_iter().try_for_each(|figure| record.put(figure))?;
    let mut used = Figure::new("churn-20000: CPU of 120 s, 200 changes a second", "%", Limit::None);
    let mut grown = Figure::new("churn-20000: VmRSS after it, less that before", "MiB", Limit::Each(2.0));
    let mut wrong = Figure::new("churn-20000: objects missing or left at the end", "", Limit::Each(0.0));
    let pid = member.agent.process().id();
    let (before, memory, begun) = (cpu_time(pid)?, resident_mib(pid)?, Instant::now());
    churn(stage, cluster, peers)?;
    used.rounds.push(100.0 * (cpu_time(pid)? - before).as_secs_f64() / begun.elapsed().as_secs_f64());
    stage.progress.pause(SETTLE)?;
    grown.rounds.push(resident_mib(pid)? - memory);
    wrong.rounds.push(f64::from(differences(&member, cluster)?));
    cluster.remove(member)?;
    [used, grown, wrong].iter().try_for_each(|figure| record.put(figure))
}

/// A node comes, and goes, again and again. The clock runs from before the writing program starts, and the writing of a lease that
/// nobody heeds is taken off; so is from the CPU what the agent uses in pauses in which nothing changes. One address is looked
/// up, since a list of all routes takes longer than what is measured.
fn single(
    stage: &Stage,
    cluster: &Cluster,
    member: &mut Member,
    peers: u16,
    (right, cpu): (&mut Figure, &mut Figure),
) -> anyhow::Result<()> {
    let pid = member.agent.process().id();
    let (mut idle, mut pauses) = (Duration::ZERO, Duration::ZERO);
    let mut used = Vec::new();
    for number in peers..peers + SINGLE {
        let (key, value) = peer(number);
        let begun = Instant::now();
        cluster.delete(["10.250.1.0-24"])?;
        let writing = begun.elapsed();
        stage.progress.pause(PAUSE)?;
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        stage.progress.pause(PAUSE)?;
        (idle, pauses) = (idle + cpu_time(pid)?.saturating_sub(before), pauses + begun.elapsed());
        let (before, begun) = (cpu_time(pid)?, Instant::now());
        cluster.write(&[(key.clone(), value)])?;
        let (destination, address) = (key.replace("-24", "/24"), key.replace(".0-24", ".1"));
        member.wait("the route", || {
            let shown = member.show(&format!("ip -4 route get fibmatch {address}"));
            shown.is_ok_and(|shown| shown.contains(&destination))
        })?;
        right.push_ms(begun.elapsed().saturating_sub(writing));
        stage.progress.pause(PAUSE)?;
        used.push((cpu_time(pid)?.saturating_sub(before), begun.elapsed()));
        cluster.delete([key.as_str()])?;
        stage.progress.pause(PAUSE)?;
    }
    let idle = idle.as_secs_f64() / pauses.as_secs_f64();
    for (used, within) in used {
        cpu.rounds.push(1000.0 * (used.as_secs_f64() - idle * within.as_secs_f64()));
    }
    let last = |figure: &Figure| figure.rounds.last().copied().unwrap_or_default();
    stage.progress.step(&format!("one-of-20000: {:.1} ms, CPU {:.1} ms", last(right), last(cpu)))
}

/// Guests come, move to another address, and go.
fn churn(stage: &Stage, cluster: &Cluster, peers: u16) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut due = begun;
    let mut step = 0u16;
    while begun.elapsed() < CHURN {
        let first = (step.wrapping_mul(AT_ONCE)) % GUESTS;
        let numbers = (first..first + AT_ONCE).map(|number| peers + 100 + number);
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
    stage.progress.step(&format!("churn-20000: {} changes in {:.0?}", u32::from(step) * 20, begun.elapsed()))
}

/// How many routes, neighbours and forwarding entries differ from the leases in etcd.
fn differences(member: &Member, cluster: &Cluster) -> anyhow::Result<u32> {
    let own = member.subnet()?;
    let mut wanted: Vec<String> = Vec::new();
    let mut publics: Vec<String> = Vec::new();
    let leases = cluster.leases()?;
    let lines: Vec<&str> = leases.lines().collect();
    for pair in lines.chunks(2) {
        let [key, value] = pair else { continue };
        let subnet = key.rsplit('/').next().unwrap_or_default().replace('-', "/");
        if subnet == own.to_string() {
            continue;
        }
        let public = value.split('"').nth(3).unwrap_or_default();
        publics.push(public.to_owned());
        wanted.push(subnet);
    }
    ensure!(wanted.len() >= usize::from(super::TWENTY.peers), "etcd has {} leases", wanted.len());
    let of = |command: &str, word: usize| -> anyhow::Result<Vec<String>> {
        let shown = member.show(command)?;
        let words = shown.lines().filter_map(|line| line.split_whitespace().nth(word));
        Ok(words.map(str::to_owned).collect())
    };
    let routes = of("ip -4 route show dev flannel.1", 0)?;
    let hops: Vec<String> =
        of("ip -4 neigh show dev flannel.1", 0)?.iter().map(|hop| format!("{hop}/24")).collect();
    let entries = of("bridge fdb show dev flannel.1", 2)?;
    Ok(apart(&wanted, &routes) + apart(&wanted, &hops) + apart(&publics, &entries))
}

/// How many are in one of two and not in the other.
fn apart(one: &[String], other: &[String]) -> u32 {
    let set = |all: &[String]| all.iter().cloned().collect::<std::collections::BTreeSet<_>>();
    let (one, other) = (set(one), set(other));
    one.symmetric_difference(&other).count() as u32
}
