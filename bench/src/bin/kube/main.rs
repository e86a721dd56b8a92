//! Measures the agent in Kubernetes: start and rest in a cluster of two, of 5,000 and of 20,000 nodes, what
//! heartbeats of other nodes cost, and whether pods that wait for their network get it at the first try; with
//! a scripted API server, the real kernel and the release programs.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod bed;
mod churn;
mod heartbeat;
mod kernel;
mod many;
mod pair;
mod pods;
mod size;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use bench::figure::{self, Record};
use bench::progress::{Output, Progress, watch_signals_during};
use clap::{Parser, ValueEnum};

/// What this program's results are kept in, ignored by git.
const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/results/kube.jsonl");

#[derive(Parser)]
#[command(name = "kube", about = "Measures the agent in clusters of Kubernetes, small and large")]
struct Args {
    /// Measure only this; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Subject>,
    /// How often each measurement is taken; the long ones are taken less often.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The file to which results are appended, one JSON object a line.
    #[arg(long, default_value = RESULTS)]
    out: PathBuf,
    /// The directory of the programs to measure; by default the release build beside this program.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Measure nothing: print the latest results in the file as a Markdown table.
    #[arg(long)]
    markdown: bool,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    Size,
    #[value(name = "start-2")]
    Start2,
    Pods,
    #[value(name = "start-5000")]
    Start5000,
    Heartbeat,
    #[value(name = "churn-20000")]
    Churn20000,
}

/// What every measurement is given.
struct Stage {
    progress: Progress,
    rounds: u32,
    programs: PathBuf,
}

impl Stage {
    /// The rounds of a measurement that is taken at most `most` times.
    fn rounds(&self, most: u32) -> std::ops::RangeInclusive<u32> {
        1..=self.rounds.min(most)
    }

    /// The agent.
    fn flanneld(&self) -> PathBuf {
        self.programs.join("flanneld")
    }

    /// The CNI plugin.
    fn plugin(&self) -> PathBuf {
        self.programs.join("flannel")
    }
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kube: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    if args.markdown {
        return figure::print(&figure::read(&args.out)?);
    }
    ensure!(
        !cfg!(debug_assertions),
        "this is a development build, whose API server is slow: make bench-kube"
    );
    let programs = match args.programs {
        Some(programs) => programs,
        None => bench::release_programs("kube")?,
    };
    for program in ["flanneld", "flannel"].map(|name| programs.join(name)) {
        ensure!(program.is_file(), "no program {}: make bench-kube builds it", program.display());
    }
    let subjects = if args.only.is_empty() { Subject::value_variants().to_vec() } else { args.only };
    let mut record = Record::open(&args.out, &programs)?;
    watch_signals_during("kube", Output::Error, move |progress| {
        let stage = Stage { progress, rounds: args.rounds, programs };
        stage.progress.measure(&subjects, &mut record, |subject, record| match subject {
            Subject::Size => size::measure(&stage, record),
            Subject::Start2 => pair::measure(&stage, record),
            Subject::Pods => pods::measure(&stage, record),
            Subject::Start5000 => many::measure(&stage, record),
            Subject::Heartbeat => heartbeat::measure(&stage, record),
            Subject::Churn20000 => churn::measure(&stage, record),
        })
    })
}
