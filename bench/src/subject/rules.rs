//! Traffic rules: how soon they are back when another program removes them, whether a packet notices a restart of
//! the agent, how many programs it runs, and what very many rules cost.

mod bed;
mod bulk;
mod forks;
mod heal;
mod restart;
mod traffic;

use std::time::Duration;

use clap::ValueEnum;

use crate::stage::{Plan, Selection, ensure_release};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection<Subject>,
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

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Subject {
    #[value(name = "rules-heal")]
    Heal,
    #[value(name = "rules-restart")]
    Restart,
    #[value(name = "rules-forks")]
    Forks,
    #[value(name = "rules-bulk")]
    Bulk,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if let Some(kind) = args.bulk_round {
        return bulk::round(kind);
    }
    if !args.selection.markdown {
        ensure_release("rules")?;
    }
    let (restarts, idle) = (args.restarts, Duration::from_secs(args.idle));
    let plan = Plan { name: "rules", rounds: 20, programs: &["flanneld"], setup: None };
    args.selection.measure(plan, move |stage, subject| match subject {
        Subject::Heal => heal::measure(stage),
        Subject::Restart => restart::measure(stage, restarts),
        Subject::Forks => forks::measure(stage, idle),
        Subject::Bulk => bulk::measure(stage),
    })
}
