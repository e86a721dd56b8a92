//! What the kernel says was changed on a node: `ip monitor` and `bridge monitor` as witnesses.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Node, Process, wait_for};

/// How long anything may take before it is given up.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The kernel itself tells late of links that were just made; the measurement begins when it is quiet for
/// this long.
const QUIET: Duration = Duration::from_secs(1);

/// A route that marks the beginning and the end in what a witness of routes writes; no agent has anything to do with it.
const ROUTE: &str = "192.0.2.1";
/// The same for a witness of FDB entries.
const MAC: &str = "02:00:5e:00:02:01";

/// A running program, what it told and when, but for marks; and how often it told of its mark.
struct Witness {
    mark: &'static str,
    heard: Arc<Mutex<Heard>>,
    _process: Process,
}

#[derive(Default)]
struct Heard {
    lines: Vec<(Instant, String)>,
    marks: usize,
}

impl Witness {
    fn start(node: &Node, command: &str, mark: &'static str) -> anyhow::Result<Self> {
        let mut words = command.split(' ');
        let program = node.namespace().command(words.next().unwrap_or_default()).args(words);
        let mut process = program.stdout(Stdio::piped()).spawn()?;
        let output = process.take_stdout().with_context(|| format!("{command} has no output"))?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let shared = Arc::clone(&heard);
        // It ends with the output of the process, which is killed on drop.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let mut heard = lock(&shared);
                match line.contains(mark) {
                    true => heard.marks += 1,
                    false => heard.lines.push((Instant::now(), line)),
                }
            }
        });
        Ok(Self { mark, heard, _process: process })
    }

    /// Makes and removes the object of its mark until it tells of that: it told of everything before.
    fn hears(&self, node: &Node) -> anyhow::Result<()> {
        let before = lock(&self.heard).marks;
        wait_for(&format!("a monitor to tell of {}", self.mark), TIMEOUT, || {
            let made = if self.mark == ROUTE {
                node.namespace().ip(&format!("route add {ROUTE} dev lo\nroute del {ROUTE} dev lo"))
            } else {
                let fdb = format!("fdb add {MAC} dev cni0 self\nfdb del {MAC} dev cni0 self\n");
                node.namespace().command("bridge").args(["-batch", "-"]).input(fdb).ok().map(drop)
            };
            thread::sleep(Duration::from_millis(20));
            made.is_ok() && lock(&self.heard).marks >= before + 2
        })
    }

    fn lines(&self) -> Vec<String> {
        lock(&self.heard).lines.iter().map(|(_, line)| line.clone()).collect()
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().expect("no holder of this lock panics")
}

/// Two running witnesses; `cni0` must be there.
pub struct Monitor([Witness; 2]);

impl Monitor {
    /// Starts both and returns once both are known to hear and have nothing to tell.
    pub fn start(node: &Node) -> anyhow::Result<Self> {
        let monitor = Self([
            Witness::start(node, "ip -o monitor label link address route neigh", ROUTE)?,
            Witness::start(node, "bridge monitor fdb", MAC)?,
        ]);
        monitor.hear(node)?;
        let start = Instant::now();
        let mut quiet = (0, start);
        while quiet.1.elapsed() < QUIET {
            let changes = monitor.changes().len();
            if changes != quiet.0 {
                quiet = (changes, Instant::now());
            }
            ensure!(start.elapsed() < TIMEOUT, "the kernel is never quiet: {:?}", monitor.changes());
            thread::sleep(Duration::from_millis(50));
        }
        monitor.hear(node)?;
        monitor.0.iter().for_each(|witness| lock(&witness.heard).lines.clear());
        Ok(monitor)
    }

    /// Ends them and gives what was changed since the beginning: addresses and routes of all devices, links
    /// but those of pods, neighbours and FDB entries of tunnel devices. The rest the kernel itself changes.
    pub fn finish(self, node: &Node) -> anyhow::Result<Vec<String>> {
        self.hear(node)?;
        Ok(self.changes())
    }

    fn hear(&self, node: &Node) -> anyhow::Result<()> {
        self.0.iter().try_for_each(|witness| witness.hears(node))
    }

    fn changes(&self) -> Vec<String> {
        self.0.iter().flat_map(Witness::lines).filter(|line| counts(line)).collect()
    }
}

/// A running `ip monitor` of IPv4 routes.
pub struct RouteMonitor(Witness);

impl RouteMonitor {
    /// Starts it and returns once it is known to hear.
    pub fn start(node: &Node) -> anyhow::Result<Self> {
        let witness = Witness::start(node, "ip -4 -o monitor route", ROUTE)?;
        witness.hears(node)?;
        Ok(Self(witness))
    }

    /// When it told of a line with this text for the last time.
    pub fn last(&self, text: &str) -> Option<Instant> {
        let heard = lock(&self.0.heard);
        heard.lines.iter().rev().find(|(_, line)| line.contains(text)).map(|(at, _)| *at)
    }
}

fn counts(line: &str) -> bool {
    let (tunnel, pods) = (line.contains("dev flannel"), line.contains("cni0"));
    match line.split_once(']').map(|(label, _)| label) {
        Some("[ADDR" | "[ROUTE") => true,
        // The kernel tells of a bridge and its ports at leisure.
        Some("[LINK") => !pods,
        // Of multicast groups the kernel makes and drops entries by itself.
        _ => tunnel && !line.contains("NOARP"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_does_by_itself_between_pods_is_no_change() {
        assert!(counts("[ROUTE]10.244.7.0/24 via 10.244.7.0 dev flannel.1 proto 70 onlink "));
        assert!(counts("[NEIGH]10.244.7.0 dev flannel.1 lladdr 02:00:00:00:00:01 PERMANENT "));
        assert!(counts("Deleted 02:00:00:00:00:01 dev flannel.1 dst 172.31.0.2 self permanent"));
        assert!(!counts("[NEIGH]10.244.7.2 dev cni0 lladdr 02:00:00:00:00:01 REACHABLE "));
        assert!(counts("[LINK]7: eth0@if9: <BROADCAST,MULTICAST> mtu 1500 state DOWN "));
        assert!(!counts(
            "[LINK]5: pod5@eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 master cni0 state UP "
        ));
        assert!(!counts("[NEIGH]Deleted ff02::16 dev flannel.1 lladdr 33:33:00:00:00:16 NOARP "));
        assert!(!counts("02:00:00:00:00:01 dev pod1 master cni0"));
    }
}
