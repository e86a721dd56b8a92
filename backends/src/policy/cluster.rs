//! What is known of the cluster's namespaces, pods and policies, compact enough for all of a large one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use subnet::Family;
use subnet::policy::{Labels, NamedPort, NetworkPolicy, ObjectName, Pod, Uid};

use super::groups::{GroupId, Groups};
use super::owners::Owners;

/// Namespaces, pods and policies.
#[derive(Debug, Default)]
pub struct Cluster {
    groups: Groups,
    pods: Vec<Record>,
    free: Vec<u32>,
    index: HashMap<[u8; 16], u32>,
    owners: Owners,
    ports: Ports,
    locals: BTreeMap<Uid, Local>,
    policies: BTreeMap<ObjectName, Arc<NetworkPolicy>>,
    pub(super) touched: Touched,
}

/// What changed since somebody looked.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Addresses whose pod, or what is known of it, is another.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Addresses that passed from one pod to another.
    pub(super) passed: BTreeSet<IpAddr>,
    /// Policies.
    pub(super) policies: bool,
    /// Pods of this node.
    pub(super) locals: bool,
}

#[derive(Debug)]
pub(super) struct Record {
    uid: [u8; 16],
    created: u32,
    pub(super) group: GroupId,
    ports: u32,
    v4: Option<[u8; 4]>,
    v6: Option<[u8; 16]>,
    origin: PodSource,
}

/// Who says which addresses a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PodSource {
    /// Its object.
    Object,
    /// Our CNI plugin gave them to it, long before its object says so.
    Plugin,
    /// Our CNI plugin took them back, though its object goes on naming them.
    Released,
}

/// A pod of this node.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) name: ObjectName,
    pub(super) number: u32,
}

impl Record {
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [self.v4.map(IpAddr::from), self.v6.map(IpAddr::from)].into_iter().flatten()
    }

    pub(super) fn announced(&self) -> bool {
        self.origin == PodSource::Plugin
    }

    /// Who of two that claim an address has it: the one that our CNI plugin named, then the younger.
    fn claim(&self) -> (bool, u32, [u8; 16]) {
        (self.announced(), self.created, self.uid)
    }
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
        self.policies.insert(policy.name.clone(), Arc::new(policy));
        self.touched.policies = true;
    }

    /// Whether this policy is known just so.
    pub fn knows_policy(&self, policy: &NetworkPolicy) -> bool {
        self.policies.get(&policy.name).is_some_and(|known| **known == *policy)
    }

    /// A policy is gone.
    pub fn remove_policy(&mut self, name: &ObjectName) {
        self.touched.policies |= self.policies.remove(name).is_some();
    }

    /// A pod is there, as described. One that has ended or is on its host's network is to be removed instead.
    pub fn set_pod(&mut self, pod: &Pod) {
        let known = self.number(pod.uid).map(|number| &self.pods[number as usize]);
        let (origin, addresses) = match known.map(|record| (record.origin, record)) {
            None | Some((PodSource::Object, _)) => (PodSource::Object, pod.addresses.clone()),
            Some((origin, record)) => (origin, record.addresses().collect()),
        };
        self.put_pod(pod, &addresses, origin);
    }

    /// The CNI plugin gave these addresses to a pod of this node: they are its own, also when its object
    /// says otherwise.
    pub fn announce_pod(&mut self, pod: &Pod) {
        self.put_pod(pod, &pod.addresses, PodSource::Plugin);
    }

    /// The CNI plugin took the addresses of a pod back. What its object names from now on counts for nothing.
    pub fn release_pod(&mut self, uid: Uid) {
        let Some(number) = self.number(uid) else { return };
        for address in self.pods[number as usize].addresses() {
            self.disown(address, number);
        }
        let record = &mut self.pods[number as usize];
        (record.v4, record.v6, record.origin) = (None, None, PodSource::Released);
        self.touched.locals |= self.locals.contains_key(&uid);
    }

    /// A pod is gone, has ended, or turns out to be on its host's network.
    pub fn remove_pod(&mut self, uid: Uid) {
        let Some(number) = self.index.remove(&uid.0.to_be_bytes()) else { return };
        for address in self.pods[number as usize].addresses() {
            self.disown(address, number);
        }
        self.release(number);
        self.free.push(number);
        self.touched.locals |= self.locals.remove(&uid).is_some();
    }

    /// How many pods are known.
    pub fn pod_count(&self) -> usize {
        self.index.len()
    }

    /// How many policies there are.
    pub fn policy_count(&self) -> usize {
        self.policies.len()
    }

    /// The pods that are known, by uid.
    pub fn uids(&self) -> impl Iterator<Item = Uid> + '_ {
        self.index.keys().map(|uid| Uid(u128::from_be_bytes(*uid)))
    }

    /// The pods of other nodes whose namespace is `among` some.
    pub fn pods_elsewhere(&self, among: impl Fn(&str) -> bool) -> Vec<Uid> {
        let records = self.index.values().map(|number| &self.pods[*number as usize]);
        let among = |record: &&Record| among(self.groups.namespace(record.group));
        let uids = records.filter(among).map(|record| Uid(u128::from_be_bytes(record.uid)));
        uids.filter(|uid| !self.locals.contains_key(uid)).collect()
    }

    /// The names of the policies that are known.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.policies.values()
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
        self.policies.contains_key(name)
    }

    /// The policies of a namespace.
    pub(super) fn policies_of(&self, namespace: &str) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        let first = ObjectName::new(namespace, "");
        let namespace: Box<str> = namespace.into();
        self.policies
            .range(first..)
            .take_while(move |(name, _)| name.namespace == namespace)
            .map(|(_, policy)| policy)
    }

    /// The pods of this node.
    pub(super) fn locals(&self) -> impl Iterator<Item = (&Local, &Record)> {
        self.locals.values().map(|local| (local, &self.pods[local.number as usize]))
    }

    /// All addresses of a family, each with the pod that it belongs to.
    pub(super) fn owned(&self, family: Family) -> impl Iterator<Item = (IpAddr, &Record)> {
        // What a pod that is gone had is not its own any more.
        let numbers = 0..self.pods.len() as u32;
        numbers
            .filter_map(move |number| Some((self.own_address(number, family)?, &self.pods[number as usize])))
    }

    /// The pod that an address belongs to.
    pub(super) fn owner(&self, address: IpAddr) -> Option<&Record> {
        self.owners.get(address).map(|number| &self.pods[number as usize])
    }

    /// The address of this family that a pod has, unless another pod has a better claim.
    pub(super) fn own_address(&self, number: u32, family: Family) -> Option<IpAddr> {
        let address =
            self.pods[number as usize].addresses().find(|address| Family::of(*address) == family)?;
        (self.owners.get(address) == Some(number)).then_some(address)
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

    fn number(&self, uid: Uid) -> Option<u32> {
        self.index.get(&uid.0.to_be_bytes()).copied()
    }

    fn put_pod(&mut self, pod: &Pod, addresses: &[IpAddr], origin: PodSource) {
        let mut ports: Vec<NamedPort> = pod.ports.clone();
        ports.sort_unstable();
        ports.dedup();
        let of = |family| addresses.iter().copied().find(|address| Family::of(*address) == family);
        let record = Record {
            uid: pod.uid.0.to_be_bytes(),
            created: u32::try_from(pod.created).unwrap_or(u32::MAX),
            group: self.groups.acquire(&pod.name.namespace, &pod.labels),
            ports: self.ports.acquire(&ports),
            v4: of(Family::V4).and_then(|address| match address {
                IpAddr::V4(v4) => Some(v4.octets()),
                IpAddr::V6(_) => None,
            }),
            v6: of(Family::V6).and_then(|address| match address {
                IpAddr::V6(v6) => Some(v6.octets()),
                IpAddr::V4(_) => None,
            }),
            origin,
        };
        let number = match self.number(pod.uid) {
            Some(number) => {
                if !self.replace(number, record) {
                    return;
                }
                number
            }
            None => self.add(record),
        };
        let was_local = self.locals.remove(&pod.uid).is_some();
        if pod.local {
            self.locals.insert(pod.uid, Local { name: pod.name.clone(), number });
        }
        self.touched.locals |= pod.local || was_local;
    }

    fn add(&mut self, record: Record) -> u32 {
        let uid = record.uid;
        let addresses = record.addresses();
        let number = match self.free.pop() {
            Some(number) => {
                self.pods[number as usize] = record;
                number
            }
            None => {
                self.pods.push(record);
                self.pods.len() as u32 - 1
            }
        };
        self.index.insert(uid, number);
        addresses.for_each(|address| self.own(address, number));
        number
    }

    /// Whether anything is different.
    fn replace(&mut self, number: u32, record: Record) -> bool {
        let known = &self.pods[number as usize];
        let same = (known.group, known.ports, known.origin, known.created)
            == (record.group, record.ports, record.origin, record.created)
            && (known.v4, known.v6) == (record.v4, record.v6);
        if same {
            self.groups.release(record.group);
            self.ports.release(record.ports);
            return false;
        }
        let (before, after): (Vec<_>, Vec<_>) = (known.addresses().collect(), record.addresses().collect());
        self.release(number);
        self.pods[number as usize] = record;
        for address in before.iter().filter(|address| !after.contains(address)) {
            self.disown(*address, number);
        }
        after.into_iter().for_each(|address| self.own(address, number));
        true
    }

    fn release(&mut self, number: u32) {
        let record = &self.pods[number as usize];
        self.groups.release(record.group);
        self.ports.release(record.ports);
    }

    fn own(&mut self, address: IpAddr, number: u32) {
        let pods = &self.pods;
        let before = self.owners.get(address);
        self.owners.claim(address, number, |number| pods[number as usize].claim());
        self.note_owner(address, before);
    }

    fn disown(&mut self, address: IpAddr, number: u32) {
        let pods = &self.pods;
        let before = self.owners.get(address);
        self.owners.leave(address, number, |number| pods[number as usize].claim());
        self.note_owner(address, before);
    }

    fn note_owner(&mut self, address: IpAddr, before: Option<u32>) {
        let after = self.owners.get(address);
        self.touched.addresses.insert(address);
        if before.is_some() && after.is_some() && before != after {
            self.touched.passed.insert(address);
            self.touched.locals = true;
        }
    }

    fn touch_namespace(&mut self, name: &str) {
        let Some(groups) = self.groups.of_namespace(name) else { return };
        let groups: BTreeSet<GroupId> = groups.iter().copied().collect();
        if groups.is_empty() {
            return;
        }
        let records = self.index.values().map(|number| &self.pods[*number as usize]);
        let addresses = records.filter(|record| groups.contains(&record.group)).flat_map(Record::addresses);
        self.touched.addresses.extend(addresses);
    }
}

/// Lists of named ports, each kept once.
#[derive(Debug)]
struct Ports {
    lists: Vec<(Box<[NamedPort]>, u32)>,
    free: Vec<u32>,
    index: HashMap<Box<[NamedPort]>, u32>,
}

impl Default for Ports {
    /// The first is the empty list, which stays.
    fn default() -> Self {
        Self { lists: vec![(Box::default(), 1)], free: Vec::new(), index: HashMap::new() }
    }
}

impl Ports {
    fn acquire(&mut self, list: &[NamedPort]) -> u32 {
        if list.is_empty() {
            return 0;
        }
        if let Some(id) = self.index.get(list) {
            self.lists[*id as usize].1 += 1;
            return *id;
        }
        let entry = (Box::from(list), 1);
        let id = match self.free.pop() {
            Some(id) => {
                self.lists[id as usize] = entry;
                id
            }
            None => {
                self.lists.push(entry);
                self.lists.len() as u32 - 1
            }
        };
        self.index.insert(list.into(), id);
        id
    }

    fn release(&mut self, id: u32) {
        if id == 0 {
            return;
        }
        let (list, uses) = &mut self.lists[id as usize];
        *uses -= 1;
        if *uses == 0 {
            self.index.remove(list);
            *list = Box::default();
            self.free.push(id);
        }
    }

    fn get(&self, id: u32) -> &[NamedPort] {
        &self.lists[id as usize].0
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
        cluster.owner(address.parse().unwrap()).map(|record| u128::from_be_bytes(record.uid))
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
