//! Claims, and watching what a store says.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use subnet::{Attachment, Claim, Family, Feed, Known, Lease, LeaseStore, Leases, NetworkConfig, PublicAddrs};
use subnet::{StoreError, Subnets, Vtep};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// No condition takes longer, however busy the machine is.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// The public address of the node with this number.
pub(crate) fn public(number: u16) -> PublicAddrs {
    let [high, low] = number.to_be_bytes();
    PublicAddrs { v4: Some(Ipv4Addr::new(192, 0, high, low)), v6: None }
}

/// The same of a node without IPv4.
pub(crate) fn public_v6(number: u16) -> PublicAddrs {
    PublicAddrs { v4: None, v6: Some(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number)) }
}

/// The same of a node with both.
pub(crate) fn public_with_v6(number: u16) -> PublicAddrs {
    PublicAddrs { v4: public(number).v4, v6: public_v6(number).v6 }
}

/// A VXLAN endpoint whose MAC address ends with this number.
pub(crate) fn vxlan(number: u16) -> Attachment {
    let [high, low] = number.to_be_bytes();
    let mac = format!("02:00:00:00:{high:02x}:{low:02x}").parse().unwrap();
    Attachment::Vxlan { v4: Some(Vtep { vni: 1, mac, port: None }), v6: None }
}

/// The value of such a node's lease.
pub(crate) fn value(number: u16) -> String {
    value_of(public(number), number)
}

/// The value of the lease of a node with these addresses.
pub(crate) fn value_of(public: PublicAddrs, number: u16) -> String {
    subnet::lease::encode_value(&public, &vxlan(number))
}

pub(crate) fn network(config: &str) -> NetworkConfig {
    NetworkConfig::parse(config).unwrap()
}

pub(crate) fn subnets(text: &str) -> Subnets {
    text.split('&').map(|net| net.parse::<ipnet::IpNet>().unwrap()).collect()
}

/// What the store calls a lease.
pub(crate) fn key(lease: &Lease) -> String {
    subnet::lease::format_key(&lease.subnets).unwrap()
}

/// Acquires as the node with this number, which has an IPv6 address only where there is no IPv4.
pub(crate) async fn acquire(store: &impl LeaseStore, config: &str, number: u16) -> Result<Lease, StoreError> {
    acquire_after(store, config, number, Subnets::default()).await
}

/// The same with the subnets of an earlier run.
pub(crate) async fn acquire_after(
    store: &impl LeaseStore,
    config: &str,
    number: u16,
    previous: Subnets,
) -> Result<Lease, StoreError> {
    let attach = |_: Option<&Lease>, _: &Leases| vxlan(number);
    let network = network(config);
    let public = if network.range(Family::V4).is_some() { public(number) } else { public_v6(number) };
    let claim = Claim::new(public, previous, &attach);
    within(store.acquire(&network, &claim)).await
}

/// Acquires as [`acquire`] does, from a node with pods in subnets that the network has moved away from.
pub(crate) async fn acquire_beside(
    store: &impl LeaseStore,
    config: &str,
    number: u16,
    left: &[ipnet::IpNet],
) -> Result<Lease, StoreError> {
    let attach = |_: Option<&Lease>, _: &Leases| vxlan(number);
    let claim = Claim { left, ..Claim::new(public_with_v6(number), Subnets::default(), &attach) };
    within(store.acquire(&network(config), &claim)).await
}

/// Waits for something that must happen.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("this did not happen in time")
}

/// Polls a condition that nothing announces.
pub(crate) async fn until<T>(mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    within(async {
        loop {
            match condition().await {
                Some(found) => return found,
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await
}

/// A task that ends with the test.
pub(crate) struct Running<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<T> Running<T> {
    /// Whether the task has ended by itself.
    pub(crate) fn ended(&self) -> bool {
        self.0.is_finished()
    }

    /// The task's result, which must come.
    pub(crate) async fn end(&mut self) -> T {
        within(&mut self.0).await.unwrap()
    }
}

/// Holds the lease of a store.
pub(crate) fn hold<S: LeaseStore>(store: &Arc<S>) -> Running<subnet::Loss> {
    let store = store.clone();
    Running(tokio::spawn(async move { store.hold().await }))
}

/// A reader of a store's feed.
pub(crate) struct Follower {
    known: watch::Receiver<Known>,
    _task: Running<()>,
}

impl Follower {
    pub(crate) fn of<S: LeaseStore>(store: Arc<S>) -> Self {
        let (feed, known) = Feed::channel();
        let task = tokio::spawn(async move { match store.follow(&feed).await {} });
        Self { known, _task: Running(task) }
    }

    /// The first state that fulfils the condition; all states on the way must fulfil `always`.
    pub(crate) async fn until(&mut self, condition: impl Fn(&Known) -> bool) -> Known {
        let found = within(self.known.wait_for(|known| condition(known))).await;
        found.expect("the store still follows").clone()
    }

    /// The next state.
    pub(crate) async fn next(&mut self) -> Known {
        self.known.changed().await.expect("the store still follows");
        self.known.borrow_and_update().clone()
    }

    pub(crate) async fn leases(&mut self, condition: impl Fn(&Leases) -> bool) -> Arc<Leases> {
        let known = self.until(|known| known.leases.as_deref().is_some_and(&condition)).await;
        known.leases.unwrap()
    }
}
