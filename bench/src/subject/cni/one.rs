//! One pod after the other: the median of the times, and the CPU time of all that runs for a pod.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use backends::testing::Namespace;
use bench::figure::{Figure, Limit, Record, median};
use nix::sys::resource::{UsageWho, getrusage};

use super::Node;
use crate::Stage;

/// Pods of a round.
const PODS: usize = 40;
/// So many pods of the 253 that a /24 has room for are there when the pool is called full.
const FULL: usize = 240;

/// What is asked of the plugin, beside Go's in the same run.
const ADD_RATIO: f64 = 0.15;
const ADD_MILLISECONDS: f64 = 3.0;
const ADD_CPU: f64 = 2.5;
const DEL_RATIO: f64 = 1.2;
const DEL_CPU: f64 = 2.0;
const FULL_CPU: f64 = 5.0;

pub(super) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let pods = (0..FULL + PODS / 4).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
    let nodes = [Node::new(stage, false)?, Node::new(stage, true)?];
    let names = ["flannel", "go"];
    let figure = |name: String, unit, limit| Figure::new(name, unit, limit);
    let limit = |way: usize, limit: f64| if way == 0 { Limit::Median(limit) } else { Limit::None };
    let mut times = [("add", ADD_MILLISECONDS), ("del", f64::INFINITY)].map(|(verb, most)| {
        let limits = [0, 1].map(|way| if most.is_finite() { limit(way, most) } else { Limit::None });
        [0, 1].map(|way| figure(format!("cni-one-{verb}-{}", names[way]), "ms", limits[way]))
    });
    let mut cpu = [("add", ADD_CPU), ("del", DEL_CPU)].map(|(verb, most)| {
        [0, 1].map(|way| figure(format!("cni-one-{verb}-cpu-{}", names[way]), "ms of CPU", limit(way, most)))
    });
    let mut add_ratio = figure("cni-one-add-ratio".into(), "ratio", Limit::Median(ADD_RATIO));
    let mut floor = [("ip-batch", "ms"), ("ip-batch-cpu", "ms of CPU")]
        .map(|(name, unit)| figure(format!("cni-one-add-{name}"), unit, Limit::None));
    let mut bare = figure("cni-one-link-del".into(), "ms", Limit::None);
    let mut del_ratio = figure("cni-one-del-to-link-del".into(), "ratio", Limit::Median(DEL_RATIO));
    let mut full = [0, 1]
        .map(|way| figure(format!("cni-full-add-cpu-{}", names[way]), "ms of CPU", limit(way, FULL_CPU)));

    for round in stage.rounds(u32::MAX) {
        for way in [round % 2, (round + 1) % 2].map(|way| way as usize) {
            stage.progress.check()?;
            for (verb, (times, cpu)) in ["ADD", "DEL"].into_iter().zip(times.iter_mut().zip(&mut cpu)) {
                let (time, used) = in_turn(&nodes[way], verb, &pods[..PODS], 0)?;
                times[way].rounds.push(time);
                cpu[way].rounds.push(used);
            }
        }
        for (figure, value) in floor.iter_mut().zip(ip_batch(&nodes[0], &pods[..PODS])?) {
            figure.rounds.push(value);
        }
        bare.rounds.push(link_del(&nodes[0], &pods[..PODS])?);
        let last = |figure: &Figure| figure.rounds.last().copied().unwrap_or_default();
        add_ratio.rounds.push(last(&times[0][0]) / last(&times[0][1]));
        del_ratio.rounds.push(last(&times[1][0]) / last(&bare));
        stage.progress.step(&format!("cni: round {round}: ADD in {:.2} ms", last(&times[0][0])))?;
    }
    for way in [0, 1] {
        in_turn(&nodes[way], "ADD", &pods[..FULL], 0)?;
        let (_, used) = in_turn(&nodes[way], "ADD", &pods[FULL..], FULL)?;
        full[way].rounds.push(used);
        // The pods are the other way's next.
        in_turn(&nodes[way], "DEL", &pods[..FULL], 0)?;
        in_turn(&nodes[way], "DEL", &pods[FULL..], FULL)?;
    }
    let all = times
        .iter()
        .flatten()
        .chain(cpu.iter().flatten())
        .chain(&floor)
        .chain([&add_ratio, &bare, &del_ratio])
        .chain(&full);
    for figure in all {
        record.put(figure)?;
    }
    Ok(())
}

/// Calls the plugin for each of the pods; gives the median of the milliseconds, and the CPU time of a call, programs that
/// it runs included.
fn in_turn(node: &Node, verb: &str, pods: &[Namespace], first: usize) -> anyhow::Result<(f64, f64)> {
    node.namespace.run(|| -> anyhow::Result<(f64, f64)> {
        let before = children()?;
        let mut times = Vec::new();
        for (number, pod) in pods.iter().enumerate() {
            let start = Instant::now();
            node.plugin.call(verb, &format!("pod-{}", first + number), pod)?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        Ok((median(&times), (children()? - before) / pods.len() as f64))
    })
}

/// The median of the milliseconds, and the CPU time, in which two runs of `ip -batch` ask the kernel for what an ADD asks it for, on
/// the node and in the pod. Nothing is removed in between, as with ADD.
fn ip_batch(node: &Node, pods: &[Namespace]) -> anyhow::Result<[f64; 2]> {
    let batch = |lines: &str| -> anyhow::Result<()> {
        let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
        child.stdin.take().context("it is piped")?.write_all(lines.as_bytes())?;
        ensure!(child.wait()?.success(), "ip -batch failed: {lines}");
        Ok(())
    };
    let before = children()?;
    let mut times = Vec::new();
    for (number, pod) in pods.iter().enumerate() {
        let start = Instant::now();
        let path = pod.path().display().to_string();
        let pair = format!(
            "link add floor{number} mtu 1450 up master cni0 type veth peer name eth0 mtu 1450 netns {path}\n\
             link set floor{number} type bridge_slave hairpin on\n"
        );
        node.namespace.run(|| batch(&pair))?;
        let inside = format!(
            "link set eth0 up\naddress add 10.244.7.{}/24 brd + dev eth0\nroute add 10.244.0.0/16 via 10.244.7.1\n\
             route add default via 10.244.7.1\n",
            number + 2
        );
        pod.run(|| batch(&inside))?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let used = (children()? - before) / pods.len() as f64;
    for pod in pods {
        let status = pod.run(|| Command::new("ip").args(["link", "del", "eth0"]).status())?;
        ensure!(status.success(), "ip link del failed");
    }
    times.sort_by(f64::total_cmp);
    Ok([median(&times), used])
}

/// Milliseconds of CPU of all programs that have ended.
fn children() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("can't read the CPU time")?;
    let milliseconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 * 1e3 + time.tv_usec() as f64 / 1e3;
    Ok(milliseconds(usage.user_time()) + milliseconds(usage.system_time()))
}

/// The median of the milliseconds in which `ip link del` removes a pair of links between node and pod.
fn link_del(node: &Node, pods: &[Namespace]) -> anyhow::Result<f64> {
    let ip = |pod: &Namespace, arguments: &[&str]| -> anyhow::Result<f64> {
        let start = Instant::now();
        let status = pod.run(|| Command::new("ip").args(arguments).status())?;
        ensure!(status.success(), "ip {arguments:?} failed");
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let mut times = Vec::new();
    for pod in pods {
        let node_path = node.namespace.path();
        let node_name = node_path.to_string_lossy().into_owned();
        let peer = ["link", "add", "eth0", "type", "veth", "peer", "name", "bare0", "netns", &node_name];
        ip(pod, &peer)?;
        node.namespace.run(|| -> anyhow::Result<()> {
            let status =
                Command::new("ip").args(["link", "set", "bare0", "up", "master", "cni0"]).status()?;
            ensure!(status.success(), "ip link set bare0 failed");
            Ok(())
        })?;
        ip(pod, &["link", "set", "eth0", "up"])?;
        times.push(ip(pod, &["link", "del", "eth0"])?);
    }
    times.sort_by(f64::total_cmp);
    Ok(median(&times))
}
