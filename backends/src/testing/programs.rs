//! Namespaces made and probed by the system's programs, so that what is under test is not its own witness.

use std::ffi::OsStr;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::sched::CloneFlags;

use super::namespace::Namespace;
use super::process::NsCommand;
use super::wait_for_some;

/// Of the ten requests of two seconds, so many say that there is no way.
const ENOUGH_REQUESTS: u32 = 6;
/// A machine that stands still again and again can't be tested on.
const MAX_ATTEMPTS: usize = 10;
const PORT_TIMEOUT: Duration = Duration::from_secs(30);

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

    /// Whether one of the echo requests of two seconds to `target` is answered.
    ///
    /// Nothing is said by a time in which `ping` could not send them: then it is begun again.
    pub fn reaches(&self, target: IpAddr) -> anyhow::Result<bool> {
        let target = target.to_string();
        for _ in 0..MAX_ATTEMPTS {
            let output = self.command("ping").args(["-n", "-c1", "-w2", "-i0.2", &target]).output()?;
            if output.status.success() {
                return Ok(true);
            }
            let stood_still =
                stood_still(&String::from_utf8_lossy(&output.stdout)) && output.stderr.is_empty();
            if !stood_still {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Waits until a port of a bridge in here passes frames. A bridge hears of a new port's carrier from another thread of
    /// the kernel, and drops what comes before.
    pub(super) fn wait_for_port(&self, port: &str) -> anyhow::Result<()> {
        let mut shown = String::new();
        let passes = || {
            shown = self.show(&format!("bridge link show dev {port}")).unwrap_or_default();
            shown.contains(" state forwarding ").then_some(())
        };
        wait_for_some(&format!("{port} on its bridge"), PORT_TIMEOUT, passes).with_context(|| shown.clone())
    }
}

/// Whether a `ping` that was given two seconds for its requests could send few of them, and heard of no error.
fn stood_still(printed: &str) -> bool {
    let Some(line) = printed.lines().find(|line| line.contains(" packets transmitted")) else { return false };
    let sent = line.split(' ').next().and_then(|count| count.parse::<u32>().ok());
    sent.is_some_and(|sent| sent < ENOUGH_REQUESTS) && !line.contains(" errors,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_ping_that_could_not_send_is_begun_again() {
        for (line, expected) in [
            ("2 packets transmitted, 0 received, 100% packet loss, time 1900ms", true),
            ("10 packets transmitted, 0 received, 100% packet loss, time 1900ms", false),
            ("1 packets transmitted, 0 received, +1 errors, 100% packet loss, time 0ms", false),
            ("ping: connect: Network is unreachable", false),
        ] {
            assert_eq!(
                stood_still(&format!("--- 10.0.0.1 ping statistics ---\n{line}\n")),
                expected,
                "{line}"
            );
        }
    }
}
