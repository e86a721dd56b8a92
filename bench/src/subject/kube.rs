//! The agent in Kubernetes: start and rest in a cluster of two, of 5,000 and of 20,000 nodes, what heartbeats of
//! other nodes cost, whether pods that wait for their network get it at the first try, and what policies add to ADD; with a
//! scripted API server in this process.

mod churn;
mod heartbeat;
mod pods;
mod policy_add;
mod start;

use bench::bed::{Cluster, Member};
use bench::process::{DeviceCounters, counters};

use crate::Stage;
use crate::stage::{Plan, Selection, Subject};

pub(crate) type Args = Selection;

pub(crate) const SUBJECTS: &[Subject<()>] = &[
    ("size", |stage, ()| start::size(stage)),
    ("start-2", |stage, ()| start::two(stage)),
    ("idle", |stage, ()| start::idle(stage)),
    ("pods", |stage, ()| pods::measure(stage)),
    ("policy-add", |stage, ()| policy_add::measure(stage)),
    ("start-5000", |stage, ()| start::five_thousand(stage)),
    ("start-20000", |stage, ()| start::twenty_thousand(stage)),
    ("heartbeat", |stage, ()| heartbeat::measure(stage)),
    ("churn-20000", |stage, ()| churn::measure(stage)),
];

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let plan = Plan::new("kube", "make bench-kube", &["flanneld", "flannel"]);
    args.measure(Plan { works: true, ..plan }, SUBJECTS, ())
}

fn cluster(stage: &Stage) -> anyhow::Result<Cluster> {
    Cluster::in_kubernetes(stage.flanneld())
}

/// What `eth0` of a node has counted.
fn eth0(member: &Member) -> anyhow::Result<DeviceCounters> {
    counters(member.node.namespace(), "eth0")
}
