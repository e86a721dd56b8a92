//! How long nothing needs to be done.

use std::time::Duration;

use super::{Machine, Now};
use crate::agent::RETRY;

impl Machine {
    /// After how long to take a turn although nothing happens. `resync` is the longest.
    pub(in crate::agent) fn rest(&self, now: Now, resync: Duration) -> Duration {
        let wait = match self.turn.failures {
            0 => resync,
            failures => RETRY.1.min(RETRY.0 * 2u32.pow(failures - 1)),
        };
        let ready = self.turn.sound && self.own.lease().is_some();
        let (_, fought) = self.status.journal.held(now.at.into_std());
        let timers = [
            self.planner.expiry,
            self.own.contest.again(),
            self.underlay.choosing.again(),
            self.rules.again(),
        ];
        // What was due at the last turn was seen there; it may stay so until something else happens.
        let seen = self.turn.now.map(|last| last.at);
        let timers = timers.into_iter().flatten().filter(|at| Some(*at) > seen);
        [
            self.keeper.again,
            self.keeper.files,
            timers.map(|at| now.until(at)).min(),
            self.change.held(ready, now),
            fought,
            self.rules.held(now),
            self.turn.held_until.map(|at| now.until(at)),
        ]
        .into_iter()
        .flatten()
        .fold(wait, Duration::min)
    }

    /// Something of this turn waits for so long because somebody undoes it.
    pub(super) fn hold_back(&mut self, wait: Option<Duration>) {
        let until = wait.map(|wait| self.now().at + wait);
        self.turn.held_until = [self.turn.held_until, until].into_iter().flatten().min();
    }
}
