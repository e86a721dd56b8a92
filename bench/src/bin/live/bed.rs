//! A cluster to change: a fabric, an etcd, nodes with agents and pods.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use backends::testing::{Agent, Etcd, Fabric, Node, Pod, wait_for};
use ipnet::IpNet;
use subnet::{Family, Subnets};

use crate::Stage;

/// How long anything may take before a measurement is given up. Old ways stay for 30 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A fabric, an etcd and nodes; what depends on another thing is dropped before it.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    etcd: Etcd,
    fabric: Fabric,
}

/// A node with its agent.
pub(crate) struct Member {
    pub(crate) agent: Agent,
    pub(crate) node: Node,
    flanneld: PathBuf,
    args: Vec<String>,
}

/// A network configuration with this backend, of IPv4 or of both families.
pub(crate) fn config(backend: &str, families: &[Family]) -> String {
    let v6 = if families.contains(&Family::V6) {
        r#""EnableIPv6":true,"IPv6Network":"fd00:244::/48","#
    } else {
        ""
    };
    format!(r#"{{"Network":"10.244.0.0/16",{v6}"Backend":{{"Type":"{backend}"}}}}"#)
}

impl Cluster {
    /// So many nodes whose agents are ready.
    pub(crate) fn new(stage: &Stage, config: &str, nodes: usize) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let etcd = Etcd::on(&fabric)?;
        let mut cluster = Self { members: Vec::new(), etcd, fabric };
        cluster.configure(config)?;
        for _ in 0..nodes {
            stage.progress.check()?;
            let node = cluster.fabric.node()?;
            let args = vec![format!("--etcd-endpoints={}", cluster.etcd.endpoint()), "--ip-masq".to_owned()];
            let flanneld = stage.flanneld();
            let mut agent = Agent::spawn(&node, &flanneld, &args)?;
            agent.wait_ready(PATIENCE)?;
            cluster.members.push(Member { agent, node, flanneld, args });
        }
        Ok(cluster)
    }

    /// Writes the network configuration.
    pub(crate) fn configure(&self, config: &str) -> anyhow::Result<()> {
        self.etcdctl(&["put", "/coreos.com/network/config", config]).map(drop)
    }

    /// Keys and values of all leases, each in a line of its own.
    pub(crate) fn leases(&self) -> anyhow::Result<String> {
        self.etcdctl(&["get", "--prefix", "/coreos.com/network/subnets/"])
    }

    fn etcdctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let endpoint = self.etcd.endpoint();
        let command = self.fabric.switch().command("etcdctl").env("ETCDCTL_API", "3");
        command
            .args(["--endpoints", &endpoint])
            .args(args)
            .ok()
            .context("etcdctl is in the package etcd-client")
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
            wait_for(what, PATIENCE, || condition(member).unwrap_or(false)).with_context(|| self.logs())?;
        }
        Ok(())
    }

    /// What all agents have logged.
    pub(crate) fn logs(&self) -> String {
        let of_one = |member: &Member| format!("log of {}:\n{}\n", member.node.name(), member.agent.log());
        self.members.iter().map(of_one).collect()
    }
}

impl Member {
    /// Starts another agent in place of one that has ended.
    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        self.agent = Agent::spawn(&self.node, &self.flanneld, &self.args)?;
        Ok(())
    }

    /// What it tells the CNI plugin of its subnets.
    pub(crate) fn subnets(&self) -> anyhow::Result<Subnets> {
        Ok(self.agent.subnet_env()?.subnets)
    }

    /// A pod with the second address of the node's subnet of each family.
    fn pod(&self, families: &[Family]) -> anyhow::Result<Pod> {
        let subnets = self.subnets()?;
        let second = |family: &Family| -> anyhow::Result<IpNet> {
            let subnet = subnets.get(*family).context("a node without a subnet of this family")?;
            let address = match subnet.network() {
                IpAddr::V4(first) => Ipv4Addr::from(u32::from(first) + 2).into(),
                IpAddr::V6(first) => Ipv6Addr::from(u128::from(first) + 2).into(),
            };
            Ok(IpNet::new(address, subnet.prefix_len())?)
        };
        let addresses = families.iter().map(second).collect::<anyhow::Result<Vec<_>>>()?;
        Pod::wired_with(&self.node, &addresses)
    }

    /// Output of a program on the node, given as words with one space between.
    pub(crate) fn show(&self, command: &str) -> anyhow::Result<String> {
        let mut words = command.split(' ');
        let program = words.next().context("no program")?;
        self.node.namespace().command(program).args(words).ok()
    }
}
