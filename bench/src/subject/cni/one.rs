//! One pod after the other: the median of the times, and the CPU time of all that runs for a pod.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use backends::testing::Namespace;
use bench::figure::{Limit, Row, median, ms};
use bench::process::cpu_time_of_children;

use super::Node;
use crate::Stage;

/// Pods of a round.
const PODS: usize = 40;
/// So many pods of the 253 that a /24 has room for are there when the pool is called full.
const FULL: usize = 240;

/// What is asked of the plugin, beside Go's in the same run.
const ROWS: [Row<'_>; 13] = [
    ("add-flannel", "ms", Limit::Median(3.0)),
    ("add-cpu-flannel", "ms of CPU", Limit::Median(2.5)),
    ("del-flannel", "ms", Limit::None),
    ("del-cpu-flannel", "ms of CPU", Limit::Median(2.0)),
    ("add-go", "ms", Limit::None),
    ("add-cpu-go", "ms of CPU", Limit::None),
    ("del-go", "ms", Limit::None),
    ("del-cpu-go", "ms of CPU", Limit::None),
    ("add-ratio", "ratio", Limit::Median(0.15)),
    ("add-ip-batch", "ms", Limit::None),
    ("add-ip-batch-cpu", "ms of CPU", Limit::None),
    ("link-del", "ms", Limit::None),
    ("del-to-link-del", "ratio", Limit::Median(1.2)),
];

pub(super) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let pods = (0..FULL + PODS / 4).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
    let nodes = [Node::new(stage, false)?, Node::new(stage, true)?];
    let some = &pods[..PODS];
    stage.measure("cni-one", ROWS, u32::MAX, |round| {
        let mut ways = [[0.0; 4]; 2];
        // Neither is always the first.
        for way in [round % 2, (round + 1) % 2].map(|way| way as usize) {
            let ([add, add_cpu], [del, del_cpu]) =
                (calls(&nodes[way], "ADD", some, 0)?, calls(&nodes[way], "DEL", some, 0)?);
            ways[way] = [add, add_cpu, del, del_cpu];
        }
        let ([flannel, go], batch, bare) = (ways, ip_batch(&nodes[0], some)?, link_del(&nodes[0], some)?);
        let ratios = [flannel[0] / go[0], batch[0], batch[1], bare, flannel[2] / bare];
        let mut all = [0.0; ROWS.len()];
        all.iter_mut().zip(flannel.into_iter().chain(go).chain(ratios)).for_each(|(to, value)| *to = value);
        Ok(all)
    })?;
    let rows =
        [("add-cpu-flannel", "ms of CPU", Limit::Median(5.0)), ("add-cpu-go", "ms of CPU", Limit::None)];
    stage.measure("cni-full", rows, 1, |_| {
        let full = |node: &Node| -> anyhow::Result<f64> {
            calls(node, "ADD", &pods[..FULL], 0)?;
            let [_, cpu] = calls(node, "ADD", &pods[FULL..], FULL)?;
            // The pods are the other way's next.
            calls(node, "DEL", &pods[..FULL], 0)?;
            calls(node, "DEL", &pods[FULL..], FULL)?;
            Ok(cpu)
        };
        Ok([full(&nodes[0])?, full(&nodes[1])?])
    })
}

/// Does something for each of the pods; gives the median of the milliseconds that it says, and the CPU time of each, of all
/// programs that were run meanwhile.
fn in_turn(
    pods: &[Namespace],
    mut work: impl FnMut(usize, &Namespace) -> anyhow::Result<f64>,
) -> anyhow::Result<[f64; 2]> {
    let before = cpu_time_of_children()?;
    let times = pods.iter().enumerate().map(|(number, pod)| work(number, pod));
    let times = times.collect::<anyhow::Result<Vec<_>>>()?;
    Ok([median(times), ms(cpu_time_of_children()? - before) / pods.len() as f64])
}

/// Calls the plugin for each of the pods.
fn calls(node: &Node, verb: &str, pods: &[Namespace], first: usize) -> anyhow::Result<[f64; 2]> {
    node.namespace.run(|| {
        in_turn(pods, |number, pod| {
            let start = Instant::now();
            node.plugin.call(verb, &format!("pod-{}", first + number), pod)?;
            Ok(ms(start.elapsed()))
        })
    })
}

/// Two runs of `ip -batch` that ask the kernel for what an ADD asks it for, on the node and in the pod. Nothing is removed in
/// between, as with ADD.
fn ip_batch(node: &Node, pods: &[Namespace]) -> anyhow::Result<[f64; 2]> {
    let floor = in_turn(pods, |number, pod| {
        let start = Instant::now();
        ip(
            &node.namespace,
            "-batch -",
            &format!(
                "link add floor{number} mtu 1450 up master cni0 type veth peer name eth0 mtu 1450 netns {}\n\
             link set floor{number} type bridge_slave hairpin on\n",
                pod.path().display()
            ),
        )?;
        ip(
            pod,
            "-batch -",
            &format!(
                "link set eth0 up\naddress add 10.244.7.{}/24 brd + dev eth0\nroute add 10.244.0.0/16 via 10.244.7.1\n\
             route add default via 10.244.7.1\n",
                number + 2
            ),
        )?;
        Ok(ms(start.elapsed()))
    })?;
    pods.iter().try_for_each(|pod| ip(pod, "link del eth0", ""))?;
    Ok(floor)
}

/// The median of the milliseconds in which `ip link del` removes a pair of links between node and pod.
fn link_del(node: &Node, pods: &[Namespace]) -> anyhow::Result<f64> {
    let [median, _] = in_turn(pods, |_, pod| {
        let namespace = node.namespace.path().display();
        pod.ip(&format!("link add eth0 type veth peer name bare0 netns {namespace}"))?;
        node.namespace.ip("link set bare0 up master cni0")?;
        pod.ip("link set eth0 up")?;
        let start = Instant::now();
        ip(pod, "link del eth0", "")?;
        Ok(ms(start.elapsed()))
    })?;
    Ok(median)
}

/// Runs `ip` alone: a program around it would count.
fn ip(namespace: &Namespace, words: &str, lines: &str) -> anyhow::Result<()> {
    namespace.run(|| {
        let mut child = Command::new("ip").args(words.split(' ')).stdin(Stdio::piped()).spawn()?;
        child.stdin.take().context("it is piped")?.write_all(lines.as_bytes())?;
        ensure!(child.wait()?.success(), "ip {words} failed: {lines}");
        Ok(())
    })
}
