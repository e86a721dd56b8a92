//! A cluster to measure: a fabric with a scripted API server, nodes with agents, and peers that are no more
//! than node objects.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, ensure};
use backends::testing::{Fabric, Node};
use bench::bed::{Member, PEER_OBJECTS, TIMEOUT, drop_node, launch, wait_for_switch};
use bench::process::{DeviceCounters, counters};
use serde_json::Value;
use subnet::testing::{ApiServer, announced, fattened, node};
use tempfile::TempDir;

use crate::Stage;

/// Images in the status of a large node: 10 KB.
pub(crate) const IMAGES: usize = 40;

/// A fabric with an API server; the server is a thread of this process, each agent a process of its own.
pub(crate) struct Cluster {
    pub(crate) api: ApiServer,
    pub(crate) fabric: Fabric,
    files: TempDir,
    flanneld: std::path::PathBuf,
}

impl Cluster {
    /// A cluster without nodes, for pods in 10.0.0.0/8.
    pub(crate) fn new(stage: &Stage) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let at = (fabric.address(), 0);
        let listener = fabric.switch().run(|| TcpListener::bind(at)).context("no socket on the switch")?;
        let files = tempfile::Builder::new().prefix("flannel-bench-kube-").tempdir()?;
        let config = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#;
        fs::write(files.path().join("net-conf.json"), config)?;
        Ok(Self { api: ApiServer::start(listener)?, fabric, files, flanneld: stage.flanneld() })
    }

    /// A new node with its object, and the switch within reach, still without an agent.
    pub(crate) fn node(&self) -> anyhow::Result<Node> {
        let node = self.fabric.node()?;
        let number = node.address().octets()[3];
        self.api.put_node(fattened(self::node(&node.name(), &[&format!("10.255.{number}.0/24")]), IMAGES));
        wait_for_switch(&self.fabric, &node)?;
        Ok(node)
    }

    /// Starts an agent on the node with these arguments besides the usual ones.
    pub(crate) fn start_on(&self, node: Node, more: &[String]) -> anyhow::Result<Member> {
        let mut args = vec![
            "--kube-subnet-mgr".to_owned(),
            format!("--kube-api-url={}", self.api.url()),
            format!("--net-config-path={}/net-conf.json", self.files.path().display()),
        ];
        args.extend_from_slice(more);
        let env = vec![("NODE_NAME".to_owned(), node.name())];
        Member::start(node, launch(self.flanneld.clone(), args, env))
    }

    /// A new node whose agent was only just started.
    pub(crate) fn start(&self) -> anyhow::Result<Member> {
        self.start_on(self.node()?, &[])
    }

    /// Removes a member with its node object.
    pub(crate) fn remove(&self, mut member: Member) -> anyhow::Result<()> {
        member.agent.terminate(TIMEOUT)?;
        self.api.delete_node(&member.node.name());
        drop_node(&self.fabric, member)
    }
}

/// What `eth0` of a node has counted.
pub(crate) fn eth0(member: &Member) -> anyhow::Result<DeviceCounters> {
    counters(member.node.namespace(), "eth0")
}

/// What makes one peer different from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Decides on its name and subnet.
    pub(crate) number: u16,
    /// Decides on its public address.
    pub(crate) address: u32,
    /// Decides on its MAC.
    pub(crate) mac: u32,
}

impl Peer {
    /// The peer with this number, as it is in the beginning.
    pub(crate) fn new(number: u16) -> Self {
        Self { number, address: number.into(), mac: number.into() }
    }

    pub(crate) fn name(self) -> String {
        format!("peer-{:05}.example.internal", self.number)
    }

    /// The first address of its subnet, which has 24 bits.
    pub(crate) fn first(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(10, high, low, 0)
    }

    pub(crate) fn public(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + self.address)
    }

    pub(crate) fn mac(self) -> String {
        let [a, b, c, d] = self.mac.to_be_bytes();
        format!("02:01:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }

    /// Its node object, as large as that of a real node.
    pub(crate) fn large(self) -> Value {
        let cidr = format!("{}/24", self.first());
        announced(fattened(node(&self.name(), &[&cidr]), IMAGES), &self.public().to_string(), &self.mac())
    }

    /// The same without its status: as large as the metadata that a metadata-only watch would bring.
    pub(crate) fn without_status(self) -> Value {
        let mut node = self.large();
        if let Some(members) = node.as_object_mut() {
            members.remove("status");
        }
        node
    }
}

/// The lines in which the kernel of a node differs from what the peers ask for, which are missing or too many.
pub(crate) fn differences(
    member: &Member,
    peers: impl IntoIterator<Item = Peer>,
) -> anyhow::Result<Vec<String>> {
    let mut wanted = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    for peer in peers {
        let (first, public, mac) = (peer.first(), peer.public(), peer.mac());
        wanted[0].insert(format!("{first}/24 via {first} proto 70 onlink"));
        wanted[1].insert(format!("{first} lladdr {mac} PERMANENT"));
        wanted[2].insert(format!("{mac} dst {public} self permanent"));
    }
    let mut differences = Vec::new();
    for (look, wanted) in PEER_OBJECTS.into_iter().zip(wanted) {
        let text = member.show(look)?;
        let found: BTreeSet<String> = text.lines().map(without_nexthop_id).collect();
        differences.extend(wanted.symmetric_difference(&found).cloned());
    }
    Ok(differences)
}

/// A line without the id of the nexthop object that a route uses: its gateway is shown as well.
fn without_nexthop_id(line: &str) -> String {
    match line.trim().split_once(" nhid ") {
        Some((destination, rest)) => format!("{destination} {}", rest.split_once(' ').unwrap_or_default().1),
        None => line.trim().to_owned(),
    }
}

/// An error with some of the differences and the agent's log, if there are any.
pub(crate) fn ensure_equal(member: &Member, peers: impl IntoIterator<Item = Peer>) -> anyhow::Result<()> {
    let differences = differences(member, peers)?;
    let some = &differences[..differences.len().min(10)];
    let (number, log) = (differences.len(), member.agent.log());
    ensure!(differences.is_empty(), "{number} differences, such as {some:#?}\n{log}");
    Ok(())
}
