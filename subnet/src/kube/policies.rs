//! What network policies are about: policies, namespaces and pods, listed and watched, told one by one.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::collection::{Collection, Continue, Ended, Kind, Least, Pages, Watching};
use super::connection::{Connection, Failure};
use super::own::OwnNode;
use super::split::Bulk;
use crate::pace::Backoff;
use crate::policy::explain::{self as policy, Party};
use crate::policy::objects::{self, ReadPod, ReadPolicy, Unreadable};
use crate::policy::{Labels, ObjectName, Uid};
use crate::store::StoreError;

const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
const NAMESPACES: &str = "/api/v1/namespaces";
const PODS: &str = "/api/v1/pods";
const SERVICES: &str = "/api/v1/services";

/// A server that answers, but can't do what it is asked, has too much to do already.
const BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// What policies and namespaces have besides what they say.
const ADMINISTRATIVE: Bulk =
    Bulk { members: &["status"], parts: &["managedFields", "annotations"], aside: &[] };
/// What of a pod says nothing about its addresses, labels and ports: most of it.
const POD_BULK: Bulk = Bulk {
    members: &[],
    parts: &[
        "managedFields",
        "annotations",
        "ownerReferences",
        "volumes",
        "tolerations",
        "affinity",
        "securityContext",
        "conditions",
        "hostIPs",
        "containerStatuses",
        "initContainerStatuses",
        "ephemeralContainerStatuses",
    ],
    aside: &[],
};

/// Objects that are followed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Watch {
    /// All policies.
    Policies,
    /// All namespaces.
    Namespaces,
    /// The pods of this node.
    OwnPods,
    /// The pods of a namespace.
    PodsOf(String),
    /// All pods.
    AllPods,
}

/// Something about the objects of a watch.
#[derive(Debug)]
pub enum Told {
    /// A list begins. What it has comes next, and what it lacks is gone once it is complete.
    Listing,
    /// The list is complete.
    Listed,
    /// A policy is there, as of this version.
    Policy(Box<ReadPolicy>, u64),
    /// A policy is gone.
    PolicyGone(ObjectName),
    /// A namespace is there, with these labels.
    Namespace(String, Labels),
    /// A namespace is gone.
    NamespaceGone(String),
    /// A pod is there.
    Pod(ReadPod),
    /// A pod is gone.
    PodGone(Uid),
    /// An object can't be understood, and counts as absent.
    Unreadable(Unreadable),
    /// Nothing is heard at the moment, and why.
    Trouble(StoreError),
    /// Changes are heard.
    Sound,
}

/// What a watch tells.
#[derive(Debug)]
pub struct News {
    /// The number that the watch was given.
    pub watch: u32,
    /// What it tells.
    pub told: Told,
}

/// A pod that was asked for by name.
#[derive(Debug)]
pub struct FoundPod {
    /// The pod.
    pub pod: ReadPod,
    /// The uid by which kubelet and the container runtime know a static pod, whose object has another one.
    pub static_uid: Option<Uid>,
}

/// Reads what network policies are about.
pub struct PolicyApi {
    connection: Arc<Connection>,
    node: Arc<OwnNode>,
}

/// From where a watch goes on.
struct Position {
    version: Option<String>,
    least: Least,
    watching: Watching,
}

/// Why following ends: the receiver is gone.
struct Unheard;

/// Why a list or a watch ends.
enum WatchEnd {
    Watch(Ended),
    Unheard,
}

impl From<Ended> for WatchEnd {
    fn from(ended: Ended) -> Self {
        Self::Watch(ended)
    }
}

impl From<Failure> for WatchEnd {
    fn from(failure: Failure) -> Self {
        Self::Watch(failure.into())
    }
}

impl From<Unheard> for WatchEnd {
    fn from(_: Unheard) -> Self {
        Self::Unheard
    }
}

/// Where one watch tells.
struct Teller<'a> {
    watch: u32,
    news: &'a mpsc::Sender<News>,
}

impl Teller<'_> {
    async fn tell(&self, told: Told) -> Result<(), Unheard> {
        self.news.send(News { watch: self.watch, told }).await.map_err(|_| Unheard)
    }
}

impl PolicyApi {
    pub(super) fn new(connection: Arc<Connection>, node: Arc<OwnNode>) -> Self {
        Self { connection, node }
    }

    /// This node's name.
    ///
    /// # Errors
    /// [`StoreError`] when it has to be asked for, and the server doesn't answer.
    pub async fn node_name(&self) -> Result<String, StoreError> {
        Ok(self.node.name(&self.connection).await?.to_owned())
    }

    /// Tells about these objects under a number, through all failures, until the receiver is gone.
    pub async fn follow(&self, watch: &Watch, number: u32, news: &mpsc::Sender<News>) {
        let teller = Teller { watch: number, news };
        let mut position = Position { version: None, least: Least::AtHand, watching: Watching::default() };
        let (mut backoff, mut busy) = (Backoff::watching(), Backoff::new(BUSY.0, BUSY.1));
        loop {
            let begun = Instant::now();
            let ended = match self.list_and_watch(watch, &mut position, &teller).await {
                WatchEnd::Watch(ended) => ended,
                WatchEnd::Unheard => return,
            };
            backoff.reset_if_sound(begun);
            busy.reset_if_sound(begun);
            if position.watching.ended(&ended, &self.connection, watch.objects()) == Continue::Listing {
                position.version = None;
            }
            match ended {
                Ended::Closed => {}
                Ended::Outdated | Ended::Refamilied => position.version = None,
                Ended::Undecodable(failure) | Ended::Failed(failure) => {
                    if teller.tell(Told::Trouble(failure.error)).await.is_err() {
                        return;
                    }
                    if matches!(failure.status, 429 | 500..) {
                        busy.wait().await;
                        continue;
                    }
                }
            }
            backoff.wait().await;
        }
    }

    async fn list_and_watch(&self, watch: &Watch, position: &mut Position, teller: &Teller<'_>) -> WatchEnd {
        match self.try_list_and_watch(watch, position, teller).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn try_list_and_watch(
        &self,
        watch: &Watch,
        position: &mut Position,
        teller: &Teller<'_>,
    ) -> Result<std::convert::Infallible, WatchEnd> {
        let node = self.node.name(&self.connection).await?.to_owned();
        let collection = watch.collection(&node);
        if position.version.is_none() {
            match self.list(watch, &collection, &node, &position.least, teller).await {
                Ok(version) => {
                    position.least = Least::Seen(version.clone());
                    position.version = Some(version);
                }
                Err(end) => {
                    // Perhaps the server can't be as new as we want: its store was restored.
                    position.least = Least::Newest;
                    position.watching.list_failed();
                    return Err(end);
                }
            }
        }
        let from = position.version.clone().unwrap_or_default();
        let mut events = self.connection.watch_from(&collection, &from).await?;
        position.watching.begins();
        match position.watching.why() {
            Some(why) => teller.tell(Told::Trouble(why.clone())).await?,
            None => teller.tell(Told::Sound).await?,
        }
        loop {
            let proof = position.watching.proof();
            let event = tokio::select! {
                event = self.connection.heard(&mut events) => event?,
                () = sleep_until(proof.unwrap_or_else(Instant::now)), if proof.is_some() => {
                    position.watching.proven();
                    teller.tell(Told::Sound).await?;
                    continue;
                }
            };
            let version = version_of(event.object());
            let told = match event.kind {
                Kind::Put => Some(watch.there(event.object(), &node)),
                Kind::Deleted => Some(watch.gone(event.object(), &node)),
                Kind::Error | Kind::Other => None,
            };
            position.watching.hears();
            if let Some(told) = told {
                teller.tell(told.unwrap_or_else(Told::Unreadable)).await?;
            }
            if !version.is_empty() {
                position.least = Least::Seen(version.clone());
                position.version = Some(version);
            }
        }
    }

    /// Tells all that there is; gives the version as of which it is all.
    async fn list(
        &self,
        watch: &Watch,
        collection: &Collection,
        node: &str,
        least: &Least,
        teller: &Teller<'_>,
    ) -> Result<String, WatchEnd> {
        match self.read(watch, self.connection.pages(collection, least), node, teller).await {
            Err(WatchEnd::Watch(Ended::Outdated)) => {
                self.read(watch, self.connection.one_page(collection), node, teller).await
            }
            outcome => outcome,
        }
    }

    async fn read(
        &self,
        watch: &Watch,
        mut pages: Pages<'_>,
        node: &str,
        teller: &Teller<'_>,
    ) -> Result<String, WatchEnd> {
        let mut next = pages.next().await?;
        teller.tell(Told::Listing).await?;
        while let Some(json) = next {
            teller.tell(watch.there(&json, node).unwrap_or_else(Told::Unreadable)).await?;
            next = pages.next().await?;
        }
        teller.tell(Told::Listed).await?;
        Ok(pages.version)
    }

    /// The policies of a namespace, as new as there are any.
    ///
    /// # Errors
    /// [`StoreError`] when they can't be read.
    pub async fn policies_of(&self, namespace: &str) -> Result<Vec<(ReadPolicy, u64)>, StoreError> {
        let path = format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies");
        let collection = Collection::new(path, ADMINISTRATIVE);
        let mut pages = self.connection.pages(&collection, &Least::Newest);
        let mut policies = Vec::new();
        while let Some(json) = pages.next().await? {
            // One that can't be read is told by the watch.
            policies.extend(objects::network_policy(&json).ok().map(|policy| (policy, number_of(&json))));
        }
        Ok(policies)
    }

    /// The pod of this name; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    pub async fn pod(&self, name: &ObjectName) -> Result<Option<FoundPod>, StoreError> {
        let ObjectName { namespace, name: pod } = name;
        let node = self.node_name().await?;
        let json = match self.connection.get(&format!("/api/v1/namespaces/{namespace}/pods/{pod}")).await {
            Ok(json) => json,
            Err(failure) if failure.status == 404 => return Ok(None),
            Err(failure) => return Err(failure.error),
        };
        let pod = objects::pod(&json, &node).map_err(|error| self.unreadable(&error))?;
        Ok(Some(FoundPod { pod, static_uid: objects::static_uid(&json) }))
    }
}

/// What explanations of network policies need to know of others.
impl PolicyApi {
    /// The pod of this name as an end of a connection; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    pub async fn end_named(&self, name: &ObjectName) -> Result<Option<policy::End>, StoreError> {
        let ObjectName { namespace, name: pod } = name;
        let node = self.node_name().await?;
        match self.connection.get(&format!("/api/v1/namespaces/{namespace}/pods/{pod}")).await {
            Ok(json) => objects::end(&json, &node).map(Some).map_err(|error| self.unreadable(&error)),
            Err(failure) if failure.status == 404 => Ok(None),
            Err(failure) => Err(failure.error),
        }
    }

    /// Who has this address: a pod that runs, or else what is on its host's network, has ended, or is a Service. `None`
    /// if there is none, or if it must not be asked for.
    ///
    /// # Errors
    /// [`StoreError`] when it can't be read.
    pub async fn end_at(&self, address: IpAddr) -> Result<Option<policy::End>, StoreError> {
        let node = self.node_name().await?;
        let pods = Collection::new(PODS, POD_BULK).selected("status.podIP", &address.to_string());
        let mut found = None;
        let mut pages = self.connection.pages(&pods, &Least::Newest);
        while let Some(json) = pages.next().await? {
            let end = objects::end(&json, &node).map_err(|error| self.unreadable(&error))?;
            if matches!(end.party, Party::Pod(_)) {
                return Ok(Some(policy::End { address: Some(address), ..end }));
            }
            found = Some(end);
        }
        if found.is_some() {
            return Ok(found);
        }
        // Without the permission it isn't known to be one.
        let services = Collection::new(SERVICES, ADMINISTRATIVE);
        let mut pages = self.connection.pages(&services, &Least::AtHand);
        while let Ok(Some(json)) = pages.next().await {
            let service = objects::service(&json).ok().filter(|(_, addresses)| addresses.contains(&address));
            if let Some((name, _)) = service {
                return Ok(Some(policy::End {
                    party: Party::Service(name),
                    address: Some(address),
                    node: None,
                }));
            }
        }
        Ok(None)
    }

    fn unreadable(&self, error: &Unreadable) -> StoreError {
        self.connection.away(error.to_string()).error
    }
}

impl Watch {
    fn collection(&self, node: &str) -> Collection {
        match self {
            Self::Policies => Collection::new(POLICIES, ADMINISTRATIVE),
            Self::Namespaces => Collection::new(NAMESPACES, ADMINISTRATIVE),
            Self::OwnPods => Collection::new(PODS, POD_BULK).selected("spec.nodeName", node),
            Self::PodsOf(namespace) => Collection::new(format!("{NAMESPACES}/{namespace}/pods"), POD_BULK),
            Self::AllPods => Collection::new(PODS, POD_BULK),
        }
    }

    fn objects(&self) -> &'static str {
        match self {
            Self::Policies => "network policies",
            Self::Namespaces => "namespaces",
            Self::OwnPods | Self::PodsOf(_) | Self::AllPods => "pods",
        }
    }

    fn there(&self, json: &[u8], node: &str) -> Result<Told, Unreadable> {
        Ok(match self {
            Self::Policies => Told::Policy(Box::new(objects::network_policy(json)?), number_of(json)),
            Self::Namespaces => {
                let (name, labels) = objects::namespace(json)?;
                Told::Namespace(name, labels)
            }
            Self::OwnPods | Self::PodsOf(_) | Self::AllPods => Told::Pod(objects::pod(json, node)?),
        })
    }

    fn gone(&self, json: &[u8], node: &str) -> Result<Told, Unreadable> {
        Ok(match self {
            Self::Policies => Told::PolicyGone(objects::name(json)?),
            Self::Namespaces => Told::NamespaceGone(objects::name(json)?.name.into()),
            Self::OwnPods | Self::PodsOf(_) | Self::AllPods => {
                Told::PodGone(match objects::pod(json, node)? {
                    ReadPod::Own(pod) => pod.uid,
                    ReadPod::Without(uid) => uid,
                })
            }
        })
    }
}

/// The version of an object; empty if it says none.
fn version_of(json: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Object {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        #[serde(rename = "resourceVersion", default)]
        version: String,
    }
    serde_json::from_slice::<Object>(json).map(|object| object.metadata.version).unwrap_or_default()
}

/// The version as a number, which it is at every server that there is; 0 where it isn't.
fn number_of(json: &[u8]) -> u64 {
    version_of(json).parse().unwrap_or(0)
}
