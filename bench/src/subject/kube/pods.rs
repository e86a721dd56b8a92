//! Pods that wait for their network, as a container runtime has them on a new node: it tries as soon as there
//! is a CNI configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::testing::{Namespace, Node};
use bench::figure::{Figure, Limit, Record};
use serde_json::{Value, json};

use super::bed::Cluster;
use crate::Stage;
use crate::bed::TIMEOUT;
use crate::plugin::{DELEGATES, environment, flannel_config};

/// Pods that wait on a node.
const PODS: usize = 10;

/// Starts an agent on a new node round after round, while pods wait there.
pub(crate) fn measure(stage: &Stage, record: &mut Record) -> anyhow::Result<()> {
    let cluster = Cluster::new(stage)?;
    let mut failed =
        Figure::new(format!("pods: of {PODS} that wait, first ADDs that fail"), "", Limit::Each(0.0));
    let mut written = Figure::new("pods: exec to the CNI configuration", "ms", Limit::None);
    let mut all = Figure::new(format!("pods: exec to all {PODS} added"), "ms", Limit::None);
    for round in stage.rounds(u32::MAX) {
        let node = cluster.node()?;
        let (source, conflist) =
            (node.dir().join("cni-conf.json"), node.dir().join("net.d/10-flannel.conflist"));
        fs::write(&source, configuration(&node).to_string())?;
        let pods = (0..PODS).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
        let member =
            cluster.start_on(node, &[format!("--cni-conf={}:{}", source.display(), conflist.display())])?;
        let text = wait_for_file(&conflist).with_context(|| member.agent.log())?;
        let appeared = member.started.elapsed();
        let chain = Chain::new(stage, &member.node, &text)?;
        let outcomes = thread::scope(|scope| {
            let adding: Vec<_> = pods
                .iter()
                .enumerate()
                .map(|(number, pod)| {
                    let container = format!("bench-{}-{round}-{number}", std::process::id());
                    let chain = &chain;
                    scope.spawn(move || chain.add(&container, pod))
                })
                .collect();
            adding
                .into_iter()
                .map(|adding| adding.join().map_err(|_| anyhow!("adding a pod panicked")))
                .collect::<anyhow::Result<Vec<_>>>()
        })?;
        let time = member.started.elapsed();
        let mut failures = 0;
        for error in outcomes.into_iter().filter_map(Result::err) {
            eprintln!("          failed: {error:#}");
            failures += 1;
        }
        stage.progress.step(&format!(
            "pods: round {round}: configuration after {appeared:.1?}, all after {time:.1?}, {failures} failed"
        ))?;
        failed.rounds.push(f64::from(failures));
        written.push_ms(appeared);
        all.push_ms(time);
        drop(pods);
        cluster.remove(member)?;
    }
    [failed, written, all].iter().try_for_each(|figure| record.put(figure))
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

/// Looks for a file all the time, and reads it.
fn wait_for_file(path: &Path) -> anyhow::Result<String> {
    let start = Instant::now();
    while !path.exists() {
        ensure!(start.elapsed() < TIMEOUT, "{} does not appear", path.display());
        thread::sleep(Duration::from_micros(300));
    }
    fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))
}

/// A list of plugins that a runtime runs one after the other.
struct Chain<'a> {
    node: &'a Node,
    list: Value,
    path: [PathBuf; 2],
}

impl<'a> Chain<'a> {
    fn new(stage: &Stage, node: &'a Node, list: &str) -> anyhow::Result<Self> {
        let list = serde_json::from_str(list).context("the CNI configuration is not JSON")?;
        Ok(Self { node, list, path: [stage.programs.clone(), PathBuf::from(DELEGATES)] })
    }

    /// ADD of each plugin, with the result of the one before.
    fn add(&self, container: &str, pod: &Namespace) -> anyhow::Result<()> {
        let plugins = self.list["plugins"].as_array().context("the CNI configuration has no plugins")?;
        let mut result: Option<Value> = None;
        for plugin in plugins {
            let mut config = plugin.clone();
            config["name"] = self.list["name"].clone();
            config["cniVersion"] = self.list["cniVersion"].clone();
            if let Some(before) = result {
                config["prevResult"] = before;
            }
            let kind = plugin["type"].as_str().context("a plugin without a type")?;
            let program = self.path.iter().map(|directory| directory.join(kind)).find(|path| path.is_file());
            let program = program
                .with_context(|| format!("no plugin {kind}: apt-get install containernetworking-plugins"))?;
            let path = std::env::join_paths(&self.path).context("a directory with a colon")?;
            let command = self.node.namespace().command(&program).input(config.to_string());
            let variables = environment("ADD", container, pod, path);
            let command =
                variables.into_iter().fold(command, |command, (name, value)| command.env(name, value));
            let answer = command.ok()?;
            result =
                Some(serde_json::from_str(&answer).with_context(|| format!("{kind} answers {answer:?}"))?);
        }
        let addresses = result.as_ref().and_then(|result| result["ips"].as_array()).map_or(0, Vec::len);
        ensure!(addresses > 0, "the pod has no address: {result:?}");
        Ok(())
    }
}
