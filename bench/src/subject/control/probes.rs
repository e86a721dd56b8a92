//! What probing fifty peers costs. The peers are kernels alone: namespaces with a VXLAN device, as a node of Go flannel has.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Node, wait_for};
use serde_json::{Value, json};

use crate::Stage;
use crate::bed::{Cluster, Member, SETTLE, TIMEOUT, key};
use bench::figure::{Figure, Limit, Record};
use bench::process::{cpu_time, resident_mib};

const PEERS: usize = 50;
const TIME: Duration = Duration::from_secs(60);

/// Measures CPU time and memory of one agent with fifty peers that answer, with probes and without.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let mut with = Figure::new("probes: CPU over 60 s, 50 peers", "%", Limit::Median(0.3));
    let mut without = Figure::new("probes: the same with --probe-interval=0", "%", Limit::None);
    let mut memory = Figure::new("probes: VmRSS more than without", "MiB", Limit::Median(1.0));
    for round in stage.rounds(3) {
        let mut resident = [0.0; 2];
        for (index, interval) in ["0", "10s"].into_iter().enumerate() {
            let interval = format!("--probe-interval={interval}");
            let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
            let cluster = Cluster::new(stage.flanneld(), config, &[&interval])?;
            let mut member = cluster.join()?;
            let peers = peers(&cluster, &member)?;
            wait_for("routes to all peers", TIMEOUT, || {
                member
                    .node
                    .namespace()
                    .command("ip")
                    .args(["-4", "route", "show", "dev", "flannel.1"])
                    .ok()
                    .is_ok_and(|routes| routes.lines().count() == PEERS)
            })?;
            if index == 1 {
                wait_for("fifty peers that answer", TIMEOUT, || {
                    fine(&member).is_ok_and(|count| count == PEERS)
                })?;
            }
            stage.progress.pause(SETTLE)?;
            let pid = member.agent.process().id();
            let (begun, before) = (Instant::now(), cpu_time(pid)?);
            stage.progress.pause(TIME)?;
            let spent = cpu_time(pid)?.saturating_sub(before);
            let percent = 100.0 * spent.as_secs_f64() / begun.elapsed().as_secs_f64();
            resident[index] = resident_mib(pid)?;
            let figure = if index == 0 { &mut without } else { &mut with };
            figure.rounds.push(percent);
            stage.progress.step(&format!(
                "probes: round {round}: {interval}: {percent:.3} %, {:.2} MiB",
                resident[index]
            ))?;
            drop((peers, member, cluster));
        }
        memory.rounds.push((resident[1] - resident[0]).max(0.0));
    }
    [with, without, memory].iter().try_for_each(|figure| record.put(figure))
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
    let shown = member.node.namespace().command("ip").args(["-o", "link", "show", "flannel.1"]).ok()?;
    let mac = shown
        .split("link/ether ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .context("no MAC of flannel.1")?;
    let (network, public) = (own.network(), member.node.address());
    let (mut nodes, mut leases) = (Vec::new(), Vec::new());
    for number in 0..PEERS {
        let node = cluster.fabric.node()?;
        let subnet = format!("10.244.{}.0", 100 + number);
        ensure!(subnet != network.to_string(), "the agent has a subnet that a peer is to have");
        let vtep = format!("02:00:00:00:01:{number:02x}");
        node.namespace().ip(&format!(
            "link add flannel.1 address {vtep} mtu 1450 type vxlan id 1 dstport 8472 local {} nolearning\n\
             addr add {subnet}/32 dev flannel.1\n\
             link set flannel.1 up\n\
             neigh replace {network} lladdr {mac} dev flannel.1 nud permanent\n\
             route add {own} via {network} dev flannel.1 onlink",
            node.address()
        ))?;
        let entry = format!("{mac} dev flannel.1 dst {public}");
        let mut words = vec!["fdb", "append"];
        words.extend(entry.split(' '));
        node.namespace().command("bridge").args(words).ok()?;
        let value = json!({
            "PublicIP": node.address().to_string(),
            "BackendType": "vxlan",
            "BackendData": {"VNI": 1, "VtepMAC": vtep},
        });
        leases.push((key(format!("{subnet}/24").parse()?), value.to_string()));
        nodes.push(node);
    }
    cluster.write(&leases)?;
    Ok(nodes)
}
