//! What operators feel of the agent and the CNI plugin: how soon they are ready, how little they need, and how
//! soon damage is repaired; with a real etcd.

mod churn;
mod cni;
mod heal;
mod probes;
mod restart;
mod size;
mod start;

use clap::ValueEnum;

use crate::stage::{Plan, Selection};

pub(crate) type Args = Selection<Subject>;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Subject {
    Size,
    #[value(name = "start-2")]
    Start2,
    #[value(name = "start-5000")]
    Start5000,
    #[value(name = "start-20000")]
    Start20000,
    #[value(name = "one-of-20000")]
    OneOf20000,
    #[value(name = "churn-20000")]
    Churn20000,
    Heal,
    RestartLoss,
    #[value(name = "stale-20")]
    Stale20,
    BadKeys,
    CniAdd,
    Probes,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let plan = Plan { name: "control", rounds: 5, programs: &["flanneld", "flannel"], setup: None };
    args.measure(plan, |stage, subject| match subject {
        Subject::Size => size::measure(stage),
        Subject::Start2 => start::two(stage),
        Subject::Start5000 => start::many(stage, start::FIVE),
        Subject::Start20000 => start::many(stage, start::TWENTY),
        Subject::OneOf20000 => churn::one_of_many(stage),
        Subject::Churn20000 => churn::measure(stage),
        Subject::Heal => heal::measure(stage),
        Subject::RestartLoss => restart::loss(stage),
        Subject::Stale20 => restart::stale(stage),
        Subject::BadKeys => restart::bad_keys(stage),
        Subject::CniAdd => cni::measure(stage),
        Subject::Probes => probes::measure(stage),
    })
}
