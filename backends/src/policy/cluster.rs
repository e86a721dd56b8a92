//! What is known of the cluster's namespaces, pods and policies, compact enough for all of a large one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use subnet::Family;
use subnet::policy::{Labels, NamedPort, NetworkPolicy, ObjectName, Pod, Uid};

use super::groups::{GroupId, Groups};
use super::owners::Owners;
use super::pods::{Addresses, PodSource, Pods, Record};
use super::policies::Policies;
use super::ports::Ports;
use super::touched::Touched;

/// Namespaces, pods and policies.
#[derive(Debug, Default)]
pub struct Cluster {
    groups: Groups,
    pods: Pods,
    owners: Owners,
    ports: Ports,
    locals: BTreeMap<Uid, Local>,
    policies: Policies,
    pub(super) touched: Touched,
}

/// A pod of this node.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) name: ObjectName,
    pub(super) number: u32,
}

impl Cluster {
    /// A namespace is there, with these labels.
    pub fn set_namespace(&mut self, name: &str, labels: &Labels) {
        if self.groups.set_namespace(name, labels) {
            self.touch_namespace(name);
        }
    }

    /// A namespace is gone.
    pub fn remove_namespace(&mut self, name: &str) {
        if self.groups.remove_namespace(name) {
            self.touch_namespace(name);
        }
    }

    /// A policy is there, and says this.
    pub fn set_policy(&mut self, policy: NetworkPolicy) {
        if self.knows_policy(&policy) {
            return;
        }
        self.policies.set(policy);
        self.touched.policies = true;
    }

    /// Whether this policy is known just so.
    pub fn knows_policy(&self, policy: &NetworkPolicy) -> bool {
        self.policies.get(&policy.name).is_some_and(|known| **known == *policy)
    }

    /// A policy is gone.
    pub fn remove_policy(&mut self, name: &ObjectName) {
        self.touched.policies |= self.policies.remove(name);
    }

    /// A pod is there, as described. One that has ended or is on its host's network is to be removed instead.
    pub fn set_pod(&mut self, pod: &Pod) {
        let known = self.pods.number(pod.uid).map(|number| (number, self.pods.get(number).origin));
        let (origin, addresses) = match known {
            None | Some((_, PodSource::Object)) => (PodSource::Object, Addresses::first_of(&pod.addresses)),
            Some((number, origin)) => (origin, self.pods.addresses(number)),
        };
        self.put_pod(pod, addresses, origin);
    }

    /// The CNI plugin gave these addresses to a pod of this node: they are its own, also when its object
    /// says otherwise.
    pub fn announce_pod(&mut self, pod: &Pod) {
        self.put_pod(pod, Addresses::first_of(&pod.addresses), PodSource::Plugin);
    }

    /// The CNI plugin took the addresses of a pod back. What its object names from now on counts for nothing.
    pub fn release_pod(&mut self, uid: Uid) {
        let Some(number) = self.pods.number(uid) else { return };
        self.pods.addresses(number).iter().for_each(|address| self.disown(address, number));
        self.pods.release(number);
        self.touched.locals |= self.locals.contains_key(&uid);
    }

    /// A pod is gone, has ended, or turns out to be on its host's network.
    pub fn remove_pod(&mut self, uid: Uid) {
        let Some(number) = self.pods.number(uid) else { return };
        self.pods.addresses(number).iter().for_each(|address| self.disown(address, number));
        self.release(number);
        self.pods.remove(number);
        self.touched.locals |= self.locals.remove(&uid).is_some();
    }

    /// How many pods are known.
    pub fn pod_count(&self) -> usize {
        self.pods.len()
    }

    /// How many policies there are.
    pub fn policy_count(&self) -> usize {
        self.policies.len()
    }

    /// The pods that are known, by uid.
    pub fn uids(&self) -> impl Iterator<Item = Uid> + '_ {
        self.pods.numbers().map(|number| self.pods.get(number).uid())
    }

    /// The pods of other nodes whose namespace is `among` some.
    pub fn pods_elsewhere(&self, among: impl Fn(&str) -> bool) -> Vec<Uid> {
        let records = self.pods.numbers().map(|number| self.pods.get(number));
        let among = |record: &&Record| among(self.groups.namespace(record.group));
        let uids = records.filter(among).map(Record::uid);
        uids.filter(|uid| !self.locals.contains_key(uid)).collect()
    }

    /// The names of the policies that are known.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.policies.iter()
    }

    /// The labels of the namespaces that are known.
    pub fn namespace_labels(&self) -> impl Iterator<Item = (&str, Labels)> {
        self.groups.namespace_labels()
    }

    /// The names of the namespaces that are known.
    pub fn namespaces(&self) -> impl Iterator<Item = &str> {
        self.groups.namespaces()
    }

    pub(super) fn has_policy(&self, name: &ObjectName) -> bool {
        self.policies.get(name).is_some()
    }

    /// The policies of a namespace.
    pub(super) fn policies_of(&self, namespace: &str) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.policies.of_namespace(namespace)
    }

    /// The pods of this node.
    pub(super) fn locals(&self) -> impl Iterator<Item = (&Local, &Record)> {
        self.locals.values().map(|local| (local, self.pods.get(local.number)))
    }

    /// All addresses of a family, each with the pod that it belongs to.
    pub(super) fn owned(&self, family: Family) -> impl Iterator<Item = (IpAddr, &Record)> {
        // What a pod that is gone had is not its own any more.
        let numbers = self.pods.numbers_with(family);
        numbers.filter_map(move |number| Some((self.own_address(number, family)?, self.pods.get(number))))
    }

    /// The pod that an address belongs to.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&Record> {
        self.owners.get(address).map(|number| self.pods.get(number))
    }

    /// The address of this family that a pod has, unless another pod has a better claim.
    pub(super) fn own_address(&self, number: u32, family: Family) -> Option<IpAddr> {
        let address = self.pods.addresses(number).of(family)?;
        (self.owners.get(address) == Some(number)).then_some(address)
    }

    /// The addresses that a pod claims.
    pub(super) fn addresses(&self, number: u32) -> impl Iterator<Item = IpAddr> + use<> {
        self.pods.addresses(number).iter()
    }

    pub(super) fn ports_of(&self, record: &Record) -> &[NamedPort] {
        self.ports.get(record.ports)
    }

    /// What stands for the ports of a pod, equal for equal ports.
    pub(super) fn ports_id(&self, record: &Record) -> u32 {
        record.ports
    }

    pub(super) fn groups(&self) -> &Groups {
        &self.groups
    }

    fn put_pod(&mut self, pod: &Pod, addresses: Addresses, origin: PodSource) {
        let mut ports: Vec<NamedPort> = pod.ports.clone();
        ports.sort_unstable();
        ports.dedup();
        let group = self.groups.acquire(&pod.name.namespace, &pod.labels);
        let record = Record::new(pod.uid, pod.created, group, self.ports.acquire(&ports), origin);
        let number = match self.pods.number(pod.uid) {
            Some(number) => {
                if !self.replace(number, record, addresses) {
                    return;
                }
                number
            }
            None => {
                let number = self.pods.add(record, addresses);
                addresses.iter().for_each(|address| self.own(address, number));
                number
            }
        };
        let was_local = self.locals.remove(&pod.uid).is_some();
        if pod.local {
            self.locals.insert(pod.uid, Local { name: pod.name.clone(), number });
        }
        self.touched.locals |= pod.local || was_local;
    }

    /// Whether anything is different.
    fn replace(&mut self, number: u32, record: Record, addresses: Addresses) -> bool {
        let before = self.pods.addresses(number);
        if *self.pods.get(number) == record && before == addresses {
            self.groups.release(record.group);
            self.ports.release(record.ports);
            return false;
        }
        self.release(number);
        self.pods.replace(number, record, addresses);
        for address in before.iter().filter(|address| addresses.of(Family::of(*address)) != Some(*address)) {
            self.disown(address, number);
        }
        addresses.iter().for_each(|address| self.own(address, number));
        true
    }

    fn release(&mut self, number: u32) {
        let record = self.pods.get(number);
        self.groups.release(record.group);
        self.ports.release(record.ports);
    }

    fn own(&mut self, address: IpAddr, number: u32) {
        let pods = &self.pods;
        let before = self.owners.get(address);
        self.owners.claim(address, number, |number| pods.get(number).claim());
        self.note_owner(address, before);
    }

    fn disown(&mut self, address: IpAddr, number: u32) {
        let pods = &self.pods;
        let before = self.owners.get(address);
        self.owners.leave(address, number, |number| pods.get(number).claim());
        self.note_owner(address, before);
    }

    fn note_owner(&mut self, address: IpAddr, before: Option<u32>) {
        let after = self.owners.get(address);
        self.touched.addresses.insert(address, self.owners.count());
        if before.is_some() && after.is_some() && before != after {
            self.touched.passed = true;
            self.touched.locals = true;
        }
    }

    fn touch_namespace(&mut self, name: &str) {
        let Some(groups) = self.groups.of_namespace(name) else { return };
        let groups: BTreeSet<GroupId> = groups.iter().copied().collect();
        if groups.is_empty() {
            return;
        }
        let numbers = self.pods.numbers().filter(|number| groups.contains(&self.pods.get(*number).group));
        let owned = self.owners.count();
        for address in numbers.flat_map(|number| self.pods.addresses(number).iter()) {
            self.touched.addresses.insert(address, owned);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: u128, address: Option<&str>) -> Pod {
        Pod {
            uid: Uid(uid),
            name: ObjectName::new("shop", format!("pod-{uid}")),
            labels: Labels::new(),
            addresses: address.map(|text| text.parse().unwrap()).into_iter().collect(),
            ports: Vec::new(),
            created: 0,
            local: true,
        }
    }

    fn owner(cluster: &Cluster, address: &str) -> Option<u128> {
        cluster.owner(address.parse().unwrap()).map(|record| record.uid().0)
    }

    #[test]
    fn what_the_plugin_says_about_addresses_counts_before_what_the_object_says() {
        let mut cluster = Cluster::default();
        cluster.set_pod(&pod(1, None));
        cluster.announce_pod(&pod(1, Some("10.0.0.1")));
        // The object is changed before it names the address.
        cluster.set_pod(&pod(1, None));
        assert_eq!(owner(&cluster, "10.0.0.1"), Some(1));
        // Another object still names it, and a younger one would have it otherwise.
        cluster.set_pod(&Pod { created: 9, ..pod(2, Some("10.0.0.1")) });
        assert_eq!(owner(&cluster, "10.0.0.1"), Some(1));
        cluster.release_pod(Uid(1));
        cluster.set_pod(&pod(1, Some("10.0.0.1")));
        assert_eq!(owner(&cluster, "10.0.0.1"), Some(2));
        cluster.remove_pod(Uid(2));
        assert_eq!(owner(&cluster, "10.0.0.1"), None);
        cluster.remove_pod(Uid(1));
        assert_eq!((cluster.pod_count(), cluster.groups().of_namespace("shop")), (0, None));
    }
}
