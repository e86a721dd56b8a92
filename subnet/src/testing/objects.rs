//! The objects, their versions, and what has happened to them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};

/// How many changes are remembered for watches.
const HISTORY: usize = 10_000;

/// An object as text; parsed only to be changed.
pub(super) type Json = Arc<str>;

/// The resources that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Resource {
    Nodes,
    Namespaces,
    Pods,
    Policies,
    Services,
}

/// Which objects are asked for.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    pub(super) resource: Resource,
    pub(super) namespace: Option<String>,
    /// What a field has to be: `metadata.name`, `spec.nodeName` or `status.podIP`.
    pub(super) field: Option<(String, String)>,
}

impl Selection {
    pub(super) fn wants(&self, resource: Resource, name: &str, object: &str) -> bool {
        let of_namespace = self
            .namespace
            .as_ref()
            .is_none_or(|namespace| name.split_once('/').is_some_and(|(of, _)| of == namespace));
        let has = |member: &str, key: &str, value: &str| {
            serde_json::from_str::<Value>(object).is_ok_and(|object| object[member][key] == value)
        };
        let selected = self.field.as_ref().is_none_or(|(field, value)| match field.as_str() {
            "metadata.name" => name.rsplit('/').next() == Some(value),
            "spec.nodeName" => has("spec", "nodeName", value),
            "status.podIP" => has("status", "podIP", value),
            _ => false,
        });
        resource == self.resource && of_namespace && selected
    }
}

/// A change of an object.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) kind: &'static str,
    pub(super) resource: Resource,
    pub(super) name: Arc<str>,
    pub(super) object: Json,
}

/// A list that is read in pages: all of them are as of one version.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    pub(super) version: u64,
    pub(super) objects: Arc<Vec<Json>>,
}

#[derive(Debug, Default)]
pub(super) struct Objects {
    version: u64,
    objects: BTreeMap<(Resource, Arc<str>), Json>,
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

    /// The object of this name; of a namespace `NAMESPACE/NAME`.
    pub(super) fn find(&self, resource: Resource, name: &str) -> Option<Value> {
        serde_json::from_str(self.objects.get(&(resource, name.into()))?).ok()
    }

    pub(super) fn get(&self, name: &str) -> Option<Value> {
        self.find(Resource::Nodes, name)
    }

    pub(super) fn names(&self) -> Vec<String> {
        let nodes = self.objects.keys().filter(|(resource, _)| *resource == Resource::Nodes);
        nodes.map(|(_, name)| name.to_string()).collect()
    }

    pub(super) fn put(&mut self, node: Value) {
        self.put_in(Resource::Nodes, node);
    }

    pub(super) fn put_in(&mut self, resource: Resource, mut object: Value) {
        let text = |member: &str| object["metadata"][member].as_str().unwrap_or_default();
        let name: Arc<str> = match text("namespace") {
            "" => text("name").into(),
            namespace => format!("{namespace}/{}", text("name")).into(),
        };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if resource == Resource::Nodes {
            note_pod_cidrs(&mut object);
        }
        let known = self.objects.contains_key(&(resource, Arc::clone(&name)));
        let kind = if known { "MODIFIED" } else { "ADDED" };
        self.happened(kind, resource, name, object.to_string().into());
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.remove_from(Resource::Nodes, name);
    }

    pub(super) fn remove_from(&mut self, resource: Resource, name: &str) {
        let Some(mut object) = self.find(resource, name) else { return };
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.happened("DELETED", resource, name.into(), object.to_string().into());
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
        self.objects.get(&(Resource::Nodes, name.into())).cloned()
    }

    fn happened(&mut self, kind: &'static str, resource: Resource, name: Arc<str>, object: Json) {
        let key = (resource, Arc::clone(&name));
        if kind == "DELETED" {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, Arc::clone(&object));
        }
        self.history.push_back(Change { version: self.version, kind, resource, name, object });
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

    pub(super) fn list(&self, selection: &Selection) -> Listing {
        let wanted = |((resource, name), object): &(&(Resource, Arc<str>), &Json)| {
            selection.wants(*resource, name, object)
        };
        let objects = self.objects.iter().filter(wanted).map(|(_, object)| Arc::clone(object));
        Listing { version: self.version, objects: Arc::new(objects.collect()) }
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

    pub(super) fn put_event(&mut self, event: Value) {
        self.events.push(event);
    }

    pub(super) fn events(&self) -> &[Value] {
        &self.events
    }
}

/// Notes in `managedFields` who has set the pod subnets, as the server does, unless the field was cleared by `[{}]`.
fn note_pod_cidrs(node: &mut Value) {
    const MANAGER: &str = "kube-controller-manager";
    let cidrs = node["spec"]["podCIDRs"].as_array().into_iter().flatten();
    let elements: serde_json::Map<String, Value> =
        cidrs.map(|cidr| (format!("v:{cidr}"), json!({}))).chain([(".".to_owned(), json!({}))]).collect();
    let managed = &mut node["metadata"]["managedFields"];
    if elements.len() == 1 || *managed == json!([{}]) {
        return;
    }
    let fields = json!({"f:podCIDR": {}, "f:podCIDRs": elements});
    if !managed.is_array() {
        *managed = json!([]);
    }
    let Value::Array(all) = managed else { return };
    match all.iter_mut().find(|entry| entry["manager"] == MANAGER) {
        Some(entry) => entry["fieldsV1"]["f:spec"] = fields,
        None => all.push(json!({"manager": MANAGER, "operation": "Update", "apiVersion": "v1",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": fields}})),
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
