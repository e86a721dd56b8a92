//! What operators feel of the agent: how soon it is ready, how little it needs, and how soon damage is repaired; with
//! a real etcd.

mod churn;
mod heal;
mod probes;
mod restart;
mod size;
mod start;

use crate::stage::{Plan, Selection, Subject};

pub(crate) type Args = Selection;

pub(crate) const SUBJECTS: &[Subject<()>] = &[
    ("size", |stage, ()| size::measure(stage)),
    ("start-2", |stage, ()| start::two(stage)),
    ("start-5000", |stage, ()| start::many(stage, start::FIVE)),
    ("start-20000", |stage, ()| start::many(stage, start::TWENTY)),
    ("one-of-20000", |stage, ()| churn::one_of_many(stage)),
    ("churn-20000", |stage, ()| churn::measure(stage)),
    ("heal", |stage, ()| heal::measure(stage)),
    ("restart-loss", |stage, ()| restart::loss(stage)),
    ("stale-20", |stage, ()| restart::stale(stage)),
    ("bad-keys", |stage, ()| restart::bad_keys(stage)),
    ("probes", |stage, ()| probes::measure(stage)),
];

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    args.measure(Plan::new("control", "make bench-control", &["flanneld", "flannel"]), SUBJECTS, ())
}
