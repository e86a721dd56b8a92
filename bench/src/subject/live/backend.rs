//! The cluster changes its backend three times while pods ping each other.

use std::time::{Duration, Instant};

use anyhow::Context;
use bench::bed::{Member, TIMEOUT, config};
use bench::figure::{Limit, ms};
use bench::monitor::RouteMonitor;
use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use super::shown::{differences, everything};
use crate::Stage;

const NODES: usize = 3;
/// One edit each; the cluster begins with the last of them.
const SWITCHES: [&str; 3] = ["host-gw", "udp", "vxlan"];

/// Switches and compares with what was there at the start.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let rows = [
        ("pings lost in three switches", "", Limit::Each(0.0)),
        ("lines that differ from a fresh start", "", Limit::Each(0.0)),
        ("last edit to all as after a fresh start", "s", Limit::None),
        ("edit to last route, to host-gw", "ms", Limit::None),
        ("edit to last route, to udp", "ms", Limit::None),
        ("edit to last route, to vxlan", "ms", Limit::None),
    ];
    stage.measure("backend", rows, u32::MAX, |_| {
        let cluster = Cluster::new(stage, &config("vxlan", &[Family::V4]), NODES)?;
        let pods = cluster.pods(&[Family::V4])?;
        let mesh = Mesh::start(&pods, Family::V4)?.undisturbed()?;
        let fresh = all(&cluster)?;
        let mut edited = Instant::now();
        let mut times = [0.0; 3];
        for (to, time) in SWITCHES.into_iter().zip(&mut times) {
            let watches = cluster.members.iter().map(|member| RouteMonitor::start(&member.node));
            let watches = watches.collect::<anyhow::Result<Vec<_>>>()?;
            edited = Instant::now();
            cluster.configure(&config(to, &[Family::V4]))?;
            cluster.wait(&format!("routes of {to}"), |member| leads_by(member, to))?;
            stage.progress.pause(AFTER)?;
            let last = watches.iter().filter_map(|watch| watch.last("10.244.")).max();
            *time = ms(last.context("no route was changed")?.duration_since(edited));
        }
        let mut different = differences(&fresh, &all(&cluster)?);
        while !different.is_empty() && edited.elapsed() < TIMEOUT {
            stage.progress.pause(Duration::from_millis(200))?;
            different = differences(&fresh, &all(&cluster)?);
        }
        let settled = edited.elapsed().as_secs_f64();
        stage.progress.pause(AFTER)?;
        let lost = cluster.lost(stage, &mesh.finish()?)?;
        if !different.is_empty() {
            stage.progress.say(&format!("differences {different:#?}\n{}", cluster.logs()))?;
        }
        let [host_gw, udp, vxlan] = times;
        Ok([lost, different.len() as f64, settled, host_gw, udp, vxlan])
    })
}

/// What all nodes show.
fn all(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for member in &cluster.members {
        let of_one = everything(member)?;
        lines.extend(of_one.into_iter().map(|line| format!("{}: {line}", member.node.name())));
    }
    Ok(lines)
}

/// Whether all routes to peers are those of a backend, and no others.
fn leads_by(member: &Member, backend: &str) -> anyhow::Result<bool> {
    let routes = member.show("ip -4 route show proto 70")?;
    let to_peers: Vec<&str> =
        routes.lines().filter(|line| line.starts_with("10.244.") && line.contains("/24 ")).collect();
    Ok(match backend {
        // One route for the whole network.
        "udp" => {
            to_peers.is_empty() && member.show("ip -4 route show 10.244.0.0/16")?.contains("dev flannel0")
        }
        _ => {
            let device = if backend == "vxlan" { "dev flannel.1" } else { "dev eth0" };
            to_peers.len() == NODES - 1 && to_peers.iter().all(|line| line.contains(device))
        }
    })
}
