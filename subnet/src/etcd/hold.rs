//! Keeping the lease: renewed in time, put back when deleted, never taken from a node that has it now.
//!
//! Every writing compares the key's revision, so that a node that was suspended for days finds out that
//! its lease has been given away instead of taking it back.

use std::time::Duration;

use etcd_client::{KeyValue, WatchOptions};
use tokio::time::{Instant, sleep_until};

use super::follow::EtcdWatchEnd;
use super::{Etcd, HeldLease};
use crate::claim::{Verdict, judge, rival};
use crate::lease::{Lease, decode_value};
use crate::pace::Backoff;
use crate::store::{LEASE_TTL, Loss, StoreError};

/// After how long a renewal that failed is tried again; the end is Flannel's constant.
const RENEW_RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// However large the margin is, a renewal does not follow at once on another.
const RENEW_APART: Duration = Duration::from_secs(1);

/// What the key said when it was read.
enum Found {
    /// This node holds nothing at present.
    Nothing,
    /// The lease is ours.
    Ours(HeldLease),
    /// It was restored just now; read it again.
    Restored,
    /// It is lost for good.
    Lost(Loss),
}

impl Etcd {
    pub(super) async fn keep(&self) -> Loss {
        let mut backoff = Backoff::watching();
        loop {
            let begun = Instant::now();
            let ended = match self.keep_while_connected(&mut backoff).await {
                Ok(loss) => return loss,
                Err(ended) => ended,
            };
            backoff.reset_if_sound(begun);
            if let EtcdWatchEnd::Failed(error) = ended
                && backoff.worth_saying()
            {
                tracing::warn!(%error, "the own lease can't be watched; trying again");
            }
            backoff.wait().await;
        }
    }

    /// Reads the key and acts on it, then watches it for what happens next, again and again.
    async fn keep_while_connected(&self, backoff: &mut Backoff) -> Result<Loss, EtcdWatchEnd> {
        loop {
            match self.find().await? {
                Found::Lost(loss) => return Ok(loss),
                Found::Nothing => self.moved.notified().await,
                // Paced, in case somebody deletes or damages the key for ever.
                Found::Restored => backoff.wait().await,
                Found::Ours(held) => {
                    let begun = Instant::now();
                    self.watch_own(held).await?;
                    backoff.reset_if_sound(begun);
                }
            }
        }
    }

    /// Reads the key of the lease and does what is needed for it to be ours.
    async fn find(&self) -> Result<Found, StoreError> {
        let mut guard = self.held.lock().await;
        let Some(held) = guard.as_mut() else { return Ok(Found::Nothing) };
        let found = match self.read(&self.keys.lease(&held.lease.subnets)?).await? {
            Some(kv) => self.find_key(held, &kv).await?,
            None => self.put_back(held).await?,
        };
        if let Found::Lost(_) = found {
            *guard = None;
            self.standing().lost();
        }
        Ok(found)
    }

    async fn find_key(&self, held: &mut HeldLease, kv: &KeyValue) -> Result<Found, StoreError> {
        let Ok((public, attachment)) = decode_value(kv.value()) else {
            let mut grant = None;
            let restored =
                self.rewrite(held.lease.clone(), kv.mod_revision(), kv.lease() == 0, &mut grant).await?;
            self.revoke(grant).await;
            if let Some(restored) = restored {
                tracing::warn!(lease = %held.lease, "the own lease was unreadable and has been restored");
                *held = restored;
            }
            return Ok(Found::Restored);
        };
        let created = kv.create_revision().unsigned_abs();
        let now = Lease {
            subnets: held.lease.subnets,
            public,
            attachment,
            created,
            written: kv.mod_revision().unsigned_abs(),
        };
        let (expires, granted) = self.expiry(kv.lease()).await?;
        let contested = Loss::Contested { subnets: held.lease.subnets, public: held.lease.public };
        let loss = match judge(&held.lease, Some(&now)) {
            Verdict::Lost(loss) => Some(loss),
            Verdict::Kept | Verdict::Deleted => self.by_another(held, kv, granted).then_some(contested),
        };
        match loss {
            Some(loss @ Loss::Contested { .. }) if self.standing().answers() => {
                let mut grant = None;
                let answer = self.rewrite(held.lease.clone(), kv.mod_revision(), kv.lease() == 0, &mut grant);
                let answered = answer.await?;
                self.revoke(grant).await;
                if let Some(answered) = answered {
                    tracing::warn!("{loss}; it was written again, since this node has held it for longer");
                    *held = answered;
                }
                Ok(Found::Restored)
            }
            Some(loss) => Ok(Found::Lost(loss)),
            None => {
                *held = HeldLease { lease: now, revision: kv.mod_revision(), expires };
                Ok(Found::Ours(held.clone()))
            }
        }
    }

    /// The same value again, but by another flanneld: a living node that has our public address, and therefore
    /// adopted our lease. It is known by a flanneld's time to live that is not from us; and at a reservation, which
    /// has none and is never renewed, by having been written at all.
    fn by_another(&self, held: &HeldLease, kv: &KeyValue, granted: Option<Duration>) -> bool {
        let again = kv.mod_revision() != held.revision;
        match granted {
            Some(granted) => again && granted == LEASE_TTL && !self.is_grant_of_ours(kv.lease()),
            // Revision 0 is a move of ours of which the answer never came.
            None => again && held.revision != 0 && held.expires.is_none(),
        }
    }

    /// When an etcd lease ends, as etcd says: our own clock stands still while the machine is suspended.
    /// And the time to live that it was granted with.
    async fn expiry(&self, lease: i64) -> Result<(Option<Instant>, Option<Duration>), StoreError> {
        if lease == 0 {
            return Ok((None, None));
        }
        let asked = Instant::now();
        let answer = self
            .connection
            .call(|mut client| async move { client.lease_time_to_live(lease, None).await })
            .await?;
        let seconds = |ttl: i64| Duration::from_secs(ttl.max(0).unsigned_abs());
        Ok((Some(asked + seconds(answer.ttl())), Some(seconds(answer.granted_ttl()))))
    }

    /// The key is gone: expired, or deleted by hand. Pods use the subnet, so it is taken again, as an
    /// ordinary lease even if it was a reservation, unless another node was faster.
    async fn put_back(&self, held: &mut HeldLease) -> Result<Found, StoreError> {
        let listing = self.list().await?;
        if listing.leases.leases.contains_key(&held.lease.subnets) {
            return Ok(Found::Restored); // another node's or ours: its key is to be judged
        }
        // A move of ours of which the answer never came: no lease that was there before this one was written.
        let public = held.lease.public;
        let moved = listing.leases.by_public(&public).find(|lease| {
            lease.subnets.overlaps(&held.lease.subnets) && lease.created > held.revision.unsigned_abs()
        });
        if let Some(moved) = moved {
            *held = HeldLease { lease: moved.clone(), revision: 0, expires: None };
            return Ok(Found::Restored);
        }
        if let Some(loss) = rival(&held.lease, &listing.leases) {
            return Ok(Found::Lost(loss));
        }
        let mut grant = None;
        let restored = self.create(held.lease.clone(), None, listing.revision, &mut grant).await?;
        self.revoke(grant).await;
        if let Some(restored) = restored {
            tracing::warn!(lease = %held.lease, "the own lease was deleted and has been put back");
            *held = restored;
        }
        Ok(Found::Restored)
    }

    /// Renews the lease in time, until somebody else changes its key or this node moves to another.
    async fn watch_own(&self, mut held: HeldLease) -> Result<(), EtcdWatchEnd> {
        let key = self.keys.lease(&held.lease.subnets)?;
        let mut watch = self.watch(&key, WatchOptions::new(), held.revision + 1).await?;
        let mut again = Backoff::new(RENEW_RETRY.0, RENEW_RETRY.1);
        let mut due = self.due(&held);
        self.stands(Some(&held), None);
        loop {
            tokio::select! {
                response = self.heard(&mut watch) => {
                    let newest = response?.events().iter().filter_map(|event| event.kv()).map(KeyValue::mod_revision).max();
                    // Locked, so that a writing of our own is known before it is heard of.
                    let known = self.held.lock().await.as_ref().map(|held| held.revision);
                    if newest > known {
                        return Ok(());
                    }
                }
                () = self.moved.notified() => {
                    let known = self.held.lock().await.as_ref().map(|held| held.revision);
                    if known != Some(held.revision) {
                        return Ok(());
                    }
                }
                () = until(due) => match self.renew(&held).await {
                    Ok(Some(renewed)) => {
                        tracing::debug!(lease = %renewed.lease, "renewed");
                        again.reset();
                        self.stands(Some(&renewed), None);
                        due = self.due(&renewed).map(|due| due.max(Instant::now() + RENEW_APART));
                        held = renewed;
                    }
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        self.stands(Some(&held), Some(&error));
                        if again.worth_saying() {
                            tracing::warn!(%error, "the lease can't be renewed; trying again");
                        }
                        due = Some(Instant::now() + again.delay());
                    }
                },
            }
        }
    }

    fn due(&self, held: &HeldLease) -> Option<Instant> {
        let now = Instant::now();
        held.expires.map(|expires| expires.checked_sub(self.renew_margin).unwrap_or(now))
    }

    /// Gives the key a new time to live, if it still is as `seen`. `None` if it is not.
    async fn renew(&self, seen: &HeldLease) -> Result<Option<HeldLease>, StoreError> {
        let mut guard = self.held.lock().await;
        let Some(held) = guard.as_mut().filter(|held| held.revision == seen.revision) else {
            return Ok(None);
        };
        let mut grant = None;
        let renewed =
            self.rewrite(held.lease.clone(), held.revision, held.expires.is_none(), &mut grant).await?;
        self.revoke(grant).await;
        if let Some(renewed) = &renewed {
            *held = renewed.clone();
        }
        Ok(renewed)
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
