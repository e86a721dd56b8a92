//! A cluster to change: nodes with agents that are ready, and pods.

use backends::testing::{Pod, wait_for};
use subnet::Family;

use crate::Stage;
use crate::bed::{self, Member, TIMEOUT};

/// Nodes in a cluster; what depends on another thing is dropped before it.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    store: bed::Cluster,
}

impl Cluster {
    /// This many nodes whose agents are ready.
    pub(crate) fn new(stage: &Stage, config: &str, nodes: usize) -> anyhow::Result<Self> {
        let store = bed::Cluster::new(stage.flanneld(), config, &["--ip-masq"])?;
        let mut members = Vec::new();
        for _ in 0..nodes {
            stage.progress.check()?;
            members.push(store.join()?);
        }
        Ok(Self { members, store })
    }

    /// Writes the network configuration.
    pub(crate) fn configure(&self, config: &str) -> anyhow::Result<()> {
        self.store.configure(config)
    }

    /// Keys and values of all leases, each in a line of its own.
    pub(crate) fn leases(&self) -> anyhow::Result<String> {
        self.store.leases()
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
        for member in &self.members {
            wait_for(what, TIMEOUT, || condition(member).unwrap_or(false))
                .map_err(|error| error.context(self.logs()))?;
        }
        Ok(())
    }

    /// What all agents have logged.
    pub(crate) fn logs(&self) -> String {
        let of_one = |member: &Member| format!("log of {}:\n{}\n", member.node.name(), member.agent.log());
        self.members.iter().map(of_one).collect()
    }
}
