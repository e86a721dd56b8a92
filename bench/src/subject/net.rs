//! Measures the ways from node to node side by side: the bare underlay, host-gw, vxlan, udp, the udp
//! backend of a Go flanneld, and if asked for WireGuard in our process and by wireguard-go, in turns within each round, so
//! that what else the machine does hits all of them.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod bed;
mod cost;
mod counted;
mod flow;
mod measure;
mod plan;
mod plot;
mod results;
mod soak;
mod table;
mod wire;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use bench::figure;
use bench::process::stat;
use clap::ValueEnum;
use subnet::Family;

use crate::Stage;
use crate::stage::{Plan, Selection};

use bed::{PacketPath, Pair};
use counted::Counted;
pub(crate) use plan::Subject;
use plan::{Clock, Place, Step};
use results::Results;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Measure only between these.
    #[arg(long, value_enum)]
    place: Option<Place>,
    /// The ways to measure; by default all without encryption, and go-udp if FLANNELD_GO names a program.
    #[arg(long, value_enum, value_delimiter = ',')]
    paths: Vec<PacketPath>,
    /// Threads of udp and wireguard for each direction (Backend.Workers).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    workers: u8,
    /// MTU of the underlay, in bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(1280..=65_535))]
    mtu: u32,
    /// IPv6, inside and outside, and nothing else.
    #[arg(long)]
    ipv6: bool,
    /// A few short measurements, within two minutes.
    #[arg(long)]
    quick: bool,
    /// How long iperf3 sends, each time; pings take a part of that.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: Option<u32>,
    /// Measure nothing: draw the latest TCP results in the file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What is measured, how often and how long.
struct Job {
    paths: Vec<PacketPath>,
    steps: Vec<Step>,
    seconds: u32,
    workers: u8,
    mtu: u32,
    family: Family,
    go: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    // The quick results don't hide the others.
    let (name, command, rounds, seconds) = match args.quick {
        false => ("net", "make bench", 5, 4),
        true => ("net-quick", "make bench-quick", 2, 2),
    };
    if let Some(path) = &args.svg {
        let drawing = plot::draw(&figure::read(&args.selection.out(name))?)?;
        fs::write(path, drawing).with_context(|| format!("can't write {}", path.display()))?;
        if !args.selection.markdown {
            return Ok(());
        }
    }
    let go = std::env::var_os("FLANNELD_GO").map(PathBuf::from);
    let mut paths = args.paths;
    if paths.is_empty() {
        let all = PacketPath::value_variants().iter().copied();
        paths.extend(all.filter(|way| way.is_usual() && (*way != PacketPath::GoUdp || go.is_some())));
    }
    let family = if args.ipv6 { Family::V6 } else { Family::V4 };
    if paths.contains(&PacketPath::GoUdp) {
        let program = go.as_ref().context("go-udp needs a Go flanneld: set FLANNELD_GO to its path")?;
        ensure!(program.is_file(), "FLANNELD_GO: there is no program {}", program.display());
        ensure!(family == Family::V4, "go-udp has no IPv6: name other --paths");
    }
    let steps = plan::steps(args.quick, &args.selection.only, args.place);
    ensure!(!steps.is_empty(), "nothing to measure: what --only names is not done there");
    let seconds = args.seconds.unwrap_or(seconds);
    let job = Job { paths, steps, seconds, workers: args.workers, mtu: args.mtu, family, go };
    let plan = Plan {
        rounds,
        works: true,
        setup: Some(setup(&job)?),
        table: table::table,
        ..Plan::new(name, command, &["flanneld", "flannel"])
    };
    args.selection.on_stage(plan, move |stage| measure(stage, &job))
}

/// What of the conditions is particular to this program.
fn setup(job: &Job) -> anyhow::Result<String> {
    let congestion = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
    let congestion = congestion.context("the congestion control of TCP is unknown")?;
    let nice = stat("self", 19)?;
    let workers = if job.workers > 1 { format!(", {} workers", job.workers) } else { String::new() };
    let family = if job.family == Family::V6 { ", IPv6" } else { "" };
    let mtu = if job.mtu != 1500 { format!(", underlay of MTU {}", job.mtu) } else { String::new() };
    Ok(format!(
        "TCP {}, iperf3 for {} s, niceness {nice}{workers}{mtu}{family}",
        congestion.trim(),
        job.seconds
    ))
}

/// Takes all measurements; gives the names of those that can't be taken, which don't stop the others.
fn measure(stage: &Stage, job: &Job) -> anyhow::Result<Vec<String>> {
    let (mut failed, mut pairs) = (Vec::new(), Vec::new());
    for &way in &job.paths {
        stage.progress.step(&format!("two nodes with {way}"))?;
        match Pair::new(way, stage, job) {
            Ok(pair) => pairs.push(pair),
            Err(error) => failed.push(format!("{way}: {error:#}")),
        }
    }
    let mut clock = Clock::start(job, stage.rounds, &pairs);
    let mut results = Results::default();
    for round in 0..stage.rounds {
        for &step in &job.steps {
            let mut turn: Vec<&Pair> = pairs.iter().filter(|pair| step.suits(pair.way)).collect();
            // None is always the first.
            if round % 2 == 1 {
                turn.reverse();
            }
            for pair in turn {
                let counted = Counted::now(pair);
                let outcome = measure::take(pair, step, Duration::from_secs(job.seconds.into()));
                clock.done(step);
                let (of, left) = (stage.rounds, clock.left());
                let head = format!("round {}/{of}, {left}; {step}: {}", round + 1, pair.way);
                match outcome {
                    Ok(values) => {
                        let counted = counted.and_then(|before| Some(Counted::now(pair)?.since(&before)));
                        let counted = counted.map(|counted| format!(" ({counted})")).unwrap_or_default();
                        stage.progress.step(&format!("{head}: {}{counted}", results::summary(&values)))?;
                        results.add(step, pair.way, round, values);
                    }
                    Err(error) => {
                        stage.progress.step(&format!("{head}: could not be measured: {error:#}"))?;
                        failed.push(format!("{step}: {}, round {}", pair.way, round + 1));
                    }
                }
            }
        }
    }
    stage.put(&results.figures())?;
    Ok(failed)
}
