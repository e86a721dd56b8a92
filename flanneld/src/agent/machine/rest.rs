//! How long nothing needs to be done.

use std::time::Duration;

use tokio::time::Instant;

use super::{Machine, Now};
use crate::agent::{JITTER, MAX_RESYNC, PEERS_PER_MINUTE, RESYNC, RETRY};

/// A look that is due is taken this long after a turn that needed none.
const MIN_RESYNC: Duration = Duration::from_secs(1);

impl Machine {
    /// In so many minutes the kernel is read once although nothing is heard of it: a look costs as much as there are peers. Nothing
    /// tells of the peers of WireGuard devices.
    pub(super) fn minutes_between_looks(&self) -> u32 {
        if !self.view.interest.desired.wireguard.is_empty() {
            return 1;
        }
        let peers = self.planner.peers.usable.len();
        u32::try_from(peers.div_ceil(PEERS_PER_MINUTE)).unwrap_or(MAX_RESYNC).clamp(1, MAX_RESYNC)
    }

    /// Whether the last look is so recent that the kernel need not be read unless something is heard of it.
    pub(super) fn has_looked_lately(&self, now: Now) -> bool {
        let lately = match self.minutes_between_looks() {
            1 => RESYNC,
            minutes => (RESYNC - JITTER) * minutes,
        };
        self.planner.looked.is_some_and(|at| now.at.saturating_duration_since(at) < lately)
    }

    /// After how long to take a turn although nothing happens. `resync` is the longest.
    pub(in crate::agent) fn rest(&self, now: Now, resync: Duration) -> Duration {
        // Turns that did not read the kernel put the next look off no further.
        let looked = self.planner.looked.filter(|_| self.planner.settled.is_some());
        let wait = match self.turn.failures {
            0 => looked.map_or(resync, |at| {
                now.until(at + resync * self.minutes_between_looks()).max(MIN_RESYNC).min(resync)
            }),
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

    /// Whether a turn at this time is for housekeeping alone: the saved state, addresses that are no longer admitted, and, where looks
    /// are rarer than turns, rules and settings. Nothing was heard of the kernel then, so it need not be read, which among thousands
    /// of peers costs more than anything else.
    pub(super) fn is_housekeeping(&self, now: Now) -> bool {
        let Some(last) = self.turn.now else { return false };
        let due = |at: &Instant| *at <= now.at;
        let own = [self.keeper.again.map(|wait| last.at + wait), self.rules.again()];
        let others = [self.planner.expiry, self.own.contest.again(), self.underlay.choosing.again()];
        let (_, fought) = self.status.journal.held(now.at.into_std());
        let held = [fought, self.rules.held(now), self.keeper.files, self.change.held(true, now)];
        let is_for_all = own.iter().flatten().any(due) || self.minutes_between_looks() > 1;
        is_for_all
            && !others.iter().flatten().any(due)
            && held.iter().all(Option::is_none)
            && self.turn.held_until.is_none()
            && self.turn.failures == 0
    }

    /// Something of this turn waits for so long because somebody undoes it.
    pub(super) fn hold_back(&mut self, wait: Option<Duration>) {
        let until = wait.map(|wait| self.now().at + wait);
        self.turn.held_until = [self.turn.held_until, until].into_iter().flatten().min();
    }
}
