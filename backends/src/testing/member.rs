//! A node of a cluster with its agent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ipnet::IpNet;
use subnet::{Family, Subnets};

use super::agent::Agent;
use super::fabric::Node;
use super::pod::Pod;
use super::wait_for;

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The agent.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables in its environment.
    pub environment: Vec<(String, String)>,
    /// How long anything may take that it is waited for.
    pub limit: Duration,
}

impl Launch {
    /// Starts an agent on the node.
    pub fn start(&self, node: &Node) -> anyhow::Result<Agent> {
        Agent::spawn_with(node, &self.program, &self.args, &self.environment)
    }
}

/// A node with its agent; what depends on another thing is dropped before it.
pub struct Member {
    /// The agent.
    pub agent: Agent,
    /// When it was told to start; before the first instruction of the program.
    pub started: Instant,
    /// The node.
    pub node: Node,
    /// How another agent is started in its place.
    pub launch: Launch,
}

impl Member {
    /// Starts an agent on the node.
    pub fn start(node: Node, launch: Launch) -> anyhow::Result<Self> {
        let started = Instant::now();
        Ok(Self { agent: launch.start(&node)?, started, node, launch })
    }

    /// Starts another agent in place of one that has ended.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        self.started = Instant::now();
        self.agent = self.launch.start(&self.node)?;
        Ok(())
    }

    /// The time from `started` until the subnet file appears; it must not have been there before.
    pub fn time_to_subnet_file(&self) -> anyhow::Result<Duration> {
        self.time_until("subnet file", || self.node.subnet_file().exists())
    }

    /// The time from `started` until `/readyz` says yes.
    pub fn time_to_ready(&self) -> anyhow::Result<Duration> {
        self.time_until("readiness", || self.agent.get("/readyz").is_ok_and(|(code, _)| code == 200))
    }

    /// The time from `started` until a condition holds, which is looked at every 0.3 ms.
    pub fn time_until(&self, what: &str, mut condition: impl FnMut() -> bool) -> anyhow::Result<Duration> {
        let limit = self.launch.limit;
        while !condition() {
            let log = || self.agent.log();
            ensure!(self.started.elapsed() < limit, "no {what} after {limit:?}; the log:\n{}", log());
            thread::sleep(Duration::from_micros(300));
        }
        Ok(self.started.elapsed())
    }

    /// The id of its agent's process.
    pub fn pid(&mut self) -> u32 {
        self.agent.process().id()
    }

    /// What it tells the CNI plugin of its subnets.
    pub fn subnets(&self) -> anyhow::Result<Subnets> {
        Ok(self.agent.subnet_env()?.subnets)
    }

    /// The subnet that it holds, that of IPv4 if it has two.
    pub fn subnet(&self) -> anyhow::Result<IpNet> {
        self.subnets()?.iter().next().context("subnet.env has no subnet")
    }

    /// A pod with the second address of the node's subnet of each family.
    pub fn pod(&self, families: &[Family]) -> anyhow::Result<Pod> {
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
    pub fn show(&self, command: &str) -> anyhow::Result<String> {
        self.node.namespace().show(command)
    }

    /// Lines of that output.
    pub fn count(&self, command: &str) -> anyhow::Result<usize> {
        Ok(self.show(command)?.lines().count())
    }

    /// Waits for a condition; an error has the agent's log.
    pub fn wait(&self, what: &str, condition: impl FnMut() -> bool) -> anyhow::Result<()> {
        wait_for(what, self.launch.limit, condition)
            .with_context(|| format!("log of {}:\n{}", self.node.name(), self.agent.log()))
    }
}
