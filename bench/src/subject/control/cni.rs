//! What the plugin adds to the time in which the delegates attach a pod.

use std::time::{Duration, Instant};

use backends::testing::{Fabric, Namespace, Node};
use bench::figure::{Figure, Limit, Record, median};

use crate::Stage;
use crate::plugin::Plugin;

/// Pods attached each way in a round.
const PODS: u32 = 100;
const MAX_ROUNDS: u32 = 3;

/// Attaches pods through the plugin and through its delegates alone, in turns, on the same node.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let plugin = Plugin::flannel(stage.plugin(), node.dir())?;
    let delegates = Plugin::delegate(&plugin, node.namespace(), node.dir())?;

    let mut difference =
        Figure::new("cni-add: p50 through the plugin less p50 of the delegates", "ms", Limit::Median(3.0));
    let mut whole = Figure::new("cni-add: p50 through the plugin", "ms", Limit::None);
    let mut alone = Figure::new("cni-add: p50 of the delegates", "ms", Limit::None);
    for round in stage.rounds(MAX_ROUNDS) {
        let [mut with, mut without] = [Vec::new(), Vec::new()];
        for pod in 0..PODS {
            stage.progress.check()?;
            // Neither is always the first.
            for plugin_now in [pod % 2 == 0, pod % 2 == 1] {
                if plugin_now {
                    with.push(attach(&plugin, &node, &format!("bench-{round}-{pod}-plugin"))?);
                } else {
                    without.push(attach(&delegates, &node, &format!("bench-{round}-{pod}-delegates"))?);
                }
            }
        }
        let (with, without) = (p50(with), p50(without));
        stage
            .progress
            .step(&format!("cni-add: round {round}: {with:.2} ms, delegates alone {without:.2} ms"))?;
        difference.rounds.push(with - without);
        whole.rounds.push(with);
        alone.rounds.push(without);
    }
    [difference, whole, alone].iter().try_for_each(|figure| record.put(figure))
}

/// Attaches a new pod and detaches it again; gives the time of the former.
fn attach(plugin: &Plugin, node: &Node, container: &str) -> anyhow::Result<Duration> {
    let pod = Namespace::new()?;
    node.namespace().run(|| {
        let start = Instant::now();
        plugin.call("ADD", container, &pod)?;
        let time = start.elapsed();
        plugin.call("DEL", container, &pod)?;
        Ok(time)
    })
}

fn p50(times: Vec<Duration>) -> f64 {
    let mut ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    median(&ms)
}
