//! Measures what the CNI plugin adds to the time in which its delegate connects many pods at once: 200 of
//! them, 16 at a time, through `flannel` and through `bridge` with the very configuration that flannel
//! generates. Prints JSON lines.
//!
//! Both ways have a node of their own (namespace, bridge, directories) and use the same pods in turns.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, ensure};
use backends::testing::Namespace;
use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where the distribution keeps the delegates.
const DELEGATES: &str = "/usr/lib/cni";
/// Through flannel may take this much longer than the delegate alone.
const LIMIT: f64 = 1.10;

#[derive(Parser)]
#[command(name = "cni", about = "Measures adding many pods through flannel and through its delegate alone")]
struct Args {
    /// The release build of the plugin.
    #[arg(long)]
    flannel: PathBuf,
    /// Pods in a round, at most 250.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=250))]
    pods: u16,
    /// How many of them at a time.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=250))]
    parallel: u16,
    /// How often each way is measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(args.flannel.is_file(), "no program {}: make release", args.flannel.display());
    let bridge = Path::new(DELEGATES).join("bridge");
    ensure!(bridge.is_file(), "no {}: apt-get install containernetworking-plugins", bridge.display());
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let pods = (0..args.pods).map(|_| Namespace::new()).collect::<anyhow::Result<Vec<_>>>()?;
    let (first, second) = (Node::new()?, Node::new()?);
    let flannel = Way { node: &first, program: &args.flannel, config: first.network() };
    let direct = Way { node: &second, program: &bridge, config: second.generated(&args.flannel, &pods[0])? };
    for way in [&flannel, &direct] {
        // The first pod on a node makes the bridge.
        way.all("ADD", &pods[..1], 1)?;
        way.all("DEL", &pods[..1], 1)?;
    }

    let [mut adds, mut dels] = [[Vec::new(), Vec::new()], [Vec::new(), Vec::new()]];
    for round in 0..args.rounds {
        // Neither is always the first.
        for turn in [round % 2, (round + 1) % 2].map(usize::from) {
            let way = [&flannel, &direct][turn];
            adds[turn].push(way.all("ADD", &pods, args.parallel)?);
            dels[turn].push(way.all("DEL", &pods, args.parallel)?);
        }
        eprintln!(
            "round {round}: {:.0} ms, direct {:.0} ms",
            adds[0][round as usize], adds[1][round as usize]
        );
    }

    let conditions = conditions(&args, &bridge, first.directory.path(), load.trim())?;
    let put = |name: &str, unit: &str, limit: Option<f64>, rounds: &[f64], value: f64| {
        let line = json!({
            "name": name, "value": value, "unit": unit, "limit": limit, "met": limit.map(|limit| value <= limit),
            "rounds": rounds, "median": median(rounds), "conditions": conditions,
        });
        writeln!(io::stdout(), "{line}").context("can't write to the standard output")
    };
    for (verb, limit, [through, alone]) in [("add", Some(LIMIT), adds), ("del", None, dels)] {
        put(&format!("cni-{verb}-flannel"), "ms", None, &through, median(&through))?;
        put(&format!("cni-{verb}-delegate"), "ms", None, &alone, median(&alone))?;
        let ratios: Vec<_> = through.iter().zip(&alone).map(|(through, alone)| through / alone).collect();
        put(
            &format!("cni-{verb}-ratio"),
            "ratio of medians",
            limit,
            &ratios,
            median(&through) / median(&alone),
        )?;
    }
    Ok(())
}

/// A namespace and a directory for everything that plugins write.
struct Node {
    namespace: Namespace,
    directory: TempDir,
}

/// A way of connecting pods to a node.
struct Way<'a> {
    node: &'a Node,
    program: &'a Path,
    config: String,
}

impl Node {
    fn new() -> anyhow::Result<Self> {
        let node = Self { namespace: Namespace::new()?, directory: tempfile::tempdir()? };
        let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        fs::write(node.directory.path().join("subnet.env"), env).context("can't write subnet.env")?;
        Ok(node)
    }

    /// The shipped configuration of flannel, with this node's directories.
    fn network(&self) -> String {
        let directory = self.directory.path();
        let network = json!({
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "flannel",
            "subnetFile": directory.join("subnet.env"),
            "dataDir": directory.join("flannel"),
            "delegate": {"hairpinMode": true, "isDefaultGateway": true},
            "ipam": {"dataDir": directory.join("addresses")},
        });
        network.to_string()
    }

    /// What flannel gives to its delegate on this node: it keeps it for DEL.
    fn generated(&self, flannel: &Path, pod: &Namespace) -> anyhow::Result<String> {
        let way = Way { node: self, program: flannel, config: self.network() };
        way.all("ADD", std::slice::from_ref(pod), 1)?;
        let kept = self.directory.path().join("flannel/pod-0");
        let config = fs::read_to_string(&kept).with_context(|| format!("can't read {}", kept.display()))?;
        way.all("DEL", std::slice::from_ref(pod), 1)?;
        Ok(config)
    }
}

impl Way<'_> {
    /// Calls the plugin for all of `pods`, `parallel` at a time; gives the milliseconds.
    fn all(&self, verb: &str, pods: &[Namespace], parallel: u16) -> anyhow::Result<f64> {
        let next = AtomicUsize::new(0);
        let some = || -> anyhow::Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(pod) = pods.get(number) else { return Ok(()) };
                self.call(verb, number, pod)?;
            }
        };
        // Threads that are made inside the namespace are in it, and so are their children.
        self.node.namespace.run(|| {
            let start = Instant::now();
            thread::scope(|scope| {
                let workers: Vec<_> = (0..parallel).map(|_| scope.spawn(some)).collect();
                workers.into_iter().try_for_each(|worker| worker.join().expect("workers don't panic"))
            })?;
            Ok(start.elapsed().as_secs_f64() * 1e3)
        })
    }

    fn call(&self, verb: &str, number: usize, pod: &Namespace) -> anyhow::Result<()> {
        let mut child = Command::new(self.program)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", format!("pod-{number}"))
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", DELEGATES)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't run {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.config.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{verb} failed: {}", String::from_utf8_lossy(&output.stdout));
        Ok(())
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[half] } else { (sorted[half - 1] + sorted[half]) / 2.0 }
}

fn conditions(args: &Args, bridge: &Path, files: &Path, load: &str) -> anyhow::Result<Value> {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    // A plugin that is run by hand says on its standard error what it is.
    let about = Command::new(bridge).env_remove("CNI_COMMAND").output().context("can't run the delegate")?;
    let about = String::from_utf8_lossy(&about.stderr).lines().next().unwrap_or_default().to_owned();
    let file_system =
        Command::new("stat").args(["-f", "-c", "%T"]).arg(files).output().context("can't run stat")?;
    Ok(json!({
        "pods": args.pods,
        "parallel": args.parallel,
        "flannel": args.flannel,
        "flannel-bytes": fs::metadata(&args.flannel)?.len(),
        "delegate": about,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "cpu": cpu.map_or("unknown", |(_, cpu)| cpu.trim()),
        "cores": thread::available_parallelism().map_or(0, usize::from),
        "load": load,
        "files": String::from_utf8_lossy(&file_system.stdout).trim(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
    }
}
