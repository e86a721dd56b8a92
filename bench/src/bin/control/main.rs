//! Measures what operators feel of the agent and the CNI plugin: how soon they are ready, how little they
//! need, and how soon damage is mended; with a real etcd, the real kernel and the release programs.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod bed;
mod cni;
mod heal;
mod many;
mod pair;
mod restart;
mod size;
mod strangers;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use bench::figure::{self, Record};
use bench::progress::{Output, Progress, watch_signals_during};
use bench::{monitor, process};
use clap::{Parser, ValueEnum};

/// What this crate's results are kept in, ignored by git.
const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/results/control.jsonl");

#[derive(Parser)]
#[command(name = "control", about = "Measures start, repair, restart and size of the release programs")]
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
    #[value(name = "start-5000")]
    Start5000,
    Heal,
    RestartLoss,
    #[value(name = "stale-20")]
    Stale20,
    BadKeys,
    CniAdd,
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
    let outcome = run(Args::parse());
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    if args.markdown {
        return figure::print(&figure::read(&args.out)?);
    }
    let programs = match args.programs {
        Some(programs) => programs,
        None => bench::release_programs("control")?,
    };
    for program in ["flanneld", "flannel"].map(|name| programs.join(name)) {
        ensure!(program.is_file(), "no program {}: make bench-control builds it", program.display());
    }
    let subjects = if args.only.is_empty() { Subject::value_variants().to_vec() } else { args.only };
    let mut record = Record::open(&args.out, &programs)?;
    watch_signals_during("control", Output::Error, move |progress| {
        let stage = Stage { progress, rounds: args.rounds, programs };
        stage.progress.measure(&subjects, &mut record, |subject, record| match subject {
            Subject::Size => size::measure(&stage, record),
            Subject::Start2 => pair::measure(&stage, record),
            Subject::Start5000 => many::measure(&stage, record),
            Subject::Heal => heal::measure(&stage, record),
            Subject::RestartLoss => restart::loss(&stage, record),
            Subject::Stale20 => restart::stale(&stage, record),
            Subject::BadKeys => strangers::measure(&stage, record),
            Subject::CniAdd => cni::measure(&stage, record),
        })
    })
}
