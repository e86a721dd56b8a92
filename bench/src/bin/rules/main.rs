//! Measures traffic rules: how soon they are back when somebody removes them, whether a packet notices a
//! restart of the agent, how many programs it runs, and what very many rules cost; on the real kernel.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod bed;
mod bulk;
mod forks;
mod heal;
mod restart;
mod traffic;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use backends::testing::program;
use bench::figure::{self, Record};
use bench::progress::{Output, Progress, watch_signals_during};
use clap::{Parser, ValueEnum};

/// Where results are kept.
const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/results/rules.jsonl");

#[derive(Parser)]
#[command(
    name = "rules",
    about = "Measures traffic rules: repair, restarts, programs run, and very many of them"
)]
struct Args {
    /// Measure only this; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Subject>,
    /// How often each measurement is taken; the long ones are taken less often.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How often the agent is killed in one round of `rules-restart`.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    restarts: u32,
    /// How long nothing happens in one round of `rules-forks`, in seconds. After 60 s the agent has a look
    /// at the rules of its own accord.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u64).range(1..))]
    idle: u64,
    /// The file to which results are appended, one JSON object a line.
    #[arg(long, default_value = RESULTS)]
    out: PathBuf,
    /// The directory of the agent to measure; by default that of this program.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Measure nothing: print the latest results in the file as a Markdown table.
    #[arg(long)]
    markdown: bool,
    /// One round of `rules-bulk`, in the network namespace and with the memory of this process.
    #[arg(long, hide = true)]
    bulk_round: Option<bulk::Kind>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    #[value(name = "rules-heal")]
    Heal,
    #[value(name = "rules-restart")]
    Restart,
    #[value(name = "rules-forks")]
    Forks,
    #[value(name = "rules-bulk")]
    Bulk,
}

/// What every measurement is given.
struct Stage {
    progress: Progress,
    rounds: u32,
    restarts: u32,
    idle: Duration,
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
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rules: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    if let Some(kind) = args.bulk_round {
        return bulk::round(kind);
    }
    if args.markdown {
        return figure::print(&figure::read(&args.out)?);
    }
    ensure!(!cfg!(debug_assertions), "this is a development build, which says nothing: make bench-rules");
    let programs = match args.programs {
        Some(programs) => programs,
        None => program("flanneld")?.parent().context("a program is in a directory")?.to_owned(),
    };
    let flanneld = programs.join("flanneld");
    ensure!(flanneld.is_file(), "no program {}: make release", flanneld.display());
    let subjects = if args.only.is_empty() { Subject::value_variants().to_vec() } else { args.only };
    let mut record = Record::open(&args.out, &programs)?;
    let Args { rounds, restarts, .. } = args;
    let idle = Duration::from_secs(args.idle);
    watch_signals_during("rules", Output::Error, move |progress| {
        let stage = Stage { progress, rounds, restarts, idle, programs };
        stage.progress.measure(&subjects, &mut record, |subject, record| match subject {
            Subject::Heal => heal::measure(&stage, record),
            Subject::Restart => restart::measure(&stage, record),
            Subject::Forks => forks::measure(&stage, record),
            Subject::Bulk => bulk::measure(&stage, record),
        })
    })
}
