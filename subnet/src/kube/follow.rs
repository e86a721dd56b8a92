//! All leases, from the API server to the feed: list, watch from there, and list again when the watch
//! can't be continued. Heartbeats of nodes, which are most of what a watch brings, end at the table.
//!
//! A list brings whole nodes, a watch their metadata, in protobuf where the server has it: a heartbeat is a fifth of a node then, and
//! annotations are metadata.
//! The pod subnets, which are not, never change while a node exists, so they are taken from what is known of it; of a new
//! node from `managedFields`, and where that says nothing, by a request for this node (docs/adr/033).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, timeout_at};

use super::Kube;
use super::collection::{Collection, Continue, Ended, Kind, Least, Pages, SILENCE, Watching};
use super::connection::Failure;
use super::managed;
use super::node::{Given, Node, Seen};
use super::objects::{Encoding, Objects};
use super::protobuf::{DecodedMetadata, MetadataEvent};
use super::split::Bulk;
use super::table::NodeTable;
use crate::net::{Family, Subnets};
use crate::pace::Backoff;
use crate::store::Feed;
use crate::text::shortened;

/// Changes that follow on another within this time make one snapshot.
const TOGETHER: Duration = Duration::from_millis(50);
/// What was read together is taken in within this time; it has waited before.
const TOGETHER_DEFERRED: Duration = Duration::from_millis(5);

/// A server that answers, but can't do what it is asked, has too much to do already.
const BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long a node may lack what it announced before peers act on it: what somebody deletes or overwrites, the
/// node puts back sooner.
const GRACE: Duration = Duration::from_secs(1);

pub(super) const NODES: &str = "/api/v1/nodes";
/// What makes most of a node and says nothing about leases: the status, and who manages which field.
pub(super) const BULK: Bulk = Bulk { members: &["status"], parts: &["managedFields"], aside: &[] };
/// In a watch, the latter tells the subnets of new nodes. It is read only for them.
const WATCHED_BULK: Bulk = Bulk { members: &["status"], parts: &[], aside: &["managedFields"] };

/// What is known, and from where the watch goes on.
struct Place {
    table: NodeTable,
    /// The version up to which the table is complete; `None` if it needs a listing.
    version: Option<String>,
    least: Least,
    /// What nodes have said that is not acted upon yet.
    late: Late,
    watching: Watching,
    /// How metadata is asked for: in JSON once something in protobuf could not be decoded.
    encoding: Encoding,
}

/// An event of a watch of nodes.
struct NodeEvent<'a> {
    kind: Kind,
    node: Node<'a>,
    managed_fields: EncodedManagedFields<'a>,
}

/// `managedFields` of a node as the watch brought them.
enum EncodedManagedFields<'a> {
    Json(&'a [u8]),
    Protobuf(&'a DecodedMetadata),
}

impl EncodedManagedFields<'_> {
    fn subnets(&self) -> Option<Subnets> {
        match self {
            Self::Json(text) => managed::subnets(text),
            Self::Protobuf(metadata) => managed::subnets_of_entries(metadata.managed_fields()),
        }
    }
}

/// What became of an event.
enum Taken {
    /// It was taken in; whether it changes any lease.
    Whole(bool),
    /// It was not: the subnets of this node have to be found out first.
    Lacks { name: String, uid: String },
}

/// What nodes say and when it counts, by name.
type Late = BTreeMap<Box<str>, (Instant, Option<Seen>)>;

impl Kube {
    pub(super) async fn feed(&self, feed: &Feed) -> Infallible {
        let mut place = Place {
            table: NodeTable::default(),
            version: None,
            least: Least::AtHand,
            late: Late::new(),
            watching: Watching::default(),
            encoding: Encoding::Protobuf,
        };
        let mut families = self.families.subscribe();
        let (mut backoff, mut busy) = (Backoff::watching(), Backoff::new(BUSY.0, BUSY.1));
        loop {
            let begun = Instant::now();
            let ended = match self.list_and_watch(&mut place, &mut families, feed).await {
                Ok(never) => match never {},
                Err(ended) => ended,
            };
            backoff.reset_if_sound(begun);
            busy.reset_if_sound(begun);
            place.watch_ended(&ended, self);
            match ended {
                Ended::Closed => {}
                Ended::Outdated => place.outdated(),
                // Nothing has failed, and somebody waits for it.
                Ended::Refamilied => {
                    place.outdated();
                    continue;
                }
                Ended::Undecodable(failure) => {
                    tracing::warn!(why = %failure.error, "nodes are watched in JSON from now on");
                    place.encoding = Encoding::Json;
                }
                Ended::Failed(failure) => {
                    feed.trouble(&failure.error);
                    if matches!(failure.status, 429 | 500..) {
                        busy.wait().await;
                        continue;
                    }
                }
            }
            backoff.wait().await;
        }
    }

    async fn list_and_watch(
        &self,
        place: &mut Place,
        families: &mut Receiver<&'static [Family]>,
        feed: &Feed,
    ) -> Result<Infallible, Ended> {
        let version = match &place.version {
            Some(version) => version.clone(),
            None => {
                families.mark_unchanged();
                let listed = self.list(&place.table, &place.least).await;
                let (mut table, late, version) = match listed {
                    Ok(listed) => listed,
                    Err(failure) => {
                        // Perhaps the server can't be as new as we want: its store was restored.
                        place.least = Least::Newest;
                        place.watching.list_failed();
                        return Err(Ended::Failed(failure));
                    }
                };
                table.succeed(&place.table);
                place.table = table;
                // Those that were late already have waited since then.
                for (name, (due, _)) in std::mem::replace(&mut place.late, late) {
                    place.late.entry(name).and_modify(|late| late.0 = late.0.min(due));
                }
                place.version = Some(version.clone());
                place.least = Least::Seen(version.clone());
                place.publish(feed);
                version
            }
        };
        place.watching.asks();
        let nodes = Collection::new(NODES, WATCHED_BULK).metadata(place.encoding);
        // Nearly all of it are heartbeats.
        let mut events = self.connection.watch_from(&nodes, &version).await?.coalesced();
        place.watching.begins();
        // Ends the trouble that there may have been, unless the watches before this one began as well.
        place.publish(feed);
        tokio::select! {
            ended = self.watch_all(&mut events, place, feed) => ended,
            _ = families.changed() => Err(Ended::Refamilied),
        }
    }

    async fn watch_all(
        &self,
        events: &mut Objects<'_>,
        place: &mut Place,
        feed: &Feed,
    ) -> Result<Infallible, Ended> {
        // When the changes that are not published yet have to be.
        let mut due: Option<Instant> = None;
        loop {
            let proof = place.watching.proof();
            let silence = Instant::now() + SILENCE;
            let late = place.late.values().map(|(at, _)| *at).min();
            let until = [due, proof, late].into_iter().flatten().fold(silence, Instant::min);
            let outcome = match timeout_at(until, self.connection.event_text(events)).await {
                Ok(Ok(event)) => match self.take(place, events.encoding(), event, events.aside()).await {
                    Ok(news) => {
                        feed.answered();
                        if news {
                            events.has_news();
                        }
                        if news || place.watching.proven() {
                            let together = if events.is_deferred() { TOGETHER_DEFERRED } else { TOGETHER };
                            due.get_or_insert_with(|| Instant::now() + together);
                        }
                        Ok(())
                    }
                    Err(ended) => Err(ended),
                },
                Ok(Err(ended)) => Err(ended),
                // The server sends bookmarks: nothing at all is not what a watch is like.
                Err(_) if until == silence => Err(Ended::Outdated),
                Err(_) => {
                    let now = Instant::now();
                    if place.take_late(now) || proof.is_some_and(|at| at <= now) && place.watching.proven() {
                        due.get_or_insert(now);
                    }
                    Ok(())
                }
            };
            if let Some(at) = due
                && (outcome.is_err() || at <= Instant::now())
            {
                place.publish(feed);
                due = None;
            }
            outcome?;
        }
    }

    /// Takes an event in; whether it changes any lease.
    async fn take(
        &self,
        place: &mut Place,
        encoding: Encoding,
        event: Vec<u8>,
        aside: &[u8],
    ) -> Result<bool, Ended> {
        match encoding {
            Encoding::Json => self.take_node(place, self.watched(&event, aside)?).await,
            Encoding::Protobuf => {
                let undecodable = |why: String| {
                    Ended::Undecodable(
                        self.connection.away(format!("an event in protobuf: {}", shortened(&why))),
                    )
                };
                match MetadataEvent::decode(event).map_err(undecodable)? {
                    MetadataEvent::Object { kind, metadata } => {
                        let managed_fields = EncodedManagedFields::Protobuf(&metadata);
                        self.take_node(place, NodeEvent { kind, node: metadata.node(), managed_fields }).await
                    }
                    // As with JSON, in `Connection::event`.
                    MetadataEvent::Error(status) => {
                        tracing::debug!(status = %shortened(&status), "a watch was ended");
                        Err(Ended::Outdated)
                    }
                }
            }
        }
    }

    /// An event in JSON.
    fn watched<'a>(&self, json: &'a [u8], managed_fields: &'a [u8]) -> Result<NodeEvent<'a>, Ended> {
        #[derive(Deserialize)]
        struct Event<'a> {
            #[serde(borrow, rename = "type")]
            kind: &'a str,
            #[serde(borrow)]
            object: Node<'a>,
        }
        let why = match serde_json::from_slice::<Event<'_>>(json) {
            Ok(Event { kind, object }) if Kind::of(kind) != Kind::Error => {
                let managed_fields = EncodedManagedFields::Json(managed_fields);
                return Ok(NodeEvent { kind: Kind::of(kind), node: object, managed_fields });
            }
            Ok(_) => String::new(),
            Err(error) => format!("an event: {}", shortened(&error.to_string())),
        };
        // Decoded as a node in one go, for nearly all are heartbeats. This one is something else.
        self.connection.event(json.to_vec())?;
        Err(self.connection.away(why).into())
    }

    async fn take_node(&self, place: &mut Place, mut event: NodeEvent<'_>) -> Result<bool, Ended> {
        match place.take(&mut event, self, None) {
            Taken::Whole(news) => Ok(news),
            Taken::Lacks { name, uid } => match self.subnets_of(&name, &uid).await? {
                Some(subnets) => match place.take(&mut event, self, Some(Given::whole(subnets))) {
                    Taken::Whole(news) => Ok(news),
                    Taken::Lacks { .. } => Ok(false),
                },
                // It is gone, and that will be told.
                None => Ok(false),
            },
        }
    }

    /// The pod subnets of a node that nothing in its metadata tells; `None` if there is no such node any more.
    async fn subnets_of(&self, name: &str, uid: &str) -> Result<Option<Subnets>, Failure> {
        // A list of one, because the manifest gives no right to `get` nodes. The server reads one key of etcd for it.
        let selected = Collection::new(NODES, BULK).selected("metadata.name", name);
        let Some(json) = self.connection.one_page(&selected).next().await? else { return Ok(None) };
        let node = self.node(&json)?;
        // What can't be read is wrong in the next list, too, and is told there.
        Ok((node.metadata.uid == uid).then(|| node.subnets().unwrap_or_default()))
    }

    /// All nodes that Flannel manages, and the version as of which these are all.
    async fn list(&self, before: &NodeTable, least: &Least) -> Result<(NodeTable, Late, String), Failure> {
        let nodes = Collection::new(NODES, BULK);
        match self.pages(before, self.connection.pages(&nodes, least)).await {
            // The listing took longer than the server remembers: in one piece then, for there is no
            // hurry between the pieces of one answer.
            Err(failure) if failure.status == 410 => {
                self.pages(before, self.connection.one_page(&nodes)).await
            }
            outcome => outcome,
        }
    }

    async fn pages(
        &self,
        before: &NodeTable,
        mut pages: Pages<'_>,
    ) -> Result<(NodeTable, Late, String), Failure> {
        let families = self.families();
        let (mut table, mut late) = (NodeTable::default(), Late::new());
        while let Some(json) = pages.next().await? {
            let node = self.node(&json)?;
            let (name, seen) = (node.metadata.name.as_ref(), node.entry(&self.prefix, families));
            if !self.is_own(name) && before.lacks(name, seen.as_ref(), &node) {
                table.keep(name, before);
                late.insert(name.into(), (Instant::now() + GRACE, seen));
            } else {
                table.put(name, seen, Some(before));
            }
        }
        Ok((table, late, pages.version))
    }

    fn is_own(&self, name: &str) -> bool {
        self.node.known() == Some(name)
    }

    fn node<'a>(&self, json: &'a [u8]) -> Result<Node<'a>, Failure> {
        serde_json::from_slice(json)
            .map_err(|error| self.connection.away(format!("a node that can't be read: {error}")))
    }
}

impl Place {
    /// The next listing has to be at least as new as what is known.
    fn outdated(&mut self) {
        self.version = None;
    }

    /// Publishes what is known: with what is wrong with watches, as long as they bring nothing.
    fn publish(&mut self, feed: &Feed) {
        let leases = self.table.leases();
        match self.watching.why() {
            Some(why) => feed.share_in_trouble(leases, why),
            None => feed.share(leases),
        }
    }

    /// Takes note of how a watch has ended.
    fn watch_ended(&mut self, ended: &Ended, kube: &Kube) {
        if self.watching.ended(ended, &kube.connection, "nodes") == Continue::Listing {
            self.version = None;
        }
    }

    /// Takes in what has been said for long enough; whether it changes any lease.
    fn take_late(&mut self, now: Instant) -> bool {
        let names: Vec<Box<str>> =
            self.late.iter().filter(|(_, (due, _))| *due <= now).map(|(name, _)| name.clone()).collect();
        let mut news = false;
        for name in names {
            if let Some((_, seen)) = self.late.remove(&name) {
                news |= self.table.put(&name, seen, None);
            }
        }
        news
    }

    /// Takes in what a node says, at once or after a while; whether it changes any lease.
    fn put(&mut self, node: &Node<'_>, kube: &Kube) -> bool {
        let (name, seen) = (node.metadata.name.as_ref(), node.entry(&kube.prefix, kube.families()));
        if !kube.is_own(name) && self.table.lacks(name, seen.as_ref(), node) {
            let due = self.late.get(name).map_or_else(|| Instant::now() + GRACE, |(due, _)| *due);
            self.late.insert(name.into(), (due, seen));
            return false;
        }
        self.late.remove(name);
        self.table.put(name, seen, None)
    }

    /// Takes an event in, of a node with these subnets where that has been found out.
    fn take(&mut self, event: &mut NodeEvent<'_>, kube: &Kube, given: Option<Given>) -> Taken {
        let (kind, node) = (event.kind, &mut event.node);
        if kind == Kind::Put && node.is_partial() {
            let known = || self.table.subnets_of(&node.metadata.name, node.created(), kube.families());
            let known = given.or_else(known);
            match known.or_else(|| event.managed_fields.subnets().map(Given::whole)) {
                Some(subnets) => node.give(subnets),
                None if node.is_managed(&kube.prefix) => {
                    let metadata = &node.metadata;
                    return Taken::Lacks { name: metadata.name.to_string(), uid: metadata.uid.to_string() };
                }
                None => {}
            }
        }
        let name = node.metadata.name.as_ref();
        let news = match kind {
            Kind::Put => self.put(node, kube),
            Kind::Deleted => {
                self.late.remove(name);
                self.table.remove(name)
            }
            Kind::Error | Kind::Other => false,
        };
        self.watching.hears();
        if !node.metadata.resource_version.is_empty() {
            self.version = Some(node.metadata.resource_version.to_string());
            self.least = Least::Seen(node.metadata.resource_version.to_string());
        }
        Taken::Whole(news)
    }
}
