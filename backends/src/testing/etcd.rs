//! A real etcd server with one member and its data in a temporary directory.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, bail};
use tempfile::TempDir;

use super::fabric::Fabric;
use super::namespace::Namespace;
use super::process::Process;
use super::wait_for_some;

/// A running etcd server; it is killed on drop.
pub struct Etcd {
    namespace: Arc<Namespace>,
    client: SocketAddr,
    peer: SocketAddr,
    dir: TempDir,
    /// Arguments besides those that every server has.
    more: Vec<String>,
    process: Option<Process>,
}

impl Etcd {
    /// A server on the loopback address of the host (of the calling thread's namespace).
    pub fn start() -> anyhow::Result<Self> {
        Self::start_at(Arc::new(Namespace::current()?), Ipv4Addr::LOCALHOST.into())
    }

    /// A server on the switch of `fabric`, which all nodes reach.
    pub fn on(fabric: &Fabric) -> anyhow::Result<Self> {
        Self::start_at(fabric.shared(), fabric.address().into())
    }

    /// Where clients find it, `http://127.0.0.1:12345`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.client)
    }

    /// Where another URL may be served: the same address, and a free port.
    pub fn other_address(&self) -> anyhow::Result<SocketAddr> {
        let [free, _] = self.namespace.run(|| free_ports(self.client.ip()))?;
        Ok(free)
    }

    /// Starts the server again with other arguments besides those that every server has.
    pub fn restart_with(&mut self, more: Vec<String>) -> anyhow::Result<()> {
        self.more = more;
        self.restart()
    }

    /// Runs `etcdctl`; the result is its standard output.
    pub fn ctl(&self, args: &[&str], input: &str) -> anyhow::Result<String> {
        let command = self.namespace.command("etcdctl").env("ETCDCTL_API", "3");
        let command = command.args(["--endpoints", &self.endpoint()]).args(args).input(input);
        command.ok().context("etcdctl is in the package etcd-client")
    }

    /// Kills the server and keeps its data.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts a killed server again, with the same data at the same address.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.kill();
        let log = self.dir.path().join("log");
        let to = || File::create(&log).with_context(|| format!("can't write {}", log.display()));
        let (client, peer) = (self.endpoint(), format!("http://{}", self.peer));
        let mut command = self
            .namespace
            .command("etcd")
            .arg("--data-dir")
            .arg(self.dir.path().join("data"))
            .args(["--name", "testbed", "--initial-cluster", &format!("testbed={peer}")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(&self.more)
            .stdout(to()?)
            .stderr(to()?);
        if self.may_skip_fsync()? {
            command = command.arg("--unsafe-no-fsync");
        }
        let mut process = command.spawn()?;
        let outcome = wait_for_some("a healthy etcd", Duration::from_secs(60), || {
            if let Ok(Some(status)) = process.ended() {
                return Some(Err(status));
            }
            let healthy = self.namespace.http_get(self.client, "/health").is_ok_and(|(code, _)| code == 200);
            healthy.then_some(Ok(()))
        })?;
        if let Err(status) = outcome {
            bail!("etcd ended early ({status}):\n{}", std::fs::read_to_string(&log).unwrap_or_default());
        }
        self.process = Some(process);
        Ok(())
    }

    /// Whether the program knows the flag that makes it quick, as it does from 3.5 on.
    fn may_skip_fsync(&self) -> anyhow::Result<bool> {
        static KNOWN: OnceLock<bool> = OnceLock::new();
        if let Some(known) = KNOWN.get() {
            return Ok(*known);
        }
        let known = self.namespace.command("etcd").arg("--help").ok()?.contains("unsafe-no-fsync");
        Ok(*KNOWN.get_or_init(|| known))
    }

    fn start_at(namespace: Arc<Namespace>, address: IpAddr) -> anyhow::Result<Self> {
        // Someone else may take a port between finding it free and etcd's use of it.
        for attempt in 1.. {
            let [client, peer] = namespace.run(|| free_ports(address))?;
            let dir = tempfile::Builder::new()
                .prefix("flannel-etcd-")
                .tempdir()
                .context("no temporary directory for etcd")?;
            let namespace = Arc::clone(&namespace);
            let mut etcd = Self { namespace, client, peer, dir, more: Vec::new(), process: None };
            match etcd.restart() {
                Err(error) if attempt < 3 && format!("{error:#}").contains("address already in use") => {}
                result => return result.map(|()| etcd),
            }
        }
        unreachable!("the third attempt returns")
    }
}

/// Two ports without a listener at the moment.
fn free_ports(address: IpAddr) -> anyhow::Result<[SocketAddr; 2]> {
    let listen = || TcpListener::bind((address, 0)).with_context(|| format!("no free port on {address}"));
    let (one, other) = (listen()?, listen()?);
    Ok([one.local_addr()?, other.local_addr()?])
}
