//! Leases as annotations of Kubernetes' node objects, as Go flannel keeps them (contract §3.2).
//!
//! Kubernetes decides which subnet a node has (`spec.podCIDRs`); the node adds how it is reached. So
//! nothing is allocated and nothing expires here, and what can go wrong is that somebody changes the
//! node object.

mod annotations;
mod coalesce;
mod collection;
mod condition;
mod connection;
mod credentials;
mod event_api;
mod events;
mod exec;
mod follow;
mod frames;
mod hold;
mod http_client;
mod kubeconfig;
mod low_water;
mod managed;
mod node;
mod objects;
mod own;
mod policies;
mod protobuf;
mod reason;
mod split;
mod stream;
mod table;
mod yaml;

use std::convert::Infallible;
use std::fmt;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::config::NetworkConfig;
use crate::lease::{Attachment, Lease};
use crate::net::{Family, PublicAddrs, Subnets};
use crate::store::{Claim, Feed, LeaseStore, Loss, StoreError, Tenure, addresses_of};
use crate::watched::Watched;
use annotations::Prefix;
use connection::Connection;
use own::{OwnNode, OwnSettings, is_name};

pub use event_api::{EventApi, EventError};
pub use policies::{FoundPod, News, PolicyApi, Told, Watch};

/// What the network configuration is worth waiting for an API server that may be away.
const HINT_WITHIN: Duration = Duration::from_secs(3);

/// Where the API server is, and who this node is.
#[derive(Clone, Debug)]
pub struct KubeOptions {
    /// This node's name in Kubernetes (`NODE_NAME`).
    pub node_name: Option<String>,
    /// Namespace and name of the pod that this process is in (`POD_NAMESPACE`, `POD_NAME`), by which the
    /// node is found if its name is not given.
    pub pod: Option<(String, String)>,
    /// A kubeconfig file. With neither this nor `api_url` the pod's service account is used.
    pub kubeconfig: Option<PathBuf>,
    /// The API server's address, also instead of the one in `kubeconfig`.
    pub api_url: Option<String>,
    /// What the annotations' names begin with, `flannel.alpha.coreos.com` unless the operator says
    /// otherwise; completed as in Go flannel (contract §3.2.2).
    pub annotation_prefix: String,
    /// The file with the network configuration.
    pub net_config_path: PathBuf,
    /// Whether [`announce_ready`](LeaseStore::announce_ready) sets the node's condition
    /// `NetworkUnavailable` to `False`.
    pub set_network_unavailable: bool,
}

/// An option that can't be used, with any answer of the API server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {why}")]
pub struct BadOption {
    /// The flag with its hyphens, or the variable.
    pub option: &'static str,
    /// What is wrong with its value, without any secret, and what would do.
    pub why: String,
}

impl KubeOptions {
    /// Checks what can be checked without reading a file or asking anybody.
    ///
    /// # Errors
    /// The first option that can't be used.
    pub fn check(&self) -> Result<(), BadOption> {
        Prefix::parse(&self.annotation_prefix)
            .map_err(|why| BadOption { option: "--kube-annotation-prefix", why })?;
        if let Some(url) = self.api_url.as_deref().filter(|url| !url.is_empty()) {
            connection::address(url).map_err(|why| BadOption { option: "--kube-api-url", why })?;
        }
        let (name, pod) = self.place();
        let names = name
            .iter()
            .map(|name| ("NODE_NAME", name))
            .chain(pod.iter().flat_map(|(namespace, pod)| [("POD_NAMESPACE", namespace), ("POD_NAME", pod)]));
        for (option, value) in names {
            if !is_name(value) {
                let why =
                    format!("{value:?} is not a name in Kubernetes: small letters, digits, '-' and '.' only");
                return Err(BadOption { option, why });
            }
        }
        if name.is_none() && pod.is_none() {
            let why = "this node's name is unknown: set NODE_NAME (from spec.nodeName), or POD_NAME and POD_NAMESPACE";
            return Err(BadOption { option: "NODE_NAME", why: why.to_owned() });
        }
        Ok(())
    }

    /// The names of the node and of the pod, as far as they are given.
    fn place(&self) -> (Option<String>, Option<(String, String)>) {
        let given = |text: &String| !text.is_empty();
        let pod = self.pod.clone().filter(|(namespace, pod)| given(namespace) && given(pod));
        (self.node_name.clone().filter(given), pod)
    }
}

/// One node's end of a Kubernetes cluster.
pub struct Kube {
    connection: Arc<Connection>,
    /// The same at each start of this node: without anything that has to be asked for.
    described: String,
    node: Arc<OwnNode>,
    prefix: Prefix,
    net_config: Watched,
    set_network_unavailable: bool,
    /// What this node announces. Locked while it is being written, so that `hold` can tell our own
    /// writing from others'.
    held: tokio::sync::Mutex<Option<Held>>,
    /// Wakes `hold` when `acquire` has changed `held`.
    moved: Notify,
    /// The families that are in force: those of the network for which a lease was obtained last. Until
    /// then those of the configuration that was read last, or both.
    families: watch::Sender<&'static [Family]>,
    /// The podCIDRs that this node was last seen with; it has none for a moment when it is registered again.
    given: Mutex<Subnets>,
    /// What was read last about this node, for `stirred`.
    seen: Mutex<OwnSettings>,
    /// Tells all who wait in `stirred` what one of them has found out.
    stirs: Notify,
    /// Whether the node's network was said to be available.
    announced: AtomicBool,
    /// What is wrong with the own node, if anything is, while its lease is held.
    trouble: Mutex<Option<String>>,
    /// What was complained about last.
    complained: Mutex<String>,
    /// What was last left as an event at the node.
    reported: tokio::sync::Mutex<Option<String>>,
}

/// What this node holds and says about itself.
#[derive(Clone, Debug)]
struct Held {
    subnets: Subnets,
    public: PublicAddrs,
    attachment: Attachment,
    /// The families that the network had.
    families: &'static [Family],
    /// What it was decided on.
    basis: own::Basis,
}

impl Kube {
    /// Checks the options, and reads the kubeconfig or the pod's service account. The API server need
    /// not be there yet. Has to be called in a runtime.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] naming the option or the file.
    pub async fn new(options: KubeOptions) -> Result<Self, StoreError> {
        options.check().map_err(|error| StoreError::Unusable(error.to_string()))?;
        let prefix = Prefix::parse(&options.annotation_prefix).map_err(StoreError::Unusable)?;
        let (name, pod) = options.place();
        let connection = Connection::new(options.kubeconfig, options.api_url.as_deref()).await?;
        Ok(Self {
            described: match &name {
                Some(name) => format!("{}, node {name}", connection.described),
                None => connection.described.clone(),
            },
            connection: Arc::new(connection),
            node: Arc::new(OwnNode::new(name, pod)),
            prefix,
            net_config: Watched::new(options.net_config_path),
            set_network_unavailable: options.set_network_unavailable,
            held: tokio::sync::Mutex::new(None),
            moved: Notify::new(),
            families: watch::Sender::new(&Family::BOTH),
            given: Mutex::new(Subnets::default()),
            seen: Mutex::new(OwnSettings::default()),
            stirs: Notify::new(),
            announced: AtomicBool::new(false),
            trouble: Mutex::new(None),
            complained: Mutex::new(String::new()),
            reported: tokio::sync::Mutex::new(None),
        })
    }

    /// The objects that network policies are about, read over the same connection.
    pub fn policy_api(&self) -> PolicyApi {
        PolicyApi::new(Arc::clone(&self.connection), Arc::clone(&self.node))
    }

    /// Events at this node's object, left over the same connection.
    pub fn event_api(&self) -> EventApi {
        EventApi::new(Arc::clone(&self.connection), Arc::clone(&self.node))
    }

    fn seen(&self) -> MutexGuard<'_, OwnSettings> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the families of a network in force. Who follows reads all nodes again if they are others.
    fn enforce_families(&self, network: &NetworkConfig) {
        let now = families_of(network);
        self.families.send_if_modified(|families| std::mem::replace(families, now) != now);
    }

    fn families(&self) -> &'static [Family] {
        *self.families.borrow()
    }

    fn given(&self) -> MutexGuard<'_, Subnets> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The subnets that this node has, as far as it is known or the API server says so soon: only to know
    /// their lengths.
    async fn hint(&self) -> Subnets {
        let known = *self.given();
        if !known.is_empty() {
            return known;
        }
        let read = timeout(HINT_WITHIN, self.read_own()).await;
        let own = read.ok().and_then(Result::ok).and_then(|read| read.own);
        own.and_then(|own| own.subnets.ok()).unwrap_or_default()
    }
}

/// The families that a network has.
fn families_of(network: &NetworkConfig) -> &'static [Family] {
    match (network.range(Family::V4), network.range(Family::V6)) {
        (Some(_), None) => &[Family::V4],
        (None, Some(_)) => &[Family::V6],
        _ => &Family::BOTH,
    }
}

impl fmt::Debug for Kube {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Kube").field(&self.describe()).finish()
    }
}

impl LeaseStore for Kube {
    fn describe(&self) -> String {
        self.described.clone()
    }

    async fn network(&self) -> Result<NetworkConfig, StoreError> {
        let at = self.net_config.path().display().to_string();
        let json = match self.net_config.read() {
            Ok(json) => String::from_utf8_lossy(&json).into_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(StoreError::NoConfig { at }),
            Err(error) => return Err(StoreError::Unusable(format!("{at}: {error}"))),
        };
        let parse = |own: Subnets| {
            NetworkConfig::parse_given_subnets(&json, &own)
                .map_err(|source| StoreError::BadConfig { at: at.clone(), source })
        };
        let network = parse(Subnets::default())?;
        // While a lease is held nothing changes before somebody wants it to: reading is not deciding.
        if self.held.try_lock().is_ok_and(|held| held.is_none()) {
            self.enforce_families(&network);
        }
        parse(self.hint().await)
    }

    async fn network_changed(&self) {
        self.net_config.changed().await;
    }

    fn admits(&self, network: &NetworkConfig, held: &Subnets) -> Result<(), String> {
        self.examine(network, held)
    }

    async fn acquire(&self, network: &NetworkConfig, claim: &Claim<'_>) -> Result<Lease, StoreError> {
        self.obtain(network, claim).await
    }

    async fn hold(&self) -> Loss {
        self.keep().await
    }

    fn tenure(&self) -> Tenure {
        self.stands()
    }

    async fn follow(&self, feed: &Feed) -> Infallible {
        self.feed(feed).await
    }

    async fn stirred(&self) {
        self.wait_until_stirred().await;
    }

    async fn announce_ready(&self) {
        if self.set_network_unavailable {
            self.announce().await;
        }
    }

    async fn node_public(&self) -> Result<PublicAddrs, StoreError> {
        self.read_public().await
    }

    async fn endpoints(&self) -> Vec<IpAddr> {
        let url = self.connection.described.rsplit(' ').next().unwrap_or_default();
        addresses_of(&[url.to_owned()]).await
    }

    fn readdressed(&self) {
        self.connection.readdressed();
    }
}
