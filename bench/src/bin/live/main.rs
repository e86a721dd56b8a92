//! Measures changes without a restart: another backend, a family more, another MTU of the underlay, other
//! addresses; with a real etcd, the real kernel and the release agent, while packets flow.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod address;
mod backend;
mod bed;
mod family;
mod ipv6;
mod mtu;
mod pings;
mod shown;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use bench::figure::{self, Figure, Record};
use bench::progress::{Output, Progress, watch_signals_during};
use clap::{Parser, ValueEnum};

/// What this program's results are kept in, ignored by git.
const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/results/live.jsonl");

/// What is still to be noticed after a change that looks complete.
const AFTER: Duration = Duration::from_secs(1);

#[derive(Parser)]
#[command(name = "live", about = "Measures changes without a restart, while packets flow")]
struct Args {
    /// Measure only this; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Subject>,
    /// How often each measurement is taken.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The file to which results are appended, one JSON object a line.
    #[arg(long, default_value = RESULTS)]
    out: PathBuf,
    /// The directory of the agent to measure; by default the release build beside this program.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Measure nothing: print the latest results in the file as a Markdown table.
    #[arg(long)]
    markdown: bool,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    Backend,
    Ipv6,
    Mtu,
    Address,
    Family,
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

    /// Tells the rounds of figures and writes them down.
    fn put(&self, record: &mut Record, figures: &[Figure]) -> anyhow::Result<()> {
        for figure in figures {
            let rounds: Vec<String> = figure.rounds.iter().map(|&value| figure::short(value)).collect();
            self.progress.step(&format!("{}: {} {}", figure.name, rounds.join(", "), figure.unit))?;
            record.put(figure)?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("live: {error:#}");
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
        None => bench::release_programs("live")?,
    };
    let flanneld = programs.join("flanneld");
    ensure!(flanneld.is_file(), "no program {}: make bench-live builds it", flanneld.display());
    let subjects = if args.only.is_empty() { Subject::value_variants().to_vec() } else { args.only };
    let mut record = Record::open(&args.out, &programs)?;
    watch_signals_during("live", Output::Error, move |progress| {
        let stage = Stage { progress, rounds: args.rounds, programs };
        stage.progress.measure(&subjects, &mut record, |subject, record| match subject {
            Subject::Backend => backend::measure(&stage, record),
            Subject::Ipv6 => ipv6::measure(&stage, record),
            Subject::Mtu => mtu::measure(&stage, record),
            Subject::Address => address::measure(&stage, record),
            Subject::Family => family::measure(&stage, record),
        })
    })
}
