//! Clusters to measure and to show: a fabric, a store, nodes with agents and pods.

use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
pub use backends::testing::Member;
use backends::testing::{Etcd, Fabric, Launch, Node, Pinger, Pod, wait_for};
use ipnet::IpNet;
use serde_json::json;
use subnet::Family;
use tempfile::TempDir;

/// How long anything may take before a measurement is given up.
pub const TIMEOUT: Duration = Duration::from_secs(120);
/// Memory counts once the agent had this long to settle.
pub const SETTLE: Duration = Duration::from_secs(10);

/// Where agents keep their leases.
const SUBNETS: &str = "/coreos.com/network/subnets";
/// Operations in one transaction; etcd's own limit is 128.
const BATCH: usize = 100;

/// Shows routes, neighbours and FDB entries of a VXLAN device.
pub const PEER_OBJECTS: [&str; 3] =
    ["ip -4 route show dev flannel.1", "ip -4 neigh show dev flannel.1", "bridge fdb show dev flannel.1"];

/// A fabric with a store that holds a network configuration.
pub struct Cluster {
    store: Store,
    /// What nodes are plugged into.
    pub fabric: Fabric,
    launch: Launch,
}

/// Where leases and configuration are.
enum Store {
    Etcd(Etcd),
    Files(TempDir),
}

/// Two nodes with a pod each.
pub struct Pair {
    /// A pod of the first node.
    pub pod_a: Pod,
    /// A pod of the second node.
    pub pod_b: Pod,
    /// The first node.
    pub a: Member,
    /// The second node.
    pub b: Member,
}

impl Cluster {
    /// A cluster without nodes whose etcd has `config`; agents get `args` besides the endpoint.
    pub fn new(flanneld: PathBuf, config: &str, args: &[&str]) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let etcd = Etcd::on(&fabric)?;
        let endpoints = format!("--etcd-endpoints={}", etcd.endpoint());
        Self::with(Store::Etcd(etcd), fabric, flanneld, config, endpoints, args)
    }

    /// The same with leases and configuration in a directory.
    pub fn in_files(flanneld: PathBuf, config: &str, args: &[&str]) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("flannel-leases-").tempdir();
        let directory = directory.context("no temporary directory for leases")?;
        let store = format!("--lease-store=file:{}", directory.path().display());
        Self::with(Store::Files(directory), Fabric::new()?, flanneld, config, store, args)
    }

    fn with(
        store: Store,
        fabric: Fabric,
        flanneld: PathBuf,
        config: &str,
        first: String,
        args: &[&str],
    ) -> anyhow::Result<Self> {
        let args = [first].into_iter().chain(args.iter().map(|&arg| arg.to_owned())).collect();
        let cluster = Self { store, fabric, launch: launch(flanneld, args, Vec::new()) };
        cluster.configure(config)?;
        Ok(cluster)
    }

    /// Writes the network configuration.
    pub fn configure(&self, config: &str) -> anyhow::Result<()> {
        match &self.store {
            Store::Etcd(etcd) => etcd.ctl(&["put", "/coreos.com/network/config", config], "").map(drop),
            Store::Files(directory) => {
                fs::write(directory.path().join("config.json"), config).context("can't write config.json")
            }
        }
    }

    fn etcd(&self) -> anyhow::Result<&Etcd> {
        match &self.store {
            Store::Etcd(etcd) => Ok(etcd),
            Store::Files(_) => anyhow::bail!("this cluster has no etcd"),
        }
    }

    /// Keys and values of all leases, each in a line of its own.
    pub fn leases(&self) -> anyhow::Result<String> {
        self.etcd()?.ctl(&["get", "--prefix", SUBNETS], "")
    }

    /// Writes leases, each under its key below the prefix, many in one transaction.
    pub fn write(&self, leases: &[(String, String)]) -> anyhow::Result<()> {
        let puts = leases.iter().map(|(key, value)| format!("put {SUBNETS}/{key} {}", quoted(value)));
        self.transactions(puts)
    }

    /// Deletes leases by their keys below the prefix.
    pub fn delete<'a>(&self, keys: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
        self.transactions(keys.into_iter().map(|key| format!("del {SUBNETS}/{key}")))
    }

    fn transactions(&self, operations: impl Iterator<Item = String>) -> anyhow::Result<()> {
        for some in operations.collect::<Vec<_>>().chunks(BATCH) {
            // No comparisons; on success these operations; nothing otherwise.
            self.etcd()?.ctl(&["txn"], &format!("\n{}\n\n\n", some.join("\n")))?;
        }
        Ok(())
    }

    /// A new node, the switch within its reach, without an agent.
    pub fn node(&self) -> anyhow::Result<Node> {
        let node = self.fabric.node()?;
        wait_for_switch(&self.fabric, &node)?;
        Ok(node)
    }

    /// An agent on this node that was only just started.
    pub fn start_on(&self, node: Node) -> anyhow::Result<Member> {
        Member::start(node, self.launch.clone())
    }

    /// A new node whose agent was only just started.
    pub fn start(&self) -> anyhow::Result<Member> {
        self.start_on(self.node()?)
    }

    /// A new node whose agent is ready.
    pub fn join(&self) -> anyhow::Result<Member> {
        let mut member = self.start()?;
        member.agent.wait_ready(TIMEOUT)?;
        Ok(member)
    }

    /// Two nodes that are ready, and a pod on each that reaches the other.
    pub fn pair(&self) -> anyhow::Result<Pair> {
        let (a, b) = (self.join()?, self.join()?);
        let (pod_a, pod_b) = (a.pod(&[Family::V4])?, b.pod(&[Family::V4])?);
        wait_for("the first echo between pods", TIMEOUT, || {
            pod_a.namespace().reaches(pod_b.address()).unwrap_or(false)
        })?;
        Ok(Pair { pod_a, pod_b, a, b })
    }

    /// Removes a member from the cluster, with its lease.
    pub fn remove(&self, mut member: Member) -> anyhow::Result<()> {
        let subnet = member.subnet()?;
        member.agent.terminate(TIMEOUT)?;
        self.delete([key(subnet).as_str()])?;
        drop_node(&self.fabric, member)
    }
}

/// How a measurement starts an agent.
pub fn launch(program: PathBuf, args: Vec<String>, environment: Vec<(String, String)>) -> Launch {
    Launch { program, args, environment, limit: TIMEOUT }
}

/// The kernel may take a second until a new port of a switch passes anything.
pub fn wait_for_switch(fabric: &Fabric, node: &Node) -> anyhow::Result<()> {
    let switch = fabric.address().into();
    wait_for("the node to reach the switch", TIMEOUT, || node.namespace().reaches(switch).unwrap_or(false))
}

/// Drops a node and waits until the kernel has taken its namespace down, which would disturb what comes next.
pub fn drop_node(fabric: &Fabric, member: Member) -> anyhow::Result<()> {
    let port = member.node.name().replace("node", "port");
    drop(member);
    wait_for("a node's namespace to go", TIMEOUT, || {
        let shown = fabric.switch().command("ip").args(["link", "show", &port]).output();
        shown.is_ok_and(|shown| !shown.status.success())
    })
}

impl Pair {
    /// A ping between the pods, at 100 Hz, that has run undisturbed for a moment.
    pub fn pinger(&self) -> anyhow::Result<Pinger> {
        undisturbed_ping(&self.pod_a, &self.pod_b)
    }
}

/// A ping from a pod to another, at 100 Hz, that has run undisturbed for a moment.
pub fn undisturbed_ping(from: &Pod, to: &Pod) -> anyhow::Result<Pinger> {
    const UNDISTURBED: u64 = 30;
    let pinger = Pinger::start(from.namespace(), to.address())?;
    wait_for("answers before the damage", TIMEOUT, || pinger.received() >= UNDISTURBED)?;
    Ok(pinger)
}

/// When routes, neighbours and FDB entries of all peers were there. The agent writes the subnet file after
/// them: if a look right after finds everything, that moment counts; if not, the end of the look that does.
pub fn time_to_peers(member: &Member, file: Duration, peers: u16) -> anyhow::Result<Duration> {
    let mut whole = file;
    loop {
        let counts = PEER_OBJECTS.iter().map(|look| member.count(look));
        let counts = counts.collect::<anyhow::Result<Vec<_>>>()?;
        if counts == [usize::from(peers); 3] {
            return Ok(whole);
        }
        whole = member.started.elapsed();
        let log = || member.agent.log();
        ensure!(whole < TIMEOUT, "{counts:?} of {peers} routes, neighbours, FDB entries\n{}", log());
    }
}

/// A network configuration with this backend, of IPv4 or of both families.
pub fn config(backend: &str, families: &[Family]) -> String {
    let mut config = json!({ "Network": "10.244.0.0/16", "Backend": { "Type": backend } });
    if families.contains(&Family::V6) {
        config["EnableIPv6"] = true.into();
        config["IPv6Network"] = "fd00:244::/48".into();
    }
    config.to_string()
}

/// A lease as VXLAN agents write it, of a node with this address and a number of its own.
pub fn lease(public: Ipv4Addr, number: u16) -> String {
    json!({
        "PublicIP": public,
        "BackendType": "vxlan",
        "BackendData": { "VNI": 1, "VtepMAC": mac(number) },
    })
    .to_string()
}

/// The MAC of the node with this number.
pub fn mac(number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!("02:00:00:01:{high:02x}:{low:02x}")
}

/// The key of a subnet below the prefix, `10.244.7.0-24`.
pub fn key(subnet: IpNet) -> String {
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
