//! A real etcd on a loopback address of its own, gone with the test process however that ends.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions};
use tempfile::TempDir;

/// Certificates and addresses of a server, kept while it is stopped and started again.
pub(crate) struct Server {
    pub(crate) host: String,
    directory: TempDir,
    /// More arguments, for example TLS.
    arguments: Vec<String>,
    /// The shell that ends etcd when its standard input is closed.
    process: Mutex<Option<Child>>,
}

impl Server {
    /// The one that tests share as long as any of them uses it.
    pub(crate) async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let server = {
            let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
            shared.upgrade().unwrap_or_else(|| {
                let server = Arc::new(Self::prepare());
                server.start();
                *shared = Arc::downgrade(&server);
                server
            })
        };
        server.answering(None).await;
        server
    }

    /// A server of one test, not yet started.
    pub(crate) fn prepare() -> Self {
        // In memory where possible: etcd syncs every write, and loss of power is not what is tested here.
        let place =
            ["/dev/shm", "/tmp"].into_iter().find(|path| std::path::Path::new(path).is_dir()).unwrap();
        let directory = tempfile::Builder::new().prefix("flannel-test-etcd-").tempdir_in(place).unwrap();
        Self { host: own_address(), directory, arguments: Vec::new(), process: Mutex::new(None) }
    }

    /// The same with these arguments instead of plain HTTP.
    pub(crate) fn with(mut self, arguments: Vec<String>) -> Self {
        self.arguments = arguments;
        self
    }

    /// Where its files are.
    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn address(&self) -> String {
        format!("{}:2379", self.host)
    }

    pub(crate) fn start(&self) {
        const ETCD: &str = "/usr/bin/etcd";
        assert!(std::path::Path::new(ETCD).exists(), "{ETCD} is missing: install the package etcd-server");
        let scheme = self.scheme();
        let (url, peer) = (format!("{scheme}://{}:2379", self.host), format!("http://{}:2380", self.host));
        // The shell waits for its standard input to end, which it does with this process at the latest.
        let script = r#""$@" >"$D/log" 2>&1 & read -r keep; kill -9 $!; wait; [ "$keep" ] || rm -rf "$D""#;
        let child = Command::new("/bin/sh")
            .args(["-c", script, "sh", ETCD, "--name=test", "--log-level=warn", "--logger=zap"])
            .args(["--log-outputs=stderr", "--max-txn-ops=1000"])
            .arg(format!("--data-dir={}", self.path("data")))
            .arg(format!("--listen-client-urls={url}"))
            .arg(format!("--advertise-client-urls={url}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=test={peer}"))
            .args(&self.arguments)
            .env("D", self.directory.path())
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        *self.process() = Some(child);
    }

    /// Kills it; its data stay.
    pub(crate) fn kill(&self) {
        if let Some(mut child) = self.process().take() {
            // The pipe is closed with its last owner, here.
            child.stdin.take().unwrap().write_all(b"keep\n").unwrap();
            child.wait().unwrap();
        }
    }

    /// Kills it, and starts it with no data, as after a backup of the first minute was put back.
    pub(crate) async fn begin_anew(&self) -> Client {
        self.kill();
        std::fs::remove_dir_all(self.path("data")).unwrap();
        self.start();
        self.answering(None).await
    }

    /// Waits until it answers, and gives a client.
    pub(crate) async fn answering(&self, options: Option<ConnectOptions>) -> Client {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let scheme = self.scheme();
            let url = format!("{scheme}://{}", self.address());
            let client = Client::connect([url], options.clone()).await;
            let why = match client {
                Ok(mut client) => match client.get("ready?", None).await {
                    Ok(_) => return client,
                    Err(error) => error.to_string(),
                },
                Err(error) => error.to_string(),
            };
            let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "etcd does not answer: {why}\n{log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn scheme(&self) -> &'static str {
        let tls = self.arguments.iter().any(|argument| argument.starts_with("--cert-file"));
        if tls { "https" } else { "http" }
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A loopback address without listeners on the ports that we use.
pub(crate) fn own_address() -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    loop {
        let pid = std::process::id();
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let host = format!("127.{}.{}.{}", 64 + (pid >> 8) % 128, pid % 256, 1 + count % 254);
        let free = |port: u16| std::net::TcpListener::bind((host.as_str(), port)).is_ok();
        if free(2379) && free(2380) {
            return host;
        }
    }
}
