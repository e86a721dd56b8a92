//! Which pods of other nodes have to be known: only those that a policy of a pod of this node may speak of.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use subnet::policy::{NamespaceScope, NetworkPolicy, Peer, Peers, PortMatch, Ports, Rule, Selector};

use super::cluster::Cluster;
use super::resolved::Resolved;

/// With more namespaces than this, one watch of all pods takes less of the API server than a watch of each.
pub(super) const MAX_DEMAND: usize = 64;

/// The pods of other nodes that have to be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Those of these namespaces; none at all without any.
    Namespaces(BTreeSet<String>),
    /// All.
    Everything,
}

impl Demand {
    /// Of these namespaces, or of all if they are too many.
    pub(super) fn of(namespaces: BTreeSet<String>) -> Self {
        if namespaces.len() > MAX_DEMAND { Self::Everything } else { Self::Namespaces(namespaces) }
    }
}

/// Works out the demand of what is known of a cluster before it is planned, so that the pods are there when their
/// sets are made. It is at least that of [`Engine::demand`](super::Engine::demand) after the plan.
#[derive(Debug, Default)]
pub struct Foresight {
    /// By the serial number of a group of pods of this node.
    groups: HashMap<u64, Arc<Named>>,
}

/// Whom the policies of a group of pods name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Named {
    everybody: bool,
    /// Pods of their own namespace.
    own: bool,
    /// Pods of namespaces with such labels.
    matching: BTreeSet<Selector>,
}

impl Foresight {
    /// Policies came, went or changed.
    pub fn policies_changed(&mut self) {
        self.groups.clear();
    }

    /// What has to be watched.
    pub fn demand(&mut self, cluster: &Cluster) -> Demand {
        let groups = cluster.groups();
        let mut known = std::mem::take(&mut self.groups);
        let mut namespaces = BTreeSet::new();
        let mut everybody = false;
        // Those of the namespaces of groups that are new.
        let mut policies: HashMap<&str, Vec<(&Arc<NetworkPolicy>, Resolved)>> = HashMap::new();
        for (local, record) in cluster.locals() {
            let serial = groups.serial(record.group);
            if self.groups.contains_key(&serial) {
                continue;
            }
            let named = known.remove(&serial).unwrap_or_else(|| {
                let mut named = Named::default();
                let namespace = &*local.name.namespace;
                let policies = policies.entry(namespace).or_insert_with(|| {
                    let all = cluster.policies_of(namespace);
                    all.map(|policy| (policy, groups.resolve(&policy.pods))).collect()
                });
                let selecting = policies.iter().filter(|(_, pods)| groups.has_labels(record.group, pods));
                selecting.for_each(|(policy, _)| named.add(policy));
                Arc::new(named)
            });
            everybody |= named.everybody;
            if named.own {
                namespaces.insert(local.name.namespace.to_string());
            }
            for labels in &named.matching {
                namespaces.extend(groups.namespaces_matching(labels));
            }
            self.groups.insert(serial, named);
        }
        if everybody { Demand::Everything } else { Demand::of(namespaces) }
    }
}

impl Named {
    fn add(&mut self, policy: &NetworkPolicy) {
        policy.ingress.rules().iter().for_each(|rule| self.add_rule(rule, false));
        policy.egress.rules().iter().for_each(|rule| self.add_rule(rule, true));
    }

    fn add_rule(&mut self, rule: &Rule, egress: bool) {
        let named_port = egress
            && matches!(&rule.ports, Ports::Of(ports)
                if ports.iter().any(|port| matches!(port.port, PortMatch::Named(_))));
        let Peers::Of(peers) = &rule.peers else {
            self.everybody |= named_port;
            return;
        };
        for peer in peers {
            match peer {
                Peer::Block { .. } => self.everybody |= named_port,
                Peer::Pods { namespaces: NamespaceScope::Own, .. } => self.own = true,
                Peer::Pods { namespaces: NamespaceScope::Matching(labels), pods } => {
                    if !labels.is_everything() {
                        self.matching.insert(labels.clone());
                    } else {
                        // Every pod is known by its address alone, unless its ports matter.
                        self.everybody |= named_port || !pods.is_everything();
                    }
                }
            }
        }
    }
}
