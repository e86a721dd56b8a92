//! How often the agent runs programs in iptables mode: at the start, while nothing happens, for a repair.
//!
//! Two witnesses: scripts in the agent's `PATH` that note their calls before they become the real programs,
//! and the kernel, which counts the page faults of children that have ended; none has fewer than one.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use backends::testing::wait_for;
use bench::bed::TIMEOUT;
use bench::figure::{Limit, Row};
use bench::process::stat;
use tempfile::TempDir;

use super::bed::{MODES, Setup, look};
use crate::Stage;

/// Rounds, of a minute each, that are enough.
const ROUNDS: u32 = 3;

/// Programs that an agent might run.
const PROGRAMS: [&str; 10] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
    "nft",
    "ip",
    "bridge",
    "modprobe",
];

/// Counts the programs that an agent runs.
pub(crate) fn measure(stage: &Stage, idle_for: Duration) -> anyhow::Result<()> {
    let watch = Watch::new(&stage.flanneld())?;
    let (_, flag) = MODES[1];
    let mut setup = Setup::new(stage, watch.launcher(), flag)?;
    let seconds = idle_for.as_secs();
    let rows: [Row<'_>; 4] = [
        ("programs run at the start", "", Limit::None),
        ("programs run for a repair", "", Limit::None),
        (&format!("programs run in {seconds} s without an event"), "", Limit::Each(0.0)),
        (&format!("page faults of children in {seconds} s without an event"), "", Limit::Each(0.0)),
    ];
    let mut nft = setup.nft()?;
    stage.measure("rules-forks", rows, ROUNDS, |_| {
        setup.member.agent.kill()?;
        watch.forget()?;
        setup.member.start_again()?;
        setup.member.agent.wait_ready(TIMEOUT)?;
        let pid = setup.member.pid();
        // Readiness comes after the rules, but what is still to come belongs to the start, too.
        stage.progress.pause(Duration::from_secs(2))?;
        let (start, children) = (watch.calls()?, children(pid)?);
        ensure!(
            !start.is_empty() && children.faults > 0,
            "neither witness saw the programs of the start: {start:?}"
        );
        let healthy = look(&mut nft)?;
        watch.forget()?;
        setup.member.show("iptables -t nat -F FLANNEL-POSTRTG")?;
        wait_for("the repair", TIMEOUT, || look(&mut nft).is_ok_and(|found| found == healthy))?;
        stage.progress.pause(Duration::from_secs(2))?;
        let repair = watch.calls()?;

        watch.forget()?;
        let before = self::children(pid)?;
        stage.progress.pause(idle_for)?;
        let (idle, after) = (watch.calls()?, self::children(pid)?);
        ensure!(after.alive == 0, "the agent has {} children", after.alive);
        stage.progress.step(&format!("rules-forks: {start:?}, {repair:?}, {idle:?}"))?;
        let calls = [start, repair, idle].map(|calls| calls.len() as f64);
        Ok([calls[0], calls[1], calls[2], (after.faults - before.faults) as f64])
    })
}

/// A directory of scripts that note their calls.
struct Watch {
    directory: TempDir,
}

impl Watch {
    fn new(flanneld: &Path) -> anyhow::Result<Self> {
        let watch = Self { directory: tempfile::tempdir().context("no temporary directory")? };
        let path = std::env::var_os("PATH").unwrap_or_default();
        for name in PROGRAMS {
            let Some(real) = std::env::split_paths(&path).map(|at| at.join(name)).find(|at| at.is_file())
            else {
                continue;
            };
            let note = format!("echo {name} \"$*\" >> '{}'", watch.log().display());
            watch.script(name, &format!("{note}\nexec '{}' \"$@\"", real.display()))?;
        }
        let own = watch.directory.path().display();
        let become_agent = format!("export PATH='{own}':\"$PATH\"\nexec '{}' \"$@\"", flanneld.display());
        watch.script("flanneld", &become_agent)?;
        watch.forget()?;
        Ok(watch)
    }

    /// The agent, with the scripts in its `PATH`.
    fn launcher(&self) -> PathBuf {
        self.directory.path().join("flanneld")
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("calls")
    }

    /// The calls since the last time they were forgotten, each in words.
    fn calls(&self) -> anyhow::Result<Vec<String>> {
        let text = fs::read_to_string(self.log()).context("can't read the notes of calls")?;
        Ok(text.lines().map(|line| line.trim().to_owned()).collect())
    }

    fn forget(&self) -> anyhow::Result<()> {
        fs::write(self.log(), "").context("can't write the notes of calls")
    }

    fn script(&self, name: &str, lines: &str) -> anyhow::Result<()> {
        let path = self.directory.path().join(name);
        let written = subnet::testing::write_program(&path, &format!("#!/bin/sh\n{lines}\n"));
        written.with_context(|| format!("can't write the script {}", path.display()))
    }
}

/// What the kernel knows of a process's children.
#[derive(Debug)]
struct Children {
    /// Page faults of those that have ended, and of theirs.
    faults: i64,
    /// How many have not ended, or were not waited for.
    alive: usize,
}

fn children(pid: u32) -> anyhow::Result<Children> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let mut alive = 0;
    for task in tasks.with_context(|| format!("can't list threads of {pid}"))? {
        // A thread may have ended since it was listed.
        let text = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        alive += text.split_whitespace().count();
    }
    // `cminflt` and `cmajflt`.
    Ok(Children { faults: stat(pid, 11)? + stat(pid, 13)?, alive })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn both_witnesses_notice_a_program() {
        let own = std::process::id();
        let watch = Watch::new(Path::new("/bin/sh")).unwrap();
        let before = children(own).unwrap().faults;
        let run = Command::new(watch.launcher()).args(["-c", "ip -V && ip -V"]).output().unwrap();
        assert!(run.status.success(), "{run:?}");
        assert_eq!(watch.calls().unwrap(), ["ip -V", "ip -V"]);
        assert!(children(own).unwrap().faults > before);
        watch.forget().unwrap();
        assert!(watch.calls().unwrap().is_empty());

        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(children(own).unwrap().alive > 0);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
