//! The iptables programs of one family: found once, run only when something has to change.

use std::cell::OnceCell;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use subnet::Family;

use crate::orphan::end_with_this_thread;
use crate::traffic::firewall::FirewallError;

/// How long a program may take that only prints its version or the rules.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a program may wait for the lock of iptables, and change rules.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);

/// Where the programs of one family are, and which kernel interface they use.
#[derive(Debug)]
pub(super) struct Programs {
    version: PathBuf,
    save: PathBuf,
    restore: PathBuf,
    /// Whether they keep their rules in nftables, where changes are noticed; asked for when it is first
    /// needed, since the answer may keep somebody waiting.
    over_nftables: OnceCell<bool>,
}

impl Programs {
    /// Finds the programs in `PATH`.
    pub(super) fn find(family: Family) -> Result<Self, FirewallError> {
        let name = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        Ok(Self {
            version: find(name)?,
            save: find(&format!("{name}-save"))?,
            restore: find(&format!("{name}-restore"))?,
            over_nftables: OnceCell::new(),
        })
    }

    /// Whether they keep their rules in nftables.
    pub(super) fn are_over_nftables(&self) -> Result<bool, FirewallError> {
        if let Some(known) = self.over_nftables.get() {
            return Ok(*known);
        }
        let version = run(Command::new(&self.version).arg("--version"), None, READ_TIMEOUT)?;
        Ok(*self.over_nftables.get_or_init(|| version.contains("nf_tables")))
    }

    /// All rules as text.
    pub(super) fn save(&self) -> Result<String, FirewallError> {
        run(&mut Command::new(&self.save), None, READ_TIMEOUT)
    }

    /// Applies changes, each table in one transaction.
    pub(super) fn restore(&self, input: &str) -> Result<(), FirewallError> {
        let mut command = Command::new(&self.restore);
        run(command.args(["--noflush", "--wait"]), Some(input), CHANGE_TIMEOUT).map(drop)
    }
}

fn find(name: &str) -> Result<PathBuf, FirewallError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| FirewallError {
        what: format!("looking for {name}"),
        why: "it is not in PATH: install iptables, or leave --traffic-manager=iptables out, since nftables needs no program"
            .to_owned(),
    })
}

/// What a program prints. One that has not ended after `limit` is killed, with its children.
fn run(command: &mut Command, input: Option<&str>, limit: Duration) -> Result<String, FirewallError> {
    let what = command.get_program().to_string_lossy().into_owned();
    let failed = |why: String| FirewallError { what: what.clone(), why };
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = end_with_this_thread(command)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let group = Pid::from_child(&child);
    let (stdin, input) = (child.stdin.take(), input.map(str::to_owned));
    thread::spawn(move || {
        if let (Some(input), Some(mut stdin)) = (input, stdin) {
            // It answers only when its input has ended; a program that ends early says why on stderr.
            let _ = stdin.write_all(input.as_bytes());
        }
    });
    let (done, ended) = mpsc::channel();
    thread::spawn(move || done.send(child.wait_with_output()));
    let Ok(output) = ended.recv_timeout(limit) else {
        let _ = kill_process_group(group, Signal::KILL);
        return Err(failed(format!("no answer within {} s, so it was killed", limit.as_secs())));
    };
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: Vec<&str> = complaint.lines().take(3).collect();
    Err(failed(format!("{}: {}", output.status, complaint.join("; "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children_and_one_that_answers_is_heard() {
        let limit = Duration::from_millis(300);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("child");
        // The grandchild holds the pipe.
        let script = format!("sleep 600 & echo $! > {}; wait", file.display());
        let error = run(Command::new("sh").args(["-c", &script]), None, limit).unwrap_err().to_string();
        assert!(error.contains("no answer within 0 s"), "{error}");
        let child = std::fs::read_to_string(&file).unwrap();
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
            stat.rsplit(')').next().and_then(|rest| rest.split(' ').nth(1)).unwrap_or("gone").to_owned()
        };
        crate::testing::wait_for("its end", Duration::from_secs(30), || ["gone", "Z"].contains(&&*state()))
            .unwrap();

        let long = Duration::from_secs(60);
        let big = "x".repeat(1 << 20);
        assert_eq!(run(&mut Command::new("cat"), Some(&big), long).unwrap().len(), big.len());
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"]), None, long).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }
}
