//! When what is known of the cluster is kept for a start without the store.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use subnet::env_file::SubnetEnv;
use subnet::{Lease, Leases};
use tokio::time::Instant;

use super::{Action, Machine};
use crate::agent::BULK;
use crate::agent::recall::Keep;

/// In a busy cluster the file is not written more often than this; what it lacks then is heard again.
const APART: Duration = Duration::from_secs(10);

/// What was kept last.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    kept: Option<(Instant, Lease, Arc<Leases>)>,
    /// What is being kept.
    keeping: Option<(Lease, Arc<Leases>)>,
    /// What is kept is out of date, and will be brought up to date after this time.
    pub(super) again: Option<Duration>,
    /// The files for the CNI plugin could not be written, and it is tried again after this time.
    pub(super) files: Option<Duration>,
    /// What this run wrote to `subnet.env` last.
    pub(super) written: Option<SubnetEnv>,
}

impl Keeper {
    /// What is kept besides leases is out of date.
    pub(super) fn stale(&mut self) {
        self.kept = None;
    }
}

impl Machine {
    /// Has what is known kept, if it is not what was kept, and if the last time is long enough ago.
    pub(super) fn save(&mut self) {
        self.keeper.again = None;
        match self.keep() {
            Some(keep) => {
                self.keeper.keeping = Some((keep.lease.clone(), Arc::clone(&keep.leases)));
                self.act(Action::Save(Box::new(keep)));
            }
            None => self.end_turn(),
        }
    }

    fn keep(&mut self) -> Option<Keep> {
        if self.own.is_recalled() || self.view.known.recalled {
            return None;
        }
        let (lease, leases) = (self.own.lease().cloned()?, self.view.known.leases.clone()?);
        if let Some((at, known, all)) = &self.keeper.kept {
            if *known == lease && Arc::ptr_eq(all, &leases) {
                return None;
            }
            let wait = self.now().until(*at + APART);
            if !wait.is_zero() {
                self.keeper.again = Some(wait);
                return None;
            }
        }
        leases.leases.contains_key(&lease.subnets).then(|| Keep {
            network: self.force.network.clone(),
            former: self.force.active.former(),
            left: self.change.inhabited(),
            lease,
            hardware: self.hardware(),
            leases,
        })
    }

    /// Takes note of whether that was done, and whether all was written.
    pub(super) fn saved(&mut self, written: &io::Result<bool>) {
        self.status.journal.kept(&self.settings.state_file, written);
        let Some((lease, leases)) = self.keeper.keeping.take() else { return };
        let whole = written.as_ref().is_ok_and(|whole| *whole);
        self.turn.bulky |= whole && leases.leases.len() >= BULK;
        if written.is_err() {
            self.keeper.again = Some(APART);
            return;
        }
        self.status.health.note("saved", Vec::new());
        self.keeper.kept = Some((self.now().at, lease, leases));
    }
}
