//! A cluster to measure: a fabric, an etcd, nodes with agents and pods.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use backends::testing::{Agent, Etcd, Fabric, Node, Pinger, Pod, wait_for};
use ipnet::IpNet;

use crate::Stage;

/// How long anything may take before a measurement is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Where agents keep their leases.
const SUBNETS: &str = "/coreos.com/network/subnets";

/// Operations in one transaction; etcd's own limit is 128.
const BATCH: usize = 100;

/// A fabric with an etcd that holds a network configuration.
pub(crate) struct Cluster {
    flanneld: PathBuf,
    pub(crate) fabric: Fabric,
    pub(crate) etcd: Etcd,
}

/// A node with its agent; what depends on another thing is dropped before it.
pub(crate) struct Member {
    pub(crate) agent: Agent,
    /// When its agent was told to start; before the first instruction of the program.
    pub(crate) started: Instant,
    pub(crate) node: Node,
    flanneld: PathBuf,
    endpoint: String,
}

impl Cluster {
    /// A cluster without nodes whose etcd has `config`.
    pub(crate) fn new(stage: &Stage, config: &str) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let etcd = Etcd::on(&fabric)?;
        let cluster = Self { flanneld: stage.flanneld(), fabric, etcd };
        cluster.etcdctl(&["put", "/coreos.com/network/config", config], "")?;
        Ok(cluster)
    }

    /// A cluster with the small network that most measurements use.
    pub(crate) fn small(stage: &Stage, backend: &str) -> anyhow::Result<Self> {
        Self::new(stage, &format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{backend}"}}}}"#))
    }

    /// Writes leases, each under its key below the prefix, many in one transaction.
    pub(crate) fn write(&self, leases: &[(String, String)]) -> anyhow::Result<()> {
        for some in leases.chunks(BATCH) {
            let puts = some.iter().map(|(key, value)| format!("put {SUBNETS}/{key} {}", quoted(value)));
            self.transaction(puts)?;
        }
        Ok(())
    }

    /// Deletes leases by their keys below the prefix.
    pub(crate) fn delete<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
        let keys: Vec<&str> = keys.into_iter().collect();
        for some in keys.chunks(BATCH) {
            self.transaction(some.iter().map(|key| format!("del {SUBNETS}/{key}")))?;
        }
        Ok(())
    }

    /// A new node whose agent was only just started.
    pub(crate) fn start(&self) -> anyhow::Result<Member> {
        let node = self.fabric.node()?;
        // The kernel may take a second until a new port of a switch passes anything.
        let switch = self.fabric.address().into();
        wait_for("the node to reach the switch", PATIENCE, || {
            node.namespace().reaches(switch).unwrap_or(false)
        })?;
        let (flanneld, endpoint) = (self.flanneld.clone(), self.etcd.endpoint());
        let started = Instant::now();
        let agent = spawn(&node, &flanneld, &endpoint)?;
        Ok(Member { agent, started, node, flanneld, endpoint })
    }

    /// A new node whose agent is ready.
    pub(crate) fn join(&self) -> anyhow::Result<Member> {
        let mut member = self.start()?;
        member.agent.wait_ready(PATIENCE)?;
        Ok(member)
    }

    /// Two nodes that are ready, and a pod on each that reaches the other.
    pub(crate) fn pair(&self) -> anyhow::Result<Pair> {
        let (a, b) = (self.join()?, self.join()?);
        let (pod_a, pod_b) = (a.pod()?, b.pod()?);
        wait_for("the first echo between pods", PATIENCE, || {
            pod_a.namespace().reaches(pod_b.address()).unwrap_or(false)
        })?;
        Ok(Pair { pod_a, pod_b, a, b })
    }

    /// Removes a member from the cluster, with its lease, and waits until the kernel has taken its namespace
    /// down: what comes next isn't disturbed by that.
    pub(crate) fn remove(&self, mut member: Member) -> anyhow::Result<()> {
        let subnet = member.subnet()?;
        let port = member.node.name().replace("node", "port");
        member.agent.terminate(PATIENCE)?;
        self.delete([key(subnet).as_str()])?;
        drop(member);
        wait_for("a node's namespace to go", PATIENCE, || {
            let shown = self.fabric.switch().command("ip").args(["link", "show", &port]).output();
            shown.is_ok_and(|shown| !shown.status.success())
        })
    }

    fn transaction(&self, operations: impl IntoIterator<Item = String>) -> anyhow::Result<()> {
        // No comparisons; on success these operations; nothing otherwise.
        let mut text = "\n".to_owned();
        operations.into_iter().for_each(|operation| text = std::mem::take(&mut text) + &operation + "\n");
        self.etcdctl(&["txn"], &(text + "\n\n")).map(drop)
    }

    /// Runs `etcdctl`; the result is its standard output.
    pub(crate) fn etcdctl(&self, args: &[&str], input: &str) -> anyhow::Result<String> {
        let endpoint = self.etcd.endpoint();
        let command = self.fabric.switch().command("etcdctl").env("ETCDCTL_API", "3");
        let command = command.args(["--endpoints", &endpoint]).args(args).input(input);
        command.ok().context("etcdctl is in the package etcd-client")
    }
}

/// Two nodes with a pod each.
pub(crate) struct Pair {
    pub(crate) pod_a: Pod,
    pub(crate) pod_b: Pod,
    pub(crate) a: Member,
    pub(crate) b: Member,
}

impl Pair {
    /// A ping between the pods, at 100 Hz, that has run undisturbed for a moment.
    pub(crate) fn pinger(&self) -> anyhow::Result<Pinger> {
        const UNDISTURBED: u64 = 30;
        let pinger = Pinger::start(self.pod_a.namespace(), self.pod_b.address())?;
        wait_for("answers before the damage", PATIENCE, || pinger.received() >= UNDISTURBED)?;
        Ok(pinger)
    }
}

impl Member {
    /// Starts another agent in place of one that has ended.
    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        self.started = Instant::now();
        self.agent = spawn(&self.node, &self.flanneld, &self.endpoint)?;
        Ok(())
    }

    /// The time from `started` until the subnet file appears; it must not have been there before. The log of
    /// a start that takes longer than `slow` is worth a look.
    pub(crate) fn time_to_subnet_file(&self, slow: Duration) -> anyhow::Result<Duration> {
        let path = self.node.subnet_file();
        loop {
            if path.exists() {
                let time = self.started.elapsed();
                if time > slow {
                    eprintln!("          that took {time:.1?}; the log:\n{}", self.agent.log());
                }
                return Ok(time);
            }
            if self.started.elapsed() > PATIENCE {
                anyhow::bail!("no subnet file after {PATIENCE:?}; the log:\n{}", self.agent.log());
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    /// The subnet that it holds.
    pub(crate) fn subnet(&self) -> anyhow::Result<IpNet> {
        self.agent.subnet_env()?.subnets.iter().next().context("subnet.env has no subnet")
    }

    /// A pod with the second address of the node's subnet.
    pub(crate) fn pod(&self) -> anyhow::Result<Pod> {
        let subnet = self.subnet()?;
        let address = subnet.hosts().nth(1).context("a subnet without room for pods")?;
        Pod::wired(&self.node, IpNet::new(address, subnet.prefix_len())?)
    }

    /// Output of a program on the node, given as words with one space between.
    pub(crate) fn show(&self, command: &str) -> anyhow::Result<String> {
        let mut words = command.split(' ');
        let program = words.next().context("no program")?;
        self.node.namespace().command(program).args(words).ok()
    }

    /// Lines of that output.
    pub(crate) fn count(&self, command: &str) -> anyhow::Result<usize> {
        Ok(self.show(command)?.lines().count())
    }

    /// Waits for a condition; an error has the agent's log.
    pub(crate) fn wait(&self, what: &str, condition: impl FnMut() -> bool) -> anyhow::Result<()> {
        wait_for(what, PATIENCE, condition)
            .with_context(|| format!("log of {}:\n{}", self.node.name(), self.agent.log()))
    }
}

/// A lease as VXLAN agents write it, of a node with this address and a number of its own.
pub(crate) fn lease(public: std::net::Ipv4Addr, number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!(
        r#"{{"PublicIP":"{public}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:01:{high:02x}:{low:02x}"}}}}"#
    )
}

/// The key of a subnet below the prefix, `10.244.7.0-24`.
pub(crate) fn key(subnet: IpNet) -> String {
    format!("{}-{}", subnet.network(), subnet.prefix_len())
}

fn spawn(node: &Node, flanneld: &std::path::Path, endpoint: &str) -> anyhow::Result<Agent> {
    Agent::spawn(node, flanneld, [format!("--etcd-endpoints={endpoint}")])
}

/// A word for `etcdctl txn`, which takes Go's quotation marks.
fn quoted(value: &str) -> String {
    value.chars().fold("\"".to_owned(), |mut word, char| {
        if matches!(char, '"' | '\\') {
            word.push('\\');
        }
        // Writing to a string doesn't fail.
        let _ = write!(word, "{char}");
        word
    }) + "\""
}
