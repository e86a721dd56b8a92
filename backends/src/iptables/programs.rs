//! The iptables programs of one family: found once, run only when something has to change.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use subnet::Family;

use crate::firewall::FirewallError;

/// Where the programs of one family are, and which kernel interface they use.
#[derive(Debug)]
pub(super) struct Programs {
    save: PathBuf,
    restore: PathBuf,
    /// Whether they keep their rules in nftables, where changes are noticed.
    pub(super) over_nftables: bool,
}

impl Programs {
    /// Finds the programs in `PATH`.
    pub(super) fn find(family: Family) -> Result<Self, FirewallError> {
        let name = match family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let version = run(Command::new(find(name)?).arg("--version"), None)?;
        Ok(Self {
            save: find(&format!("{name}-save"))?,
            restore: find(&format!("{name}-restore"))?,
            over_nftables: version.contains("nf_tables"),
        })
    }

    /// All rules as text.
    pub(super) fn save(&self) -> Result<String, FirewallError> {
        run(&mut Command::new(&self.save), None)
    }

    /// Applies changes, each table in one transaction.
    pub(super) fn restore(&self, input: &str) -> Result<(), FirewallError> {
        run(Command::new(&self.restore).args(["--noflush", "--wait"]), Some(input)).map(drop)
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

fn run(command: &mut Command, input: Option<&str>) -> Result<String, FirewallError> {
    let what = command.get_program().to_string_lossy().into_owned();
    let failed = |why: String| FirewallError { what: what.clone(), why };
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // It answers only when its input has ended; a program that ends early says why on stderr.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: Vec<&str> = complaint.lines().take(3).collect();
    Err(failed(format!("{}: {}", output.status, complaint.join("; "))))
}
