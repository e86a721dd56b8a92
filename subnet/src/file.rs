//! Leases in a directory, one file each: a store that needs no server, for one machine or for several
//! that share a file system.
//!
//! ```text
//! DIR/config.json               the network configuration
//! DIR/subnets/10.244.3.0-24     a lease: key and value as in etcd, and three members more
//! DIR/.lock                     locked while leases are listed or written
//! ```
//!
//! A lease's value is the one that etcd has (contract §3.1.1), with `"Created"` (microseconds since 1970),
//! `"Expires"` (seconds since 1970) and `"Owner"`, by which a process knows its own writing from another's. Without `Expires` it is a reservation, without `Created` the
//! file's time of modification counts. An expired file counts as absent for everybody; clocks of
//! machines that share a directory have to agree to a fraction of the renewal margin.

mod directory;
mod entry;
mod notice;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep};

use crate::claim::{Choice, Verdict, choose, exhausted, judge, leftovers, require_public, rival, still_used};
use crate::config::NetworkConfig;
use crate::lease::{Lease, decode_value};
use crate::pace::Backoff;
use crate::standing::{Standing, writer};
use crate::store::{Claim, Feed, LEASE_TTL, LeaseStore, Loss, StoreError, Tenure};
use directory::{Directory, Locked};
use entry::{LeaseFile, created_at, whole_seconds};
use notice::Notice;

/// A renewal never follows sooner than this on another, however large the margin is.
const RENEW_APART: Duration = Duration::from_secs(1);

/// How many of the own times are remembered: far more than a file can be behind.
const STAMPS_KNOWN: usize = 16;

/// One node's end of a directory of leases.
#[derive(Debug)]
pub struct Files {
    directory: Directory,
    renew_margin: Duration,
    /// The lease that this node holds. Locked while it is being changed in the directory, so that
    /// `hold` can tell our own writing from others'.
    held: Mutex<Option<Lease>>,
    /// Wakes `hold` when `acquire` has changed `held`.
    moved: Notify,
    /// When the leases that this value wrote expire, latest first: another time is somebody else's.
    stamps: std::sync::Mutex<VecDeque<u64>>,
    /// When the lease ends that this node holds; never, if it is a reservation.
    ends: std::sync::Mutex<Option<SystemTime>>,
    /// The name of this value's writing.
    writer: String,
    standing: std::sync::Mutex<Standing>,
}

/// What was found out about the own lease.
enum LeaseCheck {
    /// This node holds nothing at present.
    Nothing,
    /// It is ours and is to be looked at again then; never, if it is a reservation.
    Ours { key: String, again: Option<SystemTime> },
    /// It was restored just now.
    Restored,
    /// It is lost for good.
    Lost(Loss),
}

impl Files {
    /// A store in this directory; nothing is read yet. A lease is renewed `renew_margin` before it
    /// expires.
    pub fn new(directory: PathBuf, renew_margin: Duration) -> Self {
        Self {
            directory: Directory::new(directory),
            renew_margin,
            held: Mutex::new(None),
            moved: Notify::new(),
            stamps: std::sync::Mutex::default(),
            ends: std::sync::Mutex::default(),
            writer: writer(),
            standing: std::sync::Mutex::default(),
        }
    }

    /// Holds the lease until it is lost or the directory can't be watched any more.
    async fn keep(&self, backoff: &mut Backoff) -> Result<Loss, StoreError> {
        let mut notice = Notice::new(&self.directory)?;
        loop {
            match self.find().await? {
                LeaseCheck::Lost(loss) => return Ok(loss),
                LeaseCheck::Nothing => self.moved.notified().await,
                // Paced, in case somebody deletes or damages the file for ever, for example a machine
                // with another idea of the time.
                LeaseCheck::Restored => backoff.wait().await,
                LeaseCheck::Ours { key, again } => {
                    let begun = Instant::now();
                    tokio::select! {
                        changed = notice.changed(Some(&key)) => changed?,
                        () = self.moved.notified() => {}
                        () = until(again) => {}
                    }
                    backoff.reset_if_sound(begun);
                }
            }
        }
    }

    /// Reads the own lease and does what is needed for it to be ours.
    async fn find(&self) -> Result<LeaseCheck, StoreError> {
        let mut held = self.held.lock().await;
        let Some(mine) = held.as_mut() else { return Ok(LeaseCheck::Nothing) };
        let found = self.directory.alone(|directory| self.find_locked(directory, mine)).await?;
        if let LeaseCheck::Lost(_) = found {
            *held = None;
            self.standing().lost();
        }
        Ok(found)
    }

    fn find_locked(&self, directory: &Locked<'_>, mine: &mut Lease) -> Result<LeaseCheck, StoreError> {
        let (key, now) = (directory.key(&mine.subnets)?, SystemTime::now());
        let entry = directory.read(&key)?.filter(|entry| !entry.expired(now));
        let Some(entry) = entry else {
            // Expired while this node was away, or deleted by hand; perhaps given to another since.
            let table = directory.list()?;
            if let Some(loss) = rival(mine, &table.leases) {
                return Ok(LeaseCheck::Lost(loss));
            }
            mine.created = table.next_created(now);
            self.renew(directory, &key, mine, now)?;
            tracing::warn!(lease = %mine, "the own lease was deleted and has been put back");
            return Ok(LeaseCheck::Restored);
        };
        let Ok((public, attachment)) = decode_value(entry.text.as_bytes()) else {
            self.renew(directory, &key, mine, now)?;
            tracing::warn!(lease = %mine, "the own lease was unreadable and has been restored");
            return Ok(LeaseCheck::Restored);
        };
        let created = entry.created.unwrap_or(mine.created);
        let found = Lease { subnets: mine.subnets, public, attachment, created, written: mine.written };
        // The same value again, but by another flanneld: a living node that has our public address, and therefore
        // adopted our lease. Without a name it is known by a time that is not from us.
        let by_another = match &entry.owner {
            Some(owner) => *owner != self.writer,
            None => entry.expires.is_some_and(|expires| !self.stamps().contains(&whole_seconds(expires))),
        };
        let loss = match judge(mine, Some(&found)) {
            Verdict::Lost(loss) => Some(loss),
            _ if by_another => Some(Loss::Contested { subnets: mine.subnets, public: mine.public }),
            _ => None,
        };
        match loss {
            Some(loss @ Loss::Contested { .. }) if self.standing().answers() => {
                tracing::warn!("{loss}; it was written again, since this node has held it for longer");
                let expires = entry.expires.map(|_| self.stamp(now));
                directory.write(&key, &LeaseFile::encode(mine, expires, &self.writer))?;
                return Ok(LeaseCheck::Restored);
            }
            Some(loss) => return Ok(LeaseCheck::Lost(loss)),
            None => *mine = found,
        }
        *self.ends.lock().unwrap_or_else(PoisonError::into_inner) = entry.expires;
        let due = |expires: SystemTime| expires.checked_sub(self.renew_margin).unwrap_or(now);
        let mut again = entry.expires.map(due);
        if again.is_some_and(|again| again <= now) {
            again = Some(due(self.renew(directory, &key, mine, now)?).max(now + RENEW_APART));
        }
        Ok(LeaseCheck::Ours { key, again })
    }

    /// Writes the lease with a new time to live; the end of that.
    fn renew(
        &self,
        directory: &Locked<'_>,
        key: &str,
        mine: &Lease,
        now: SystemTime,
    ) -> Result<SystemTime, StoreError> {
        let expires = self.stamp(now);
        directory.write(key, &LeaseFile::encode(mine, Some(expires), &self.writer))?;
        Ok(expires)
    }

    /// The end of a lease written now, remembered as ours.
    fn stamp(&self, now: SystemTime) -> SystemTime {
        let expires = now + LEASE_TTL;
        *self.ends.lock().unwrap_or_else(PoisonError::into_inner) = Some(expires);
        let mut stamps = self.stamps();
        stamps.truncate(STAMPS_KNOWN - 1);
        stamps.push_front(whole_seconds(expires));
        expires
    }

    fn standing(&self) -> std::sync::MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stamps(&self) -> std::sync::MutexGuard<'_, VecDeque<u64>> {
        self.stamps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds snapshots until the directory can't be read or watched any more.
    async fn feed(&self, feed: &Feed) -> Result<Infallible, StoreError> {
        // Watched first, so that nothing is missed between listing and watching.
        let mut notice = Notice::new(&self.directory)?;
        loop {
            let mut table = self.directory.together(|directory| directory.list()).await?;
            if table.has_expired() {
                table = self.directory.alone(|directory| directory.list_and_sweep()).await?;
            }
            feed.snapshot(&table.leases);
            tokio::select! {
                changed = notice.changed(None) => changed?,
                () = until(table.next_expiry) => {}
            }
        }
    }

    fn take(
        &self,
        directory: &Locked<'_>,
        network: &NetworkConfig,
        claim: &Claim<'_>,
        held: Option<&Lease>,
    ) -> Result<Lease, StoreError> {
        let (table, now) = (directory.list_and_sweep()?, SystemTime::now());
        let chosen = choose(network, claim, held, &table.leases);
        let Some(choice) = chosen else { return Err(exhausted(network, &table.leases)) };
        let attachment = (claim.attach)(choice.known.as_ref(), &table.leases);
        for used in still_used(claim, &choice, &table.leases) {
            let renewed = Lease { public: claim.public, attachment: attachment.clone(), ..used.clone() };
            let key = directory.key(&used.subnets)?;
            let reserved = directory.read(&key)?.is_some_and(|entry| entry.expires.is_none());
            let expires = (!reserved).then(|| now + LEASE_TTL);
            directory.write(&key, &LeaseFile::encode(&renewed, expires, &self.writer))?;
        }
        let Choice { subnets, known, replaces } = choice;
        let (same, replaced) = match known {
            Some(known) if known.subnets == subnets => (Some(known), None),
            other => (None, other.filter(|_| replaces)),
        };
        let created = same.as_ref().map_or_else(|| table.next_created(now), |known| known.created);
        let lease = Lease { subnets, public: claim.public, attachment, created, written: created_at(now) };
        let key = directory.key(&subnets)?;
        // A reservation stays one, also under a new name.
        let before = same.as_ref().or(replaced.as_ref()).map(|lease| directory.key(&lease.subnets));
        let before = before.transpose()?.map(|key| directory.read(&key)).transpose()?.flatten();
        let reserved = before.is_some_and(|entry| entry.expires.is_none());
        directory
            .write(&key, &LeaseFile::encode(&lease, (!reserved).then(|| self.stamp(now)), &self.writer))?;
        for old in replaced.iter().chain(leftovers(network, claim, subnets, &table.leases)) {
            directory.remove(&directory.key(&old.subnets)?)?;
        }
        Ok(lease)
    }
}

impl LeaseStore for Files {
    fn describe(&self) -> String {
        self.directory.described()
    }

    async fn network(&self) -> Result<NetworkConfig, StoreError> {
        let (at, json) = self.directory.read_config()?;
        NetworkConfig::parse(&json).map_err(|source| StoreError::BadConfig { at, source })
    }

    async fn network_changed(&self) {
        self.directory.config.changed().await;
    }

    async fn acquire(&self, network: &NetworkConfig, claim: &Claim<'_>) -> Result<Lease, StoreError> {
        require_public(network, &claim.public, "the file store")?;
        let mut held = self.held.lock().await;
        let taken = self.directory.alone(|directory| self.take(directory, network, claim, held.as_ref()));
        let lease = taken.await?;
        *held = Some(lease.clone());
        self.standing().taken();
        self.moved.notify_one();
        Ok(lease)
    }

    async fn hold(&self) -> Loss {
        let mut backoff = Backoff::watching();
        loop {
            let begun = Instant::now();
            let error = match self.keep(&mut backoff).await {
                Ok(loss) => return loss,
                Err(error) => error,
            };
            backoff.reset_if_sound(begun);
            if backoff.worth_saying() {
                tracing::warn!(%error, "the own lease can't be kept; trying again");
            }
            backoff.wait().await;
        }
    }

    fn tenure(&self) -> Tenure {
        let ends = *self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        Tenure { ends, trouble: None }
    }

    async fn follow(&self, feed: &Feed) -> Infallible {
        let mut backoff = Backoff::watching();
        loop {
            let begun = Instant::now();
            let error = match self.feed(feed).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            backoff.reset_if_sound(begun);
            feed.trouble(&error);
            backoff.wait().await;
        }
    }
}

/// Waits for a moment of the clock on the wall, also if that is set or the machine is suspended
/// meanwhile: timers know nothing of either, so the clock is looked at once a minute.
async fn until(when: Option<SystemTime>) {
    let Some(when) = when else { return std::future::pending().await };
    while let Ok(left) = when.duration_since(SystemTime::now()) {
        if left.is_zero() {
            return;
        }
        sleep(left.min(Duration::from_secs(60))).await;
    }
}
