//! Clusters to measure: a fabric, an etcd, nodes with agents and pods.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Agent, Etcd, Fabric, Node, Pinger, Pod, wait_for};
use ipnet::IpNet;
use subnet::{Family, Subnets};

use crate::Stage;

/// How long anything may take before a measurement is given up.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);
/// Memory counts once the agent had this long to settle.
pub(crate) const SETTLE: Duration = Duration::from_secs(10);

/// Where agents keep their leases.
const SUBNETS: &str = "/coreos.com/network/subnets";
/// Operations in one transaction; etcd's own limit is 128.
const BATCH: usize = 100;

/// Shows routes, neighbours and FDB entries of a VXLAN device.
pub(crate) const PEER_OBJECTS: [&str; 3] =
    ["ip -4 route show dev flannel.1", "ip -4 neigh show dev flannel.1", "bridge fdb show dev flannel.1"];

/// How an agent is started.
#[derive(Clone)]
pub(crate) struct Launch {
    pub(crate) flanneld: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
}

/// A node with its agent; what depends on another thing is dropped before it.
pub(crate) struct Member {
    pub(crate) agent: Agent,
    /// When its agent was told to start; before the first instruction of the program.
    pub(crate) started: Instant,
    pub(crate) node: Node,
    launch: Launch,
}

/// A fabric with an etcd that holds a network configuration.
pub(crate) struct Cluster {
    pub(crate) etcd: Etcd,
    pub(crate) fabric: Fabric,
    launch: Launch,
}

/// Two nodes with a pod each.
pub(crate) struct Pair {
    pub(crate) pod_a: Pod,
    pub(crate) pod_b: Pod,
    pub(crate) a: Member,
    pub(crate) b: Member,
}

impl Cluster {
    /// A cluster without nodes whose etcd has `config`; agents get `args` besides the endpoint.
    pub(crate) fn new(flanneld: PathBuf, config: &str, args: &[&str]) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let etcd = Etcd::on(&fabric)?;
        let mut all = vec![format!("--etcd-endpoints={}", etcd.endpoint())];
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        let cluster = Self { etcd, fabric, launch: Launch { flanneld, args: all, env: Vec::new() } };
        cluster.configure(config)?;
        Ok(cluster)
    }

    /// A cluster with the small network that most measurements use.
    pub(crate) fn small(stage: &Stage, backend: &str) -> anyhow::Result<Self> {
        Self::new(stage.flanneld(), &config(backend, &[Family::V4]), &[])
    }

    /// Writes the network configuration.
    pub(crate) fn configure(&self, config: &str) -> anyhow::Result<()> {
        self.etcd.ctl(&["put", "/coreos.com/network/config", config], "").map(drop)
    }

    /// Keys and values of all leases, each in a line of its own.
    pub(crate) fn leases(&self) -> anyhow::Result<String> {
        self.etcd.ctl(&["get", "--prefix", SUBNETS], "")
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
        wait_for_switch(&self.fabric, &node)?;
        Member::start(node, self.launch.clone())
    }

    /// A new node whose agent is ready.
    pub(crate) fn join(&self) -> anyhow::Result<Member> {
        let mut member = self.start()?;
        member.agent.wait_ready(TIMEOUT)?;
        Ok(member)
    }

    /// Two nodes that are ready, and a pod on each that reaches the other.
    pub(crate) fn pair(&self) -> anyhow::Result<Pair> {
        let (a, b) = (self.join()?, self.join()?);
        let (pod_a, pod_b) = (a.pod(&[Family::V4])?, b.pod(&[Family::V4])?);
        wait_for("the first echo between pods", TIMEOUT, || {
            pod_a.namespace().reaches(pod_b.address()).unwrap_or(false)
        })?;
        Ok(Pair { pod_a, pod_b, a, b })
    }

    /// Removes a member from the cluster, with its lease.
    pub(crate) fn remove(&self, mut member: Member) -> anyhow::Result<()> {
        let subnet = member.subnet()?;
        member.agent.terminate(TIMEOUT)?;
        self.delete([key(subnet).as_str()])?;
        drop_node(&self.fabric, member)
    }

    fn transaction(&self, operations: impl IntoIterator<Item = String>) -> anyhow::Result<()> {
        // No comparisons; on success these operations; nothing otherwise.
        let mut text = "\n".to_owned();
        operations.into_iter().for_each(|operation| text = std::mem::take(&mut text) + &operation + "\n");
        self.etcd.ctl(&["txn"], &(text + "\n\n")).map(drop)
    }
}

/// The kernel may take a second until a new port of a switch passes anything.
pub(crate) fn wait_for_switch(fabric: &Fabric, node: &Node) -> anyhow::Result<()> {
    let switch = fabric.address().into();
    wait_for("the node to reach the switch", TIMEOUT, || node.namespace().reaches(switch).unwrap_or(false))
}

/// Drops a node and waits until the kernel has taken its namespace down, which would disturb what comes next.
pub(crate) fn drop_node(fabric: &Fabric, member: Member) -> anyhow::Result<()> {
    let port = member.node.name().replace("node", "port");
    drop(member);
    wait_for("a node's namespace to go", TIMEOUT, || {
        let shown = fabric.switch().command("ip").args(["link", "show", &port]).output();
        shown.is_ok_and(|shown| !shown.status.success())
    })
}

impl Pair {
    /// A ping between the pods, at 100 Hz, that has run undisturbed for a moment.
    pub(crate) fn pinger(&self) -> anyhow::Result<Pinger> {
        const UNDISTURBED: u64 = 30;
        let pinger = Pinger::start(self.pod_a.namespace(), self.pod_b.address())?;
        wait_for("answers before the damage", TIMEOUT, || pinger.received() >= UNDISTURBED)?;
        Ok(pinger)
    }
}

impl Member {
    /// Starts an agent on the node.
    pub(crate) fn start(node: Node, launch: Launch) -> anyhow::Result<Self> {
        let started = Instant::now();
        let agent = Agent::spawn_with(&node, &launch.flanneld, &launch.args, &launch.env)?;
        Ok(Self { agent, started, node, launch })
    }

    /// Starts another agent in place of one that has ended.
    pub(crate) fn start_again(&mut self) -> anyhow::Result<()> {
        self.started = Instant::now();
        let Launch { flanneld, args, env } = &self.launch;
        self.agent = Agent::spawn_with(&self.node, flanneld, args, env)?;
        Ok(())
    }

    /// The time from `started` until the subnet file appears; it must not have been there before.
    pub(crate) fn time_to_subnet_file(&self) -> anyhow::Result<Duration> {
        self.time_until("subnet file", || self.node.subnet_file().exists())
    }

    /// The time from `started` until `/readyz` says yes.
    pub(crate) fn time_to_ready(&self) -> anyhow::Result<Duration> {
        self.time_until("readiness", || self.agent.get("/readyz").is_ok_and(|(code, _)| code == 200))
    }

    fn time_until(&self, what: &str, mut condition: impl FnMut() -> bool) -> anyhow::Result<Duration> {
        while !condition() {
            ensure!(
                self.started.elapsed() < TIMEOUT,
                "no {what} after {TIMEOUT:?}; the log:\n{}",
                self.agent.log()
            );
            std::thread::sleep(Duration::from_micros(300));
        }
        Ok(self.started.elapsed())
    }

    /// When routes, neighbours and FDB entries of all peers were there. The agent writes the subnet file after
    /// them: if a look right after finds everything, that moment counts; if not, the end of the look that does.
    pub(crate) fn time_to_peers(&self, file: Duration, peers: u16) -> anyhow::Result<Duration> {
        let mut whole = file;
        loop {
            let counts =
                PEER_OBJECTS.iter().map(|look| self.count(look)).collect::<anyhow::Result<Vec<_>>>()?;
            if counts == [usize::from(peers); 3] {
                return Ok(whole);
            }
            whole = self.started.elapsed();
            let log = || self.agent.log();
            ensure!(whole < TIMEOUT, "{counts:?} of {peers} routes, neighbours, FDB entries\n{}", log());
        }
    }

    /// What it tells the CNI plugin of its subnets.
    pub(crate) fn subnets(&self) -> anyhow::Result<Subnets> {
        Ok(self.agent.subnet_env()?.subnets)
    }

    /// The subnet that it holds.
    pub(crate) fn subnet(&self) -> anyhow::Result<IpNet> {
        self.subnets()?.iter().next().context("subnet.env has no subnet")
    }

    /// A pod with the second address of the node's subnet of each family.
    pub(crate) fn pod(&self, families: &[Family]) -> anyhow::Result<Pod> {
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
        self.node.namespace().show(command)
    }

    /// Lines of that output.
    pub(crate) fn count(&self, command: &str) -> anyhow::Result<usize> {
        Ok(self.show(command)?.lines().count())
    }

    /// Waits for a condition; an error has the agent's log.
    pub(crate) fn wait(&self, what: &str, condition: impl FnMut() -> bool) -> anyhow::Result<()> {
        wait_for(what, TIMEOUT, condition)
            .with_context(|| format!("log of {}:\n{}", self.node.name(), self.agent.log()))
    }
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

/// A lease as VXLAN agents write it, of a node with this address and a number of its own.
pub(crate) fn lease(public: Ipv4Addr, number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!(
        r#"{{"PublicIP":"{public}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:01:{high:02x}:{low:02x}"}}}}"#
    )
}

/// The key of a subnet below the prefix, `10.244.7.0-24`.
pub(crate) fn key(subnet: IpNet) -> String {
    format!("{}-{}", subnet.network(), subnet.prefix_len())
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
