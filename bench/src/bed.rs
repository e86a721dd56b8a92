//! Clusters to measure and to show: a fabric, a store, nodes with agents and pods.

use std::fmt::Write;
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
pub use backends::testing::Member;
use backends::testing::{Etcd, Fabric, Launch, Node, Pinger, Pod, wait_for};
use ipnet::IpNet;
use serde_json::json;
use subnet::Family;
use subnet::testing::{ApiServer, fattened, node};
use tempfile::TempDir;

/// How long anything may take before a measurement is given up.
pub const TIMEOUT: Duration = Duration::from_secs(120);
/// Memory counts once the agent had this long to settle.
pub const SETTLE: Duration = Duration::from_secs(10);

/// Where agents keep their leases.
const SUBNETS: &str = "/coreos.com/network/subnets";
/// Images in the status of a large node of Kubernetes: 10 KB.
pub const IMAGES: usize = 40;
/// Where the network configuration is in a directory.
const FILE: &str = "config.json";
/// Operations in one transaction; etcd's own limit is 128.
const BATCH: usize = 100;

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
    /// A scripted API server, which is a thread of this process, and the directory of the network configuration.
    Api(ApiServer, TempDir),
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
        let directory = directory()?;
        let store = format!("--lease-store=file:{}", directory.path().display());
        Self::with(Store::Files(directory), Fabric::new()?, flanneld, config, store, args)
    }

    /// One of Kubernetes, for pods in 10.0.0.0/8.
    pub fn in_kubernetes(flanneld: PathBuf) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let at = (fabric.address(), 0);
        let listener = fabric.switch().run(|| TcpListener::bind(at)).context("no socket on the switch")?;
        let (api, files) = (ApiServer::start(listener)?, directory()?);
        let url = format!("--kube-api-url={}", api.url());
        let path = format!("--net-config-path={}", files.path().join(FILE).display());
        let config = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
        Self::with(Store::Api(api, files), fabric, flanneld, config, path, &["--kube-subnet-mgr", &url])
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
        let launch = Launch { program: flanneld, args, environment: Vec::new(), limit: TIMEOUT };
        let cluster = Self { store, fabric, launch };
        cluster.configure(config)?;
        Ok(cluster)
    }

    /// Writes the network configuration.
    pub fn configure(&self, config: &str) -> anyhow::Result<()> {
        match &self.store {
            Store::Etcd(etcd) => etcd.ctl(&["put", "/coreos.com/network/config", config], "").map(drop),
            Store::Files(directory) | Store::Api(_, directory) => {
                fs::write(directory.path().join(FILE), config).with_context(|| format!("can't write {FILE}"))
            }
        }
    }

    /// The API server of a cluster of Kubernetes.
    pub fn api(&self) -> anyhow::Result<&ApiServer> {
        match &self.store {
            Store::Api(api, _) => Ok(api),
            Store::Etcd(_) | Store::Files(_) => bail!("this cluster has no API server"),
        }
    }

    fn etcd(&self) -> anyhow::Result<&Etcd> {
        match &self.store {
            Store::Etcd(etcd) => Ok(etcd),
            Store::Files(_) | Store::Api(..) => bail!("this cluster has no etcd"),
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

    /// A new node, the switch within its reach, without an agent; in Kubernetes with its node object.
    pub fn node(&self) -> anyhow::Result<Node> {
        let new = self.fabric.node()?;
        if let Store::Api(api, _) = &self.store {
            let cidr = format!("10.255.{}.0/24", new.address().octets()[3]);
            api.put_node(fattened(node(&new.name(), &[&cidr]), IMAGES));
        }
        // The kernel may take a second until a new port of a switch passes anything.
        let switch = self.fabric.address().into();
        let reached = || new.namespace().reaches(switch).unwrap_or(false);
        wait_for("the node to reach the switch", TIMEOUT, reached)?;
        Ok(new)
    }

    /// An agent on this node that was only just started.
    pub fn start_on(&self, node: Node) -> anyhow::Result<Member> {
        self.start_with(node, &[])
    }

    /// The same with these arguments besides those of all agents.
    pub fn start_with(&self, node: Node, args: &[&str]) -> anyhow::Result<Member> {
        let mut launch = self.launch.clone();
        launch.args.extend(args.iter().map(|&arg| arg.to_owned()));
        if matches!(self.store, Store::Api(..)) {
            launch.environment.push(("NODE_NAME".to_owned(), node.name()));
        }
        Member::start(node, launch)
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

    /// Removes a member from the cluster, with its lease, and waits until the kernel has taken its namespace down, which would
    /// disturb what comes next.
    pub fn remove(&self, mut member: Member) -> anyhow::Result<()> {
        let subnet = member.subnet()?;
        member.agent.terminate(TIMEOUT)?;
        match &self.store {
            Store::Api(api, _) => api.delete_node(&member.node.name()),
            Store::Etcd(_) | Store::Files(_) => self.delete([key(subnet).as_str()])?,
        }
        let port = member.node.name().replace("node", "port");
        drop(member);
        wait_for("a node's namespace to go", TIMEOUT, || {
            let shown = self.fabric.switch().command("ip").args(["link", "show", &port]).output();
            shown.is_ok_and(|shown| !shown.status.success())
        })
    }
}

fn directory() -> anyhow::Result<TempDir> {
    let directory = tempfile::Builder::new().prefix("flannel-cluster-").tempdir();
    directory.context("no temporary directory for a cluster")
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

/// A network configuration with this backend, of IPv4 or of both families.
pub fn config(backend: &str, families: &[Family]) -> String {
    let mut config = json!({ "Network": "10.244.0.0/16", "Backend": { "Type": backend } });
    if families.contains(&Family::V6) {
        config["EnableIPv6"] = true.into();
        config["IPv6Network"] = "fd00:244::/48".into();
    }
    config.to_string()
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
