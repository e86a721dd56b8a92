//! ADDs and DELs of pods, as far as the task has to do with them: each step is taken when what it waits for is there.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use backends::policy::Enforcer;
use subnet::StoreError;
use subnet::kube::FoundPod;
use subnet::policy::Pod;
use subnet::policy::objects::ReadPolicy;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::super::PolicyMode;
use super::super::adding::{AddStage, Adding, examine, find, identify};
use super::super::announce::{Announcement, EndedSandbox, OldConnections, PolicyRequest, Retry};
use super::super::known::Effect;
use super::{Phase, Policies};

/// How long an ADD waits for the watch of this node's pods to tell about the pod.
const POD_WAITS: Duration = Duration::from_secs(1);
/// How long it waits for its namespace's policies, and for an answer about the pod.
const API_WAITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(2));
/// How long it waits for the pods that its policies name.
const PEERS_WAIT: Duration = Duration::from_secs(2);
/// When it is given up.
pub(super) const ADD_TIMEOUT: Duration = Duration::from_secs(8);
/// What the API said when it was asked for an ADD.
pub(super) enum Fetched {
    Policies(String, Result<Vec<(ReadPolicy, u64)>, StoreError>),
    Pod(u64, Result<Option<FoundPod>, StoreError>),
}

impl Policies {
    pub(super) fn take(&mut self, request: PolicyRequest) {
        match request {
            PolicyRequest::Announce(pod, answer) => self.announced(pod, answer),
            PolicyRequest::Release(ended, answer) => self.released(&ended, answer),
            PolicyRequest::Ask(inquiry, answer) => self.asked(inquiry, answer),
        }
    }

    fn announced(&mut self, pod: Announcement, answer: oneshot::Sender<Result<OldConnections, Retry>>) {
        let now = Instant::now();
        let adding = Adding::new(pod, answer, AddStage::Watched(now + POD_WAITS), now);
        if let Err(why) = examine(&adding.pod, self.options.mode == PolicyMode::Strict) {
            self.figures.refused();
            return adding.end(Err(why));
        }
        // The announcement comes before the pod has its link. If that failed, its addresses may be another pod's by now, from
        // which it must not take them.
        self.give_up(
            |earlier| adding.replaces(earlier),
            "its addresses were given to another pod, or it was announced again",
        );
        self.next_adding += 1;
        let (id, namespace) = (self.next_adding, adding.pod.namespace.clone());
        self.adding.push((id, adding));
        if self.readings.need(&namespace, id) {
            self.read_policies(namespace);
        }
    }

    fn read_policies(&mut self, namespace: String) {
        let api = Arc::clone(&self.api);
        self.fetching.spawn(async move {
            let read = timeout(API_WAITS.0, api.policies_of(&namespace)).await;
            let read = read.unwrap_or_else(|_| Err(silent()));
            Fetched::Policies(namespace, read)
        });
    }

    /// Ends those that wait for what will not be.
    fn give_up(&mut self, is_over: impl Fn(&Adding) -> bool, why: &str) {
        for (_, adding) in self.adding.extract_if(.., |(_, adding)| is_over(adding)) {
            self.figures.refused();
            adding.end(Err(why.to_owned()));
        }
    }

    fn released(&mut self, ended: &EndedSandbox, answer: oneshot::Sender<Result<(), Retry>>) {
        self.give_up(|adding| adding.pod.container == ended.container, "its sandbox has ended");
        match self.kept.release(ended) {
            Ok(Some(kept)) => {
                if let Some(pod) = find(&self.known, &kept) {
                    self.hands.get_mut().enforcer.engine.cluster.release_pod(pod.uid);
                    self.note(Effect { cluster: true, demand: false });
                    self.releasing.push(answer);
                    return;
                }
                let _ = answer.send(Ok(()));
            }
            Ok(None) => drop(answer.send(Ok(()))),
            Err(error) => drop(answer.send(Err(Retry { why: format!("what is kept of pods: {error}") }))),
        }
    }

    pub(super) fn fetched(&mut self, fetched: Fetched) {
        match fetched {
            Fetched::Policies(namespace, read) => self.policies_fetched(namespace, read),
            Fetched::Pod(id, read) => self.pod_fetched(id, read),
        }
    }

    fn policies_fetched(&mut self, namespace: String, read: Result<Vec<(ReadPolicy, u64)>, StoreError>) {
        // Without the API, what is known counts.
        let read = read.inspect_err(|error| tracing::debug!(%error, "policies of a new pod"));
        for (policy, version) in read.unwrap_or_default() {
            let cluster = &mut self.hands.get_mut().enforcer.engine.cluster;
            let effect = self.known.set_policy(policy, version, true, cluster);
            self.note(effect);
        }
        let (served, more) = self.readings.ended(&namespace);
        for (id, adding) in &mut self.adding {
            adding.policies_read |= served.contains(id);
        }
        if more {
            self.read_policies(namespace);
        }
    }

    fn pod_fetched(&mut self, id: u64, read: Result<Option<FoundPod>, StoreError>) {
        let Some(place) = self.adding.iter().position(|(other, _)| *other == id) else { return };
        let found = read.map_err(|error| error.to_string());
        match found.and_then(|found| identify(&self.adding[place].1.pod, found)) {
            Ok(pod) => self.adding[place].1.step = AddStage::Found(pod),
            Err(why) => {
                self.figures.refused();
                self.adding.swap_remove(place).1.end(Err(why));
            }
        }
    }

    pub(super) fn advance_adding(&mut self, now: Instant) {
        for (id, mut adding) in std::mem::take(&mut self.adding) {
            if now >= adding.since + ADD_TIMEOUT {
                self.figures.refused();
                adding.end(Err(self.reason().unwrap_or_else(|| "the API doesn't answer".to_owned())));
                continue;
            }
            if let AddStage::Watched(until) = adding.step {
                if let Some(pod) = find(&self.known, &adding.pod) {
                    adding.step = AddStage::Found(Box::new(pod));
                } else if until <= now && self.phase != Phase::Waiting {
                    self.ask_for(id, &adding);
                    adding.step = AddStage::Asked;
                }
            }
            if adding.policies_read
                && self.phase != Phase::Waiting
                && let AddStage::Found(pod) = &adding.step
            {
                if let Err(error) = self.put_announced((**pod).clone(), &adding.pod) {
                    adding.end(Err(format!("what is announced of pods can't be kept: {error}")));
                    continue;
                }
                adding.step = AddStage::Listed(now + PEERS_WAIT);
                self.adjust_watches(now);
            }
            if let AddStage::Listed(until) = adding.step
                && (self.watches.peers_complete(&self.known) || until <= now)
            {
                if until <= now {
                    let Announcement { namespace, pod, .. } = &adding.pod;
                    tracing::warn!(%namespace, %pod, "the pods that its policies name are not all known yet: closed for them");
                }
                adding.step = AddStage::Programmed;
                self.urgent = true;
            }
            self.adding.push((id, adding));
        }
    }

    fn ask_for(&mut self, id: u64, adding: &Adding) {
        let (api, name) = (Arc::clone(&self.api), adding.name());
        self.fetching.spawn(async move {
            let read = timeout(API_WAITS.1, api.pod(&name)).await;
            Fetched::Pod(id, read.unwrap_or_else(|_| Err(silent())))
        });
    }

    /// The addresses are this pod's alone from now on.
    fn put_announced(&mut self, pod: Pod, announced: &Announcement) -> io::Result<()> {
        let cluster = &mut self.hands.get_mut().enforcer.engine.cluster;
        // A static pod is kept under the uid of its object.
        let kept = Announcement { uid: format!("{:032x}", pod.uid.0), ..announced.clone() };
        for robbed in self.kept.put(&kept)? {
            if let Some(other) = find(&self.known, &robbed) {
                cluster.announce_pod(&Pod { addresses: robbed.addresses.clone(), ..other });
            }
        }
        let effect = self.known.set_own(pod, cluster, &self.kept);
        self.note(effect);
        Ok(())
    }
}

fn silent() -> StoreError {
    StoreError::Unreachable { store: "the Kubernetes API".to_owned(), why: "no answer in time".to_owned() }
}

/// Has the kernel forget what was sent to and from the addresses of new pods before their policies were in force.
pub(super) fn forget_connections(enforcer: &mut Enforcer, addresses: &[IpAddr]) -> OldConnections {
    let v4 = |address: &IpAddr| match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    };
    // The kernel's filter is wrong for IPv6; the plugin goes through the list.
    let Some(addresses) = addresses.iter().map(v4).collect::<Option<Vec<_>>>().filter(|all| !all.is_empty())
    else {
        return OldConnections::Kept;
    };
    match enforcer.forget_connections(&addresses) {
        Ok(()) => OldConnections::Forgotten,
        Err(error) => {
            tracing::debug!(%error, "connections of new pods' addresses are left to the plugin");
            OldConnections::Kept
        }
    }
}
