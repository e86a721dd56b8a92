//! The watches that run: of policies, namespaces and own pods always, of other pods as policies demand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use backends::policy::{Cluster, Demand};
use subnet::kube::{News, PolicyApi, Watch};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::known::Known;

/// News that wait; a watch with more waits with them.
const MAX_WAITING: usize = 256;
/// How long pods are watched after the last policy that names them: one that is replaced comes back soon.
const IDLE: Duration = Duration::from_secs(30);

/// The watches, and what they tell.
pub(super) struct Watches {
    /// What they tell.
    pub(super) news: mpsc::Receiver<News>,
    sender: mpsc::Sender<News>,
    next: u32,
    /// Those of what is always watched.
    base: Vec<Running>,
    /// Those of pods elsewhere.
    peers: BTreeMap<Watch, Running>,
}

struct Running {
    number: u32,
    task: AbortHandle,
    /// Since when it is not demanded.
    idle: Option<Instant>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Default for Watches {
    fn default() -> Self {
        let (sender, news) = mpsc::channel(MAX_WAITING);
        Self { news, sender, next: 0, base: Vec::new(), peers: BTreeMap::new() }
    }
}

impl Watches {
    /// Begins a watch that never ends.
    pub(super) fn start_for_good(&mut self, watch: Watch, api: &Arc<PolicyApi>, known: &mut Known) {
        let running = self.start(watch, api, known);
        self.base.push(running);
    }

    /// Watches these pods from now on, and those that are no longer demanded for a while.
    pub(super) fn demand(&mut self, demand: Demand, api: &Arc<PolicyApi>, known: &mut Known, now: Instant) {
        let wanted: BTreeSet<Watch> = match demand {
            Demand::Everything => [Watch::AllPods].into(),
            Demand::Namespaces(namespaces) => namespaces.into_iter().map(Watch::PodsOf).collect(),
        };
        for (watch, running) in &mut self.peers {
            if wanted.contains(watch) {
                running.idle = None;
            } else {
                running.idle.get_or_insert(now);
            }
        }
        for watch in wanted {
            if !self.peers.contains_key(&watch) {
                let running = self.start(watch.clone(), api, known);
                self.peers.insert(watch, running);
            }
        }
    }

    /// Ends watches that were not demanded for long enough. Whether there were any.
    pub(super) fn end_idle(&mut self, known: &mut Known, cluster: &mut Cluster, now: Instant) -> bool {
        let over = |running: &Running| running.idle.is_some_and(|since| now >= since + IDLE);
        let ended: Vec<Watch> =
            self.peers.iter().filter(|(_, running)| over(running)).map(|(watch, _)| watch.clone()).collect();
        for watch in &ended {
            if let Some(running) = self.peers.remove(watch) {
                known.end(running.number, cluster);
            }
        }
        !ended.is_empty()
    }

    /// When the next watch is to be ended.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.peers.values().filter_map(|running| running.idle).min().map(|since| since + IDLE)
    }

    /// Whether what is always watched was listed once.
    pub(super) fn base_complete(&self, known: &Known) -> bool {
        known.are_complete(self.base.iter().map(|running| running.number))
    }

    /// Whether the pods that are demanded were listed once.
    pub(super) fn peers_complete(&self, known: &Known) -> bool {
        let demanded = self.peers.values().filter(|running| running.idle.is_none());
        known.are_complete(demanded.map(|running| running.number))
    }

    fn start(&mut self, watch: Watch, api: &Arc<PolicyApi>, known: &mut Known) -> Running {
        self.next += 1;
        let number = self.next;
        known.begin(number, watch.clone());
        let (api, sender) = (Arc::clone(api), self.sender.clone());
        let task = tokio::spawn(async move { api.follow(&watch, number, &sender).await });
        Running { number, task: task.abort_handle(), idle: None }
    }
}
