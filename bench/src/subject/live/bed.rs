//! A cluster to change: nodes with agents that are ready, and pods.

use std::ops::Deref;

use backends::testing::{Pod, wait_for};
use bench::bed::{self, Member, TIMEOUT};
use subnet::Family;

use super::pings::Tally;
use crate::Stage;

/// Nodes in a cluster; what depends on another thing is dropped before it.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    store: bed::Cluster,
}

impl Deref for Cluster {
    type Target = bed::Cluster;

    fn deref(&self) -> &bed::Cluster {
        &self.store
    }
}

impl Cluster {
    /// This many nodes whose agents are ready.
    pub(crate) fn new(stage: &Stage, config: &str, nodes: usize) -> anyhow::Result<Self> {
        let store = bed::Cluster::new(stage.flanneld(), config, &["--ip-masq"])?;
        let members = (0..nodes).map(|_| stage.progress.check().and_then(|()| store.join()));
        Ok(Self { members: members.collect::<anyhow::Result<Vec<_>>>()?, store })
    }

    /// A pod on each node, with an address of each of these families.
    pub(crate) fn pods(&self, families: &[Family]) -> anyhow::Result<Vec<Pod>> {
        self.members.iter().map(|member| member.pod(families)).collect()
    }

    /// Waits for a condition of every node; an error has all logs.
    pub(crate) fn wait(
        &self,
        what: &str,
        mut condition: impl FnMut(&Member) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        self.members.iter().try_for_each(|member| {
            let done = wait_for(what, TIMEOUT, || condition(member).unwrap_or(false));
            done.map_err(|error| error.context(self.logs()))
        })
    }

    /// What all agents have logged.
    pub(crate) fn logs(&self) -> String {
        let of_one = |member: &Member| format!("log of {}:\n{}\n", member.node.name(), member.agent.log());
        self.members.iter().map(of_one).collect()
    }

    /// How many pings were lost; tells what the agents logged if some were.
    pub(crate) fn lost(&self, stage: &Stage, tally: &Tally) -> anyhow::Result<f64> {
        if tally.lost() > 0 {
            stage.progress.say(&self.logs())?;
        }
        Ok(tally.lost() as f64)
    }
}
