//! Network policies: compiled, and applied to the real kernel in a namespace of its own; what one pod's arrival costs, and
//! what a large cluster takes of memory.

mod made;

use std::collections::BTreeSet;
use std::fs;
use std::time::Instant;

use anyhow::{Context, ensure};
use backends::policy::{Cluster, Enforcer, Engine};
use backends::testing::Namespace;
use bench::figure::{Limit, Row, median, ms, percentile_99};
use bench::process::resident_mib;
use subnet::policy::{ObjectName, Pod};

use crate::Stage;
use crate::stage::{Plan, Selection, Subject};

use made::{SHIFT, namespace_labels, natural, pod, policy, realistic, settings};

const ARRIVALS: u32 = 200;
/// Milliseconds from nothing, and of an arrival.
const NOTHING: Limit = Limit::Median(100.0);
const ARRIVAL: Limit = Limit::Median(5.0);
/// 32 MB.
const MEMORY: Limit = Limit::Median(30.5);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Applies so many policies on one pod in this network namespace instead, for `bench/policy-cost.sh`.
    #[arg(long)]
    apply: Option<u32>,
}

pub(crate) const SUBJECTS: &[Subject<()>] = &[
    // First: memory that was used before and is free tells nothing.
    ("memory", |stage, ()| memory(stage)),
    ("ingress", |stage, ()| measure(stage, "1,000 policies", false)),
    ("both", |stage, ()| measure(stage, "1,000 policies for both directions", true)),
];

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if let Some(policies) = args.apply {
        return made::isolate(policies);
    }
    // The kernel then writes a notification of each element, and what is made from nothing takes twice as long.
    let setup = format!("{} sockets hear of changes to nftables", listeners()?);
    let plan = Plan::new("policy", "make bench-policy", &[]);
    args.selection.measure(Plan { works: true, setup: Some(setup), ..plan }, SUBJECTS, ())
}

const ROWS: [Row<'_>; 8] = [
    ("compiled", "ms", Limit::None),
    ("compiled and applied from nothing", "ms", NOTHING),
    ("a pod of another node arrives", "ms", ARRIVAL),
    ("a pod of another node arrives, p99", "ms", Limit::None),
    ("a pod of this node arrives", "ms", ARRIVAL),
    ("a pod of this node arrives, p99", "ms", Limit::None),
    ("nothing changed, 0 changes", "ms", Limit::None),
    ("restart: read, compared, 0 changes", "ms", Limit::None),
];

fn measure(stage: &Stage, title: &str, both: bool) -> anyhow::Result<()> {
    // Another namespace each time, all of which stay: the kernel would be busy with the end of the one before.
    let mut namespaces = Vec::new();
    stage.measure(title, ROWS, u32::MAX, |round| {
        let mut engine = natural(both);
        let start = Instant::now();
        let plan = engine.adopt(None, Instant::now());
        let compiled = ms(start.elapsed());
        stage.progress.step(&format!("{title}: {} edits, {:?}", plan.edits.len(), engine.summary()))?;
        let namespace = Namespace::new()?;
        let engine = natural(both);
        let mut enforcer = namespace.run(|| Enforcer::open(engine))?;
        let start = Instant::now();
        enforcer.converge(Instant::now())?;
        let applied = ms(start.elapsed());
        if round == 1 {
            namespace.command("nft").args(["list", "ruleset"]).ok().context("nft can print it")?;
        }
        namespaces.push(namespace);
        let others = times(0..ARRIVALS, |number| {
            let one = pod(1_000_000 + number, number % 300, "10.244.200.0", number, false);
            enforcer.engine.cluster.set_pod(&one);
            converge(&mut enforcer, false)
        })?;
        let own = times(0..ARRIVALS / 2, |number| {
            let one = pod(2_000_000 + number, number % 100, "10.244.1.0", 110 + number, true);
            enforcer.engine.cluster.announce_pod(&one);
            converge(&mut enforcer, false)
        })?;
        let nothing = times(0..ARRIVALS, |_| converge(&mut enforcer, true))?;
        let mut engine = Engine::new(settings(), SHIFT, 42);
        std::mem::swap(&mut engine, &mut enforcer.engine);
        enforcer.engine.cluster = engine.cluster;
        let restart = converge(&mut enforcer, true)?;
        let [(others, others_99), (own, own_99), (nothing, _)] =
            [others, own, nothing].map(|times| (median(times.clone()), percentile_99(&times)));
        Ok([compiled, applied, others, others_99, own, own_99, nothing, restart])
    })
}

fn times(
    numbers: std::ops::Range<u32>,
    one: impl FnMut(u32) -> anyhow::Result<f64>,
) -> anyhow::Result<Vec<f64>> {
    numbers.map(one).collect()
}

/// The milliseconds in which the kernel is brought up to date, with changes or without.
fn converge(enforcer: &mut Enforcer, unchanged: bool) -> anyhow::Result<f64> {
    let start = Instant::now();
    let done = enforcer.converge(Instant::now())?;
    ensure!(unchanged == (done.changes == 0), "{done:?}");
    Ok(ms(start.elapsed()))
}

/// How many sockets hear of changes to nftables, in the network namespaces of all processes.
fn listeners() -> anyhow::Result<usize> {
    let mut sockets = BTreeSet::new();
    for entry in fs::read_dir("/proc").context("can't read /proc")?.flatten() {
        // Most entries are no processes, and some of those have ended.
        let text = fs::read_to_string(entry.path().join("net/netlink")).unwrap_or_default();
        sockets.extend(text.lines().filter_map(listener));
    }
    Ok(sockets.len())
}

/// The number of a socket of /proc/PID/net/netlink, if it is one of `NETLINK_NETFILTER` in the group `NFNLGRP_NFTABLES`.
fn listener(line: &str) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, "12", _, groups, .., socket] = fields[..] else { return None };
    let groups = u32::from_str_radix(groups, 16).ok()?;
    socket.parse().ok().filter(|_| groups & 1 << 6 != 0)
}

fn memory(stage: &Stage) -> anyhow::Result<()> {
    let rows = [
        ("150,000 pods", "MiB", Limit::None),
        ("150,000 pods, each", "bytes", Limit::None),
        ("150,000 pods, 10,000 policies and tables", "MiB", MEMORY),
    ];
    // What the process has had once, it does not need again.
    stage.measure("memory", rows, 1, |_| {
        let resident = || {
            backends::memory::give_back();
            resident_mib(std::process::id())
        };
        let before = resident()?;
        let mut cluster = Cluster::default();
        for namespace in 0..2_000 {
            cluster.set_namespace(&format!("team-{namespace}"), &namespace_labels(namespace));
        }
        for number in 0..150_000 {
            cluster.set_pod(&realistic(number));
        }
        let pods = resident()? - before;
        for number in 0..10_000 {
            cluster.set_policy(policy(number, &format!("team-{}", number % 2_000)));
        }
        let mut engine = Engine::new(settings(), SHIFT, 42);
        let local = pod(9_000_000, 3, "10.244.1.0", 9, true);
        cluster.set_pod(&Pod { name: ObjectName::new("team-7", "local"), ..local });
        engine.cluster = cluster;
        engine.adopt(None, Instant::now());
        stage.progress.step(&format!("memory: {:?}", engine.summary()))?;
        Ok([pods, pods * f64::from(1 << 20) / 150_000.0, resident()? - before])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_hears_of_nftables_is_found_among_all_that_speak_netlink() {
        let line =
            |protocol, groups| format!("0000000000000000 {protocol} 2688545038 {groups} 0 0 0 2 0 4711");
        assert_eq!(listener(&line("12", "00000040")), Some(4711));
        assert_eq!(listener(&line("12", "00000043")), Some(4711));
        for other in [line("12", "00000000"), line("12", "00000001"), line("0", "00000040")] {
            assert_eq!(listener(&other), None);
        }
        assert_eq!(listener("sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode"), None);
    }
}
