//! What all subcommands share: their arguments, their rounds and their results.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bench::bed::{Cluster, config};
use bench::figure::{self, Figure, Record, Row, short};
use bench::process::cpu_time;
use bench::progress::{Output, Progress, watch_signals_during};
use clap::Args;
use clap::builder::PossibleValue;
use serde_json::Value;
use subnet::Family;

/// Arguments of every subcommand.
#[derive(Args)]
pub(crate) struct Selection {
    /// Measure only this; may be repeated.
    #[arg(long)]
    pub(crate) only: Vec<String>,
    /// How often each measurement is taken; the long ones are taken less often.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// The file to which results are appended, one JSON object a line; by default bench/results/SUBCOMMAND.jsonl.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The directory of the programs to measure; by default the release build beside this program.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Measure nothing: print the latest results in the file as a Markdown table.
    #[arg(long)]
    pub(crate) markdown: bool,
}

/// A thing that can be measured by its name after `--only`, with the further arguments `A` of the subcommand.
pub(crate) type Subject<A> = (&'static str, fn(&Stage, &A) -> anyhow::Result<()>);

/// What comes after `--only`.
pub(crate) fn names<A>(subjects: &[Subject<A>]) -> Vec<PossibleValue> {
    subjects.iter().map(|(name, _)| PossibleValue::new(*name)).collect()
}

/// What is particular to a subcommand.
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    /// What builds all that it needs, and runs it.
    pub(crate) command: &'static str,
    /// Rounds unless `--rounds` says otherwise.
    pub(crate) rounds: u32,
    /// The programs that are measured.
    pub(crate) programs: &'static [&'static str],
    /// Whether this program works while it measures, which a development build is too slow for.
    pub(crate) works: bool,
    /// A condition to show under the table.
    pub(crate) setup: Option<String>,
    pub(crate) table: fn(&[Value]) -> String,
}

impl Plan {
    /// One with five rounds and the usual table.
    pub(crate) fn new(name: &'static str, command: &'static str, programs: &'static [&'static str]) -> Self {
        Self { name, command, rounds: 5, programs, works: false, setup: None, table: figure::table }
    }
}

/// What every measurement is given.
pub(crate) struct Stage {
    pub(crate) progress: Progress,
    pub(crate) rounds: u32,
    pub(crate) programs: PathBuf,
    record: RefCell<Record>,
}

impl Selection {
    /// Where results are kept, below a directory that git ignores.
    pub(crate) fn out(&self, name: &str) -> PathBuf {
        let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("results").join(format!("{name}.jsonl"));
        self.out.clone().unwrap_or_else(default)
    }

    /// Measures what was selected one after the other, or prints earlier results. What can't be measured doesn't
    /// stop the others.
    pub(crate) fn measure<A: Send + 'static>(
        self,
        plan: Plan,
        subjects: &'static [Subject<A>],
        args: A,
    ) -> anyhow::Result<()> {
        let only = self.only.clone();
        let name = plan.name;
        self.on_stage(plan, move |stage| {
            let mut failed = Vec::new();
            for (subject, measure) in subjects {
                if !only.is_empty() && !only.iter().any(|one| one == subject) {
                    continue;
                }
                stage.progress.check()?;
                stage.record.borrow_mut().begin()?;
                if let Err(error) = measure(stage, &args) {
                    eprintln!("{name}: {subject} could not be measured: {error:#}");
                    failed.push((*subject).to_owned());
                }
            }
            Ok(failed)
        })
    }

    /// Does all the work of a subcommand, which gives the names of what could not be measured, or prints earlier results.
    pub(crate) fn on_stage(
        self,
        plan: Plan,
        work: impl FnOnce(&Stage) -> anyhow::Result<Vec<String>> + Send + 'static,
    ) -> anyhow::Result<()> {
        let Plan { name, command, table, .. } = plan;
        let out = self.out(name);
        if self.markdown {
            return figure::print(&figure::read(&out)?, table);
        }
        ensure!(
            !plan.works || !cfg!(debug_assertions),
            "this is a development build, which is too slow: {command}"
        );
        let programs = self.programs.map_or_else(release_programs, Ok)?;
        for program in plan.programs.iter().map(|name| programs.join(name)) {
            ensure!(program.is_file(), "no program {}: {command} builds it", program.display());
        }
        let mut record = Record::open(&out, &programs)?;
        if let Some(setup) = plan.setup {
            record.note("setup", setup.into());
        }
        record.begin()?;
        let rounds = self.rounds.unwrap_or(plan.rounds);
        watch_signals_during(name, Output::Error, move |progress| {
            let stage = Stage { progress, rounds, programs, record: RefCell::new(record) };
            let failed = work(&stage)?;
            eprintln!("\n{}", stage.record.borrow().table(table));
            ensure!(failed.is_empty(), "not measured:\n  {}", failed.join("\n  "));
            Ok(())
        })
    }
}

impl Stage {
    /// The rounds of a measurement that is taken at most `most` times.
    pub(crate) fn rounds(&self, most: u32) -> RangeInclusive<u32> {
        1..=self.rounds.min(most)
    }

    /// Takes the rounds of some figures, at most `most`, each of which gives a value of each, and records them.
    pub(crate) fn measure<const N: usize>(
        &self,
        title: &str,
        rows: [Row<'_>; N],
        most: u32,
        mut round: impl FnMut(u32) -> anyhow::Result<[f64; N]>,
    ) -> anyhow::Result<()> {
        let mut figures =
            rows.map(|(what, unit, limit)| Figure::new(format!("{title}: {what}"), unit, limit));
        for number in self.rounds(most) {
            self.progress.check()?;
            let values = round(number)?;
            let words = rows.iter().zip(values).map(|((what, unit, _), value)| {
                format!("{what} {} {unit}", short(value)).trim_end().to_owned()
            });
            let words = words.collect::<Vec<_>>().join(", ");
            self.progress.step(&format!("{title}: round {number}: {words}"))?;
            figures.iter_mut().zip(values).for_each(|(figure, value)| figure.rounds.push(value));
        }
        self.put(&figures)
    }

    /// Records figures.
    pub(crate) fn put<'a>(&self, figures: impl IntoIterator<Item = &'a Figure>) -> anyhow::Result<()> {
        figures.into_iter().try_for_each(|figure| self.record.borrow_mut().put(figure))
    }

    /// A cluster with etcd and the small network of IPv4 that most measurements use.
    pub(crate) fn cluster(&self, backend: &str) -> anyhow::Result<Cluster> {
        Cluster::new(self.flanneld(), &config(backend, &[Family::V4]), &[])
    }

    /// How much of a processor a process takes in this time, in percent.
    pub(crate) fn cpu_percent(&self, pid: u32, time: Duration) -> anyhow::Result<f64> {
        let (before, start) = (cpu_time(pid)?, Instant::now());
        self.progress.pause(time)?;
        let spent = cpu_time(pid)?.saturating_sub(before);
        Ok(100.0 * spent.as_secs_f64() / start.elapsed().as_secs_f64())
    }

    /// The agent.
    pub(crate) fn flanneld(&self) -> PathBuf {
        self.programs.join("flanneld")
    }

    /// The CNI plugin.
    pub(crate) fn plugin(&self) -> PathBuf {
        self.programs.join("flannel")
    }
}

/// The directory of the release programs: beside that of this program, for any profile.
fn release_programs() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("this program's own path is unknown")?;
    let profiles = own.ancestors().nth(2).context("no directory of profiles: give --programs")?;
    Ok(profiles.join("release"))
}
