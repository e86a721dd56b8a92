//! The cluster changes its backend three times while pods ping each other.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use backends::testing::{Process, wait_for};
use subnet::Family;

use super::AFTER;
use super::bed::Cluster;
use super::pings::Mesh;
use super::shown::{differences, everything};
use crate::Stage;
use crate::bed::{Member, TIMEOUT, config};
use bench::figure::{Figure, Limit, Record};

const NODES: usize = 3;
/// One edit each; the cluster begins with the last of them.
const SWITCHES: [&str; 3] = ["host-gw", "udp", "vxlan"];

/// Switches and compares with what was there at the start.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let mut lost = Figure::new("backend: pings lost in three switches", "", Limit::Each(0.0));
    let mut left = Figure::new("backend: lines that differ from a fresh start", "", Limit::Each(0.0));
    let mut settled = Figure::new("backend: last edit to all as after a fresh start", "s", Limit::None);
    let mut times =
        SWITCHES.map(|to| Figure::new(format!("backend: edit to last route, to {to}"), "ms", Limit::None));
    for round in stage.rounds(u32::MAX) {
        stage.progress.step(&format!("backend: round {round}: three nodes with vxlan"))?;
        let cluster = Cluster::new(stage, &config("vxlan", &[Family::V4]), NODES)?;
        let pods = cluster.pods(&[Family::V4])?;
        let mesh = Mesh::start(&pods, Family::V4)?.undisturbed()?;
        let fresh = all(&cluster)?;
        let mut edited = Instant::now();
        for (to, time) in SWITCHES.into_iter().zip(&mut times) {
            let watches =
                cluster.members.iter().map(RouteWatch::start).collect::<anyhow::Result<Vec<_>>>()?;
            edited = Instant::now();
            cluster.configure(&config(to, &[Family::V4]))?;
            cluster.wait(&format!("routes of {to}"), |member| leads_by(member, to))?;
            stage.progress.pause(AFTER)?;
            let last = watches.iter().filter_map(RouteWatch::last).max();
            time.push_ms(last.context("no route was changed")?.duration_since(edited));
        }
        let mut different = Vec::new();
        while edited.elapsed() < TIMEOUT {
            different = differences(&fresh, &all(&cluster)?);
            if different.is_empty() {
                break;
            }
            stage.progress.pause(Duration::from_millis(200))?;
        }
        settled.rounds.push(edited.elapsed().as_secs_f64());
        stage.progress.pause(AFTER)?;
        let tally = mesh.finish()?;
        stage.progress.step(&format!(
            "backend: round {round}: {} pings lost, the longest silence {:.0?}, differences {different:#?}",
            tally.lost(),
            tally.silence()
        ))?;
        if tally.lost() > 0 || !different.is_empty() {
            stage.progress.say(&cluster.logs())?;
        }
        lost.rounds.push(tally.lost() as f64);
        left.rounds.push(different.len() as f64);
    }
    stage.put(record, &[lost, left, settled])?;
    stage.put(record, &times)
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

/// A running `ip monitor`, and when it told of routes to pods.
struct RouteWatch {
    heard: Arc<Mutex<Heard>>,
    _process: Process,
}

#[derive(Default)]
struct Heard {
    marks: usize,
    last: Option<Instant>,
}

/// A route that only this makes, to know that the watch hears.
const MARK: &str = "192.0.2.1";

impl RouteWatch {
    fn start(member: &Member) -> anyhow::Result<Self> {
        let namespace = member.node.namespace();
        let command = namespace.command("ip").args(["-4", "-o", "monitor", "route"]).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let output = process.take_stdout().context("ip monitor has no output")?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let shared = Arc::clone(&heard);
        // It ends with the output of the process, which is killed on drop.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let mut heard = lock(&shared);
                if line.contains(MARK) {
                    heard.marks += 1;
                } else if line.contains("10.244.") {
                    heard.last = Some(Instant::now());
                }
            }
        });
        let watch = Self { heard, _process: process };
        wait_for("`ip monitor` to hear", TIMEOUT, || {
            let marked = namespace.ip(&format!("route add {MARK} dev lo\nroute del {MARK} dev lo"));
            thread::sleep(Duration::from_millis(20));
            marked.is_ok() && lock(&watch.heard).marks > 0
        })?;
        Ok(watch)
    }

    fn last(&self) -> Option<Instant> {
        lock(&self.heard).last
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().expect("no holder of this lock panics")
}
