//! Measures what operators feel of the agent and the CNI plugin: how soon they are ready, how little they
//! need, and how soon damage is mended; with a real etcd, the real kernel and the release programs.
//!
//! All of it happens in network namespaces of this process; nothing is left behind, however it ends.

mod bed;
mod cni;
mod heal;
mod many;
mod monitor;
mod pair;
mod process;
mod restart;
mod size;
mod strangers;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backends::testing::program;
use bench::figure;
use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use figure::Record;

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
    start: Instant,
    stopped: AtomicBool,
    rounds: u32,
    programs: PathBuf,
}

impl Stage {
    /// An error once the user asked to stop, so that the guards clean up.
    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.stopped.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// Prints a line of progress.
    fn step(&self, text: &str) -> anyhow::Result<()> {
        self.check()?;
        eprintln!("{:6.1} s  {text}", self.start.elapsed().as_secs_f64());
        Ok(())
    }

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

    /// Sleeps, but not after the user asked to stop.
    fn pause(&self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.check()?;
            std::thread::sleep(left.min(Duration::from_millis(200)));
        }
        self.check()
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
        None => release_directory()?,
    };
    let stage =
        Stage { start: Instant::now(), stopped: AtomicBool::new(false), rounds: args.rounds, programs };
    for program in [stage.flanneld(), stage.plugin()] {
        ensure!(program.is_file(), "no program {}: make bench-control builds it", program.display());
    }
    let subjects = if args.only.is_empty() { Subject::value_variants().to_vec() } else { args.only };
    let mut record = Record::open(&args.out, &stage.programs)?;
    watch_signals_during(stage, move |stage| measure(stage, &subjects, &mut record))
}

/// Measures one subject after the other. One that can't be measured doesn't stop the others.
fn measure(stage: &Stage, subjects: &[Subject], record: &mut Record) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for subject in subjects {
        stage.check()?;
        record.begin()?;
        let outcome = match subject {
            Subject::Size => size::measure(stage, record),
            Subject::Start2 => pair::measure(stage, record),
            Subject::Start5000 => many::measure(stage, record),
            Subject::Heal => heal::measure(stage, record),
            Subject::RestartLoss => restart::loss(stage, record),
            Subject::Stale20 => restart::stale(stage, record),
            Subject::BadKeys => strangers::measure(stage, record),
            Subject::CniAdd => cni::measure(stage, record),
        };
        if let Err(error) = outcome {
            eprintln!("control: {subject:?} could not be measured: {error:#}");
            failed.push(format!("{subject:?}"));
        }
    }
    eprintln!("\n{}", figure::table(record.lines()));
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

/// Beside the directory that this program is in, whatever its own profile.
fn release_directory() -> anyhow::Result<PathBuf> {
    let own = program("control").context("this program is not where cargo puts it: give --programs")?;
    let profiles = own.parent().and_then(|directory| directory.parent());
    Ok(profiles.context("no directory of profiles: give --programs")?.join("release"))
}

/// Runs `work` on a thread of its own. The first SIGINT, SIGTERM or SIGHUP asks it to stop, a second one
/// ends the process at once: the kernel then removes the namespaces, and only temporary files stay.
fn watch_signals_during(
    stage: Stage,
    work: impl FnOnce(&Stage) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stage = Arc::new(stage);
    let outcome = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let worker = Arc::clone(&stage);
        let mut working = tokio::task::spawn_blocking(move || work(&worker));
        loop {
            tokio::select! {
                outcome = &mut working => return outcome.context("a measurement panicked")?,
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if stage.stopped.swap(true, Ordering::Relaxed) {
                bail!("interrupted twice: not waiting for the end of the current step");
            }
            eprintln!("control: stopping and removing everything; once more to end at once");
        }
    });
    runtime.shutdown_timeout(Duration::ZERO);
    outcome
}
