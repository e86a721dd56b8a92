//! The agent in Kubernetes: start and rest in a cluster of two, of 5,000 and of 20,000 nodes, what heartbeats of
//! other nodes cost, whether pods that wait for their network get it at the first try, and what policies add to ADD; with a
//! scripted API server.

mod bed;
mod churn;
mod heartbeat;
mod pods;
mod policy_add;
mod start;

use clap::ValueEnum;

use crate::stage::{Plan, Selection, ensure_release};

pub(crate) type Args = Selection<Subject>;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Subject {
    Size,
    #[value(name = "start-2")]
    Start2,
    Idle,
    Pods,
    PolicyAdd,
    #[value(name = "start-5000")]
    Start5000,
    #[value(name = "start-20000")]
    Start20000,
    Heartbeat,
    #[value(name = "churn-20000")]
    Churn20000,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if !args.markdown {
        // The API server is in this process.
        ensure_release("kube")?;
    }
    let plan = Plan { name: "kube", rounds: 5, programs: &["flanneld", "flannel"], setup: None };
    args.measure(plan, |stage, subject| match subject {
        Subject::Size => start::size(stage),
        Subject::Start2 => start::two(stage),
        Subject::Idle => start::idle(stage),
        Subject::Pods => pods::measure(stage),
        Subject::PolicyAdd => policy_add::measure(stage),
        Subject::Start5000 => start::five_thousand(stage),
        Subject::Start20000 => start::twenty_thousand(stage),
        Subject::Heartbeat => heartbeat::measure(stage),
        Subject::Churn20000 => churn::measure(stage),
    })
}
