//! What operators feel of the agent and the CNI plugin: how soon they are ready, how little they need, and how
//! soon damage is repaired; with a real etcd.

mod cni;
mod heal;
mod many;
mod pair;
mod probes;
mod restart;
mod size;
mod strangers;

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
    args.measure(plan, |stage, subject, record| match subject {
        Subject::Size => size::measure(stage, record),
        Subject::Start2 => pair::measure(stage, record),
        Subject::Start5000 => many::measure(stage, record, many::FIVE),
        Subject::Start20000 => many::measure(stage, record, many::TWENTY),
        Subject::Churn20000 => many::churn(stage, record),
        Subject::Heal => heal::measure(stage, record),
        Subject::RestartLoss => restart::loss(stage, record),
        Subject::Stale20 => restart::stale(stage, record),
        Subject::BadKeys => strangers::measure(stage, record),
        Subject::CniAdd => cni::measure(stage, record),
        Subject::Probes => probes::measure(stage, record),
    })
}
