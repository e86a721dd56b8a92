//! What the plugin adds to the time in which the delegates attach a pod.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Fabric, Namespace, Node};
use serde_json::json;

use crate::Stage;
use crate::figure::{Figure, Limit, Record, median};

/// Pods attached each way in a round.
const PODS: u32 = 100;
const MOST_ROUNDS: u32 = 3;
const DELEGATES: &str = "/usr/lib/cni";

/// A way of attaching pods to a node.
struct Way<'a> {
    node: &'a Node,
    program: PathBuf,
    config: String,
    path: String,
}

/// Attaches pods through the plugin and through its delegates alone, in turns, on the same node.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let bridge = Path::new(DELEGATES).join("bridge");
    ensure!(bridge.is_file(), "no {}: apt-get install containernetworking-plugins", bridge.display());
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    fs::write(node.subnet_file(), env).context("can't write the subnet file")?;
    let plugin = through_plugin(stage, &node);
    let delegates =
        Way { node: &node, program: bridge, config: generated_config(&plugin)?, path: DELEGATES.to_owned() };

    let mut difference =
        Figure::new("cni-add: p50 through the plugin less p50 of the delegates", "ms", Limit::Median(3.0));
    let mut whole = Figure::new("cni-add: p50 through the plugin", "ms", Limit::None);
    let mut alone = Figure::new("cni-add: p50 of the delegates", "ms", Limit::None);
    for round in stage.rounds(MOST_ROUNDS) {
        let [mut with, mut without] = [Vec::new(), Vec::new()];
        for pod in 0..PODS {
            stage.progress.check()?;
            let container = |way: &str| format!("bench-{}-{round}-{pod}-{way}", std::process::id());
            // Neither is always the first.
            for plugin_now in [pod % 2 == 0, pod % 2 == 1] {
                if plugin_now {
                    with.push(plugin.attach(&container("plugin"))?);
                } else {
                    without.push(delegates.attach(&container("delegates"))?);
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

fn through_plugin<'a>(stage: &Stage, node: &'a Node) -> Way<'a> {
    let config = json!({
        "cniVersion": "1.0.0",
        "name": "cbr0",
        "type": "flannel",
        "subnetFile": node.subnet_file(),
        "dataDir": node.dir().join("cni"),
        "delegate": { "hairpinMode": true, "isDefaultGateway": true },
        "ipam": { "dataDir": node.dir().join("ipam") },
    });
    Way { node, program: stage.plugin(), config: config.to_string(), path: DELEGATES.to_owned() }
}

/// What the plugin gives to its delegate: it keeps it for DEL in a file named after the container.
fn generated_config(plugin: &Way<'_>) -> anyhow::Result<String> {
    let pod = Namespace::new()?;
    let container = format!("bench-{}", std::process::id());
    plugin.call("ADD", &container, &pod)?;
    let kept = plugin.node.dir().join("cni").join(&container);
    let config = fs::read_to_string(&kept).with_context(|| format!("can't read {}", kept.display()))?;
    plugin.call("DEL", &container, &pod)?;
    Ok(config)
}

impl Way<'_> {
    /// Attaches a new pod and detaches it again; gives the time of the former.
    fn attach(&self, container: &str) -> anyhow::Result<Duration> {
        let pod = Namespace::new()?;
        let start = Instant::now();
        self.call("ADD", container, &pod)?;
        let time = start.elapsed();
        self.call("DEL", container, &pod)?;
        Ok(time)
    }

    fn call(&self, verb: &str, container: &str, pod: &Namespace) -> anyhow::Result<()> {
        let command = self.node.namespace().command(&self.program);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.path)
            .input(self.config.as_str())
            .ok()
            .map(drop)
    }
}

fn p50(times: Vec<Duration>) -> f64 {
    let mut ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    median(&ms)
}
