//! Which of a namespace's policies select a pod, found by the pod's labels.

use std::collections::HashMap;
use std::sync::Arc;

use subnet::policy::NetworkPolicy;

use super::groups::{GroupId, Groups};
use super::intern::Id;
use super::resolved::Resolved;

/// The policies of a namespace, so that a pod is compared with few of very many. Good until a group comes or goes.
pub(super) struct Selecting<'a> {
    policies: Vec<(&'a Arc<NetworkPolicy>, Resolved)>,
    /// Positions of those that ask for one of these labels, under each of them.
    by_label: HashMap<(Id, Id), Vec<usize>>,
    /// Positions of those that don't, such as those that select all pods.
    others: Vec<usize>,
}

impl<'a> Selecting<'a> {
    pub(super) fn new(policies: impl Iterator<Item = &'a Arc<NetworkPolicy>>, groups: &Groups) -> Self {
        let policies = policies.map(|policy| (policy, groups.resolve(&policy.pods))).collect();
        let mut all = Self { policies, by_label: HashMap::new(), others: Vec::new() };
        for (position, (_, selector)) in all.policies.iter().enumerate() {
            match selector.asked() {
                Some((key, values)) => {
                    for value in values {
                        all.by_label.entry((key, *value)).or_default().push(position);
                    }
                }
                None => all.others.push(position),
            }
        }
        all
    }

    /// Those that select the pods of a group, in the order that they were given in.
    pub(super) fn selecting(
        &self,
        group: GroupId,
        groups: &Groups,
    ) -> impl Iterator<Item = &'a Arc<NetworkPolicy>> {
        let asking = groups.labels(group).iter().filter_map(|label| self.by_label.get(label)).flatten();
        let mut positions: Vec<usize> = asking.chain(&self.others).copied().collect();
        positions.sort_unstable();
        positions.dedup();
        let candidates = positions.into_iter().map(|position| &self.policies[position]);
        candidates.filter(move |(_, pods)| groups.has_labels(group, pods)).map(|(policy, _)| *policy)
    }
}
