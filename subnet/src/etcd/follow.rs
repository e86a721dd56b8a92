//! All leases, from etcd to the feed: list at one revision, watch from the next, and list again after
//! each end of the watch.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, EventType, GetOptions, GetResponse, Txn, TxnOp, WatchOptions, WatchResponse,
    WatchStream,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Etcd, Listing};
use crate::pace::Backoff;
use crate::store::{Feed, StoreError, random_below};

/// Keys per page of a listing: 5,000 leases never are in memory as one answer.
const PAGE: i64 = 500;
/// etcd reports progress on an idle watch every 10 minutes by default; silence for this long makes us
/// look for ourselves.
const SILENCE: Duration = Duration::from_secs(30 * 60);

/// How often this node finds out whether etcd still lets it in: a watch goes on for a day after that has ended.
/// A little different from node to node.
const LOOK_EVERY: Duration = Duration::from_secs(40);
/// The same while it does not.
const LOOK_AGAIN: Duration = Duration::from_secs(4);

/// A watch, and what may cut it off.
pub(super) struct EtcdWatch {
    stream: WatchStream,
    /// The revision after which it begins.
    after: i64,
    /// This node's addresses.
    moves: watch::Receiver<u64>,
}

/// Why a watch ended.
pub(super) enum EtcdWatchEnd {
    /// History is gone, or is another one now, or nothing was heard: another list is all that is needed.
    Outdated,
    /// The store failed.
    Failed(StoreError),
}

impl From<StoreError> for EtcdWatchEnd {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

impl Etcd {
    pub(super) async fn feed(&self, feed: &Feed) -> Infallible {
        self.following.store(true, Ordering::Release);
        let mut listed = self.listed().take();
        let mut backoff = Backoff::watching();
        loop {
            let outcome = match listed.take() {
                Some(listing) => Ok(listing),
                None => self.list().await,
            };
            let begun = Instant::now();
            let ended = match outcome {
                Ok(listing) => {
                    feed.share(&listing.leases);
                    self.watch_all(listing, feed).await
                }
                Err(error) => EtcdWatchEnd::Failed(error),
            };
            backoff.reset_if_sound(begun);
            if let EtcdWatchEnd::Failed(error) = &ended {
                feed.trouble(error);
            }
            backoff.wait().await;
        }
    }

    /// Every lease, all as of the revision of the first page.
    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let mut listing = Listing::default();
        let mut from = self.keys.first().as_bytes().to_vec();
        let mut limit = PAGE;
        loop {
            let options = GetOptions::new().with_range(self.keys.end()).with_limit(limit);
            let options = options.with_revision(listing.revision);
            let page = self.connection.call(|mut client| {
                let (start, options) = (from.clone(), options.clone());
                async move { Page::of(client.get(start, Some(options)).await) }
            });
            let page = match page.await? {
                Page::Is(page) => page,
                Page::TooLarge if limit > 1 => {
                    limit = (limit / 8).max(1);
                    continue;
                }
                // It counts as malformed: its writer takes one subnet, and all others are still read.
                Page::TooLarge => {
                    let Some(key) = self.next_key(from.clone(), listing.revision).await? else {
                        limit = PAGE;
                        continue;
                    };
                    Arc::make_mut(&mut listing.leases).insert_too_large(&self.keys.name(&key));
                    from = [&key[..], b"\0"].concat();
                    limit = PAGE;
                    continue;
                }
                // That revision can't be finished.
                Page::Compacted => {
                    listing = Listing::default();
                    from = self.keys.first().as_bytes().to_vec();
                    continue;
                }
            };
            if listing.revision == 0 {
                listing.revision = page.header().map_or(0, |header| header.revision());
            }
            for kv in page.kvs() {
                let created = kv.create_revision().unsigned_abs();
                Arc::make_mut(&mut listing.leases).insert_written(
                    &self.keys.name(kv.key()),
                    kv.value(),
                    created,
                    kv.mod_revision().unsigned_abs(),
                );
            }
            let Some(last) = page.kvs().last().filter(|_| page.more()) else {
                Arc::make_mut(&mut listing.leases).pack();
                return Ok(listing);
            };
            from = [last.key(), b"\0"].concat();
        }
    }

    /// The first key from there on, without its value.
    async fn next_key(&self, from: Vec<u8>, revision: i64) -> Result<Option<Vec<u8>>, StoreError> {
        let options = GetOptions::new().with_range(self.keys.end()).with_limit(1).with_keys_only();
        let options = options.with_revision(revision);
        let answer = self.connection.call(|mut client| {
            let (start, options) = (from.clone(), options.clone());
            async move { client.get(start, Some(options)).await }
        });
        Ok(answer.await?.kvs().first().map(|kv| kv.key().to_vec()))
    }

    /// Whether etcd still lets this node read its keys, and write its own.
    async fn look(&self) -> Result<(), StoreError> {
        let options = GetOptions::new().with_range(self.keys.end()).with_limit(1).with_keys_only();
        if let Some(own) = self.own_key().filter(|_| self.connection.may_refuse()) {
            // etcd checks the rights to all that a transaction may do; no key has a version below 0.
            let txn = Txn::new()
                .when([Compare::version(own.as_str(), CompareOp::Less, 0)])
                .and_then([TxnOp::put(own.as_str(), "", None)])
                .or_else([TxnOp::get(self.keys.first(), Some(options))]);
            let answer = self.connection.call(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            });
            return answer.await.map(drop);
        }
        let answer = self.connection.call(|mut client| {
            let options = options.clone();
            async move { client.get(self.keys.first(), Some(options)).await }
        });
        answer.await.map(drop)
    }

    /// The key of the own lease, unless that is being written.
    fn own_key(&self) -> Option<String> {
        let held = self.held.try_lock().ok()?;
        self.keys.lease(&held.as_ref()?.lease.subnets).ok()
    }

    /// Applies what happens after the listing until the watch ends.
    async fn watch_all(&self, mut listing: Listing, feed: &Feed) -> EtcdWatchEnd {
        let range = WatchOptions::new().with_range(self.keys.end());
        let mut watch = match self.watch(self.keys.first(), range, listing.revision + 1).await {
            Ok(watch) => watch,
            Err(error) => return error.into(),
        };
        let after =
            |pause: Duration| Instant::now() + pause + pause.mul_f64(random_below(250) as f64 / 1000.0);
        let mut due = after(LOOK_EVERY);
        // The watch goes on although etcd refuses everything else.
        let mut refused = None;
        loop {
            let mut next = tokio::select! {
                next = self.heard(&mut watch) => next,
                () = sleep_until(due) => {
                    match self.look().await {
                        Ok(()) if refused.take().is_some() => feed.share(&listing.leases),
                        Ok(()) => feed.answered(),
                        Err(error @ StoreError::Denied { .. }) => {
                            feed.trouble(&error);
                            refused = Some(error);
                        }
                        Err(error) => return error.into(),
                    }
                    due = after(if refused.is_some() { LOOK_AGAIN } else { LOOK_EVERY });
                    continue;
                }
            };
            // All else that is here already belongs into the same snapshot.
            let ended = loop {
                match next {
                    Ok(response) => self.apply(&mut listing, &response),
                    Err(ended) => break Some(ended),
                }
                next = tokio::select! {
                    biased;
                    more = self.heard(&mut watch) => more,
                    () = std::future::ready(()) => break None,
                };
            };
            match &refused {
                None => feed.share(&listing.leases),
                Some(why) => feed.share_in_trouble(&listing.leases, why),
            }
            if let Some(ended) = ended {
                return ended;
            }
        }
    }

    fn apply(&self, listing: &mut Listing, response: &WatchResponse) {
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let name = self.keys.name(kv.key());
            Arc::make_mut(&mut listing.leases).remove_entry(&name);
            if event.event_type() == EventType::Put {
                Arc::make_mut(&mut listing.leases).insert_written(
                    &name,
                    kv.value(),
                    kv.create_revision().unsigned_abs(),
                    kv.mod_revision().unsigned_abs(),
                );
            }
        }
    }

    /// Begins to watch; the stream first answers whether it may.
    pub(super) async fn watch(
        &self,
        key: &str,
        options: WatchOptions,
        from: i64,
    ) -> Result<EtcdWatch, StoreError> {
        let options = options.with_start_revision(from).with_progress_notify();
        // Before it begins, so that no change is missed.
        let moves = self.connection.moves();
        let stream = self
            .connection
            .call(|mut client| {
                let options = options.clone();
                async move { client.watch(key, Some(options)).await }
            })
            .await?;
        Ok(EtcdWatch { stream, after: from - 1, moves })
    }

    /// The next response of a watch, unless it is its end.
    pub(super) async fn heard(&self, watch: &mut EtcdWatch) -> Result<WatchResponse, EtcdWatchEnd> {
        let message = tokio::select! {
            biased;
            message = timeout(SILENCE, watch.stream.message()) => message,
            _ = watch.moves.changed() => return Err(EtcdWatchEnd::Outdated),
        };
        let response = match message {
            Ok(Ok(Some(response))) => response,
            Ok(Ok(None)) => return Err(self.connection.unreachable("the watch was closed".into()).into()),
            // An event that is larger than an answer may be: the listing gets past its key.
            Ok(Err(error)) if is_too_large(&error) => return Err(EtcdWatchEnd::Outdated),
            Ok(Err(error)) => return Err(self.connection.meaning(&error).into()),
            Err(_) => return Err(EtcdWatchEnd::Outdated),
        };
        if !response.canceled() {
            // A store that was put back to an earlier state counts on from there, and would say nothing until it
            // has got beyond where it was. A member that lags behind the others looks the same for a moment.
            let restored = response.header().is_some_and(|header| header.revision() < watch.after);
            return if restored { Err(EtcdWatchEnd::Outdated) } else { Ok(response) };
        }
        // After this message the stream stays open and says nothing any more.
        Err(match response.compact_revision() {
            0 => self.connection.cancelled(response.cancel_reason()).into(),
            _ => EtcdWatchEnd::Outdated,
        })
    }
}

/// Whether an answer was longer than one may be. gRPC's "out of range", which etcd says about revisions too.
pub(super) fn is_too_large(error: &etcd_client::Error) -> bool {
    match error {
        etcd_client::Error::GRpcStatus(status) => {
            matches!(status.code() as i32, 8 | 11) && !status.message().starts_with("etcdserver")
        }
        _ => false,
    }
}

/// The answer to the request for a page.
enum Page {
    Is(GetResponse),
    /// Larger than an answer may be: somebody keeps other things than leases under our prefix.
    TooLarge,
    /// Its revision is history that has been removed since the page before.
    Compacted,
}

impl Page {
    fn of(answer: Result<GetResponse, etcd_client::Error>) -> Result<Self, etcd_client::Error> {
        match answer {
            // gRPC's "out of range": said by etcd about the revision, and by tonic about the length.
            Err(etcd_client::Error::GRpcStatus(status)) if status.code() as i32 == 11 => {
                let compacted = status.message().contains("compacted");
                Ok(if compacted { Self::Compacted } else { Self::TooLarge })
            }
            answer => answer.map(Self::Is),
        }
    }
}
