//! The CNI plugin beside Go's plugins: many pods at once, 16 at a time, and one after the other, through `flannel` and
//! through Debian's `bridge` with the very configuration that flannel generates.
//!
//! Both have a node of their own (namespace, bridge, directories) and use the same pods in turns.

mod one;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::Context;
use backends::testing::Namespace;
use bench::figure::{Figure, Limit, ms};
use tempfile::TempDir;

use crate::Stage;
use crate::plugin::{DELEGATES, Plugin};
use crate::stage::{Plan, Selection, Subject};

/// Many pods at once may take this share of the time of Go's plugins: 3.5 times as many a second.
const LIMIT: f64 = 1.0 / 3.5;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Pods in a round, at most 250.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=250))]
    pods: u16,
    /// How many of them at a time.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=250))]
    parallel: u16,
}

/// Given the pods in a round, and how many of them at a time.
pub(crate) const SUBJECTS: &[Subject<(u16, u16)>] = &[
    ("pods", |stage, (pods, parallel)| measure(stage, *pods, *parallel)),
    ("one", |stage, _| one::measure(stage)),
];

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (pods, parallel) = (args.pods, args.parallel);
    let setup = Some(format!("{pods} pods, {parallel} at a time, {}", delegate_version()?));
    let plan = Plan { rounds: 7, setup, ..Plan::new("cni", "make bench-cni", &["flannel"]) };
    args.selection.measure(plan, SUBJECTS, (pods, parallel))
}

fn measure(stage: &Stage, pods: u16, parallel: u16) -> anyhow::Result<()> {
    let pods = (0..pods).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
    let nodes = [Node::new(stage, false)?, Node::new(stage, true)?];
    for node in &nodes {
        // The first pod on a node makes the bridge.
        node.all("ADD", &pods[..1], 1)?;
        node.all("DEL", &pods[..1], 1)?;
    }
    let mut figures = [("add", Limit::Median(LIMIT)), ("del", Limit::None)].map(|(verb, limit)| {
        [
            ("flannel", "ms", Limit::None),
            ("delegate", "ms", Limit::None),
            ("ratio", "ratio of medians", limit),
        ]
        .map(|(what, unit, limit)| Figure::new(format!("cni-{verb}-{what}"), unit, limit))
    });
    for round in stage.rounds(u32::MAX) {
        // Neither is always the first.
        for way in [round % 2, (round + 1) % 2].map(|way| way as usize) {
            stage.progress.check()?;
            for (figures, verb) in figures.iter_mut().zip(["ADD", "DEL"]) {
                figures[way].rounds.push(nodes[way].all(verb, &pods, parallel)?);
            }
        }
        for [through, alone, ratio] in &mut figures {
            let (through, alone) = (through.rounds.last(), alone.rounds.last());
            ratio.rounds.extend(through.zip(alone).map(|(one, other)| one / other));
        }
        stage.progress.step(&format!("cni: round {round}: ADD {:.0?} ms", figures[0][0].rounds.last()))?;
    }
    for [through, alone, ratio] in &mut figures {
        ratio.overall = Some(through.median() / alone.median());
    }
    stage.put(figures.iter().flatten())
}

/// A namespace, a directory for everything that plugins write, and the plugin that attaches pods to it.
struct Node {
    namespace: Namespace,
    plugin: Plugin,
    _directory: TempDir,
}

impl Node {
    fn new(stage: &Stage, direct: bool) -> anyhow::Result<Self> {
        let (namespace, directory) = (Namespace::new()?, tempfile::tempdir()?);
        let mut plugin = Plugin::flannel(stage.plugin(), directory.path())?;
        if direct {
            plugin = Plugin::delegate(&plugin, &namespace, directory.path())?;
        }
        Ok(Self { namespace, plugin, _directory: directory })
    }

    /// Calls the plugin for all of `pods`, `parallel` at a time; gives the milliseconds.
    fn all(&self, verb: &str, pods: &[Namespace], parallel: u16) -> anyhow::Result<f64> {
        let next = AtomicUsize::new(0);
        let some = || -> anyhow::Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(pod) = pods.get(number) else { return Ok(()) };
                self.plugin.call(verb, &format!("pod-{number}"), pod)?;
            }
        };
        // Threads that are made inside the namespace are in it, and so are their children.
        self.namespace.run(|| {
            let start = Instant::now();
            thread::scope(|scope| {
                let workers: Vec<_> = (0..parallel).map(|_| scope.spawn(some)).collect();
                workers.into_iter().try_for_each(|worker| worker.join().expect("workers don't panic"))
            })?;
            Ok(ms(start.elapsed()))
        })
    }
}

/// A plugin that is run by hand prints on its standard error what it is.
fn delegate_version() -> anyhow::Result<String> {
    let bridge = Path::new(DELEGATES).join("bridge");
    let output = Command::new(&bridge).env_remove("CNI_COMMAND").output();
    let output = output.with_context(|| {
        format!("can't run {}: apt-get install containernetworking-plugins", bridge.display())
    })?;
    Ok(String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned())
}
