//! The cluster of the demo: nodes on one switch, an agent on each, and pods.

use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, anyhow, ensure};
use backends::testing::{Agent, Fabric, Node, Pod, program};
use bench::progress::Progress;
use ipnet::IpNet;
use serde_json::json;
use tempfile::TempDir;

use crate::Backend;
use crate::table::Table;

/// The network of all pods.
pub(crate) const NETWORK: &str = "10.244.0.0/16";
const NODES: usize = 3;
const PODS_PER_NODE: usize = 2;
/// How long anything may take before the demo gives up.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// Everything that runs.
pub(crate) struct Cluster {
    pub(crate) backend: Backend,
    pub(crate) sites: Vec<Site>,
    leases: TempDir,
    _fabric: Fabric,
}

/// A node and what runs on it; what depends on another thing is dropped before it.
pub(crate) struct Site {
    pub(crate) pods: Vec<Pod>,
    pub(crate) agent: Agent,
    pub(crate) node: Node,
    pub(crate) subnet: IpNet,
    mtu: u32,
    ready_after: Duration,
}

impl Cluster {
    /// Nodes with agents that are ready, still without pods.
    pub(crate) fn start(backend: Backend, progress: &Progress) -> anyhow::Result<Self> {
        let flanneld = program("flanneld")?;
        program("flannel")?;
        progress.step(&format!("{NODES} nodes on a switch, in namespaces"))?;
        let fabric = Fabric::new()?;
        for tool in [["ping", "-V"], ["iperf3", "-v"]] {
            fabric.switch().command(tool[0]).arg(tool[1]).ok()?;
        }
        let leases = lease_directory(backend)?;
        let nodes = (0..NODES).map(|_| fabric.node()).collect::<anyhow::Result<Vec<_>>>()?;
        progress.step("an agent on each, all at once, leases in a directory")?;
        let (flanneld, leases_in) = (&flanneld, &leases);
        let launch = |node| Site::launch(node, flanneld, leases_in);
        let sites: anyhow::Result<Vec<_>> = thread::scope(|scope| {
            let starting: Vec<_> = nodes.into_iter().map(|node| scope.spawn(move || launch(node))).collect();
            let joined = starting.into_iter().map(|site| site.join());
            joined.map(|site| site.map_err(|_| anyhow!("starting an agent panicked"))?).collect()
        });
        Ok(Self { backend, sites: sites?, leases, _fabric: fabric })
    }

    /// A table of the nodes.
    pub(crate) fn summary(&self) -> anyhow::Result<Table> {
        let mut table =
            Table::new(["node", "public IP", "subnet", "backend", "device", "MTU", "ready after ms"]);
        for site in &self.sites {
            let device = self.backend.device();
            site.node.namespace().command("ip").args(["link", "show", device]).ok()?;
            table.row([
                site.node.name(),
                site.node.address().to_string(),
                site.subnet.to_string(),
                self.backend.name().to_owned(),
                device.to_owned(),
                site.mtu.to_string(),
                site.ready_after.as_millis().to_string(),
            ]);
        }
        Ok(table)
    }

    /// Pods on every node, attached by the CNI plugin, that reach each other.
    pub(crate) fn attach_pods(&mut self, progress: &Progress) -> anyhow::Result<()> {
        progress.step(&format!("{PODS_PER_NODE} pods per node through the CNI plugin"))?;
        let plugin = program("flannel")?;
        let start = Instant::now();
        for site in &mut self.sites {
            for _ in 0..PODS_PER_NODE {
                site.pods.push(Pod::cni(&site.node, &plugin)?);
            }
        }
        let attached = start.elapsed();
        for (_, from, _, to) in self.pairs() {
            let what = format!("{} to reach {}", from.address(), to.address());
            progress.wait_for(&what, TIMEOUT, || from.namespace().reaches(to.address()))?;
        }
        let each = attached.as_millis() / (NODES * PODS_PER_NODE) as u128;
        progress.step(&format!("attached in {each} ms each; every pod reaches every pod of the other nodes"))
    }

    /// All ordered pairs of pods on different nodes, each pod with its name.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (String, &Pod, String, &Pod)> {
        self.sites.iter().flat_map(move |a| {
            let others = self.sites.iter().filter(move |b| b.node.name() != a.node.name());
            let targets = others.flat_map(Site::named_pods);
            targets.flat_map(move |(to, target)| {
                a.named_pods().map(move |(from, source)| (from, source, to.clone(), target))
            })
        })
    }

    /// Starts the agent of a site again, with the same arguments, and waits until it is ready.
    pub(crate) fn restart_agent(&mut self, site: usize) -> anyhow::Result<()> {
        let site = &mut self.sites[site];
        site.agent.terminate(TIMEOUT)?;
        site.agent = spawn(&site.node, &program("flanneld")?, &self.leases)?;
        site.agent.wait_ready(TIMEOUT)
    }

    /// How to enter the namespaces, and how to end it.
    pub(crate) fn guide(&self) -> anyhow::Result<String> {
        let mut places = Table::new(["", "address", "enter as root, from another terminal"]);
        let enter = |path: &Path| format!("nsenter --net={}", path.display());
        for site in &self.sites {
            let node = &site.node;
            places.row([node.name(), node.address().to_string(), enter(node.namespace().path())]);
            for (name, pod) in site.named_pods() {
                places.row([name, pod.address().to_string(), enter(pod.namespace().path())]);
            }
        }
        let node = &self.sites.first().context("no nodes")?.node;
        let (one, device) = (enter(node.namespace().path()), self.backend.device());
        Ok(format!(
            "\n{places}\nFor example:\n\n  {one} curl -s 'http://127.0.0.1:8081/readyz?verbose'\n  \
             {one} ip route\n  {one} ip link set {device} down\n\nCtrl-C ends it and removes everything."
        ))
    }

    /// Detaches the pods and ends the agents in good order.
    pub(crate) fn stop(&mut self, progress: &Progress) -> anyhow::Result<()> {
        // No step, which would fail once the user asked to stop.
        progress.say("detaching the pods, stopping the agents")?;
        for site in &mut self.sites {
            for mut pod in site.pods.drain(..) {
                pod.detach()?;
            }
            let status = site.agent.terminate(TIMEOUT)?;
            let log = site.agent.log();
            ensure!(status.success(), "flanneld on {} ended: {status}\n{log}", site.node.name());
        }
        Ok(())
    }
}

impl Site {
    fn launch(node: Node, flanneld: &Path, leases: &TempDir) -> anyhow::Result<Self> {
        let start = Instant::now();
        let mut agent = spawn(&node, flanneld, leases)?;
        agent.wait_ready(TIMEOUT).with_context(|| node.name())?;
        let ready_after = start.elapsed();
        let env = agent.subnet_env()?;
        let subnet = env.subnets.iter().next().context("subnet.env has no subnet")?;
        let mtu = env.mtu.context("subnet.env has no MTU")?;
        Ok(Self { pods: Vec::new(), agent, node, subnet, mtu, ready_after })
    }

    /// Its pods with names like `node1/a`.
    pub(crate) fn named_pods(&self) -> impl Iterator<Item = (String, &Pod)> {
        let name = self.node.name();
        self.pods.iter().zip('a'..).map(move |(pod, letter)| (format!("{name}/{letter}"), pod))
    }
}

fn spawn(node: &Node, flanneld: &Path, leases: &TempDir) -> anyhow::Result<Agent> {
    let store = format!("--lease-store=file:{}", leases.path().display());
    Agent::spawn(node, flanneld, [store])
}

/// The embedded store: a directory with the configuration, in which the agents put their leases.
fn lease_directory(backend: Backend) -> anyhow::Result<TempDir> {
    let dir = tempfile::Builder::new()
        .prefix("flannel-demo-")
        .tempdir()
        .context("no temporary directory for leases")?;
    let config = json!({ "Network": NETWORK, "Backend": { "Type": backend.name() } });
    fs::write(dir.path().join("config.json"), config.to_string()).context("can't write config.json")?;
    Ok(dir)
}
