//! Keeping the lease: nothing has to be renewed, but somebody may change this node's object.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use super::annotations::changes;
use super::collection::{Ended, Kind};
use super::connection::Failure;
use super::node::Own;
use super::own::{Basis, OwnSettings};
use super::{Held, Kube};
use crate::pace::Backoff;
use crate::store::{Loss, Tenure};

/// Annotations are put back for the first time at once, then after up to this long.
const RETRY_INTERVAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// Somebody who changes them this often, and within this time, will go on doing so.
const CONTEST: (usize, Duration) = (8, Duration::from_secs(600));

/// What there is to do about the own node.
#[derive(Debug, PartialEq, Eq)]
enum HoldVerdict {
    /// It is as it should be, or there is no such node at the moment.
    Kept,
    /// It has to be looked at, for something is not as it should be.
    Suspicious,
    /// It has another subnet.
    Lost(Loss),
}

/// What failed while the own node was kept as it should be.
enum HoldEnd {
    Read(Failure),
    Watched(Ended),
    Written(Failure),
}

/// The past that decides how soon annotations are put back.
struct Past {
    backoff: Backoff,
    /// When something was last corrected.
    last: Instant,
    put_back: VecDeque<Instant>,
}

impl Kube {
    pub(super) async fn keep(&self) -> Loss {
        let mut backoff = Backoff::watching();
        let mut past = Past::default();
        loop {
            let begun = Instant::now();
            let ended = match self.keep_while_connected(&mut past).await {
                Ok(loss) => {
                    self.note_trouble(None);
                    return loss;
                }
                Err(ended) => ended,
            };
            backoff.reset_if_sound(begun);
            let failed = match &ended {
                HoldEnd::Watched(Ended::Closed | Ended::Outdated | Ended::Refamilied) => None,
                HoldEnd::Watched(Ended::Undecodable(failure) | Ended::Failed(failure)) => {
                    Some((failure, "watched"))
                }
                HoldEnd::Read(failure) => Some((failure, "read")),
                HoldEnd::Written(failure) => {
                    self.note_trouble(Some(format!(
                        "this node's object can't be written: {}",
                        failure.error
                    )));
                    Some((failure, "written"))
                }
            };
            if let Some((failure, what)) = failed
                && backoff.worth_saying()
            {
                tracing::warn!(error = %failure.error, "the own node can't be {what}; trying again");
            }
            backoff.wait().await;
        }
    }

    async fn keep_while_connected(&self, past: &mut Past) -> Result<Loss, HoldEnd> {
        while self.held.lock().await.is_none() {
            self.moved.notified().await;
        }
        let mut version = match self.look(past).await? {
            Ok(version) => version,
            Err(loss) => return Ok(loss),
        };
        let mut events = self.watch_own(&version).await.map_err(HoldEnd::watched)?;
        loop {
            let event = self.connection.heard(&mut events).await.map_err(HoldEnd::Watched)?;
            let own = match event.kind {
                Kind::Put => Some(self.decode_own(event.object()).map_err(HoldEnd::Read)?),
                Kind::Deleted => None,
                Kind::Error | Kind::Other => continue,
            };
            let held = self.held.lock().await.clone();
            let doubtful = match (&own, &held) {
                (Some(own), Some(held)) => {
                    self.judge(own, held) != HoldVerdict::Kept || self.is_unavailable(own)
                }
                _ => false,
            };
            if doubtful {
                version = match self.look(past).await? {
                    Ok(version) => version,
                    Err(loss) => return Ok(loss),
                };
                events = self.watch_own(&version).await.map_err(HoldEnd::watched)?;
            } else {
                self.note_trouble(self.absence(own.as_ref()));
            }
        }
    }

    /// How the lease stands: for ever, as long as there is a node with its subnet, and it can be written.
    pub(super) fn stands(&self) -> Tenure {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Tenure { ends: None, trouble }
    }

    /// Takes note of what is wrong with the own node, if anything is, and logs what has changed about that.
    pub(super) fn note_trouble(&self, now: Option<String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *trouble == now {
            return;
        }
        match &now {
            Some(why) => tracing::warn!("{why}"),
            None => tracing::info!("this node's object is as it has to be again"),
        }
        *trouble = now;
    }

    /// Why other nodes do not know any more where the pods of this node are, if that is so.
    fn absence(&self, own: Option<&Own>) -> Option<String> {
        let name = self.node.known().unwrap_or_default();
        let Some(own) = own else {
            return Some(format!(
                "Kubernetes has no node {name:?} any more, so that other nodes have no routes to the pods of this node: it \
                 appears when kubelet registers this machine again (restart kubelet); if kubelet runs, NODE_NAME has to be the \
                 name under which it does so"
            ));
        };
        match &own.subnets {
            Ok(subnets) if subnets.is_empty() => Some(format!(
                "node {name:?} has no podCIDR any more, so that other nodes have no routes to the pods of this node: \
                 kube-controller-manager has to run with --allocate-node-cidrs=true and --cluster-cidr, and that range must not \
                 be used up"
            )),
            Ok(_) => None,
            Err(why) => Some(format!("node {name:?}: {why}")),
        }
    }

    /// Reads the own node and does what is needed for it to be as it should be: the version that it was
    /// read at, or how the lease was lost.
    async fn look(&self, past: &mut Past) -> Result<Result<String, Loss>, HoldEnd> {
        past.forget();
        let mut at_once = past.put_back.is_empty();
        loop {
            let mut guard = self.held.lock().await;
            let read = self.read_own().await.map_err(HoldEnd::Read)?;
            let absence = self.absence(read.own.as_ref());
            let (Some(held), Some(own), None) = (guard.as_mut(), read.own, &absence) else {
                self.note_trouble(absence);
                return Ok(Ok(read.version));
            };
            match self.judge(&own, held) {
                HoldVerdict::Kept => {
                    drop(guard);
                    if self.is_unavailable(&own) {
                        past.backoff.wait().await;
                        past.last = Instant::now();
                        self.say_available().await.map_err(HoldEnd::Written)?;
                    }
                    self.note_trouble(None);
                    return Ok(Ok(read.version));
                }
                HoldVerdict::Lost(loss) => {
                    *guard = None;
                    return Ok(Err(loss));
                }
                HoldVerdict::Suspicious => {}
            }
            let basis = Basis::of(&own);
            if basis != held.basis {
                // Registered again, or another wish of the operator: that is no contest.
                held.basis = basis;
                past.put_back.clear();
                at_once = true;
            }
            if past.put_back.len() >= CONTEST.0 {
                let subnets = held.subnets;
                *guard = None;
                return Ok(Err(Loss::Rewritten { subnets }));
            }
            if !at_once {
                drop(guard);
                past.backoff.wait().await;
                at_once = true;
                continue;
            }
            let Ok(wanted) = self.wanted(&own, held) else { return Ok(Ok(read.version)) };
            if self.publish(&own, &wanted).await.map_err(HoldEnd::Written)? {
                past.last = Instant::now();
                past.put_back.push_back(past.last);
                at_once = false;
                tracing::warn!(
                    subnets = %held.subnets,
                    "the annotations of this node were not as they have to be and were written again"
                );
            }
        }
    }

    fn judge(&self, own: &Own, held: &Held) -> HoldVerdict {
        let Ok(now) = &own.subnets else { return HoldVerdict::Kept };
        if now.is_empty() {
            // Registered again and not given a subnet yet.
            return HoldVerdict::Kept;
        }
        if held.subnets.iter().any(|subnet| !now.iter().any(|now| now == subnet)) {
            return HoldVerdict::Lost(Loss::Changed { subnets: held.subnets });
        }
        match self.wanted(own, held) {
            Ok(wanted) if changes(&own.annotations, &wanted).is_empty() => HoldVerdict::Kept,
            Ok(_) => HoldVerdict::Suspicious,
            Err(why) => {
                self.complain(&why);
                HoldVerdict::Kept
            }
        }
    }

    /// Says what can't be used, once.
    fn complain(&self, why: &str) {
        let mut said = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        if *said != why {
            tracing::warn!("{why}; this node goes on announcing what it does");
            why.clone_into(&mut said);
        }
    }

    /// Waits until something was decided about this node that was not known when it was last asked about.
    pub(super) async fn wait_until_stirred(&self) {
        let told = self.stirs.notified();
        tokio::pin!(told);
        told.as_mut().enable();
        tokio::select! {
            () = self.find_news() => self.stirs.notify_waiters(),
            () = told => {}
        }
    }

    async fn find_news(&self) {
        let mut backoff = Backoff::watching();
        loop {
            let begun = Instant::now();
            match self.stir().await {
                Ok(()) => return,
                Err(Ended::Undecodable(failure) | Ended::Failed(failure)) => {
                    tracing::debug!(error = %failure.error, "the own node can't be read or watched; trying again");
                }
                Err(Ended::Closed | Ended::Outdated | Ended::Refamilied) => {}
            }
            backoff.reset_if_sound(begun);
            backoff.wait().await;
        }
    }

    async fn stir(&self) -> Result<(), Ended> {
        let read = self.read_own().await?;
        if self.is_news(read.own.as_ref()) {
            return Ok(());
        }
        let mut events = self.watch_own(&read.version).await?;
        loop {
            let event = self.connection.heard(&mut events).await?;
            let own = match event.kind {
                Kind::Put => Some(self.decode_own(event.object())?),
                Kind::Deleted => None,
                Kind::Error | Kind::Other => continue,
            };
            if self.is_news(own.as_ref()) {
                return Ok(());
            }
        }
    }

    /// Whether this says something about the own node that was not known; now it is.
    fn is_news(&self, own: Option<&Own>) -> bool {
        let now = OwnSettings::of(own);
        let mut seen = self.seen();
        // Who has never asked for the addresses does not want to know.
        let news = seen.claim != now.claim || seen.public.is_some() && seen.public != now.public;
        if news {
            seen.claim = now.claim;
            if seen.public.is_some() {
                seen.public = now.public;
            }
        }
        news
    }
}

impl HoldEnd {
    fn watched(failure: Failure) -> Self {
        Self::Watched(failure.into())
    }
}

impl Default for Past {
    fn default() -> Self {
        Self {
            backoff: Backoff::new(RETRY_INTERVAL.0, RETRY_INTERVAL.1),
            last: Instant::now(),
            put_back: VecDeque::new(),
        }
    }
}

impl Past {
    /// What was long ago does not count.
    fn forget(&mut self) {
        while self.put_back.front().is_some_and(|at| at.elapsed() > CONTEST.1) {
            self.put_back.pop_front();
        }
        if self.last.elapsed() > CONTEST.1 {
            self.backoff.reset();
        }
    }
}
