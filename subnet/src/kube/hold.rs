//! Keeping the lease: nothing has to be renewed, but somebody may change this node's object.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::Instant;

use super::annotations::changes;
use super::collection::{Ended, Kind};
use super::node::Own;
use super::own::{Basis, OwnSettings};
use super::{Held, Kube};
use crate::pace::Backoff;
use crate::store::Loss;

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
                Ok(loss) => return loss,
                Err(ended) => ended,
            };
            backoff.reset_if_sound(begun);
            if let Ended::Undecodable(failure) | Ended::Failed(failure) = ended
                && backoff.worth_saying()
            {
                tracing::warn!(error = %failure.error, "the own node can't be watched; trying again");
            }
            backoff.wait().await;
        }
    }

    async fn keep_while_connected(&self, past: &mut Past) -> Result<Loss, Ended> {
        while self.held.lock().await.is_none() {
            self.moved.notified().await;
        }
        let mut version = match self.look(past).await? {
            Ok(version) => version,
            Err(loss) => return Ok(loss),
        };
        let mut events = self.watch_own(&version).await?;
        loop {
            let event = self.connection.heard(&mut events).await?;
            if event.kind != Kind::Put {
                continue;
            }
            let own = self.decode_own(event.object())?;
            let held = self.held.lock().await.clone();
            let suspicious = held.as_ref().is_some_and(|held| self.judge(&own, held) != HoldVerdict::Kept);
            if suspicious || self.is_unavailable(&own) {
                version = match self.look(past).await? {
                    Ok(version) => version,
                    Err(loss) => return Ok(loss),
                };
                events = self.watch_own(&version).await?;
            }
        }
    }

    /// Reads the own node and does what is needed for it to be as it should be: the version that it was
    /// read at, or how the lease was lost.
    async fn look(&self, past: &mut Past) -> Result<Result<String, Loss>, Ended> {
        past.forget();
        let mut at_once = past.put_back.is_empty();
        loop {
            let mut guard = self.held.lock().await;
            let read = self.read_own().await?;
            let (Some(held), Some(own)) = (guard.as_mut(), read.own) else { return Ok(Ok(read.version)) };
            match self.judge(&own, held) {
                HoldVerdict::Kept => {
                    drop(guard);
                    if self.is_unavailable(&own) {
                        past.backoff.wait().await;
                        past.last = Instant::now();
                        self.say_available().await?;
                    }
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
            if self.publish(&own, &wanted).await? {
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
                    tracing::debug!(error = %failure.error, "the own node can't be watched; trying again");
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
