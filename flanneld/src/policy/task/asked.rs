//! Questions of people to the task: answered from what it knows at the moment, beside its work.

use std::sync::Arc;

use subnet::policy::explain::PolicyContext;
use tokio::sync::oneshot;

use super::super::announce::Retry;
use super::super::explain::{self, Inquiry, PolicySnapshot};
use super::Policies;

impl Policies {
    pub(super) fn asked(&self, inquiry: Inquiry, answer: oneshot::Sender<Result<String, Retry>>) {
        let (snapshot, api) = (self.snapshot(), Arc::clone(&self.api));
        tokio::spawn(async move {
            let text = explain::answer(inquiry, snapshot, &api).await;
            let _ = answer.send(text.map_err(|why| Retry { why }));
        });
    }

    fn snapshot(&self) -> PolicySnapshot {
        let hands = self.hands.get();
        let (engine, cluster) = (&hands.enforcer.engine, &hands.enforcer.engine.cluster);
        let own = self.known.own_pods().cloned().map(|mut pod| {
            if let Some(announced) = self.kept.of(&pod) {
                pod.addresses.clone_from(&announced.addresses);
            }
            pod
        });
        let namespaces = cluster.namespace_labels().map(|(name, labels)| (name.to_owned(), labels));
        PolicySnapshot {
            context: PolicyContext {
                policies: cluster.policies().cloned().collect(),
                namespaces: namespaces.collect(),
                networks: engine.settings().networks.clone(),
                nodes: engine.settings().nodes.clone(),
            },
            own: own.collect(),
            trouble: self.reason(),
        }
    }
}
