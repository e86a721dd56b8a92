//! The objects, their versions, and what has happened to them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};

/// How many changes are remembered for watches.
const HISTORY: usize = 10_000;

/// A node as text; parsed only to be changed.
pub(super) type Json = Arc<str>;

/// A change of a node.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: &'static str,
    pub(super) name: Arc<str>,
    pub(super) node: Json,
}

/// A list that is read in pages: all of them are as of one version.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    pub(super) version: u64,
    pub(super) nodes: Arc<Vec<(Arc<str>, Json)>>,
}

#[derive(Debug, Default)]
pub(super) struct Objects {
    version: u64,
    nodes: BTreeMap<Arc<str>, Json>,
    pods: BTreeMap<String, String>,
    events: Vec<Value>,
    history: VecDeque<Change>,
    /// History begins after this version.
    forgotten: u64,
    /// Lists of which pages are missing, by number.
    listings: BTreeMap<u64, Listing>,
    next_listing: u64,
}

impl Objects {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn get(&self, name: &str) -> Option<Value> {
        self.nodes.get(name).and_then(|node| serde_json::from_str(node).ok())
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.nodes.keys().map(|name| name.to_string()).collect()
    }

    pub(super) fn put(&mut self, mut node: Value) {
        let name: Arc<str> = node["metadata"]["name"].as_str().unwrap_or_default().into();
        self.version += 1;
        node["metadata"]["resourceVersion"] = self.version.to_string().into();
        let kind = if self.nodes.contains_key(&name) { "MODIFIED" } else { "ADDED" };
        self.happened(kind, name, node.to_string().into());
    }

    pub(super) fn remove(&mut self, name: &str) {
        let Some(mut node) = self.get(name) else { return };
        self.version += 1;
        node["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.happened("DELETED", name.into(), node.to_string().into());
    }

    pub(super) fn touch(&mut self, name: &str) {
        let Some(mut node) = self.get(name) else { return };
        let beat = format!("beat-{}", self.version);
        if let Some(conditions) = node["status"]["conditions"].as_array_mut() {
            conditions.iter_mut().for_each(|condition| condition["lastHeartbeatTime"] = beat.clone().into());
        }
        self.put(node);
    }

    /// Carries a strategic merge patch out; `None` if there is no such node.
    pub(super) fn patch(&mut self, name: &str, patch: &Value) -> Option<Json> {
        let mut node = self.get(name)?;
        let before = node.clone();
        merge(&mut node, patch);
        // A patch that changes nothing is no change.
        if node != before {
            self.put(node);
        }
        self.nodes.get(name).cloned()
    }

    fn happened(&mut self, kind: &'static str, name: Arc<str>, node: Json) {
        if kind == "DELETED" {
            self.nodes.remove(&name);
        } else {
            self.nodes.insert(Arc::clone(&name), Arc::clone(&node));
        }
        self.history.push_back(Change { version: self.version, kind, name, node });
        if self.history.len() > HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = oldest.version;
        }
    }

    pub(super) fn compact(&mut self) {
        self.history.clear();
        self.listings.clear();
        self.forgotten = self.version;
    }

    /// The changes after `version`, or `None` if not all of them are remembered.
    pub(super) fn since(&self, version: u64) -> Option<Vec<Change>> {
        let from = self.history.partition_point(|change| change.version <= version);
        (version >= self.forgotten).then(|| self.history.range(from..).cloned().collect())
    }

    pub(super) fn list(&self, name: Option<&str>) -> Listing {
        let wanted = |(key, _): &(&Arc<str>, &Json)| name.is_none_or(|name| ***key == *name);
        let nodes = self.nodes.iter().filter(wanted).map(|(name, node)| (Arc::clone(name), Arc::clone(node)));
        Listing { version: self.version, nodes: Arc::new(nodes.collect()) }
    }

    /// Remembers a list, of which more pages will be asked for.
    pub(super) fn keep(&mut self, listing: Listing) -> u64 {
        self.next_listing += 1;
        self.listings.insert(self.next_listing, listing);
        self.next_listing
    }

    pub(super) fn kept(&self, number: u64) -> Option<Listing> {
        self.listings.get(&number).cloned()
    }

    pub(super) fn put_pod(&mut self, name: String, node: &str) {
        // Versions are common to objects of all kinds.
        self.version += 1;
        self.pods.insert(name, node.to_owned());
    }

    pub(super) fn pod(&self, name: &str) -> Option<Value> {
        let node = self.pods.get(name)?;
        Some(
            json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name}, "spec": {"nodeName": node}}),
        )
    }

    pub(super) fn put_event(&mut self, event: Value) {
        self.events.push(event);
    }

    pub(super) fn events(&self) -> &[Value] {
        &self.events
    }
}

/// A strategic merge: objects by member, `null` removes, conditions by their type.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => {
                if let Some(members) = target.as_object_mut() {
                    members.remove(key);
                }
            }
            Value::Array(conditions) if key == "conditions" => {
                for condition in conditions {
                    merge_condition(&mut target[key.as_str()], condition);
                }
            }
            Value::Array(_) => target[key.as_str()] = value.clone(),
            _ => merge(&mut target[key.as_str()], value),
        }
    }
}

fn merge_condition(all: &mut Value, condition: &Value) {
    if !all.is_array() {
        *all = json!([]);
    }
    let Value::Array(all) = all else { return };
    match all.iter_mut().find(|known| known["type"] == condition["type"]) {
        Some(known) => merge(known, condition),
        None => all.push(condition.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_merges_members_removes_nulls_and_knows_conditions_by_type() {
        let mut node = json!({"metadata": {"annotations": {"a": "1", "b": "2"}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "True", "reason": "r"}]}});
        merge(
            &mut node,
            &json!({"metadata": {"annotations": {"a": null, "c": "3"}, "labels": {"l": "4"}},
            "status": {"conditions": [{"type": "X", "status": "False"}, {"type": "Y", "status": "False"}]}}),
        );
        assert_eq!(
            node,
            json!({"metadata": {"annotations": {"b": "2", "c": "3"}, "labels": {"l": "4"}},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X", "status": "False", "reason": "r"},
                {"type": "Y", "status": "False"}]}})
        );
    }

    #[test]
    fn changes_are_known_until_they_are_forgotten() {
        let mut objects = Objects::default();
        for name in ["a", "b", "a"] {
            objects.put(json!({"metadata": {"name": name}}));
        }
        objects.remove("b");
        let kinds = |since: Option<Vec<Change>>| {
            since.map(|all| all.iter().map(|change| change.kind).collect::<Vec<_>>())
        };
        assert_eq!(kinds(objects.since(0)).unwrap(), ["ADDED", "ADDED", "MODIFIED", "DELETED"]);
        assert_eq!(kinds(objects.since(3)).unwrap(), ["DELETED"]);
        objects.compact();
        assert!(objects.since(3).is_none());
        assert_eq!(kinds(objects.since(4)).unwrap(), [""; 0]);
    }
}
