//! Programs inside a network namespace, none of which outlives it.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::Duration;
use std::{env, fmt, thread};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::namespace::Namespace;
use super::wait_for_some;
use crate::orphan::end_with_this_thread;

/// A program to be run in a namespace, with its arguments.
pub struct NsCommand<'ns> {
    namespace: &'ns Namespace,
    command: Command,
    input: Vec<u8>,
}

impl<'ns> NsCommand<'ns> {
    pub(super) fn new(namespace: &'ns Namespace, program: &OsStr) -> Self {
        let mut command = Command::new(program);
        end_with_this_thread(&mut command);
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
        // A process group of its own: Ctrl-C on the terminal reaches only the program that cleans up.
        command.process_group(0);
        Self { namespace, command, input: Vec::new() }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What `output` and `ok` give to the program on its standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Where a spawned program's standard output goes; nowhere by default.
    pub fn stdout(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stdout(to);
        self
    }

    /// Where a spawned program's standard error goes; to ours by default.
    pub fn stderr(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stderr(to);
        self
    }

    /// Runs the program to its end; an exit code other than 0 is no error.
    pub fn output(mut self) -> anyhow::Result<Output> {
        require(Path::new(self.command.get_program()))?;
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if !self.input.is_empty() {
            self.command.stdin(Stdio::piped());
        }
        let (command, input) = (&mut self.command, &self.input);
        self.namespace
            .run(|| -> std::io::Result<Output> {
                let mut child = command.spawn()?;
                let stdin = child.stdin.take();
                thread::scope(|scope| {
                    // A program that ends without reading its input says why on its standard error.
                    scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
                    child.wait_with_output()
                })
            })
            .with_context(|| format!("can't run {}", self.line()))
    }

    /// Runs the program and gives its standard output; failure is an error with its standard error.
    pub fn ok(self) -> anyhow::Result<String> {
        let line = self.line();
        let Output { status, stdout, stderr } = self.output()?;
        let stdout = String::from_utf8_lossy(&stdout).into_owned();
        if !status.success() {
            bail!("{line}: {status}\n{}{stdout}", String::from_utf8_lossy(&stderr));
        }
        Ok(stdout)
    }

    /// Starts the program and leaves it running.
    pub fn spawn(self) -> anyhow::Result<Process> {
        require(Path::new(self.command.get_program()))?;
        let line = self.line();
        let mut command = self.command;
        let child = self
            .namespace
            .run_on_keeper(move || command.spawn())
            .with_context(|| format!("can't start {line}"))?;
        Ok(Process { child, line })
    }

    fn line(&self) -> String {
        let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
        words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
    }
}

/// A running program; it is killed on drop.
pub struct Process {
    child: Child,
    line: String,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to it; no error when it has ended already.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if self.ended()?.is_none() {
            kill_process(Pid::from_child(&self.child), signal)
                .with_context(|| format!("can't send {signal:?} to {}", self.line))?;
        }
        Ok(())
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("can't wait for {}", self.line))
    }

    /// Waits for its end; an error when it still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("the end of {}", self.line);
        wait_for_some(&what, limit, || self.ended().transpose())?
    }

    /// Its standard output, once, when that was a pipe.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.line, self.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when it has ended and been waited for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// An error that names the package when `program` can't be started.
pub(super) fn require(program: &Path) -> anyhow::Result<()> {
    let runs = |path: &Path| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let found = if program.components().count() > 1 {
        runs(program)
    } else {
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| runs(&dir.join(program)))
    };
    if found {
        return Ok(());
    }
    let package = match program.to_str() {
        Some("ip" | "bridge" | "ss" | "tc") => "iproute2",
        Some("ping") => "iputils-ping",
        Some("etcd") => "etcd-server",
        Some("setpriv" | "nsenter") => "util-linux",
        Some("nft") => "nftables",
        Some("wg") => "wireguard-tools",
        Some(name @ ("prometheus" | "iptables" | "iperf3" | "ethtool" | "tcpdump" | "wireguard-go")) => name,
        _ => bail!("no program {}: build or install it first", program.display()),
    };
    bail!("no program {} in PATH: apt-get install {package}", program.display())
}
