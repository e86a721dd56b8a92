//! What the task says of itself: readiness, notes, figures.

use std::time::Duration;

use super::{CONDITION, Phase, Policies};
use crate::policy::steering::Steered;

/// While an API server starts it knows no right of anybody for a few seconds, so a node that enforces policies is not
/// unready before a refusal has lasted for this long.
const REFUSAL_LASTS: Duration = Duration::from_secs(30);

impl Policies {
    pub(super) fn summary(&self) -> backends::policy::Summary {
        self.hands.get().enforcer.engine.summary()
    }

    /// Why policies are not in force as they should be.
    pub(super) fn reason(&self) -> Option<String> {
        if let Some(why) = &self.refused {
            return Some(why.clone());
        }
        let trouble = self.known.trouble();
        let lasting = if self.enforced { REFUSAL_LASTS } else { Duration::ZERO };
        if let Some(denied) = self.known.refusal(lasting) {
            return Some(denied.to_string());
        }
        match (self.phase, trouble) {
            (Phase::Enforcing, _) => self.steered.as_ref().err().cloned(),
            (_, Some(trouble)) => Some(trouble.to_string()),
            (Phase::Waiting, None) if self.facts.borrow().is_none() => {
                Some("network policies need this node's lease, which is not there yet".to_owned())
            }
            (Phase::Waiting, None) => Some("network policies were not read yet".to_owned()),
            (Phase::Listing { .. }, None) => {
                Some("the pods that network policies name were not read yet".to_owned())
            }
        }
    }

    /// Readiness, notes, figures.
    pub(super) fn tell(&mut self) {
        let reason = match (self.reason(), self.enforced) {
            (Some(why), _) => Err(why),
            (None, false) => Err("network policies are not in the kernel yet".to_owned()),
            (None, true) => Ok(()),
        };
        let stale = self.known.trouble().filter(|_| reason.is_ok());
        let notes = stale.map(|why| format!("network policies are enforced as they were read last: {why}"));
        let summary = self.summary();
        let steering = self.steered == Ok(Steered::On);
        self.figures.update(&summary, steering, self.known.watch_count(), self.known.ignored_count());
        if self.ready != reason.is_ok() {
            self.ready = reason.is_ok();
            // What the node announces when it is ready depends on this, too.
            self.readiness_moved.notify_one();
        }
        self.health.note(CONDITION, notes.into_iter().collect());
        self.health.set(CONDITION, reason);
        self.health.measure(&self.figures);
    }
}
