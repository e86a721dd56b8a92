//! What probing fifty peers costs. The peers are kernels alone: namespaces with a VXLAN device, as a node of Go flannel has.

use std::time::Duration;

use anyhow::{Context, ensure};
use backends::testing::Node;
use bench::bed::{Cluster, Member, SETTLE, config, key};
use bench::figure::Limit;
use bench::peer::{PEER_OBJECTS, lease, mac as mac_of};
use bench::process::resident_mib;
use serde_json::Value;
use subnet::Family;

use crate::Stage;

const PEERS: usize = 50;
const TIME: Duration = Duration::from_secs(60);

/// Measures CPU time and memory of one agent with fifty peers that answer, with probes and without.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let rows = [
        ("CPU over 60 s, 50 peers", "%", Limit::Median(0.3)),
        ("the same with --probe-interval=0", "%", Limit::None),
        ("VmRSS more than without", "MiB", Limit::Median(1.0)),
    ];
    stage.measure("probes", rows, 3, |_| {
        let (without, resident) = one(stage, "--probe-interval=0", false)?;
        let (with, more) = one(stage, "--probe-interval=10s", true)?;
        Ok([with, without, (more - resident).max(0.0)])
    })
}

/// CPU in percent, and MiB.
fn one(stage: &Stage, flag: &str, probes: bool) -> anyhow::Result<(f64, f64)> {
    let cluster = Cluster::new(stage.flanneld(), &config("vxlan", &[Family::V4]), &[flag])?;
    let mut member = cluster.join()?;
    let _peers = peers(&cluster, &member)?;
    let routes = || member.count(PEER_OBJECTS[0]).is_ok_and(|count| count == PEERS);
    member.wait("routes to all peers", routes)?;
    if probes {
        let fine = || fine(&member).is_ok_and(|count| count == PEERS);
        member.wait("fifty peers that answer", fine)?;
    }
    stage.progress.pause(SETTLE)?;
    let percent = stage.cpu_percent(member.pid(), TIME)?;
    Ok((percent, resident_mib(member.pid())?))
}

/// How many peers' tunnels answer, by the agent.
fn fine(member: &Member) -> anyhow::Result<usize> {
    let (_, body) = member.agent.get("/peers")?;
    let answer: Value = serde_json::from_str(&body)?;
    let peers = answer["peers"].as_array().context("no peers")?;
    Ok(peers.iter().filter(|peer| peer["state"] == "reachable").count())
}

/// Nodes without an agent: a VXLAN device with the subnet's first address, and the way back to `member`.
fn peers(cluster: &Cluster, member: &Member) -> anyhow::Result<Vec<Node>> {
    let own = member.subnet()?;
    let shown = member.show("ip -o link show flannel.1")?;
    let mac = shown.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next());
    let mac = mac.context("no MAC of flannel.1")?;
    let (network, public) = (own.network(), member.node.address());
    let (mut nodes, mut leases) = (Vec::new(), Vec::new());
    for number in 0..PEERS {
        let node = cluster.fabric.node()?;
        let subnet = format!("10.244.{}.0", 100 + number);
        ensure!(subnet != network.to_string(), "the agent has a subnet that a peer is to have");
        let vtep = mac_of(number as u32);
        node.namespace().ip(&format!(
            "link add flannel.1 address {vtep} mtu 1450 type vxlan id 1 dstport 8472 local {} nolearning\n\
             addr add {subnet}/32 dev flannel.1\n\
             link set flannel.1 up\n\
             neigh replace {network} lladdr {mac} dev flannel.1 nud permanent\n\
             route add {own} via {network} dev flannel.1 onlink",
            node.address()
        ))?;
        node.namespace().show(&format!("bridge fdb append {mac} dev flannel.1 dst {public}"))?;
        leases.push((key(format!("{subnet}/24").parse()?), lease(node.address(), vtep)));
        nodes.push(node);
    }
    cluster.write(&leases)?;
    Ok(nodes)
}
