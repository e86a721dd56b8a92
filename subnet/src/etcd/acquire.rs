//! Taking a lease: decide from a complete listing, write only if nothing decisive has changed since.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp};
use tokio::time::Instant;

use super::follow::is_too_large;
use super::{Etcd, HeldLease, Listing};
use crate::claim::{Choice, choose, exhausted, require_public, still_used};
use crate::config::NetworkConfig;
use crate::lease::{Lease, Leases, decode_value, encode_value};
use crate::store::{Claim, LEASE_TTL, StoreError, random_below};
use crate::text::shortened;

/// How many of this process's etcd leases are remembered: far more than can be in doubt at one time.
const GRANTS_KNOWN: usize = 16;

/// An etcd lease that gives a key its time to live.
#[derive(Clone, Copy)]
pub(super) struct Grant {
    id: i64,
    pub(super) expires: Instant,
}

impl Etcd {
    pub(super) async fn obtain(
        &self,
        network: &NetworkConfig,
        claim: &Claim<'_>,
    ) -> Result<Lease, StoreError> {
        require_public(network, &claim.public, "etcd")?;
        let mut held = self.held.lock().await;
        let mut grant = None;
        let outcome = self.race(network, claim, held.as_ref(), &mut grant).await;
        self.revoke(grant).await;
        let (mut listing, new, replaced) = outcome?;
        let lease = new.lease.clone();
        if !self.following.load(Ordering::Acquire) {
            if let Some(old) = replaced {
                Arc::make_mut(&mut listing.leases).leases.remove(&old.subnets);
            }
            Arc::make_mut(&mut listing.leases).leases.insert(lease.subnets, lease.clone());
            *self.listed() = Some(listing);
        }
        *held = Some(new);
        self.stands(held.as_ref(), None);
        self.standing().taken();
        self.moved.notify_one();
        Ok(lease)
    }

    /// Tries until no other node was faster: what was listed, what is held now, and the lease that it
    /// replaces. There is no limit to the rounds: whenever one is lost, another node has got on.
    async fn race(
        &self,
        network: &NetworkConfig,
        claim: &Claim<'_>,
        held: Option<&HeldLease>,
        grant: &mut Option<Grant>,
    ) -> Result<(Listing, HeldLease, Option<Lease>), StoreError> {
        let mut rounds = 0;
        loop {
            let listing = self.list().await?;
            if let Some((new, replaced)) = self.take(network, claim, held, &listing, grant).await? {
                return Ok((listing, new, replaced));
            }
            rounds = (rounds + 1).min(10);
            tokio::time::sleep(Duration::from_millis(5 + random_below(20 * rounds) as u64)).await;
        }
    }

    /// One attempt. `None` when another node was faster.
    async fn take(
        &self,
        network: &NetworkConfig,
        claim: &Claim<'_>,
        held: Option<&HeldLease>,
        listing: &Listing,
        grant: &mut Option<Grant>,
    ) -> Result<Option<(HeldLease, Option<Lease>)>, StoreError> {
        let chosen = choose(network, claim, held.map(|held| &held.lease), &listing.leases);
        let Some(choice) = chosen else { return Err(exhausted(network, &listing.leases)) };
        let mut current = None;
        if let Some(known) = &choice.known {
            let kv = self.read(&self.keys.lease(&known.subnets)?).await?;
            match kv.filter(|kv| holds(kv, known)) {
                Some(kv) => current = Some(kv),
                None => return Ok(None),
            }
        }
        let attachment = (claim.attach)(choice.known.as_ref(), &listing.leases);
        // Before the lease that is taken, so that of two with the same subnet that one is the later.
        for used in still_used(claim, &choice, &listing.leases) {
            let now = Lease { public: claim.public, attachment: attachment.clone(), ..used.clone() };
            self.renew_used(used, now, grant).await?;
        }
        let Choice { subnets, known, replaces } = choice;
        let mut lease = Lease { subnets, public: claim.public, attachment, created: 0, written: 0 };
        let same = known.as_ref().is_some_and(|known| known.subnets == subnets);
        let replaced = known.filter(|_| replaces);
        let written = match &current {
            Some(kv) if same => {
                lease.created = kv.create_revision().unsigned_abs();
                self.rewrite(lease, kv.mod_revision(), kv.lease() == 0, grant).await?
            }
            current => {
                let old = current.as_ref().filter(|_| replaces);
                self.create(lease, old, listing.revision, grant).await?
            }
        };
        Ok(written.map(|held| (held, replaced)))
    }

    /// Gives a lease that this node has besides the one that it claims a new time to live, unless somebody else
    /// changes it meanwhile.
    async fn renew_used(
        &self,
        used: &Lease,
        now: Lease,
        grant: &mut Option<Grant>,
    ) -> Result<(), StoreError> {
        let Some(kv) = self.read(&self.keys.lease(&used.subnets)?).await?.filter(|kv| holds(kv, used)) else {
            return Ok(());
        };
        self.rewrite(now, kv.mod_revision(), kv.lease() == 0, grant).await.map(drop)
    }

    /// Writes a lease to the key that has it already, if its last change was at `revision`. A
    /// reservation, which is a key without time to live, stays one.
    pub(super) async fn rewrite(
        &self,
        mut lease: Lease,
        revision: i64,
        reservation: bool,
        grant: &mut Option<Grant>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let key = self.keys.lease(&lease.subnets)?;
        let unchanged = Compare::mod_revision(key.as_str(), CompareOp::Equal, revision);
        let granted = if reservation { None } else { Some(self.granted(grant).await?) };
        let put = put(&key, &lease, granted);
        let Some(revision) = self.transact(vec![unchanged], vec![put]).await? else {
            *grant = granted;
            return Ok(None);
        };
        lease.written = revision.unsigned_abs();
        Ok(Some(HeldLease { lease, revision, expires: granted.map(|granted| granted.expires) }))
    }

    /// Writes a lease to a key that doesn't exist, after a listing of revision `listed`, and deletes `old`,
    /// both in one transaction: there is no moment without any, as there is in Go flannel. A reservation
    /// stays one under its new name.
    pub(super) async fn create(
        &self,
        mut lease: Lease,
        old: Option<&KeyValue>,
        listed: i64,
        grant: &mut Option<Grant>,
    ) -> Result<Option<HeldLease>, StoreError> {
        let key = self.keys.lease(&lease.subnets)?;
        let reservation = old.is_some_and(|old| old.lease() == 0);
        let granted = if reservation { None } else { Some(self.granted(grant).await?) };
        let mut compares = vec![Compare::version(key.as_str(), CompareOp::Equal, 0)];
        let mut changes = Vec::new();
        if let Some(old) = old {
            compares.push(Compare::mod_revision(old.key(), CompareOp::Equal, old.mod_revision()));
            // First, because a Go flannel that forgets the old lease last also forgets the MAC address
            // that the new one shares with it.
            changes.push(TxnOp::delete(old.key(), None));
        }
        changes.push(put(&key, &lease, granted));
        let Some(revision) = self.transact(compares, changes).await? else {
            *grant = granted;
            return Ok(None);
        };
        lease.created = revision.unsigned_abs();
        lease.written = lease.created;

        // The transaction guards one key. A key with another length, or with the same IPv4 subnet and
        // another IPv6 one, may have been created since the listing and overlap: the younger gives way.
        // A lease that took the place of another stays until the next round moves it, keeping what it can:
        // peers never see a node of theirs without any.
        if self.older_rival(&lease, listed).await? {
            if old.is_none() {
                let ours = Compare::mod_revision(key.as_str(), CompareOp::Equal, revision);
                if self.transact(vec![ours], vec![TxnOp::delete(key, None)]).await?.is_some() {
                    *grant = granted;
                }
            }
            return Ok(None);
        }
        Ok(Some(HeldLease { lease, revision, expires: granted.map(|granted| granted.expires) }))
    }

    /// Whether a key that was created between the listing and this lease stands in its way.
    async fn older_rival(&self, lease: &Lease, listed: i64) -> Result<bool, StoreError> {
        let newer = GetOptions::new().with_range(self.keys.end()).with_min_create_revision(listed + 1);
        let mut leases = Leases::default();
        for kv in self.get_within_limits(self.keys.first(), newer).await? {
            if kv.create_revision().unsigned_abs() < lease.created {
                leases.insert_entry(&self.keys.name(kv.key()), kv.value(), 0);
            }
        }
        // Of two nodes with one public address that start at the same moment, the younger adopts the other's lease,
        // and that one notices.
        let twin = leases.by_public(&lease.public).next().is_some();
        Ok(twin || leases.taken().any(|taken| taken.overlaps(&lease.subnets)))
    }

    /// Keys with their values; without, if those are too large to be read: a key has its subnet all the same.
    async fn get_within_limits(&self, key: &str, what: GetOptions) -> Result<Vec<KeyValue>, StoreError> {
        for options in [what.clone(), what.with_keys_only()] {
            let answer = self.connection.call(|mut client| {
                let options = options.clone();
                async move {
                    match client.get(key, Some(options)).await {
                        Err(error) if is_too_large(&error) => Ok(None),
                        answer => answer.map(Some),
                    }
                }
            });
            if let Some(mut answer) = answer.await? {
                return Ok(answer.take_kvs());
            }
        }
        Err(self.connection.unreachable(format!("{} is too large to be read: delete it", shortened(key))))
    }

    /// The key, if it is there. Of one whose value is too large to be read there is all but the value.
    pub(super) async fn read(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        Ok(self.get_within_limits(key, GetOptions::new()).await?.into_iter().next())
    }

    /// Carries the changes out if all comparisons hold; the revision of the changes, or `None`.
    pub(super) async fn transact(
        &self,
        compares: Vec<Compare>,
        changes: Vec<TxnOp>,
    ) -> Result<Option<i64>, StoreError> {
        let txn = Txn::new().when(compares).and_then(changes);
        // Once, so that a comparison that fails is certain to mean that nothing was changed by us.
        let answer = self.connection.once(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        });
        let answer = answer.await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(answer.succeeded().then_some(revision))
    }

    /// Takes the grant at hand, or asks for one. It is not put back when a transaction fails without an
    /// answer: then a key of ours may use it.
    async fn granted(&self, grant: &mut Option<Grant>) -> Result<Grant, StoreError> {
        if let Some(grant) = grant.take() {
            return Ok(grant);
        }
        let asked = Instant::now();
        let ttl = LEASE_TTL.as_secs() as i64;
        let answer =
            self.connection.call(|mut client| async move { client.lease_grant(ttl, None).await }).await?;
        let expires = asked + Duration::from_secs(answer.ttl().unsigned_abs());
        let mut grants = self.grants.lock().unwrap_or_else(PoisonError::into_inner);
        grants.truncate(GRANTS_KNOWN - 1);
        grants.push_front(answer.id());
        Ok(Grant { id: answer.id(), expires })
    }

    /// Whether an etcd lease was granted to this process, even if the answer to what it was used for never
    /// came.
    pub(super) fn is_grant_of_ours(&self, id: i64) -> bool {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }

    /// Gives a grant back that no key uses. If this fails it ends by itself, a day later.
    pub(super) async fn revoke(&self, grant: Option<Grant>) {
        let Some(Grant { id, .. }) = grant else { return };
        let answer = self.connection.call(|mut client| async move { client.lease_revoke(id).await }).await;
        if let Err(error) = answer {
            tracing::debug!(%error, "an unused etcd lease could not be revoked");
        }
    }
}

/// Whether a key holds exactly this lease.
fn holds(kv: &KeyValue, lease: &Lease) -> bool {
    decode_value(kv.value())
        .is_ok_and(|(public, attachment)| public == lease.public && attachment == lease.attachment)
}

fn put(key: &str, lease: &Lease, granted: Option<Grant>) -> TxnOp {
    let value = encode_value(&lease.public, &lease.attachment);
    TxnOp::put(key, value, granted.map(|granted| PutOptions::new().with_lease(granted.id)))
}
