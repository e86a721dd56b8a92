//! Pods with the same namespace and the same labels are a group: what a selector says, it says of the whole group.

use std::collections::BTreeMap;

use subnet::policy::{Labels, Selector};

use super::intern::{Id, Interner};
use super::resolved::Resolved;
use super::selector::{PodSelector, SelectorScope};
use super::slots::{SlotIndex, Slots};

/// The number of a group.
pub(super) type GroupId = u32;

/// All groups, by namespace.
#[derive(Debug, Default)]
pub(super) struct Groups {
    strings: Interner,
    groups: Slots<SelectorGroup>,
    index: SlotIndex,
    namespaces: BTreeMap<Id, Namespace>,
    serial: u64,
}

#[derive(Debug, Default)]
struct Namespace {
    /// `None` while the namespace is only known by its pods.
    labels: Option<Pairs>,
    groups: Vec<GroupId>,
}

#[derive(Debug)]
struct SelectorGroup {
    namespace: Id,
    pods: u32,
    labels: Pairs,
    /// Never the same again, unlike the group's number.
    serial: u64,
}

/// Keys and values, sorted.
type Pairs = Box<[(Id, Id)]>;

impl SelectorGroup {
    /// What it is found by.
    fn key(&self) -> (Id, &[(Id, Id)]) {
        (self.namespace, &self.labels)
    }
}

impl Groups {
    /// Whether anything is different.
    pub(super) fn set_namespace(&mut self, name: &str, labels: &Labels) -> bool {
        let pairs = self.pairs(labels);
        let id = self.strings.acquire(name);
        let namespace = self.namespaces.entry(id).or_default();
        let known = namespace.labels.replace(pairs);
        let same = known == namespace.labels;
        if let Some(pairs) = known {
            self.release_pairs(&pairs);
            // The name is held once by each namespace that is known.
            self.strings.release(id);
        }
        !same
    }

    pub(super) fn remove_namespace(&mut self, name: &str) -> bool {
        let Some(id) = self.strings.find(name) else { return false };
        let Some(namespace) = self.namespaces.get_mut(&id) else { return false };
        let Some(pairs) = namespace.labels.take() else { return false };
        self.release_pairs(&pairs);
        self.forget_empty(id);
        self.strings.release(id);
        true
    }

    pub(super) fn namespaces(&self) -> impl Iterator<Item = &str> {
        let known = self.namespaces.iter().filter(|(_, namespace)| namespace.labels.is_some());
        known.map(|(id, _)| self.strings.text(*id))
    }

    /// The labels of those that are known.
    pub(super) fn namespace_labels(&self) -> impl Iterator<Item = (&str, Labels)> {
        self.namespaces.iter().filter_map(|(id, namespace)| {
            let text = |id: &Id| self.strings.text(*id).to_owned();
            let labels = namespace.labels.as_ref()?.iter().map(|(key, value)| (text(key), text(value)));
            Some((self.strings.text(*id), labels.collect()))
        })
    }

    /// The names of those that are known and have such labels.
    pub(super) fn namespaces_matching(&self, labels: &Selector) -> impl Iterator<Item = String> {
        let known = self.matching_namespaces(labels).filter(|(_, namespace)| namespace.labels.is_some());
        known.map(|(id, _)| self.strings.text(*id).to_owned())
    }

    pub(super) fn of_namespace(&self, name: &str) -> Option<&[GroupId]> {
        Some(&self.namespaces.get(&self.strings.find(name)?)?.groups)
    }

    /// The group with these labels, with one pod more.
    pub(super) fn acquire(&mut self, namespace: &str, labels: &Labels) -> GroupId {
        let namespace = self.strings.acquire(namespace);
        let pairs = self.pairs(labels);
        let key = (namespace, &*pairs);
        let known = self.index.find(key, |id| self.groups[id].key() == key);
        if let Some(id) = known {
            self.groups[id].pods += 1;
            // The strings are held once by each group.
            self.strings.release(namespace);
            self.release_pairs(&pairs);
            return id;
        }
        self.serial += 1;
        let id = self.groups.add(SelectorGroup { namespace, pods: 1, labels: pairs, serial: self.serial });
        let groups = &self.groups;
        self.index.insert(id, |id| groups[id].key());
        self.namespaces.entry(namespace).or_default().groups.push(id);
        id
    }

    /// A group has one pod less.
    pub(super) fn release(&mut self, id: GroupId) {
        let group = &mut self.groups[id];
        group.pods -= 1;
        if group.pods > 0 {
            return;
        }
        self.index.remove(id, group.key());
        let (namespace, pairs) = (group.namespace, std::mem::take(&mut group.labels));
        if let Some(of) = self.namespaces.get_mut(&namespace) {
            of.groups.retain(|one| *one != id);
        }
        self.forget_empty(namespace);
        self.release_pairs(&pairs);
        self.strings.release(namespace);
        self.groups.free(id);
    }

    /// The namespace of a group.
    pub(super) fn namespace(&self, id: GroupId) -> &str {
        self.strings.text(self.groups[id].namespace)
    }

    pub(super) fn serial(&self, id: GroupId) -> u64 {
        self.groups[id].serial
    }

    pub(super) fn count(&self) -> usize {
        self.groups.len()
    }

    /// `selector` for [`Self::has_labels`], good until a group comes or goes.
    pub(super) fn resolve(&self, selector: &Selector) -> Resolved {
        Resolved::new(selector, &self.strings)
    }

    /// The labels of a group's pods.
    pub(super) fn labels(&self, id: GroupId) -> &[(Id, Id)] {
        &self.groups[id].labels
    }

    /// Whether the pods of a group match the labels that `selector` asks for, in any namespace.
    pub(super) fn has_labels(&self, id: GroupId, selector: &Resolved) -> bool {
        selector.matches(&self.groups[id].labels)
    }

    /// Whether the pods of a group are among those that `selector` describes.
    pub(super) fn matches(&self, id: GroupId, selector: &PodSelector) -> bool {
        let group = &self.groups[id];
        let in_scope = match &selector.scope {
            SelectorScope::Namespace(name) => self.strings.text(group.namespace) == &**name,
            SelectorScope::Matching(labels) => self.namespace_matches(group.namespace, labels),
        };
        in_scope && self.pairs_match(&group.labels, &selector.pods)
    }

    /// All groups whose pods `selector` describes.
    pub(super) fn matching(&self, selector: &PodSelector) -> Vec<GroupId> {
        let pods = self.resolve(&selector.pods);
        let having = |groups: &[GroupId]| -> Vec<GroupId> {
            groups.iter().copied().filter(|id| self.has_labels(*id, &pods)).collect()
        };
        match &selector.scope {
            SelectorScope::Namespace(name) => self.of_namespace(name).map(having).unwrap_or_default(),
            SelectorScope::Matching(labels) => self
                .matching_namespaces(labels)
                .flat_map(|(_, namespace)| having(&namespace.groups))
                .collect(),
        }
    }

    fn matching_namespaces(&self, labels: &Selector) -> impl Iterator<Item = (&Id, &Namespace)> {
        let (everything, labels) = (labels.is_everything(), self.resolve(labels));
        self.namespaces.iter().filter(move |(_, namespace)| {
            everything || namespace.labels.as_ref().is_some_and(|pairs| labels.matches(pairs))
        })
    }

    /// A namespace that is only known by its pods matches nothing but the selector of all.
    fn namespace_matches(&self, id: Id, selector: &Selector) -> bool {
        let labels = self.namespaces.get(&id).and_then(|namespace| namespace.labels.as_ref());
        selector.is_everything() || labels.is_some_and(|labels| self.pairs_match(labels, selector))
    }

    /// For a single label set; for many of them, resolving the selector first costs less.
    fn pairs_match(&self, pairs: &Pairs, selector: &Selector) -> bool {
        selector.matches(|key| {
            let pair = pairs.iter().find(|(found, _)| self.strings.text(*found) == key)?;
            Some(self.strings.text(pair.1))
        })
    }

    fn pairs(&mut self, labels: &Labels) -> Pairs {
        let strings = &mut self.strings;
        let mut pairs: Vec<(Id, Id)> =
            labels.iter().map(|(key, value)| (strings.acquire(key), strings.acquire(value))).collect();
        pairs.sort_unstable();
        pairs.into()
    }

    fn release_pairs(&mut self, pairs: &[(Id, Id)]) {
        for (key, value) in pairs {
            self.strings.release(*key);
            self.strings.release(*value);
        }
    }

    fn forget_empty(&mut self, id: Id) {
        if self.namespaces.get(&id).is_some_and(|one| one.labels.is_none() && one.groups.is_empty()) {
            self.namespaces.remove(&id);
        }
    }
}
