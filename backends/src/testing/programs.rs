//! Namespaces made and probed by the system's programs, so that what is under test is not its own witness.

use std::ffi::OsStr;
use std::net::IpAddr;

use anyhow::{Context, anyhow};
use nix::sched::CloneFlags;

use super::namespace::Namespace;
use super::process::NsCommand;

impl Namespace {
    /// A new namespace whose `lo` is up.
    pub fn new() -> anyhow::Result<Self> {
        let namespace = Self::keep(|| nix::sched::unshare(CloneFlags::CLONE_NEWNET)).map_err(|errno| {
            anyhow!("can't create a network namespace ({errno:#}): it needs CAP_SYS_ADMIN, run this as root")
        })?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// A program to be run inside.
    pub fn command(&self, program: impl AsRef<OsStr>) -> NsCommand<'_> {
        NsCommand::new(self, program.as_ref())
    }

    /// Runs lines of `ip` commands (without the word `ip`) in order, up to the first that fails.
    pub fn ip(&self, lines: &str) -> anyhow::Result<()> {
        self.command("ip").args(["-batch", "-"]).input(lines).ok().map(drop).with_context(|| lines.to_owned())
    }

    /// Output of a program that is given as words with one space between.
    pub fn show(&self, command: &str) -> anyhow::Result<String> {
        let mut words = command.split(' ');
        self.command(words.next().unwrap_or_default()).args(words).ok()
    }

    /// Whether an echo request to `target` is answered within two seconds.
    pub fn reaches(&self, target: IpAddr) -> anyhow::Result<bool> {
        let target = target.to_string();
        Ok(self.command("ping").args(["-n", "-c1", "-w2", "-i0.2", &target]).output()?.status.success())
    }
}
