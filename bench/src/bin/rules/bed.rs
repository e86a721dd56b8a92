//! What the measurements are taken on: a node with its agent, a pod on it, and a host outside.
//!
//! ```text
//! pod ── cni0 node eth0 ── switch ── eth0 outside
//!          flanneld          etcd
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use backends::nft::{Expr, Nft, NftError, Rule, Ruleset};
use backends::testing::{Agent, Etcd, Fabric, Node, Pod, wait_for};
use ipnet::IpNet;

use crate::Stage;

/// How long anything may take before a measurement is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The two mechanisms, by their names in figures and on the agent's command line.
pub(crate) const MODES: [(&str, &str); 2] =
    [("nft", "--traffic-manager=nft"), ("iptables", "--traffic-manager=iptables")];

/// The whole network of pods.
const NETWORK: &str = "10.244.0.0/16";

/// A node, a pod and a host outside; what depends on another thing is dropped before it.
pub(crate) struct Scene {
    pub(crate) agent: Agent,
    pub(crate) node: Node,
    pub(crate) pod: Pod,
    /// It knows the way to the pods through the node, so that nothing depends on the masquerade.
    pub(crate) outside: Node,
    pub(crate) launch: Launch,
    _etcd: Etcd,
    _fabric: Fabric,
}

/// How the agent is started.
pub(crate) struct Launch {
    flanneld: PathBuf,
    args: Vec<String>,
}

impl Launch {
    /// A new agent on the node, which is ready.
    pub(crate) fn start(&self, node: &Node) -> anyhow::Result<Agent> {
        let mut agent = Agent::spawn(node, &self.flanneld, &self.args)?;
        agent.wait_ready(PATIENCE)?;
        Ok(agent)
    }
}

impl Scene {
    /// A scene whose agent, the program `flanneld`, is ready and masquerades by the mechanism `mode`.
    pub(crate) fn new(stage: &Stage, flanneld: PathBuf, mode: &str) -> anyhow::Result<Self> {
        stage.progress.step(&format!("a node, a pod and a host outside; {mode}"))?;
        let fabric = Fabric::new()?;
        let etcd = Etcd::on(&fabric)?;
        let config = format!(r#"{{"Network":"{NETWORK}","Backend":{{"Type":"vxlan"}}}}"#);
        let endpoint = etcd.endpoint();
        let etcdctl = fabric.switch().command("etcdctl").env("ETCDCTL_API", "3");
        let etcdctl = etcdctl.args(["--endpoints", &endpoint, "put", "/coreos.com/network/config", &config]);
        etcdctl.ok().context("etcdctl is in the package etcd-client")?;

        let (node, outside) = (fabric.node()?, fabric.node()?);
        outside.namespace().ip(&format!("route add {NETWORK} via {}", node.address()))?;
        let args = vec![format!("--etcd-endpoints={endpoint}"), "--ip-masq".to_owned(), mode.to_owned()];
        let launch = Launch { flanneld, args };
        let agent = launch.start(&node)?;
        let subnet = agent.subnet_env()?.subnets.iter().next().context("subnet.env has no subnet")?;
        let address = subnet.hosts().nth(1).context("a subnet without room for pods")?;
        let pod = Pod::wired(&node, IpNet::new(address, subnet.prefix_len())?)?;
        wait_for("the first echo from outside", PATIENCE, || {
            pod.namespace().reaches(outside.address().into()).unwrap_or(false)
        })?;
        Ok(Self { agent, node, pod, outside, launch, _etcd: etcd, _fabric: fabric })
    }

    /// Where datagrams go: to a port of the host outside.
    pub(crate) fn target(&self) -> SocketAddr {
        SocketAddr::from((self.outside.address(), 9_000))
    }

    /// Runs a program on the node, given as words with one space between.
    pub(crate) fn show(&self, command: &str) -> anyhow::Result<String> {
        let mut words = command.split(' ');
        let program = words.next().context("no program")?;
        self.node.namespace().command(program).args(words).ok()
    }

    /// A conversation with the node's nftables, which any thread may lead.
    pub(crate) fn nft(&self) -> Result<Nft, NftError> {
        self.node.namespace().run(Nft::open)
    }
}

/// All rules, without what counters counted, the kernel's numbers and the order of things that have names.
pub(crate) fn look(nft: &mut Nft) -> Result<Ruleset, NftError> {
    let mut found = nft.dump()?;
    found.tables.sort_by(|one, other| one.id.cmp(&other.id));
    for table in &mut found.tables {
        table.sets.sort_by(|one, other| one.name.cmp(&other.name));
        table.chains.sort_by(|one, other| one.name.cmp(&other.name));
        table.chains.iter_mut().flat_map(|chain| &mut chain.rules).for_each(plain);
    }
    Ok(found)
}

fn plain(rule: &mut Rule) {
    rule.handle = None;
    for expr in &mut rule.exprs {
        if let Expr::Counter { packets, bytes } = expr {
            (*packets, *bytes) = (0, 0);
        }
    }
}
