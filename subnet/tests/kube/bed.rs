//! A cluster of one API server, and the stores of its nodes.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use subnet::kube::{Kube, KubeOptions};
use subnet::testing::{ApiServer, Request};
use subnet::{
    Attachment, Claim, Feed, Known, Lease, LeaseStore, Leases, PublicAddrs, StoreError, Subnets, Vtep,
};
use tempfile::TempDir;
use tokio::sync::watch::Receiver;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Nothing here depends on how long something takes, as long as it is less than this.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com";
pub(crate) const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub(crate) const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
pub(crate) const MAC: &str = "12:c6:65:89:b4:e3";

pub(crate) struct Bed {
    pub(crate) server: ApiServer,
    directory: TempDir,
}

impl Bed {
    pub(crate) fn new(config: &str) -> Self {
        let bed = Self {
            server: ApiServer::local().unwrap(),
            directory: tempfile::Builder::new().prefix("flannel-test-kube-").tempdir().unwrap(),
        };
        bed.write("net-conf.json", config);
        bed
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> std::path::PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn options(&self, name: &str) -> KubeOptions {
        KubeOptions {
            node_name: Some(name.to_owned()),
            pod: None,
            kubeconfig: None,
            api_url: Some(self.server.url()),
            annotation_prefix: PREFIX.into(),
            net_config_path: self.directory.path().join("net-conf.json"),
            set_network_unavailable: true,
        }
    }

    pub(crate) async fn store(&self, name: &str) -> Arc<Kube> {
        Arc::new(Kube::new(self.options(name)).await.unwrap())
    }

    /// The patches so far.
    pub(crate) fn patches(&self) -> Vec<Request> {
        self.server.requests().into_iter().filter(|request| request.method == "PATCH").collect()
    }

    /// Their bodies, with `f` instead of the annotations' prefix.
    pub(crate) fn bodies(&self) -> Vec<String> {
        self.patches().into_iter().map(|request| request.body.replace(PREFIX, "f")).collect()
    }

    pub(crate) fn annotation(&self, node: &str, name: &str) -> Option<String> {
        let node = self.server.node(node)?;
        Some(node["metadata"]["annotations"][format!("{PREFIX}/{name}")].as_str()?.to_owned())
    }

    pub(crate) fn annotate(&self, node: &str, name: &str, value: Option<&str>) {
        self.server.annotate(node, &format!("{PREFIX}/{name}"), value);
    }
}

pub(crate) fn public(v4: &str, v6: &str) -> PublicAddrs {
    PublicAddrs { v4: v4.parse().ok(), v6: v6.parse().ok() }
}

pub(crate) fn vxlan(v4: &str, v6: &str) -> Attachment {
    let vtep = |mac: &str| mac.parse().ok().map(|mac| Vtep { vni: 1, mac });
    Attachment::Vxlan { v4: vtep(v4), v6: vtep(v6) }
}

pub(crate) async fn acquire(
    store: &Kube,
    public: PublicAddrs,
    attachment: &Attachment,
) -> Result<Lease, StoreError> {
    let network = store.network().await?;
    let attach = |_: Option<&Lease>| attachment.clone();
    store.acquire(&network, &Claim { public, previous: Subnets::default(), attach: &attach }).await
}

/// Acquires with the address of the node with this number.
pub(crate) async fn acquire_v4(store: &Kube, number: u8) -> Lease {
    acquire(store, public(&format!("192.0.2.{number}"), ""), &vxlan(MAC, "")).await.unwrap()
}

/// Ends with its handle.
pub(crate) struct Task<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(crate) fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Task<T> {
    Task(tokio::spawn(future))
}

/// Follows until dropped.
pub(crate) struct Follower {
    pub(crate) known: Receiver<Known>,
    _task: Task<std::convert::Infallible>,
}

impl Follower {
    pub(crate) fn of(store: &Arc<Kube>) -> Self {
        let (feed, known) = Feed::channel();
        let store = Arc::clone(store);
        Self { known, _task: spawn(async move { store.follow(&feed).await }) }
    }

    /// Waits until this holds of what is known.
    pub(crate) async fn until(&mut self, what: &str, condition: impl Fn(&Known) -> bool) -> Known {
        let waited = timeout(LIMIT, self.known.wait_for(|known| condition(known))).await;
        let waited = waited.map(|known| known.unwrap().clone());
        waited.unwrap_or_else(|_| panic!("never {what}: {:?}", self.known.borrow()))
    }

    /// Waits until the leases are so, and returns them.
    pub(crate) async fn leases(&mut self, what: &str, condition: impl Fn(&Leases) -> bool) -> Arc<Leases> {
        let holds = |known: &Known| known.leases.as_deref().is_some_and(&condition);
        self.until(what, holds).await.leases.unwrap()
    }

    /// The leases in words.
    pub(crate) async fn words(&mut self, count: usize) -> Vec<String> {
        let all = self.leases(&format!("{count} leases"), |all| all.leases.len() == count).await;
        all.leases.values().map(ToString::to_string).collect()
    }
}

/// Waits for what will happen.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(LIMIT, future).await {
        Ok(result) => result,
        Err(_) => panic!("never {what}"),
    }
}

/// Waits until this holds of something that can't be waited for.
pub(crate) async fn poll(what: &str, mut condition: impl FnMut() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// The result of a future that must not have one: `work` is done meanwhile.
pub(crate) async fn not_while<T>(
    what: &str,
    future: impl Future<Output = T>,
    work: impl Future<Output = ()>,
) {
    tokio::select! {
        biased;
        _ = future => panic!("{what}"),
        () = work => {}
    }
}
