//! The sessions of WireGuard with peers, while one of two nodes prepares it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use backends::FoundSessions;
use ipnet::IpNet;
use subnet::{Lease, Leases};
use tokio::time::Instant;

use super::{Action, Machine};

impl Machine {
    /// With which peers there are sessions is read before anything is decided, if it matters and was not read a moment ago.
    pub(super) fn proceed(&mut self) {
        if !self.force.active.wants_sessions() {
            self.view.sessions = FoundSessions::default();
        } else if self.view.sessions.again().is_none_or(|at| at <= self.now().at.into_std()) {
            return self.act(Action::ReadSessions(Arc::clone(&self.view.interest.desired)));
        }
        self.go_on();
    }

    /// For these subnets of peers there are sessions. It took so long to find that out.
    pub(super) fn found_sessions(&mut self, with: BTreeSet<IpNet>, took: Duration) {
        self.view.sessions = FoundSessions { with, looked: Some((self.now().at.into_std(), took)) };
        self.go_on();
    }

    /// Takes in what leases say about keys. Says when to ask again.
    pub(super) fn hear_keys(&mut self, all: &Leases, lease: &Lease) -> Option<Instant> {
        let now = self.now().at.into_std();
        let keys = self.force.active.hear_keys(all, lease, &self.view.sessions, now);
        self.status.journal.heard_keys(keys);
        let note = self.force.active.announced_meanwhile().map(|announced| {
            format!(
                "{announced} is announced until there are sessions of WireGuard with all peers that have told their keys, for \
                 15 s at most"
            )
        });
        self.status.health.note("preparation", note.into_iter().collect());
        keys.again.map(Instant::from_std)
    }
}
