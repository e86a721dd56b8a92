//! A running `flanneld` on a node.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use subnet::env_file::Reading;
use tempfile::TempDir;

use super::fabric::Node;
use super::namespace::Namespace;
use super::process::Process;
use super::{Signal, wait_for_some};

/// A `flanneld` in a node's namespace; it is killed on drop, and its log shown if the test failed.
pub struct Agent {
    process: Process,
    log: PathBuf,
    subnet_file: PathBuf,
    health: SocketAddr,
    node: (Arc<Namespace>, Arc<TempDir>),
}

impl Agent {
    /// Starts `binary` on `node` with `args`, after `--subnet-file` ([`Node::subnet_file`]) and
    /// `--healthz-ip`, `--healthz-port` (127.0.0.1:8081), of which a repetition in `args` counts.
    pub fn spawn<A: AsRef<str>>(
        node: &Node,
        binary: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Self> {
        Self::spawn_with(node, binary, args, &[])
    }

    /// The same with variables in its environment.
    pub fn spawn_with<A: AsRef<str>>(
        node: &Node,
        binary: &Path,
        args: impl IntoIterator<Item = A>,
        environment: &[(String, String)],
    ) -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let mut all = vec![
            format!("--subnet-file={}", node.subnet_file().display()),
            "--healthz-ip=127.0.0.1".to_owned(),
            "--healthz-port=8081".to_owned(),
        ];
        all.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        let last = |name: &str| all.iter().rev().find_map(|arg| arg.strip_prefix(name)?.strip_prefix('='));
        let subnet_file = last("--subnet-file").map(PathBuf::from).context("no --subnet-file")?;
        let port = last("--healthz-port").unwrap_or_default();
        let port = port.parse().with_context(|| format!("--healthz-port={port} is not a port"))?;

        let log = node.dir().join(format!("flanneld-{}.log", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let file = File::create(&log).with_context(|| format!("can't write {}", log.display()))?;
        let mut command = node.namespace().command(binary).args(&all);
        // Nodes of a test share the file system.
        command = command.env("WIREGUARD_KEY_FILE", node.dir().join("wgkey"));
        for (name, value) in environment {
            command = command.env(name, value);
        }
        let process =
            command.stdout(file.try_clone().context("can't share the log file")?).stderr(file).spawn()?;
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(Self { process, log, subnet_file, health, node: node.shared() })
    }

    /// Waits until `/readyz` says yes; an error with the log if it ends before or takes longer than `limit`.
    pub fn wait_ready(&mut self, limit: Duration) -> anyhow::Result<()> {
        let outcome = wait_for_some("flanneld to be ready", limit, || match self.process.ended() {
            Ok(Some(status)) => Some(Err(anyhow!("flanneld ended ({status})"))),
            _ => self.get("/readyz").is_ok_and(|(code, _)| code == 200).then_some(Ok(())),
        });
        outcome.and_then(|ended| ended).map_err(|error| anyhow!("{error}; its log:\n{}", self.log()))
    }

    /// Asks its HTTP server for `path`; gives the status code and the body.
    pub fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.node.0.http_get(self.health, path)
    }

    /// What it wrote for the CNI plugin.
    pub fn subnet_env(&self) -> anyhow::Result<Reading> {
        let path = self.subnet_file.display();
        let text = fs::read_to_string(&self.subnet_file).with_context(|| format!("can't read {path}"))?;
        Reading::parse(&text).with_context(|| format!("{path} is malformed"))
    }

    /// All it logged so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// The process, for signals of all kinds.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn terminate(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.process.wait(limit)
    }

    /// Ends it without a chance to clean up (SIGKILL).
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::KILL)?;
        if self.process.wait(Duration::from_secs(10)).is_err() {
            bail!("flanneld survives SIGKILL");
        }
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- {} of {:?}\n{}---", self.log.display(), self.process, self.log());
        }
    }
}
