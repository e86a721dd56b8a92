//! Leases in etcd v3, key for key and byte for byte as Go flannel keeps them (contract §3.1).

mod acquire;
mod client;
mod configured;
mod follow;
mod hold;
mod keys;
mod reason;
mod tls;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::{ConfigError, NetworkConfig};
use crate::lease::{Lease, Leases};
use crate::pace::Backoff;
use crate::standing::Standing;
use crate::store::{Claim, Feed, LeaseStore, Loss, StoreError, Tenure, addresses_of};
use client::EtcdConnection;
use follow::is_too_large;
use keys::Keys;

/// Where etcd is and how to be let in.
#[derive(Clone)]
pub struct EtcdOptions {
    /// `http://` or `https://` and `HOST:PORT`. Spaces around one and empty ones do not matter.
    pub endpoints: Vec<String>,
    /// Under which all keys are, `/coreos.com/network` unless the operator says otherwise.
    pub prefix: String,
    /// PEM file with this node's certificate; used only together with `key`.
    pub cert: Option<PathBuf>,
    /// PEM file with the key of `cert`.
    pub key: Option<PathBuf>,
    /// PEM file with the authority that signed etcd's certificate.
    pub ca: Option<PathBuf>,
    /// User name in etcd.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// How long before it expires a lease is renewed.
    pub renew_margin: Duration,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoints, prefix, cert, key, ca, username, password, renew_margin } = self;
        f.debug_struct("EtcdOptions")
            .field("endpoints", endpoints)
            .field("prefix", prefix)
            .field("cert", cert)
            .field("key", key)
            .field("ca", ca)
            .field("username", username)
            .field("password", &password.as_ref().map(|_| "(not shown)"))
            .field("renew_margin", renew_margin)
            .finish()
    }
}

/// One node's end of an etcd cluster.
pub struct Etcd {
    connection: EtcdConnection,
    endpoints: Vec<String>,
    keys: Keys,
    renew_margin: Duration,
    /// What this node holds. Locked while it is being changed in etcd, so that `hold` can tell our own
    /// writing from others'.
    held: tokio::sync::Mutex<Option<HeldLease>>,
    /// How the lease stands, to be told without waiting for a write in progress.
    tenure: Mutex<Tenure>,
    /// Wakes `hold` when `acquire` has changed `held`.
    moved: Notify,
    /// What `acquire` listed, for the first snapshot of `follow`.
    listed: Mutex<Option<Listing>>,
    /// The etcd leases granted to this process, latest first.
    grants: Mutex<VecDeque<i64>>,
    /// The revision as of which the configuration was read last, and the pace at which watching it fails.
    configured: Mutex<Option<i64>>,
    config_pace: Mutex<Backoff>,
    standing: Mutex<Standing>,
    /// Whether `follow` has begun and so needs no listing any more.
    following: AtomicBool,
}

/// The lease that this node holds, as last seen in etcd.
#[derive(Clone, Debug)]
struct HeldLease {
    lease: Lease,
    /// The revision of the key's last change: every rewriting compares it.
    revision: i64,
    /// When etcd will delete the key. `None` for a reservation, which has no time to live and gets none.
    expires: Option<Instant>,
}

/// Every lease as of one revision.
#[derive(Debug, Default)]
struct Listing {
    /// Shared with the followers, and copied only when it changes while they look at it.
    leases: Arc<Leases>,
    revision: i64,
}

impl Etcd {
    /// Checks the options and reads the TLS files. Connecting is left to the first request, and a server
    /// that is away is an error of that request and nothing more.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] naming the option or the file.
    pub fn new(options: EtcdOptions) -> Result<Self, StoreError> {
        Ok(Self {
            connection: EtcdConnection::new(&options)?,
            endpoints: options.endpoints.clone(),
            keys: Keys::new(&options.prefix),
            renew_margin: options.renew_margin,
            held: tokio::sync::Mutex::new(None),
            tenure: Mutex::default(),
            moved: Notify::new(),
            listed: Mutex::new(None),
            grants: Mutex::default(),
            configured: Mutex::new(None),
            config_pace: Mutex::new(Backoff::watching()),
            standing: Mutex::default(),
            following: AtomicBool::new(false),
        })
    }

    fn standing(&self) -> std::sync::MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps in mind how the lease stands.
    fn stands(&self, held: Option<&HeldLease>, trouble: Option<&StoreError>) {
        let left =
            held.and_then(|held| held.expires).map(|ends| ends.saturating_duration_since(Instant::now()));
        let ends = left.map(|left| SystemTime::now() + left);
        let now = Tenure { ends, trouble: trouble.map(ToString::to_string) };
        *self.tenure.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    fn listed(&self) -> std::sync::MutexGuard<'_, Option<Listing>> {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Etcd").field(&self.describe()).finish()
    }
}

impl LeaseStore for Etcd {
    fn describe(&self) -> String {
        format!("{} under {}", self.connection.described, self.keys.prefix())
    }

    async fn network(&self) -> Result<NetworkConfig, StoreError> {
        let at = format!("{} in etcd", self.keys.config());
        let answer = self.connection.call(|mut client| async move {
            match client.get(self.keys.config(), None).await {
                Err(error) if is_too_large(&error) => Ok(None),
                answer => answer.map(Some),
            }
        });
        let Some(answer) = answer.await? else {
            let source = ConfigError("it is larger than 4 MB: write a configuration".into());
            return Err(StoreError::BadConfig { at, source });
        };
        let revision = answer.header().map(|header| header.revision());
        *self.configured.lock().unwrap_or_else(PoisonError::into_inner) = revision;
        let Some(kv) = answer.kvs().first() else { return Err(StoreError::NoConfig { at }) };
        let json = String::from_utf8_lossy(kv.value());
        NetworkConfig::parse(&json).map_err(|source| StoreError::BadConfig { at, source })
    }

    async fn network_changed(&self) {
        self.watch_config().await;
    }

    async fn acquire(&self, network: &NetworkConfig, claim: &Claim<'_>) -> Result<Lease, StoreError> {
        self.obtain(network, claim).await
    }

    async fn hold(&self) -> Loss {
        self.keep().await
    }

    fn tenure(&self) -> Tenure {
        self.tenure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn follow(&self, feed: &Feed) -> Infallible {
        self.feed(feed).await
    }

    async fn endpoints(&self) -> Vec<IpAddr> {
        addresses_of(&self.endpoints).await
    }

    fn readdressed(&self) {
        self.connection.readdressed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_never_shown() {
        let options = EtcdOptions {
            endpoints: vec![" http://127.0.0.1:2379".into(), String::new()],
            prefix: "/coreos.com/network".into(),
            cert: None,
            key: None,
            ca: None,
            username: Some("flannel".into()),
            password: Some("hunter2".into()),
            renew_margin: Duration::from_secs(3600),
        };
        let etcd = Etcd::new(options.clone()).unwrap();
        let shown = format!("{options:?} {etcd:?} {}", etcd.describe());
        assert!(
            shown.contains("flannel") && shown.contains("http://127.0.0.1:2379 under /coreos.com/network")
        );
        assert!(!shown.contains("hunter2"), "{shown}");
        let error = Etcd::new(EtcdOptions { endpoints: vec![" ".into()], ..options }).unwrap_err();
        assert!(error.to_string().contains("--etcd-endpoints"), "{error}");
    }
}
