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

use clap::ValueEnum;

use crate::stage::{Plan, Selection};

/// What is still to be noticed after a change that looks complete.
const AFTER: Duration = Duration::from_secs(1);

pub(crate) type Args = Selection<Subject>;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Subject {
    Backend,
    Ipv6,
    Mtu,
    Address,
    Family,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let plan = Plan { name: "live", rounds: 3, programs: &["flanneld"], setup: None };
    args.measure(plan, |stage, subject| match subject {
        Subject::Backend => backend::measure(stage),
        Subject::Ipv6 => family::add(stage),
        Subject::Mtu => mtu::measure(stage),
        Subject::Address => address::measure(stage),
        Subject::Family => family::measure(stage),
    })
}
