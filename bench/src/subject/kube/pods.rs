//! Pods that wait for their network, as a container runtime has them on a new node: it tries as soon as there
//! is a CNI configuration.

use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, anyhow, ensure};
use backends::testing::{Namespace, Node};
use bench::figure::{Limit, Row, ms};
use serde_json::{Value, json};

use super::cluster;
use crate::Stage;
use crate::plugin::{DELEGATES, Plugin, flannel_config};

/// Pods that wait on a node.
const PODS: usize = 10;

/// Starts an agent on a new node round after round, while pods wait there.
pub(crate) fn measure(stage: &Stage) -> anyhow::Result<()> {
    let cluster = cluster(stage)?;
    let rows: [Row<'_>; 3] = [
        (&format!("of {PODS} that wait, first ADDs that fail"), "", Limit::Each(0.0)),
        ("exec to the CNI configuration", "ms", Limit::None),
        (&format!("exec to all {PODS} added"), "ms", Limit::None),
    ];
    stage.measure("pods", rows, u32::MAX, |round| {
        let node = cluster.node()?;
        let source = node.dir().join("cni-conf.json");
        let conflist = node.dir().join("net.d/10-flannel.conflist");
        fs::write(&source, configuration(&node).to_string())?;
        let pods = (0..PODS).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
        let flag = format!("--cni-conf={}:{}", source.display(), conflist.display());
        let member = cluster.start_with(node, &[&flag])?;
        let written = member.time_until("CNI configuration", || conflist.exists())?;
        let list = serde_json::from_str(&fs::read_to_string(&conflist)?).context("it is not JSON")?;
        let (list, programs): (&Value, &Path) = (&list, &stage.programs);
        // Threads that are made inside the namespace are in it, and so are their children.
        let outcomes = member.node.namespace().run(|| {
            thread::scope(|scope| {
                let adding = pods.iter().enumerate().map(|(number, pod)| {
                    let container = format!("bench-{}-{round}-{number}", std::process::id());
                    scope.spawn(move || add(list, programs, &container, pod))
                });
                let adding: Vec<_> = adding.collect();
                let outcomes = adding.into_iter().map(|adding| adding.join());
                outcomes.map(|outcome| outcome.map_err(|_| anyhow!("it panicked"))?).collect::<Vec<_>>()
            })
        });
        let all = member.started.elapsed();
        let failures: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
        failures.iter().for_each(|error| eprintln!("          failed: {error:#}"));
        drop(pods);
        cluster.remove(member)?;
        Ok([failures.len() as f64, ms(written), ms(all)])
    })
}

/// That of `kube-flannel.yml`, with all that the plugins keep in files below the node's directory.
fn configuration(node: &Node) -> Value {
    json!({
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            flannel_config(&node.subnet_file(), node.dir()),
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// ADD of each plugin of a list, with the result of the one before, as a runtime does it.
fn add(list: &Value, programs: &Path, container: &str, pod: &Namespace) -> anyhow::Result<()> {
    let mut result = Value::Null;
    for plugin in list["plugins"].as_array().context("the CNI configuration has no plugins")? {
        let mut config = plugin.clone();
        for member in ["name", "cniVersion"] {
            config[member] = list[member].clone();
        }
        if !result.is_null() {
            config["prevResult"] = result;
        }
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let program = [programs, Path::new(DELEGATES)].map(|directory| directory.join(kind));
        let program = program.into_iter().find(|path| path.is_file());
        let program = program
            .with_context(|| format!("no plugin {kind}: apt-get install containernetworking-plugins"))?;
        let answer = Plugin { program, config: config.to_string() }.call("ADD", container, pod)?;
        result = serde_json::from_str(&answer).with_context(|| format!("{kind} answers {answer:?}"))?;
    }
    ensure!(result["ips"].as_array().is_some_and(|ips| !ips.is_empty()), "no address: {result}");
    Ok(())
}
