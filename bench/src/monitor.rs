//! What the kernel says was changed on a node: `ip monitor` and `bridge monitor` as witnesses.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backends::testing::{Node, Process};

/// How long anything may take before it is given up.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Routes and FDB entries that mark the beginning and the end in what the witnesses write; no agent has
/// anything to do with them.
const BEGIN: Mark = Mark { route: "192.0.2.1", mac: "02:00:5e:00:02:01" };
const END: Mark = Mark { route: "192.0.2.2", mac: "02:00:5e:00:02:02" };

/// The kernel itself tells late of links that were just made; the measurement begins when it is quiet for
/// this long.
const QUIET: Duration = Duration::from_secs(1);

/// Two running witnesses; `cni0` must be there.
pub struct Monitor {
    witnesses: [(Process, PathBuf); 2],
}

struct Mark {
    route: &'static str,
    mac: &'static str,
}

impl Monitor {
    /// Starts both and returns once both are known to hear and have nothing to tell.
    pub fn start(node: &Node) -> anyhow::Result<Self> {
        let spawn = |program: &str, args: &[&str]| -> anyhow::Result<(Process, PathBuf)> {
            let path = node.dir().join(format!("{program}-monitor"));
            let file = File::create(&path).with_context(|| format!("can't write {}", path.display()))?;
            Ok((node.namespace().command(program).args(args).stdout(file).spawn()?, path))
        };
        let witnesses = [
            spawn("ip", &["-o", "monitor", "label", "link", "address", "route", "neigh"])?,
            spawn("bridge", &["monitor", "fdb"])?,
        ];
        let monitor = Self { witnesses };
        monitor.mark(node, &BEGIN)?;
        let start = Instant::now();
        let mut quiet = (0, start);
        while quiet.1.elapsed() < QUIET {
            let changes = monitor.changes()?.len();
            if changes != quiet.0 {
                quiet = (changes, Instant::now());
            }
            ensure!(start.elapsed() < TIMEOUT, "the kernel is never quiet: {:?}", monitor.changes()?);
            std::thread::sleep(Duration::from_millis(50));
        }
        monitor.mark(node, &BEGIN)?;
        Ok(monitor)
    }

    /// Ends them and gives what was changed since the beginning: addresses and routes of all devices, links
    /// but those of pods, neighbours and FDB entries of tunnel devices. The rest the kernel itself changes.
    pub fn finish(self, node: &Node) -> anyhow::Result<Vec<String>> {
        self.mark(node, &END)?;
        self.changes()
    }

    fn changes(&self) -> anyhow::Result<Vec<String>> {
        let mut changes = Vec::new();
        let marks = [(BEGIN.route, END.route), (BEGIN.mac, END.mac)];
        for ((_, path), (begin, end)) in self.witnesses.iter().zip(marks) {
            let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
            let lines: Vec<&str> = text.lines().collect();
            let after = lines.iter().rposition(|line| line.contains(begin)).map_or(0, |last| last + 1);
            let between = lines[after..].iter().take_while(|line| !line.contains(end));
            changes.extend(between.filter(|line| counts(line)).map(|line| (*line).to_owned()));
        }
        Ok(changes)
    }

    /// Makes and removes the objects of a mark until both witnesses tell of that.
    fn mark(&self, node: &Node, mark: &Mark) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < TIMEOUT {
            let before = self.told(mark)?;
            node.namespace().ip(&format!("route add {0} dev lo\nroute del {0} dev lo", mark.route))?;
            let fdb = format!("fdb add {0} dev cni0 self\nfdb del {0} dev cni0 self\n", mark.mac);
            node.namespace().command("bridge").args(["-batch", "-"]).input(fdb).ok()?;
            let attempt = Instant::now();
            while attempt.elapsed() < Duration::from_millis(200) {
                if self.told(mark)?.into_iter().zip(before).all(|(now, before)| now >= before + 2) {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        bail!("`ip monitor` and `bridge monitor` don't tell what changes")
    }

    /// How often each witness told of a mark.
    fn told(&self, mark: &Mark) -> anyhow::Result<[usize; 2]> {
        let [(_, ip), (_, bridge)] = &self.witnesses;
        Ok([
            fs::read_to_string(ip)?.matches(mark.route).count(),
            fs::read_to_string(bridge)?.matches(mark.mac).count(),
        ])
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
