//! What others may do to a node, and how long the agent takes to put it right.

use anyhow::Context;
use bench::bed::undisturbed_ping;
use bench::figure::markdown;
use bench::progress::Progress;

use crate::Backend;
use crate::cluster::{Cluster, NETWORK, TIMEOUT};

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
pub(crate) fn repair(cluster: &mut Cluster, progress: &Progress) -> anyhow::Result<String> {
    let titles = ["damage on node1", "pings", "lost", "longest silence ms"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    let route = match cluster.backend {
        // One route for the whole network.
        Backend::Udp | Backend::Wireguard => NETWORK.parse()?,
        Backend::Vxlan | Backend::HostGw => cluster.sites[1].subnet,
    };
    for (what, damage) in damages(cluster.backend, &route.to_string()) {
        progress.step(&format!("  {what}"))?;
        let pod = |site: usize| cluster.sites[site].pods.first().context("a node without pods");
        let pinger = undisturbed_ping(pod(0)?, pod(1)?)?;
        let node = &cluster.sites[0].member.node;
        match damage {
            Damage::Ip(command) => node.namespace().ip(&command)?,
            Damage::Flap => node.link_down().and_then(|()| node.link_up())?,
            Damage::Restart => cluster.restart_agent(0)?,
        }
        let node = &cluster.sites[0].member.node;
        let returns = format!("the route to {route} to come back");
        progress.wait_for(&returns, TIMEOUT, || node.has_route(route))?;
        pinger.wait_for_reply(TIMEOUT).with_context(|| format!("after the damage {what:?}"))?;
        let pings = pinger.finish()?;
        let silence = pings.longest_gap.as_millis();
        rows.push(vec![what, pings.sent.to_string(), pings.lost.to_string(), silence.to_string()]);
    }
    Ok(markdown(&rows))
}

fn damages(backend: Backend, route: &str) -> Vec<(String, Damage)> {
    let ip = |command: String| (format!("ip {command}"), Damage::Ip(command));
    let mut all = vec![("restart of flanneld".to_owned(), Damage::Restart), ip(format!("route del {route}"))];
    match backend {
        Backend::Vxlan | Backend::Udp | Backend::Wireguard => {
            let device = backend.device();
            all.push(ip(format!("link set {device} down")));
            all.push(ip(format!("link del {device}")));
        }
        Backend::HostGw => all.push(("eth0 down and up".to_owned(), Damage::Flap)),
    }
    all
}
