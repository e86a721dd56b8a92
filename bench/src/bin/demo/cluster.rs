//! The cluster of the demo: nodes on one switch, an agent on each, and pods.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::testing::{Node, Pod, program};
use bench::bed::{self, Member};
use bench::figure::markdown;
use bench::progress::Progress;
use ipnet::IpNet;
use subnet::Family;

use crate::Backend;

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
    _cluster: bed::Cluster,
}

/// A node and what runs on it; what depends on another thing is dropped before it.
pub(crate) struct Site {
    pub(crate) pods: Vec<Pod>,
    pub(crate) member: Member,
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
        let cluster = bed::Cluster::in_files(flanneld, &bed::config(backend.name(), &[Family::V4]), &[])?;
        for tool in ["ping -V", "iperf3 -v"] {
            cluster.fabric.switch().show(tool)?;
        }
        let nodes = (0..NODES).map(|_| cluster.fabric.node()).collect::<anyhow::Result<Vec<_>>>()?;
        progress.step("an agent on each, all at once, leases in a directory")?;
        let launch = |node| Site::launch(&cluster, node);
        let sites: anyhow::Result<Vec<_>> = thread::scope(|scope| {
            let starting: Vec<_> = nodes.into_iter().map(|node| scope.spawn(move || launch(node))).collect();
            let joined = starting.into_iter().map(|site| site.join());
            joined.map(|site| site.map_err(|_| anyhow!("starting an agent panicked"))?).collect()
        });
        Ok(Self { backend, sites: sites?, _cluster: cluster })
    }

    /// A table of the nodes.
    pub(crate) fn summary(&self) -> anyhow::Result<String> {
        let titles = ["node", "public IP", "subnet", "backend", "device", "MTU", "ready after ms"];
        let mut rows = vec![titles.map(str::to_owned).to_vec()];
        for Site { member, subnet, mtu, ready_after, .. } in &self.sites {
            let device = self.backend.device();
            member.show(&format!("ip link show {device}"))?;
            rows.push(vec![
                member.node.name(),
                member.node.address().to_string(),
                subnet.to_string(),
                self.backend.name().to_owned(),
                device.to_owned(),
                mtu.to_string(),
                ready_after.as_millis().to_string(),
            ]);
        }
        Ok(markdown(&rows))
    }

    /// Pods on every node, attached by the CNI plugin, that reach each other.
    pub(crate) fn attach_pods(&mut self, progress: &Progress) -> anyhow::Result<()> {
        progress.step(&format!("{PODS_PER_NODE} pods per node through the CNI plugin"))?;
        let plugin = program("flannel")?;
        let start = Instant::now();
        for site in &mut self.sites {
            for _ in 0..PODS_PER_NODE {
                site.pods.push(Pod::cni(&site.member.node, &plugin)?);
            }
        }
        let attached = start.elapsed();
        for (a, site) in self.sites.iter().enumerate() {
            let others = self.sites.iter().enumerate().filter(|(b, _)| *b != a);
            let others: Vec<&Pod> = others.flat_map(|(_, other)| &other.pods).collect();
            for (from, to) in site.pods.iter().flat_map(|from| others.iter().map(move |to| (from, to))) {
                let what = format!("{} to reach {}", from.address(), to.address());
                progress.wait_for(&what, TIMEOUT, || from.namespace().reaches(to.address()))?;
            }
        }
        let each = attached.as_millis() / (NODES * PODS_PER_NODE) as u128;
        progress.step(&format!("attached in {each} ms each; every pod reaches every pod of the other nodes"))
    }

    /// Starts the agent of a site again, with the same arguments, and waits until it is ready.
    pub(crate) fn restart_agent(&mut self, site: usize) -> anyhow::Result<()> {
        let member = &mut self.sites[site].member;
        member.agent.terminate(TIMEOUT)?;
        member.start_again()?;
        member.agent.wait_ready(TIMEOUT)
    }

    /// How to enter the namespaces, and how to end it.
    pub(crate) fn guide(&self) -> anyhow::Result<String> {
        let titles = ["", "address", "enter as root, from another terminal"];
        let mut places = vec![titles.map(str::to_owned).to_vec()];
        let enter = |path: &Path| format!("nsenter --net={}", path.display());
        for site in &self.sites {
            let node = &site.member.node;
            places.push(vec![node.name(), node.address().to_string(), enter(node.namespace().path())]);
            for (name, pod) in site.named_pods() {
                places.push(vec![name, pod.address().to_string(), enter(pod.namespace().path())]);
            }
        }
        let node = &self.sites.first().context("no nodes")?.member.node;
        let (one, device) = (enter(node.namespace().path()), self.backend.device());
        Ok(format!(
            "\n{}\nFor example:\n\n  {one} curl -s 'http://127.0.0.1:8081/readyz?verbose'\n  \
             {one} ip route\n  {one} ip link set {device} down\n\nCtrl-C ends it and removes everything.",
            markdown(&places)
        ))
    }

    /// Detaches the pods and ends the agents in good order.
    pub(crate) fn stop(&mut self, progress: &Progress) -> anyhow::Result<()> {
        // No step, which would fail once the user asked to stop.
        progress.say("detaching the pods, stopping the agents")?;
        for Site { pods, member, .. } in &mut self.sites {
            for mut pod in pods.drain(..) {
                pod.detach()?;
            }
            let status = member.agent.terminate(TIMEOUT)?;
            let log = member.agent.log();
            ensure!(status.success(), "flanneld on {} ended: {status}\n{log}", member.node.name());
        }
        Ok(())
    }
}

impl Site {
    fn launch(cluster: &bed::Cluster, node: Node) -> anyhow::Result<Self> {
        let mut member = cluster.start_on(node)?;
        member.agent.wait_ready(TIMEOUT).with_context(|| member.node.name())?;
        let ready_after = member.started.elapsed();
        let mtu = member.agent.subnet_env()?.mtu.context("subnet.env has no MTU")?;
        Ok(Self { pods: Vec::new(), subnet: member.subnet()?, member, mtu, ready_after })
    }

    /// Its pods with names like `node1/a`.
    pub(crate) fn named_pods(&self) -> impl Iterator<Item = (String, &Pod)> {
        let name = self.member.node.name();
        self.pods.iter().zip('a'..).map(move |(pod, letter)| (format!("{name}/{letter}"), pod))
    }
}
