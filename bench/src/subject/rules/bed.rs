//! What the measurements are taken on: a node with its agent, a pod on it, and a host outside.
//!
//! ```text
//! pod ── cni0 node eth0 ── switch ── eth0 outside
//!          flanneld          etcd
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use backends::nft::{Expr, Nft, NftError, Rule, Ruleset};
use backends::testing::{Node, Pod, wait_for};
use bench::bed::{Cluster, Member, TIMEOUT, config};
use subnet::Family;

use crate::Stage;

/// The two mechanisms, by their names in figures and on the agent's command line.
pub(crate) const MODES: [(&str, &str); 2] =
    [("nft", "--traffic-manager=nft"), ("iptables", "--traffic-manager=iptables")];

/// The whole network of pods.
const NETWORK: &str = "10.244.0.0/16";

/// A node, a pod and a host outside; what depends on another thing is dropped before it.
pub(crate) struct Setup {
    pub(crate) member: Member,
    pub(crate) pod: Pod,
    /// It has a route to the pods through the node, so that nothing depends on the masquerade.
    pub(crate) outside: Node,
    _cluster: Cluster,
}

impl Setup {
    /// A host whose agent, the program `flanneld`, is ready and masquerades by the mechanism `mode`.
    pub(crate) fn new(stage: &Stage, flanneld: PathBuf, mode: &str) -> anyhow::Result<Self> {
        stage.progress.step(&format!("a node, a pod and a host outside; {mode}"))?;
        let cluster = Cluster::new(flanneld, &config("vxlan", &[Family::V4]), &["--ip-masq", mode])?;
        let (member, outside) = (cluster.join()?, cluster.fabric.node()?);
        outside.namespace().ip(&format!("route add {NETWORK} via {}", member.node.address()))?;
        let pod = member.pod(&[Family::V4])?;
        wait_for("the first echo from outside", TIMEOUT, || {
            pod.namespace().reaches(outside.address().into()).unwrap_or(false)
        })?;
        Ok(Self { member, pod, outside, _cluster: cluster })
    }

    /// Where datagrams go: to a port of the host outside.
    pub(crate) fn target(&self) -> SocketAddr {
        SocketAddr::from((self.outside.address(), 9_000))
    }

    /// A netlink socket to the node's nftables, for any thread.
    pub(crate) fn nft(&self) -> Result<Nft, NftError> {
        self.member.node.namespace().run(Nft::open)
    }
}

/// All rules, without what counters counted, the time that elements have left, the kernel's numbers and the order of things that have
/// names.
pub(crate) fn look(nft: &mut Nft) -> Result<Ruleset, NftError> {
    let mut found = nft.dump()?;
    found.tables.sort_by(|one, other| one.id.cmp(&other.id));
    for table in &mut found.tables {
        table.sets.sort_by(|one, other| one.name.cmp(&other.name));
        table.chains.sort_by(|one, other| one.name.cmp(&other.name));
        table.chains.iter_mut().flat_map(|chain| &mut chain.rules).for_each(plain);
        let lifetimes = table.sets.iter_mut().flat_map(|set| set.lifetimes.values_mut());
        lifetimes.for_each(|left| *left = Duration::ZERO);
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
