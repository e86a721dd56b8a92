//! What others may do to a node, and how long the agent takes to put it right.

use anyhow::Context;
use backends::testing::Pinger;
use bench::progress::Progress;
use ipnet::IpNet;

use crate::Backend;
use crate::cluster::{Cluster, NETWORK, TIMEOUT};
use crate::table::Table;

/// Something that goes wrong on a node.
enum Damage {
    /// A command of `ip`.
    Ip(String),
    /// The link to the other nodes goes down and comes back.
    Flap,
    /// The agent is stopped and started.
    Restart,
}

/// Breaks one thing after another on the first node, each under a running ping from one of its pods to one
/// of the second node, and says what was lost until it was mended.
pub(crate) fn repair(cluster: &mut Cluster, progress: &Progress) -> anyhow::Result<Table> {
    let peer = cluster.sites[1].subnet;
    let mut table = Table::new(["damage on node1", "pings", "lost", "longest silence ms"]);
    for (what, damage) in damages(cluster.backend, peer) {
        progress.step(&format!("  {what}"))?;
        let pinger = start_pinger(cluster, progress)?;
        let node = &cluster.sites[0].node;
        match damage {
            Damage::Ip(command) => node.namespace().ip(&command)?,
            Damage::Flap => node.link_down().and_then(|()| node.link_up())?,
            Damage::Restart => cluster.restart_agent(0)?,
        }
        let node = &cluster.sites[0].node;
        let route = if matches!(cluster.backend, Backend::Udp | Backend::Wireguard) {
            NETWORK.parse()?
        } else {
            peer
        };
        let returns = format!("the route to {route} to come back");
        progress.wait_for(&returns, TIMEOUT, || node.has_route(route))?;
        pinger.wait_for_reply(TIMEOUT).with_context(|| format!("after the damage {what:?}"))?;
        let pings = pinger.finish()?;
        let silence = pings.longest_gap.as_millis();
        table.row([what, pings.sent.to_string(), pings.lost.to_string(), silence.to_string()]);
    }
    Ok(table)
}

fn damages(backend: Backend, peer: IpNet) -> Vec<(String, Damage)> {
    let ip = |command: &str| (format!("ip {command}"), Damage::Ip(command.to_owned()));
    let mut all = vec![("restart of flanneld".to_owned(), Damage::Restart)];
    let route = if matches!(backend, Backend::Udp | Backend::Wireguard) {
        NETWORK.to_owned()
    } else {
        peer.to_string()
    };
    all.push(ip(&format!("route del {route}")));
    match backend {
        Backend::Vxlan | Backend::Udp | Backend::Wireguard => {
            let device = backend.device();
            all.push(ip(&format!("link set {device} down")));
            all.push(ip(&format!("link del {device}")));
        }
        Backend::HostGw => all.push(("eth0 down and up".to_owned(), Damage::Flap)),
    }
    all
}

/// A ping that has run undisturbed for a moment.
fn start_pinger(cluster: &Cluster, progress: &Progress) -> anyhow::Result<Pinger> {
    const UNDISTURBED: u64 = 30;
    let source = cluster.sites[0].pods.first().context("node1 has no pods")?;
    let target = cluster.sites[1].pods.first().context("node2 has no pods")?;
    let pinger = Pinger::start(source.namespace(), target.address())?;
    progress.wait_for("answers before the damage", TIMEOUT, || Ok(pinger.received() >= UNDISTURBED))?;
    Ok(pinger)
}
