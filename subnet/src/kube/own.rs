//! This node's own object: finding it, and writing into it what peers need.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::annotations::{CHANGING, Names, TYPE, Wanted, address, changes, needs_two_steps, patch, wanted};
use super::collection::Collection;
use super::connection::{Connection, Failure};
use super::follow::NODES;
use super::node::Own;
use super::objects::Objects;
use super::split::Bulk;
use super::{Held, Kube, events, families_of};
use crate::config::{NetworkConfig, Range};
use crate::lease::{Lease, Leases};
use crate::net::{Family, PublicAddrs, Subnets};
use crate::store::{Claim, StoreError};

/// The own node as of one moment.
pub(super) struct Read {
    /// `None` if Kubernetes has no such node.
    pub(super) own: Option<Own>,
    /// The lease that it announces already.
    announced: Option<Lease>,
    /// From where to watch it.
    pub(super) version: String,
}

/// What an operator or Kubernetes decides about this node, as far as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnSettings {
    /// What [`Kube::obtain`] depends on.
    pub(super) claim: Option<[String; 4]>,
    /// What [`Kube::read_public`] says.
    pub(super) public: Option<[String; 2]>,
}

/// What the annotations follow from, besides this node's own decisions: which node object it is, and the
/// operator's overwrites.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Basis([String; 3]);

impl Basis {
    pub(super) fn of(own: &Own) -> Self {
        let [v4, v6] = Family::BOTH
            .map(|family| own.annotations.get(Names::of(family).overwrite).cloned().unwrap_or_default());
        Self([own.uid.clone(), v4, v6])
    }
}

impl OwnSettings {
    pub(super) fn of(own: Option<&Own>) -> Self {
        let Some(own) = own else {
            return Self { claim: Some(Default::default()), public: Some(Default::default()) };
        };
        let get = |name| own.annotations.get(name).cloned().unwrap_or_default();
        let [v4, v6] = Family::BOTH.map(Names::of);
        let subnets = match &own.subnets {
            Ok(subnets) => subnets.to_string(),
            Err(why) => why.clone(),
        };
        Self {
            claim: Some([own.uid.clone(), subnets, get(v4.overwrite), get(v6.overwrite)]),
            public: Some([get(v4.node_public), get(v6.node_public)]),
        }
    }
}

/// Which node this is.
pub(super) struct OwnNode {
    name: OnceCell<String>,
    /// The pod that this process is in.
    pod: Option<(String, String)>,
}

impl OwnNode {
    /// The node of this name, or else that on which this pod runs.
    pub(super) fn new(name: Option<String>, pod: Option<(String, String)>) -> Self {
        Self { name: OnceCell::new_with(name), pod }
    }

    /// Its name, if that is known already.
    pub(super) fn known(&self) -> Option<&str> {
        self.name.get().map(String::as_str)
    }

    /// Its name; asks for the pod's node if it was not given.
    pub(super) async fn name(&self, connection: &Connection) -> Result<&str, Failure> {
        #[derive(Deserialize)]
        struct Pod {
            #[serde(default)]
            spec: Spec,
        }
        #[derive(Default, Deserialize)]
        struct Spec {
            #[serde(rename = "nodeName", default)]
            node: String,
        }
        let ask = || async {
            let Some((namespace, pod)) = &self.pod else {
                return Err(connection.away("this node's name is unknown".into()));
            };
            let json = connection.get(&format!("/api/v1/namespaces/{namespace}/pods/{pod}")).await?;
            match serde_json::from_slice::<Pod>(&json) {
                Ok(pod) if is_name(&pod.spec.node) => Ok(pod.spec.node),
                _ => Err(connection.away(format!("pod {namespace}/{pod} has no node yet"))),
            }
        };
        self.name.get_or_try_init(ask).await.map(String::as_str)
    }
}

impl Kube {
    /// The name of this node: as it was given, or that of the node on which this pod runs.
    pub(super) async fn name(&self) -> Result<&str, Failure> {
        self.node.name(&self.connection).await
    }

    /// This node alone.
    async fn own(&self) -> Result<Collection, Failure> {
        Ok(Collection::new(NODES, Bulk::NONE).selected("metadata.name", self.name().await?))
    }

    /// Reads the own node. By a list, because a list has a version from which to watch also where there
    /// is no such node.
    pub(super) async fn read_own(&self) -> Result<Read, Failure> {
        self.read_own_for(self.families()).await
    }

    async fn read_own_for(&self, families: &[Family]) -> Result<Read, Failure> {
        let mut objects = self.connection.one_page(&self.own().await?);
        let (mut own, mut announced) = (None, None);
        while let Some(json) = objects.next().await? {
            own = Some(self.decode_own(&json)?);
            announced = Own::announced(&json, &self.prefix, families);
        }
        Ok(Read { own, announced, version: objects.version })
    }

    pub(super) fn decode_own(&self, json: &[u8]) -> Result<Own, Failure> {
        let own = Own::decode(json, &self.prefix)
            .map_err(|error| self.connection.away(format!("a node that can't be read: {error}")))?;
        if let Ok(subnets) = own.subnets.as_ref()
            && !subnets.is_empty()
        {
            *self.given() = *subnets;
        }
        Ok(own)
    }

    /// Whether this node, with these subnets, can take part in another network: what Kubernetes gave it has
    /// to be in there, for it can't get another one while it lives.
    pub(super) fn examine(&self, network: &NetworkConfig, held: &Subnets) -> Result<(), String> {
        let name = self.node.known().unwrap_or_default();
        let (given, families) = (*self.given(), self.families());
        for range in network.ranges() {
            let family = Family::of(range.network.addr());
            match held.get(family).or(given.get(family)) {
                Some(subnet) => contained(name, range, subnet)?,
                // It does without one already.
                None if families.contains(&family) => {}
                None => {
                    return Err(format!(
                        "node {name:?} has no {family} podCIDR: kube-controller-manager has to run with an {family} range \
                         in --cluster-cidr too, for example {}, and the node to be registered again after that; until \
                         then leave Enable{} as it was",
                        range.network, family,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Watches the own node.
    pub(super) async fn watch_own(&self, version: &str) -> Result<Objects<'_>, Failure> {
        self.connection.watch_from(&self.own().await?, version).await
    }

    pub(super) async fn obtain(
        &self,
        network: &NetworkConfig,
        claim: &Claim<'_>,
    ) -> Result<Lease, StoreError> {
        let mut held = self.held.lock().await;
        if held.is_none() {
            self.enforce_families(network);
        }
        let families = families_of(network);
        self.seen().claim = None;
        let name = self.name().await?;
        let read = self.read_own_for(families).await?;
        self.seen().claim = OwnSettings::of(read.own.as_ref()).claim;
        let Some(own) = read.own else {
            return Err(StoreError::Unusable(format!(
                "Kubernetes has no node {name:?} yet: it appears when kubelet has registered this machine; if kubelet runs, \
                 NODE_NAME has to be the name under which it does so"
            )));
        };
        let subnets = match own_subnets(name, &own, network) {
            Ok(subnets) => subnets,
            Err(why) => {
                self.report_once(name, &own.uid, &why).await;
                return Err(StoreError::Unusable(why));
            }
        };
        let attachment = (claim.attach)(read.announced.as_ref(), &Leases::default());
        let (public, basis) = (claim.public, Basis::of(&own));
        let new = Held { subnets, public, attachment: attachment.clone(), families, basis };
        let wanted =
            self.wanted(&own, &new).map_err(|why| StoreError::Unusable(format!("node {name:?}: {why}")))?;
        self.publish(&own, &wanted).await?;
        self.enforce_families(network);
        *held = Some(new);
        self.note_trouble(None);
        self.moved.notify_one();
        Ok(Lease { subnets, public, attachment, created: own.created, written: own.created })
    }

    /// The annotations that the own node has to have.
    pub(super) fn wanted(&self, own: &Own, held: &Held) -> Result<Wanted, String> {
        let enabled = |family| held.families.contains(&family);
        wanted(&own.annotations, &held.public, &held.attachment, enabled)
    }

    /// Writes the desired annotations to the own node. One patch, for Go's nodes act on each state that they see
    /// (contract K5), or two where they would overlook one (K6).
    pub(super) async fn publish(&self, own: &Own, wanted: &Wanted) -> Result<bool, Failure> {
        let mut changes = changes(&own.annotations, wanted);
        if changes.is_empty() {
            return Ok(false);
        }
        let path = self.status_path().await?;
        if needs_two_steps(&own.annotations, wanted, &changes) {
            changes.insert(TYPE, Some(CHANGING.to_owned()));
            self.connection.patch(&path, patch(&self.prefix, &changes)).await?;
            changes = Wanted::from([(TYPE, wanted.get(TYPE).cloned().flatten())]);
        }
        self.connection.patch(&path, patch(&self.prefix, &changes)).await?;
        Ok(true)
    }

    pub(super) async fn status_path(&self) -> Result<String, Failure> {
        Ok(format!("{NODES}/{}/status", self.name().await?))
    }

    /// The addresses that an operator gave to this node (contract §1.4, step 8).
    pub(super) async fn read_public(&self) -> Result<PublicAddrs, StoreError> {
        let read = self.read_own().await?;
        self.seen().public = OwnSettings::of(read.own.as_ref()).public;
        let mut public = PublicAddrs::default();
        let Some(own) = read.own else { return Ok(public) };
        for family in Family::BOTH {
            let name = Names::of(family).node_public;
            let Some(text) = own.annotations.get(name).filter(|text| !text.is_empty()) else { continue };
            match address(text, family) {
                Ok(IpAddr::V4(v4)) => public.v4 = Some(v4),
                Ok(IpAddr::V6(v6)) => public.v6 = Some(v6),
                Err(why) => {
                    let key = self.prefix.key(name);
                    return Err(StoreError::Unusable(format!("annotation {key} of this node: {why}")));
                }
            }
        }
        Ok(public)
    }

    /// Leaves an event at the node, where an operator looks first. Flannel's usual ClusterRole does not
    /// allow it, so it fails silently.
    async fn report_once(&self, name: &str, uid: &str, why: &str) {
        let mut reported = self.reported.lock().await;
        if reported.as_deref() == Some(why) {
            return;
        }
        let event = events::event(&now(), name, uid, true, "NoPodNetwork", why);
        if let Err(failure) = events::leave(&self.connection, &event).await {
            tracing::debug!(error = %failure.error, "no event could be left at the node");
        }
        *reported = Some(why.to_owned());
    }
}

/// This moment as Kubernetes writes it.
pub(super) fn now() -> String {
    k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Whether this can be the name of a node, namespace or pod.
pub(super) fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    !text.is_empty()
        && text.len() <= 253
        && text.chars().all(plain)
        && text.contains(|c: char| c.is_ascii_alphanumeric())
}

/// Refuses a subnet that is outside of the network.
fn contained(name: &str, range: &Range, subnet: IpNet) -> Result<(), String> {
    if range.network.contains(&subnet) {
        return Ok(());
    }
    let key = if subnet.addr().is_ipv4() { "Network" } else { "IPv6Network" };
    Err(format!(
        "node {name:?}: its podCIDR {subnet} is not in {} ({key} of net-conf.json): make {key} the same as \
         --cluster-cidr of kube-controller-manager",
        range.network
    ))
}

/// The subnets of the enabled families that Kubernetes gave to this node.
///
/// # Errors
/// A sentence with the remedy.
fn own_subnets(name: &str, own: &Own, network: &NetworkConfig) -> Result<Subnets, String> {
    let given = own.subnets.as_ref().map_err(|why| format!("node {name:?}: {why}"))?;
    let mut subnets = Subnets::default();
    for range in network.ranges() {
        let family = Family::of(range.network.addr());
        let Some(subnet) = given.get(family) else { continue };
        contained(name, range, subnet)?;
        subnets.set(subnet);
    }
    if !subnets.is_empty() {
        return Ok(subnets);
    }
    let networks: Vec<String> = network.ranges().map(|range| range.network.to_string()).collect();
    let which = match given.is_empty() {
        true => "pod cidr not assigned".to_owned(),
        false => format!("its podCIDR {given} is of a family that net-conf.json does not enable"),
    };
    Err(format!(
        "node {name:?} {which}: kube-controller-manager has to run with --allocate-node-cidrs=true \
         --cluster-cidr={} (kubeadm: --pod-network-cidr), and that range must not be used up",
        networks.join(",")
    ))
}
