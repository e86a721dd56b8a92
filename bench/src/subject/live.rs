//! Changes without a restart: another backend, a family added, another MTU of the underlay, other addresses; with
//! a real etcd, while packets flow.

mod address;
mod backend;
mod bed;
mod family;
mod mtu;
mod pings;
mod shown;

use std::time::Duration;

use crate::stage::{Plan, Selection, Subject};

/// What is still to be noticed after a change that looks complete.
const AFTER: Duration = Duration::from_secs(1);

pub(crate) type Args = Selection;

pub(crate) const SUBJECTS: &[Subject<()>] = &[
    ("backend", |stage, ()| backend::measure(stage)),
    ("ipv6", |stage, ()| family::add(stage)),
    ("mtu", |stage, ()| mtu::measure(stage)),
    ("address", |stage, ()| address::measure(stage)),
    ("family", |stage, ()| family::measure(stage)),
];

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    args.measure(Plan { rounds: 3, ..Plan::new("live", "make bench-live", &["flanneld"]) }, SUBJECTS, ())
}
