//! What the plugin adds to the time in which the delegates attach a pod.

use std::time::Instant;

use backends::testing::{Fabric, Namespace, Node};
use bench::figure::{Limit, median, ms};

use crate::Stage;
use crate::plugin::Plugin;

/// Pods attached each way in a round.
const PODS: usize = 100;
const MAX_ROUNDS: u32 = 3;

/// Attaches pods through the plugin and through its delegates alone, in turns, on the same node.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let plugin = Plugin::flannel(stage.plugin(), node.dir())?;
    let delegates = Plugin::delegate(&plugin, node.namespace(), node.dir())?;
    let rows = [
        ("p50 through the plugin less p50 of the delegates", "ms", Limit::Median(3.0)),
        ("p50 through the plugin", "ms", Limit::None),
        ("p50 of the delegates", "ms", Limit::None),
    ];
    stage.measure("cni-add", rows, MAX_ROUNDS, |round| {
        let mut times = [Vec::new(), Vec::new()];
        for number in 0..PODS {
            stage.progress.check()?;
            // Neither is always the first.
            for way in [number % 2, (number + 1) % 2] {
                let container = format!("bench-{round}-{number}-{way}");
                times[way].push(attach([&plugin, &delegates][way], &node, &container)?);
            }
        }
        let [with, without] = times.map(median);
        Ok([with - without, with, without])
    })
}

/// Attaches a new pod and detaches it again; gives the milliseconds of the former.
fn attach(plugin: &Plugin, node: &Node, container: &str) -> anyhow::Result<f64> {
    let pod = Namespace::new()?;
    node.namespace().run(|| {
        let start = Instant::now();
        plugin.call("ADD", container, &pod)?;
        let time = ms(start.elapsed());
        plugin.call("DEL", container, &pod)?;
        Ok(time)
    })
}
