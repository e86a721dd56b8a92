//! Stores and followers, over each kind of server.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use subnet::kube::Kube;
use subnet::{
    Attachment, Claim, Feed, Known, Lease, LeaseStore, Leases, PublicAddrs, StoreError, Subnets, Vtep,
};
use tokio::sync::watch::Receiver;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Nothing here depends on how long something takes, as long as it is less than this.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com";
pub(crate) const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub(crate) const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
pub(crate) const MAC: &str = "12:c6:65:89:b4:e3";

pub(crate) fn public(v4: &str, v6: &str) -> PublicAddrs {
    PublicAddrs { v4: v4.parse().ok(), v6: v6.parse().ok() }
}

pub(crate) fn vxlan(v4: &str, v6: &str) -> Attachment {
    let vtep = |mac: &str| mac.parse().ok().map(|mac| Vtep { vni: 1, mac, port: None });
    Attachment::Vxlan { v4: vtep(v4), v6: vtep(v6) }
}

pub(crate) async fn acquire(
    store: &Kube,
    public: PublicAddrs,
    attachment: &Attachment,
) -> Result<Lease, StoreError> {
    let network = store.network().await?;
    let attach = |_: Option<&Lease>, _: &Leases| attachment.clone();
    store.acquire(&network, &Claim::new(public, Subnets::default(), &attach)).await
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
