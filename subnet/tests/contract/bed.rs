//! What a test needs of each kind of store: nodes, the hand of an operator, and a path that can break.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use etcd_client::{Client, PutOptions, Txn, TxnOp};
use subnet::LeaseStore;
use subnet::etcd::{Etcd, EtcdOptions};
use subnet::file::Files;
use subnet::lease::{encode_value, format_key};
use subnet::memory::{Cluster, Memory};
use subnet::store::LEASE_TTL;

use super::etcd_server::Server;
use super::proxy::Proxy;

/// One store with its nodes and operators.
pub(crate) trait Bed: Sized {
    type Store: LeaseStore;

    /// A store with this `net-conf.json`, if any, and no lease.
    async fn new(config: Option<&str>) -> Self;

    /// A node that renews its lease `margin` before the end.
    fn node_with_margin(&self, margin: Duration) -> Self::Store;

    /// Writes entries as an operator or another node would.
    async fn write(&self, entries: &[(String, String)], ttl: Option<Duration>);

    async fn delete(&self, key: &str);

    async fn read(&self, key: &str) -> Option<Entry>;

    /// Writes the configuration again, or removes it.
    async fn configure(&self, config: Option<&str>);

    /// Makes the store unreachable for the nodes.
    async fn cut(&self);

    /// Ends what `cut` began.
    async fn mend(&self);

    fn node(&self) -> Self::Store {
        self.node_with_margin(Duration::from_secs(3600))
    }

    /// A node that renews its lease every second or so.
    fn eager_node(&self) -> Self::Store {
        self.node_with_margin(LEASE_TTL - Duration::from_secs(1))
    }

    async fn put(&self, key: &str, value: &str, ttl: Option<Duration>) {
        self.write(&[(key.to_owned(), value.to_owned())], ttl).await;
    }
}

/// What an entry says, however the store writes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) value: String,
    /// `None` for a reservation.
    pub(crate) ttl: Option<Duration>,
    /// Differs after every writing.
    pub(crate) version: String,
}

/// The store in memory; what a server would do about time to live is done here.
pub(crate) struct InMemory(Cluster);

impl Bed for InMemory {
    type Store = Memory;

    async fn new(config: Option<&str>) -> Self {
        Self(Cluster::new(config.unwrap_or_default()))
    }

    fn node_with_margin(&self, _: Duration) -> Memory {
        self.0.node()
    }

    async fn write(&self, entries: &[(String, String)], ttl: Option<Duration>) {
        static CREATED: AtomicU32 = AtomicU32::new(1);
        self.0.edit(|leases| {
            for (key, value) in entries {
                let old =
                    leases.leases.values().find(|lease| format_key(&lease.subnets).as_ref() == Some(key));
                let created = old.map(|old| old.created);
                let created = created.unwrap_or_else(|| CREATED.fetch_add(1, Ordering::Relaxed).into());
                leases.remove_entry(key);
                leases.insert_entry(key, value.as_bytes(), created);
            }
        });
        if let Some(ttl) = ttl {
            let (cluster, entries) = (self.0.clone(), entries.to_vec());
            tokio::spawn(async move {
                tokio::time::sleep(ttl).await;
                cluster.edit(|leases| entries.iter().for_each(|(key, _)| leases.remove_entry(key)));
            });
        }
    }

    async fn delete(&self, key: &str) {
        self.0.edit(|leases| leases.remove_entry(key));
    }

    async fn read(&self, key: &str) -> Option<Entry> {
        let leases = self.0.leases();
        let lease = leases.leases.values().find(|lease| format_key(&lease.subnets).unwrap() == key)?;
        let value = encode_value(&lease.public, &lease.attachment);
        Some(Entry { version: value.clone(), value, ttl: None })
    }

    async fn configure(&self, config: Option<&str>) {
        self.0.configure(config.unwrap_or_default());
    }

    async fn cut(&self) {
        self.0.trouble(Some("cut"));
    }

    async fn mend(&self) {
        self.0.trouble(None);
    }
}

/// A prefix of its own in a real etcd, and a network path of its own to it.
pub(crate) struct InEtcd {
    pub(crate) client: Client,
    pub(crate) prefix: String,
    pub(crate) proxy: Proxy,
    pub(crate) server: Arc<Server>,
}

impl InEtcd {
    pub(crate) async fn on(server: Arc<Server>, config: Option<&str>) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let client = server.answering(None).await;
        let prefix = format!("/test-{}/network", COUNTER.fetch_add(1, Ordering::Relaxed));
        let proxy = Proxy::new(server.address()).await;
        if let Some(config) = config {
            client.clone().put(format!("{prefix}/config"), config, None).await.unwrap();
        }
        Self { client, prefix, proxy, server }
    }

    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}/subnets/{name}", self.prefix)
    }

    pub(crate) fn options(&self, renew_margin: Duration) -> EtcdOptions {
        EtcdOptions { prefix: self.prefix.clone(), ..options(self.proxy.url(), renew_margin) }
    }
}

/// Options for one endpoint and nothing else.
pub(crate) fn options(url: String, renew_margin: Duration) -> EtcdOptions {
    EtcdOptions {
        endpoints: vec![url],
        prefix: "/coreos.com/network".into(),
        cert: None,
        key: None,
        ca: None,
        username: None,
        password: None,
        renew_margin,
    }
}

impl Bed for InEtcd {
    type Store = Etcd;

    async fn new(config: Option<&str>) -> Self {
        Self::on(Server::shared().await, config).await
    }

    fn node_with_margin(&self, margin: Duration) -> Etcd {
        Etcd::new(self.options(margin)).unwrap()
    }

    async fn write(&self, entries: &[(String, String)], ttl: Option<Duration>) {
        let mut client = self.client.clone();
        let mut lease = 0;
        if let Some(ttl) = ttl {
            lease = client.lease_grant(ttl.as_secs() as i64, None).await.unwrap().id();
        }
        for some in entries.chunks(500) {
            let puts: Vec<TxnOp> = some
                .iter()
                .map(|(key, value)| {
                    TxnOp::put(self.key(key), value.as_str(), Some(PutOptions::new().with_lease(lease)))
                })
                .collect();
            client.txn(Txn::new().and_then(puts)).await.unwrap();
        }
    }

    async fn delete(&self, key: &str) {
        self.client.clone().delete(self.key(key), None).await.unwrap();
    }

    async fn read(&self, key: &str) -> Option<Entry> {
        let mut client = self.client.clone();
        let kv = client.get(self.key(key), None).await.unwrap().take_kvs().pop()?;
        let mut ttl = None;
        if kv.lease() != 0 {
            let seconds = client.lease_time_to_live(kv.lease(), None).await.unwrap().ttl();
            ttl = Some(Duration::from_secs(seconds.max(0) as u64));
        }
        let value = kv.value_str().unwrap().to_owned();
        Some(Entry { value, ttl, version: kv.mod_revision().to_string() })
    }

    async fn configure(&self, config: Option<&str>) {
        let (mut client, key) = (self.client.clone(), format!("{}/config", self.prefix));
        match config {
            Some(config) => drop(client.put(key, config, None).await.unwrap()),
            None => drop(client.delete(key, None).await.unwrap()),
        }
    }

    async fn cut(&self) {
        self.proxy.cut().await;
    }

    async fn mend(&self) {
        self.proxy.mend().await;
    }
}

/// A directory.
pub(crate) struct InFiles {
    _place: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl InFiles {
    pub(crate) fn file(&self, key: &str) -> PathBuf {
        self.path.join("subnets").join(key)
    }
}

impl Bed for InFiles {
    type Store = Files;

    async fn new(config: Option<&str>) -> Self {
        let place = tempfile::Builder::new().prefix("flannel-test-files-").tempdir().unwrap();
        let path = place.path().join("store");
        std::fs::create_dir_all(path.join("subnets")).unwrap();
        if let Some(config) = config {
            std::fs::write(path.join("config.json"), config).unwrap();
        }
        Self { _place: place, path }
    }

    fn node_with_margin(&self, margin: Duration) -> Files {
        Files::new(self.path.clone(), margin)
    }

    async fn write(&self, entries: &[(String, String)], ttl: Option<Duration>) {
        let expires = ttl.map(|ttl| (SystemTime::now() + ttl).duration_since(UNIX_EPOCH).unwrap().as_secs());
        for (key, value) in entries {
            let text = match (expires, value.strip_suffix('}')) {
                (Some(expires), Some(start)) => format!("{start},\"Expires\":{expires}}}"),
                _ => value.clone(),
            };
            std::fs::write(self.file(".writing"), text).unwrap();
            std::fs::rename(self.file(".writing"), self.file(key)).unwrap();
        }
    }

    async fn delete(&self, key: &str) {
        std::fs::remove_file(self.file(key)).unwrap();
    }

    async fn read(&self, key: &str) -> Option<Entry> {
        use std::os::unix::fs::MetadataExt;
        let text = std::fs::read_to_string(self.file(key)).ok()?;
        let about = std::fs::metadata(self.file(key)).ok()?;
        let version = format!("{} {:?}", about.ino(), about.modified().unwrap());
        let value = match text.split_once(",\"Created\"") {
            Some((value, _)) => format!("{value}}}"),
            None => text.clone(),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        let expires = json.and_then(|json| json["Expires"].as_u64());
        Some(Entry { value, version, ttl: expires.map(|at| Duration::from_secs(at.saturating_sub(now))) })
    }

    async fn configure(&self, config: Option<&str>) {
        let path = self.path.join("config.json");
        match config {
            Some(config) => std::fs::write(path, config).unwrap(),
            None => std::fs::remove_file(path).unwrap(),
        }
    }

    async fn cut(&self) {
        std::fs::rename(&self.path, self.path.with_extension("away")).unwrap();
    }

    async fn mend(&self) {
        std::fs::rename(self.path.with_extension("away"), &self.path).unwrap();
    }
}
