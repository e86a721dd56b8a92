//! The policies of a cluster by name. Many differ in little more than that, so equal parts are kept once.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use subnet::policy::{Isolation, NamespaceScope, NetworkPolicy, ObjectName, Peer, Peers, Rule, Selector};

/// Policies, and what they have in common.
#[derive(Debug, Default)]
pub(super) struct Policies {
    by_name: BTreeSet<ByName>,
    parts: PolicyParts,
    /// How many policies went since parts without a policy were forgotten.
    gone: usize,
}

/// A policy that is found by the name in it.
#[derive(Debug)]
struct ByName(Arc<NetworkPolicy>);

/// Parts of policies, each once.
#[derive(Debug, Default)]
struct PolicyParts {
    rules: HashSet<Arc<[Rule]>>,
    selectors: HashSet<Selector>,
}

impl Policies {
    pub(super) fn len(&self) -> usize {
        self.by_name.len()
    }

    pub(super) fn get(&self, name: &ObjectName) -> Option<&Arc<NetworkPolicy>> {
        self.by_name.get(name).map(|policy| &policy.0)
    }

    /// Adds a policy, in the place of one with the same name.
    pub(super) fn set(&mut self, mut policy: NetworkPolicy) {
        self.parts.share(&mut policy);
        let replaced = self.by_name.replace(ByName(Arc::new(policy))).is_some();
        self.note_gone(replaced);
    }

    /// Whether there was one of this name.
    pub(super) fn remove(&mut self, name: &ObjectName) -> bool {
        let was_there = self.by_name.remove(name);
        self.note_gone(was_there);
        was_there
    }

    /// All, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        self.by_name.iter().map(|policy| &policy.0)
    }

    /// Those of a namespace, by name.
    pub(super) fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<NetworkPolicy>> {
        let first = ObjectName::new(namespace, "");
        let namespace: Box<str> = namespace.into();
        let policies = self.by_name.range::<ObjectName, _>(first..).map(|policy| &policy.0);
        policies.take_while(move |policy| policy.name.namespace == namespace)
    }

    /// All parts are looked at once for as many policies as there are, which costs each of these little.
    fn note_gone(&mut self, gone: bool) {
        self.gone += usize::from(gone);
        if self.gone >= self.by_name.len() {
            self.parts.tidy();
            self.gone = 0;
        }
    }
}

impl PolicyParts {
    /// Has `policy` use the parts that other policies have, too.
    fn share(&mut self, policy: &mut NetworkPolicy) {
        self.share_selector(&mut policy.pods);
        for isolation in [&mut policy.ingress, &mut policy.egress] {
            if let Isolation::Isolated(rules) = isolation {
                self.share_rules(rules);
            }
        }
    }

    fn share_rules(&mut self, rules: &mut Arc<[Rule]>) {
        if let Some(known) = self.rules.get(rules) {
            *rules = Arc::clone(known);
            return;
        }
        // Rules that the caller keeps a clone of stay as they are.
        for rule in Arc::get_mut(rules).into_iter().flatten() {
            let Peers::Of(peers) = &mut rule.peers else { continue };
            for peer in peers {
                let Peer::Pods { namespaces, pods } = peer else { continue };
                self.share_selector(pods);
                if let NamespaceScope::Matching(labels) = namespaces {
                    self.share_selector(labels);
                }
            }
        }
        self.rules.insert(Arc::clone(rules));
    }

    fn share_selector(&mut self, selector: &mut Selector) {
        match self.selectors.get(selector) {
            Some(known) => *selector = known.clone(),
            None => drop(self.selectors.insert(selector.clone())),
        }
    }

    /// Forgets what no policy has any more. Selectors come last, because rules have them.
    fn tidy(&mut self) {
        self.rules.retain(|rules| Arc::strong_count(rules) > 1);
        self.selectors.retain(Selector::is_shared);
    }
}

impl Borrow<ObjectName> for ByName {
    fn borrow(&self) -> &ObjectName {
        &self.0.name
    }
}

impl Ord for ByName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.name.cmp(&other.0.name)
    }
}

impl PartialOrd for ByName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for ByName {}

#[cfg(test)]
mod tests {
    use subnet::policy::{Ports, Requirement};

    use super::*;

    fn policy(namespace: &str, name: &str, app: &str) -> NetworkPolicy {
        let selector = || Selector::new([Requirement::equals("app", app)]);
        let peer = Peer::Pods { namespaces: NamespaceScope::Matching(selector()), pods: selector() };
        let rules = || [Rule { peers: Peers::Of([peer.clone()].into()), ports: Ports::Any }].into();
        NetworkPolicy {
            name: ObjectName::new(namespace, name),
            pods: selector(),
            ingress: Isolation::Isolated(rules()),
            egress: Isolation::Isolated(rules()),
        }
    }

    fn parts(policies: &Policies) -> (usize, usize) {
        (policies.parts.rules.len(), policies.parts.selectors.len())
    }

    #[test]
    fn equal_parts_are_kept_once_for_as_long_as_a_policy_has_them() {
        let mut policies = Policies::default();
        for number in 0..10 {
            policies.set(policy("shop", &format!("p{number}"), if number < 8 { "a" } else { "b" }));
        }
        assert_eq!(parts(&policies), (2, 2));
        let rules =
            |name: &str| policies.get(&ObjectName::new("shop", name)).unwrap().ingress.rules().as_ptr();
        assert_eq!(rules("p0"), rules("p7"));
        assert_ne!(rules("p0"), rules("p9"));
        assert_eq!(**policies.get(&ObjectName::new("shop", "p3")).unwrap(), policy("shop", "p3", "a"));
        for number in 0..8 {
            assert!(policies.remove(&ObjectName::new("shop", format!("p{number}"))));
        }
        assert_eq!((policies.len(), parts(&policies)), (2, (1, 1)));
        for name in ["p8", "p9"] {
            assert!(policies.remove(&ObjectName::new("shop", name)));
        }
        assert_eq!((policies.remove(&ObjectName::new("shop", "p9")), parts(&policies)), (false, (0, 0)));
    }

    #[test]
    fn a_policy_that_changes_again_and_again_leaves_no_parts() {
        let mut policies = Policies::default();
        for number in 0..1000 {
            policies.set(policy("shop", "p", &format!("app-{number}")));
            let (rules, selectors) = parts(&policies);
            assert!(rules <= 3 && selectors <= 3, "{rules} {selectors}");
        }
        assert_eq!(policies.len(), 1);
    }

    #[test]
    fn the_policies_of_a_namespace_are_found_among_those_of_others() {
        let mut policies = Policies::default();
        for (namespace, name) in [("b", "2"), ("a", "9"), ("c", "0"), ("b", "1"), ("ba", "1")] {
            policies.set(policy(namespace, name, "x"));
        }
        let names: Vec<String> = policies.of_namespace("b").map(|policy| policy.name.to_string()).collect();
        assert_eq!(names, ["b/1", "b/2"]);
        assert_eq!(policies.of_namespace("d").count(), 0);
    }
}
