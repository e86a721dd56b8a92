//! The contract of every lease store: complete snapshots, one claim per node, no partial truth.
//!
//! `tests/contract.rs` is the same contract as a test suite, run over all stores.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use tokio::sync::watch;

use crate::config::{ConfigError, NetworkConfig};
use crate::lease::{Attachment, Lease, Leases};
use crate::mac::Mac;
use crate::net::{Family, PublicAddrs, Subnets};

/// How long a lease lives without being renewed: 24 hours (contract §3.1.4).
pub const LEASE_TTL: std::time::Duration = std::time::Duration::from_secs(86_400);

/// Why a store can't do what it was asked. None of these is a reason to forget leases.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store does not answer; trying again may help. The operator looks at the store or the path to it.
    #[error("{store} does not answer: {why}")]
    Unreachable {
        /// The store, as the operator configured it.
        store: String,
        /// What happened.
        why: String,
    },
    /// The store refuses us; the operator looks at credentials and permissions.
    #[error("{store} refuses access: {why}")]
    Denied {
        /// The store.
        store: String,
        /// What it said, without any secret.
        why: String,
    },
    /// There is no configuration yet; the operator writes one.
    #[error(
        "there is no network configuration at {at}: write one, for example {{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}"
    )]
    NoConfig {
        /// The key or the file.
        at: String,
    },
    /// The configuration can't be used; the operator corrects it.
    #[error("{at}: {source}")]
    BadConfig {
        /// The key or the file.
        at: String,
        /// What is wrong with it.
        #[source]
        source: ConfigError,
    },
    /// Every subnet is taken; the operator widens the range or removes leases of nodes that are gone.
    #[error("out of subnets: {ranges} is leased; widen that range or delete leases of nodes that are gone")]
    Exhausted {
        /// The subnets that may be given out, in words.
        ranges: String,
    },
    /// This node can't take part, e.g. because it has no public address to be recognised by.
    #[error("{0}")]
    Unusable(String),
}

/// How a node lost its lease for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// While this node was away its lease expired and another node took the subnet.
    #[error("the lease of {subnets} now belongs to the node at {holder}")]
    Taken {
        /// The subnets that were ours.
        subnets: Subnets,
        /// The public address of the node that holds them.
        holder: PublicAddrs,
    },
    /// Another living node writes our lease: it has the same public address.
    #[error(
        "another node rewrites the lease of {subnets}: it has the same public address {public}; give each node its own with --public-ip or --iface"
    )]
    Contested {
        /// Our subnets.
        subnets: Subnets,
        /// The address that both announce.
        public: PublicAddrs,
    },
    /// The allocator of subnets has given this node another one.
    #[error("this node was given other subnets than {subnets}")]
    Changed {
        /// The subnets that were ours.
        subnets: Subnets,
    },
    /// Somebody changes what this node announces, however often it is put back.
    #[error(
        "what this node announces for {subnets} is changed by somebody else again and again: look for a second flanneld with the same node name, or a program that manages annotations of nodes"
    )]
    Rewritten {
        /// Our subnets.
        subnets: Subnets,
    },
}

/// What a node says about itself when it asks for a lease.
#[derive(Clone, Copy)]
pub struct Claim<'a> {
    /// The addresses by which peers reach the node, and by which the store recognises it.
    pub public: PublicAddrs,
    /// The subnets of an earlier run, taken again if they are free.
    pub previous: Subnets,
    /// The MACs of this node's tunnel devices, living or remembered: a lease of a previous subnet with one of
    /// them is this node's, with any public address.
    pub macs: &'a [Mac],
    /// The lease that this machine last held: it is this node's as long as no other node has written another one.
    pub before: Option<&'a Lease>,
    /// Addresses that no subnet may contain: this host's, its routers', the store's.
    pub reserved: &'a [IpNet],
    /// The networks that the host is in, from which subnets are taken only if there are no others.
    pub lans: &'a [IpNet],
    /// Subnets that the network has moved away from and in which pods of this node still are: leases of this node
    /// that contain one are renewed together with the claim.
    pub left: &'a [IpNet],
    /// What to publish, given the lease that the node turned out to hold already, if any, and all that are
    /// known. It may be called more than once.
    pub attach: &'a Attach<'a>,
}

/// What a node publishes: see [`Claim::attach`].
pub type Attach<'a> = dyn Fn(Option<&Lease>, &Leases) -> Attachment + Send + Sync + 'a;

impl<'a> Claim<'a> {
    /// A claim of a node that knows nothing else about itself.
    pub fn new(public: PublicAddrs, previous: Subnets, attach: &'a Attach<'a>) -> Self {
        Self { public, previous, macs: &[], before: None, reserved: &[], lans: &[], left: &[], attach }
    }

    /// Whether this lease, which has another public address, is this node's from before it moved.
    pub(crate) fn recognises(&self, lease: &Lease) -> bool {
        let shares = lease.subnets.iter().any(|subnet| self.previous.iter().any(|mine| mine == subnet));
        let vteps = || Family::BOTH.into_iter().filter_map(|family| lease.attachment.vtep(family));
        let unchanged = |before: &Lease| {
            before.subnets == lease.subnets
                && before.public == lease.public
                && before.attachment == lease.attachment
        };
        shares && (vteps().any(|vtep| self.macs.contains(&vtep.mac)) || self.before.is_some_and(unchanged))
    }
}

/// What is known about the cluster's leases; always the latest state, never a change.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The last complete snapshot; `None` until there was one.
    pub leases: Option<Arc<Leases>>,
    /// It is the one that an earlier run saved: the store has given none yet, and there may be more leases.
    pub recalled: bool,
    /// Why the snapshot may be out of date at the moment, if it may.
    pub trouble: Option<String>,
    /// Whether that is because the store refuses this node, and not because it is away.
    pub refused: bool,
    /// When the store last delivered a complete snapshot, or one that equals the last.
    pub answered: Option<SystemTime>,
    /// How many snapshots there were that differed from the one before.
    pub snapshots: u64,
    /// How many times following the leases failed, by [`StoreError::kind`].
    pub errors: BTreeMap<&'static str, u64>,
}

impl StoreError {
    /// Its kind, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Denied { .. } => "denied",
            Self::NoConfig { .. } => "no_config",
            Self::BadConfig { .. } => "bad_config",
            Self::Exhausted { .. } => "exhausted",
            Self::Unusable(_) => "unusable",
        }
    }
}

/// The writing end of [`Known`]. Readers that are slow miss intermediate states and nothing else.
#[derive(Clone, Debug)]
pub struct Feed(watch::Sender<Known>);

impl Feed {
    /// A feed, and the end that the agent reads.
    pub fn channel() -> (Self, watch::Receiver<Known>) {
        let (sender, receiver) = watch::channel(Known::default());
        (Self(sender), receiver)
    }

    /// Publishes a complete snapshot and ends any trouble. A snapshot equal to the last wakes no follower.
    pub fn snapshot(&self, leases: &Leases) {
        self.publish(leases, |before| Arc::new(leases.sharing_with(before)));
    }

    /// Publishes what an earlier run saved, for the time until the store gives a complete snapshot.
    pub fn recall(&self, leases: &Leases) {
        self.snapshot(leases);
        self.0.send_modify(|known| known.recalled = true);
    }

    /// As [`snapshot`](Self::snapshot), for a store that makes each snapshot from the one before.
    pub fn share(&self, leases: &Arc<Leases>) {
        self.publish(leases, |_| Arc::clone(leases));
    }

    fn publish(&self, leases: &Leases, shared: impl FnOnce(&Leases) -> Arc<Leases>) {
        self.0.send_if_modified(|known| {
            let changed = known.leases.as_deref() != Some(leases);
            known.heard(changed);
            let recalled = std::mem::take(&mut known.recalled);
            if changed {
                let before = known.leases.take().unwrap_or_default();
                known.leases = Some(shared(&before));
            }
            known.refused = false;
            known.trouble.take().is_some() || changed || recalled
        });
    }

    /// Publishes a complete snapshot that may be out of date soon, for the store can't be followed as it should be.
    pub fn share_in_trouble(&self, leases: &Leases, why: &StoreError) {
        self.0.send_if_modified(|known| {
            let changed = known.leases.as_deref() != Some(leases);
            known.heard(changed);
            let recalled = std::mem::take(&mut known.recalled);
            if changed {
                known.leases = Some(Arc::new(leases.clone()));
            }
            known.trouble_is(why) || changed || recalled
        });
    }

    /// Takes note that the store answered, though it had nothing new to say. Wakes no follower.
    pub fn answered(&self) {
        self.0.send_if_modified(|known| {
            known.heard(false);
            false
        });
    }

    /// Reports that the store can't be followed at the moment. The leases stay as they are: silence is
    /// not deletion.
    pub fn trouble(&self, why: &StoreError) {
        self.0.send_if_modified(|known| known.trouble_is(why));
    }
}

impl Known {
    fn heard(&mut self, changed: bool) {
        self.answered = Some(SystemTime::now());
        self.snapshots += u64::from(changed);
    }

    /// Says whether that is news.
    fn trouble_is(&mut self, why: &StoreError) -> bool {
        *self.errors.entry(why.kind()).or_default() += 1;
        let text = why.to_string();
        let changed = self.trouble.as_ref() != Some(&text);
        self.trouble = Some(text);
        self.refused = matches!(why, StoreError::Denied { .. });
        changed
    }
}

/// How this node's own lease stands.
#[derive(Clone, Debug, Default)]
pub struct Tenure {
    /// When it ends unless it is renewed; never, where leases do not end.
    pub ends: Option<SystemTime>,
    /// Why it could not be renewed last, if it could not; where leases do not end, what is wrong with the own entry: a
    /// sentence that ends with the remedy.
    pub trouble: Option<String>,
}

/// Where leases are kept. One value serves one node.
pub trait LeaseStore: Send + Sync + 'static {
    /// The store in words, for logs: its kind and address, never a secret.
    fn describe(&self) -> String;

    /// Reads and checks the cluster's network configuration.
    fn network(&self) -> impl Future<Output = Result<NetworkConfig, StoreError>> + Send;

    /// Resolves when the configuration may be another one than [`network`](Self::network) read last, at
    /// once if that is so already. May resolve for nothing; paces its own retries.
    fn network_changed(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Whether this node, which holds `held`, can go on in another network. It can always, where nodes
    /// choose their subnets themselves.
    ///
    /// # Errors
    /// A sentence with what stands in the way and the remedy.
    fn admits(&self, _network: &NetworkConfig, _held: &Subnets) -> Result<(), String> {
        Ok(())
    }

    /// Obtains this node's lease, the same one as before where possible, and publishes the attachment.
    ///
    /// In this order: the lease that this value holds already (so that a new public address moves it),
    /// one that this node held before it moved to another address, the lease with the same public address, the claim's previous subnets, a free subnet; each family for
    /// itself, so that one that is added or removed leaves the other alone. The lease then moves in one
    /// step: a follower never sees the node without a lease or with both. A lease with a subnet that the
    /// network has moved away from stays beside the new one, since pods may still use it; it expires unless
    /// [`Claim::left`] renews it. Races with other nodes are resolved inside. Called again, it republishes.
    fn acquire(
        &self,
        network: &NetworkConfig,
        claim: &Claim<'_>,
    ) -> impl Future<Output = Result<Lease, StoreError>> + Send;

    /// Keeps the lease that [`acquire`](Self::acquire) obtained: renews it in time, puts it back when it
    /// was deleted, and retries for ever when the store is away. Returns only when it is lost for good.
    fn hold(&self) -> impl Future<Output = Loss> + Send;

    /// How the lease stands that [`hold`](Self::hold) keeps, as far as it is known without asking.
    fn tenure(&self) -> Tenure {
        Tenure::default()
    }

    /// Feeds complete snapshots, the own lease included, until dropped; paces its own retries.
    fn follow(&self, feed: &Feed) -> impl Future<Output = Infallible> + Send;

    /// This node's own addresses have changed: connections from the old ones, on which nothing is heard any
    /// more, are given up at once.
    fn readdressed(&self) {}

    /// Resolves when somebody has decided something about this node that [`acquire`](Self::acquire) or
    /// [`node_public`](Self::node_public) have not seen yet, so that they are worth calling again at
    /// once. Never, where nothing decides about nodes.
    fn stirred(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Tells the cluster that this node's network works, until it has been heard.
    fn announce_ready(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// The addresses at which the store answers, as far as that can be found out: no pod subnet may contain them.
    fn endpoints(&self) -> impl Future<Output = Vec<IpAddr>> + Send {
        std::future::ready(Vec::new())
    }

    /// The public addresses that an operator gave to this node in the store, if any: they act like
    /// `--public-ip` and `--public-ipv6`.
    fn node_public(&self) -> impl Future<Output = Result<PublicAddrs, StoreError>> + Send {
        std::future::ready(Ok(PublicAddrs::default()))
    }
}

/// A number below `bound` that differs between nodes and runs; for picking subnets and spreading load,
/// not for secrets.
pub fn random_below(bound: usize) -> usize {
    use std::hash::{BuildHasher, Hasher};
    // RandomState is keyed by the operating system's randomness, another key for each value.
    let hash = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (hash % bound.max(1) as u64) as usize
}

/// The addresses of the hosts of `http://HOST:PORT` and the like, as far as they have any at the moment.
#[cfg(any(feature = "etcd", feature = "kube"))]
pub(crate) async fn addresses_of(urls: &[String]) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for url in urls {
        let url = url.trim();
        let host = url.split_once("://").map_or(url, |(_, rest)| rest);
        let host = host.split('/').next().unwrap_or_default();
        let port = if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
            ""
        } else {
            ":443"
        };
        let within = std::time::Duration::from_secs(2);
        let addrs = tokio::time::timeout(within, tokio::net::lookup_host(format!("{host}{port}"))).await;
        found.extend(addrs.into_iter().flatten().flatten().map(|addr| addr.ip()));
    }
    found
}

/// `text` and what caused it, each said once.
#[cfg(any(feature = "etcd", feature = "kube"))]
pub(crate) fn with_causes(mut text: String, mut cause: Option<&(dyn std::error::Error + 'static)>) -> String {
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = error.source();
    }
    text
}
