//! Traffic rules: how soon they are back when another program removes them, whether a packet notices a restart of
//! the agent, how many programs it runs, and what very many rules cost.

mod bed;
mod bulk;
mod forks;
mod heal;
mod restart;
mod traffic;

use std::time::Duration;

use crate::stage::{Plan, Selection, Subject};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// How often the agent is killed in one round of `rules-restart`.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    restarts: u32,
    /// How long nothing happens in one round of `rules-forks`, in seconds. After 60 s the agent has a look
    /// at the rules of its own accord.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u64).range(1..))]
    idle: u64,
    /// One round of `rules-bulk`, in the network namespace and with the memory of this process.
    #[arg(long, hide = true)]
    bulk_round: Option<bulk::Kind>,
}

/// Given how often the agent is killed, and how long nothing happens.
pub(crate) const SUBJECTS: &[Subject<(u32, Duration)>] = &[
    ("rules-heal", |stage, _| heal::measure(stage)),
    ("rules-restart", |stage, (restarts, _)| restart::measure(stage, *restarts)),
    ("rules-forks", |stage, (_, idle)| forks::measure(stage, *idle)),
    ("rules-bulk", |stage, _| bulk::measure(stage)),
];

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if let Some(kind) = args.bulk_round {
        return bulk::round(kind);
    }
    let plan = Plan { rounds: 20, works: true, ..Plan::new("rules", "make bench-rules", &["flanneld"]) };
    args.selection.measure(plan, SUBJECTS, (args.restarts, Duration::from_secs(args.idle)))
}
