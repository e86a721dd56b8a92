//! What was known before: kept on disk, and good for a start while the store is away.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backends::Kernel;
use subnet::saved::Saved;
use subnet::{Lease, LeaseStore, Leases, StoreError};
use tokio::time::Instant;

use super::claim;
use super::tenure::Task;
use super::{Agent, BULK};
use crate::serve::Health;

/// In a busy cluster the file is not written more often than this; what it lacks then is heard again.
const APART: Duration = Duration::from_secs(10);

/// What was kept last.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    kept: Option<(Instant, Lease, Arc<Leases>)>,
    /// What is kept is out of date, and will be brought up to date after this time.
    pub(super) again: Option<Duration>,
    /// The files for the CNI plugin could not be written, and it is tried again after this time.
    pub(super) files: Option<Duration>,
}

impl Keeper {
    /// What is kept besides leases is out of date.
    pub(super) fn stale(&mut self) {
        self.kept = None;
    }
}

/// What an earlier run saved. A file that can't be used is named until there is a new one.
pub(super) fn read(path: &Path, store: &str, health: &Health) -> Option<Saved> {
    Saved::read(path, store).unwrap_or_else(|why| {
        let text =
            format!("what was saved of the cluster is not used: {why}; it is replaced once there is a lease");
        tracing::warn!("{text}");
        health.note("saved", vec![text]);
        None
    })
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// The agent with the lease and the peers of an earlier run, until the store answers.
    pub(super) fn recalling(mut self, saved: Option<(Saved, StoreError)>) -> Self {
        let Some((saved, why)) = saved else { return self };
        let Some(lease) = saved.leases.leases.get(&saved.own).cloned() else { return self };
        tracing::warn!(subnet = %saved.own, peers = saved.leases.leases.len() - 1, "starting with what was saved");
        self.feed.snapshot(&saved.leases);
        self.lease = Some(lease);
        let (store, health) = (Arc::clone(&self.store), self.health.clone());
        self.reconnecting =
            Some(Task::spawn(async move { claim::reconnected(&*store, &health, saved.own, why).await }));
        self
    }

    /// Keeps what is known, if it is not what was kept. Says after how long to try again, if that was too
    /// soon after the last time.
    pub(super) async fn save(&mut self) -> Option<Duration> {
        if self.reconnecting.is_some() {
            return None;
        }
        let (lease, leases) = (self.lease.clone()?, self.known.borrow().leases.clone()?);
        if let Some((at, known, all)) = &self.keeper.kept {
            if *known == lease && Arc::ptr_eq(all, &leases) {
                return None;
            }
            let wait = APART.saturating_sub(at.elapsed());
            if !wait.is_zero() {
                return Some(wait);
            }
        }
        if !leases.leases.contains_key(&lease.subnets) {
            return None;
        }
        let (path, store) = (self.settings.state_file.clone(), self.store.describe());
        let (network, own, all) = (self.network.clone(), lease.subnets, Arc::clone(&leases));
        let (former, left) = (self.ways.former(), self.change.inhabited());
        let hardware = self.hardware();
        let write = move || {
            Saved { network, former, left, own, hardware, leases: (*all).clone() }.write(&path, &store)
        };
        let written = tokio::task::spawn_blocking(write).await.unwrap_or_else(|error| Err(error.into()));
        self.journal.kept(&self.settings.state_file, &written);
        if written.is_ok() {
            self.health.note("saved", Vec::new());
        }
        self.bulky |= leases.leases.len() >= BULK;
        if written.is_err() {
            return Some(APART);
        }
        self.keeper.kept = Some((Instant::now(), lease, leases));
        None
    }
}
