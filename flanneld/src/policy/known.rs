//! What watches tell, taken into the cluster that policies are compiled from: nothing is removed because a list is
//! under way, and everything that a complete one lacks is.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use backends::policy::{Cluster, Demand, Foresight};
use subnet::StoreError;
use subnet::kube::{Told, Watch};
use subnet::policy::objects::{ReadPod, ReadPolicy};
use subnet::policy::{ObjectName, Pod, Uid};
use tokio::time::Instant;

use super::kept::{Kept, is_about};

/// What is known besides the cluster itself.
#[derive(Default)]
pub(super) struct Known {
    /// The pods of this node.
    own: BTreeMap<Uid, Pod>,
    /// By number.
    watches: BTreeMap<u32, Followed>,
    foresight: Foresight,
    /// Policies that were read for a pod's ADD, as of which version: the watch may be behind.
    ahead: HashMap<ObjectName, u64>,
    /// What of policies is not understood.
    ignored: BTreeMap<ObjectName, Vec<String>>,
    /// Objects that were complained about.
    unreadable: BTreeSet<String>,
}

/// A watch, as far as it was heard.
struct Followed {
    watch: Watch,
    /// Whether its first list was complete.
    complete: bool,
    /// The list that is under way.
    listed: Option<Listed>,
    trouble: Option<StoreError>,
    /// Since when the server refuses to tell, if that is the trouble.
    refused_since: Option<Instant>,
}

impl Followed {
    fn of(watch: Watch) -> Self {
        Self { watch, complete: false, listed: None, trouble: None, refused_since: None }
    }

    fn take_note(&mut self, trouble: Option<StoreError>) {
        let refused = matches!(trouble, Some(StoreError::Denied { .. }));
        self.refused_since = refused.then(|| self.refused_since.unwrap_or_else(Instant::now));
        self.trouble = trouble;
    }
}

#[derive(Default)]
struct Listed {
    policies: BTreeSet<ObjectName>,
    namespaces: BTreeSet<String>,
    pods: HashSet<Uid>,
}

/// What an event may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// Something in the cluster.
    pub(super) cluster: bool,
    /// Which pods have to be watched.
    pub(super) demand: bool,
}

const CHANGE: Effect = Effect { cluster: true, demand: false };
const NEED: Effect = Effect { cluster: true, demand: true };

impl Known {
    /// A watch begins.
    pub(super) fn begin(&mut self, number: u32, watch: Watch) {
        self.watches.insert(number, Followed::of(watch));
    }

    /// A watch is given up; what only it told about is forgotten.
    pub(super) fn end(&mut self, number: u32, cluster: &mut Cluster) {
        let Some(followed) = self.watches.remove(&number) else { return };
        let covered = |namespace: &str| {
            self.watches.values().any(|other| match &other.watch {
                Watch::AllPods => true,
                Watch::PodsOf(of) => of == namespace,
                _ => false,
            })
        };
        let gone: Vec<Uid> = match &followed.watch {
            Watch::PodsOf(namespace) => cluster.pods_elsewhere(|of| of == namespace && !covered(of)),
            Watch::AllPods => cluster.pods_elsewhere(|of| !covered(of)),
            Watch::Policies | Watch::Namespaces | Watch::OwnPods => Vec::new(),
        };
        gone.into_iter().for_each(|uid| cluster.remove_pod(uid));
    }

    /// Takes in what a watch tells. One that was given up is not heard.
    pub(super) fn hear(&mut self, number: u32, told: Told, cluster: &mut Cluster, kept: &mut Kept) -> Effect {
        let Some(followed) = self.watches.get_mut(&number) else { return Effect::default() };
        let listed = followed.listed.as_mut();
        match told {
            Told::Listing => {
                followed.listed = Some(Listed::default());
                Effect::default()
            }
            Told::Listed => self.complete(number, cluster, kept),
            Told::Trouble(error) => {
                followed.take_note(Some(error));
                Effect::default()
            }
            Told::Sound => {
                followed.take_note(None);
                Effect::default()
            }
            Told::Policy(read, version) => {
                listed.map(|listed| listed.policies.insert(read.policy.name.clone()));
                self.set_policy(*read, version, false, cluster)
            }
            Told::PolicyGone(name) => {
                self.remove_policy(&name, cluster);
                NEED
            }
            Told::Namespace(name, labels) => {
                cluster.set_namespace(&name, &labels);
                listed.map(|listed| listed.namespaces.insert(name));
                NEED
            }
            Told::NamespaceGone(name) => {
                cluster.remove_namespace(&name);
                NEED
            }
            Told::Pod(pod) => {
                listed.map(|listed| listed.pods.insert(uid_of(&pod)));
                let own = followed.watch == Watch::OwnPods;
                self.hear_pod(pod, own, cluster, kept)
            }
            Told::PodGone(uid) => self.remove_pod(uid, cluster, kept),
            Told::Unreadable(error) => {
                let text = error.to_string();
                if self.unreadable.len() < 1000 && self.unreadable.insert(text) {
                    tracing::warn!("network policies: {error}: it counts as absent");
                }
                Effect::default()
            }
        }
    }

    /// Takes in what a watch tells of a pod; `own` is that of this node's pods.
    fn hear_pod(&mut self, pod: ReadPod, own: bool, cluster: &mut Cluster, kept: &mut Kept) -> Effect {
        match pod {
            ReadPod::Own(pod) if own => self.set_own(pod, cluster, kept),
            // Another watch may be behind that of this node's pods, which says all about them.
            ReadPod::Own(pod) if pod.local || self.own.contains_key(&pod.uid) => Effect::default(),
            ReadPod::Own(pod) => {
                cluster.set_pod(&pod);
                CHANGE
            }
            ReadPod::Without(uid) => self.remove_pod(uid, cluster, kept),
        }
    }

    /// A pod of this node is there.
    pub(super) fn set_own(&mut self, pod: Pod, cluster: &mut Cluster, kept: &Kept) -> Effect {
        match kept.of(&pod) {
            Some(announced) => {
                cluster.announce_pod(&Pod { addresses: announced.addresses.clone(), ..pod.clone() });
            }
            None => cluster.set_pod(&pod),
        }
        let known = self.own.get(&pod.uid).is_some_and(|known| known.labels == pod.labels);
        self.own.insert(pod.uid, pod);
        if known { CHANGE } else { NEED }
    }

    /// A policy is there. One that was read `ahead` of the watch is not replaced by what the watch had before.
    pub(super) fn set_policy(
        &mut self,
        read: ReadPolicy,
        version: u64,
        ahead: bool,
        cluster: &mut Cluster,
    ) -> Effect {
        let name = read.policy.name.clone();
        if let Some(newest) = self.ahead.get(&name).copied() {
            if version < newest {
                return Effect::default();
            }
            self.ahead.remove(&name);
        }
        if ahead {
            self.ahead.insert(name.clone(), version);
        }
        if read.ignored.is_empty() {
            self.ignored.remove(&name);
        } else if self.ignored.get(&name) != Some(&read.ignored) {
            for what in &read.ignored {
                tracing::warn!("network policy {name}: {what}: it allows nothing");
            }
            self.ignored.insert(name, read.ignored);
        }
        if cluster.knows_policy(&read.policy) {
            return Effect::default();
        }
        cluster.set_policy(read.policy);
        self.foresight.policies_changed();
        NEED
    }

    fn remove_policy(&mut self, name: &ObjectName, cluster: &mut Cluster) {
        self.ahead.remove(name);
        self.ignored.remove(name);
        self.foresight.policies_changed();
        cluster.remove_policy(name);
    }

    fn remove_pod(&mut self, uid: Uid, cluster: &mut Cluster, kept: &mut Kept) -> Effect {
        cluster.remove_pod(uid);
        match self.own.remove(&uid) {
            Some(pod) => {
                kept.retain(|kept| !is_about(kept, &pod));
                NEED
            }
            None => CHANGE,
        }
    }

    /// A list is complete: what it lacks is gone.
    fn complete(&mut self, number: u32, cluster: &mut Cluster, kept: &mut Kept) -> Effect {
        let Some(followed) = self.watches.get_mut(&number) else { return Effect::default() };
        followed.complete = true;
        followed.take_note(None);
        let Some(listed) = followed.listed.take() else { return Effect::default() };
        match followed.watch.clone() {
            Watch::Policies => {
                let known = cluster.policies().map(|policy| policy.name.clone());
                // One that was read ahead may be newer than the list.
                let gone: Vec<ObjectName> = known
                    .filter(|name| !listed.policies.contains(name) && !self.ahead.contains_key(name))
                    .collect();
                gone.iter().for_each(|name| self.remove_policy(name, cluster));
            }
            Watch::Namespaces => {
                let known = cluster.namespaces().map(str::to_owned);
                let gone: Vec<String> = known.filter(|name| !listed.namespaces.contains(name)).collect();
                gone.iter().for_each(|name| cluster.remove_namespace(name));
            }
            Watch::OwnPods => {
                let gone = self.own.keys().copied().filter(|uid| !listed.pods.contains(uid));
                for uid in gone.collect::<Vec<_>>() {
                    self.remove_pod(uid, cluster, kept);
                }
                let own = &self.own;
                kept.retain(|kept| own.values().any(|pod| is_about(kept, pod)));
            }
            Watch::PodsOf(namespace) => remove_missing(&listed, cluster, |of| of == namespace),
            Watch::AllPods => remove_missing(&listed, cluster, |_| true),
        }
        NEED
    }

    /// The pods of this node.
    pub(super) fn own_pods(&self) -> impl Iterator<Item = &Pod> {
        self.own.values()
    }

    /// The pods of this node that have this name.
    pub(super) fn own_named<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> impl Iterator<Item = &'a Pod> {
        self.own.values().filter(move |pod| (&*pod.name.namespace, &*pod.name.name) == (namespace, name))
    }

    /// The pod of this node that has this uid.
    pub(super) fn own(&self, uid: Uid) -> Option<&Pod> {
        self.own.get(&uid)
    }

    /// The pods that have to be watched.
    pub(super) fn demand(&mut self, cluster: &Cluster) -> Demand {
        self.foresight.demand(cluster)
    }

    /// Whether the lists of all of these watches were complete once.
    pub(super) fn are_complete(&self, mut numbers: impl Iterator<Item = u32>) -> bool {
        numbers.all(|number| self.watches.get(&number).is_some_and(|followed| followed.complete))
    }

    /// What is wrong with a watch, the most serious first.
    pub(super) fn trouble(&self) -> Option<&StoreError> {
        let troubles = || self.watches.values().filter_map(|followed| followed.trouble.as_ref());
        troubles().find(|error| matches!(error, StoreError::Denied { .. })).or_else(|| troubles().next())
    }

    /// A refusal that has lasted for so long.
    pub(super) fn refusal(&self, lasting: Duration) -> Option<&StoreError> {
        let lasts =
            |followed: &&Followed| followed.refused_since.is_some_and(|since| since.elapsed() >= lasting);
        self.watches.values().find(lasts).and_then(|followed| followed.trouble.as_ref())
    }

    /// How many watches there are.
    pub(super) fn watch_count(&self) -> usize {
        self.watches.len()
    }

    /// How many sentences of policies are not understood.
    pub(super) fn ignored_count(&self) -> usize {
        self.ignored.values().map(Vec::len).sum::<usize>() + self.unreadable.len()
    }
}

fn uid_of(pod: &ReadPod) -> Uid {
    match pod {
        ReadPod::Own(pod) => pod.uid,
        ReadPod::Without(uid) => *uid,
    }
}

fn remove_missing(listed: &Listed, cluster: &mut Cluster, of: impl Fn(&str) -> bool) {
    let gone = cluster.pods_elsewhere(of).into_iter().filter(|uid| !listed.pods.contains(uid));
    gone.for_each(|uid| cluster.remove_pod(uid));
}

#[cfg(test)]
mod tests;
