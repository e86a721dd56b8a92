//! All leases, from the API server to the feed: list, watch from there, and list again when the watch
//! can't be continued. Heartbeats of nodes, which are most of what a watch brings, end at the table.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, timeout, timeout_at};

use super::Kube;
use super::connection::{Failure, Objects};
use super::node::{Node, Seen};
use super::table::Table;
use crate::net::Family;
use crate::pace::Backoff;
use crate::store::{Feed, StoreError, random_below};
use crate::text::shortened;

/// Nodes per page, where the server cares for it.
const PAGE: usize = 500;
/// The server sends a bookmark about once a minute, so a watch that is silent for this long is dead.
pub(super) const SILENCE: Duration = Duration::from_secs(150);
/// Changes that follow on another within this time make one snapshot.
const TOGETHER: Duration = Duration::from_millis(50);

/// A server that answers, but can't do what it is asked, has too much to do already.
const BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A watch that ends sooner than this and brought nothing may never bring anything: the nodes are listed again.
const SOON: Duration = Duration::from_secs(10);
/// So many such watches in a row are worth a word, although each for itself may have a good reason.
const FRUITLESS: u32 = 3;
/// How long a node may lack what it announced before peers act on it: what somebody deletes or overwrites, the
/// node puts back sooner.
const GRACE: Duration = Duration::from_secs(1);

pub(super) const NODES: &str = "/api/v1/nodes";

/// How new a listing has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Least {
    /// As the server has it at hand; what it lacks follows by the watch. Asking for more would make the
    /// server read all nodes from its store for each of thousands of agents that start together.
    AtHand,
    /// Not older than what was seen already.
    Seen(String),
    /// The newest there is.
    Newest,
}

/// What is known, and from where the watch goes on.
struct Place {
    table: Table,
    /// The version up to which the table is complete; `None` if it needs a listing.
    version: Option<String>,
    least: Least,
    /// What nodes have said that is not acted upon yet.
    late: Late,
    watching: Watching,
}

/// What nodes say and when it counts, by name.
type Late = BTreeMap<Box<str>, (Instant, Option<Seen>)>;

/// How watches fare.
#[derive(Default)]
struct Watching {
    /// When the present one began.
    since: Option<Instant>,
    /// Whether it has brought anything.
    heard: bool,
    /// How many in a row ended soon and brought nothing.
    fruitless: u32,
    /// Why, once that is worth a word.
    why: Option<StoreError>,
}

/// Why a watch ended.
pub(super) enum Ended {
    /// It is to be continued: its time was over, or nothing was heard, or the connection broke.
    Closed,
    /// It can't be continued.
    Outdated,
    /// Other families are in force now.
    Refamilied,
    /// The store failed.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        if failure.status == 410 { Self::Outdated } else { Self::Failed(failure) }
    }
}

impl Kube {
    pub(super) async fn feed(&self, feed: &Feed) -> Infallible {
        let mut place = Place {
            table: Table::default(),
            version: None,
            least: Least::AtHand,
            late: Late::new(),
            watching: Watching::default(),
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
                let (table, late, version) = match listed {
                    Ok(listed) => listed,
                    Err(failure) => {
                        // Perhaps the server can't be as new as we want: its store was restored.
                        place.least = Least::Newest;
                        return Err(Ended::Failed(failure));
                    }
                };
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
        let path = watch_path(&version);
        place.watching.since = Some(Instant::now());
        let mut events = self.connection.watch(&path).await?.without_bulk();
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
            let outcome = match timeout_at(until, self.json(events)).await {
                Ok(Ok(event)) => match place.take(event, self) {
                    Ok(news) => {
                        if news || place.watching.proven() {
                            due.get_or_insert_with(|| Instant::now() + TOGETHER);
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

    /// The text of the next event of a watch. May be dropped and called again.
    async fn json(&self, events: &mut Objects<'_>) -> Result<Vec<u8>, Ended> {
        match events.next().await {
            Ok(Some(json)) => Ok(json),
            Ok(None) if events.rest().is_empty() => Err(Ended::Closed),
            Ok(None) => Err(self.connection.away("it answers a watch with something else".into()).into()),
            Err(failure) => {
                tracing::debug!(error = %failure.error, "a watch broke off");
                Err(Ended::Closed)
            }
        }
    }

    /// What an event says, unless it is the end of the watch.
    fn event(&self, json: Vec<u8>) -> Result<Event, Ended> {
        let event = Event::read(json).map_err(|text| {
            self.connection.away(format!("it answers a watch with something else: {}", shortened(&text)))
        })?;
        if event.kind != Kind::Error {
            return Ok(event);
        }
        // Nearly always: this version is too old. For any other reason the same version won't do either.
        tracing::debug!(status = %shortened(&String::from_utf8_lossy(event.object())), "a watch was ended");
        Err(Ended::Outdated)
    }

    /// All nodes that Flannel manages, and the version as of which these are all.
    async fn list(&self, before: &Table, least: &Least) -> Result<(Table, Late, String), Failure> {
        let first = match least {
            Least::AtHand => format!("{NODES}?limit={PAGE}&resourceVersion=0"),
            Least::Seen(version) => format!(
                "{NODES}?limit={PAGE}&resourceVersion={}&resourceVersionMatch=NotOlderThan",
                encoded(version)
            ),
            Least::Newest => format!("{NODES}?limit={PAGE}"),
        };
        match self.pages(before, first).await {
            // The listing took longer than the server remembers: in one piece then, for there is no
            // hurry between the pieces of one answer.
            Err(failure) if failure.status == 410 => self.pages(before, NODES.to_owned()).await,
            outcome => outcome,
        }
    }

    async fn pages(&self, before: &Table, first: String) -> Result<(Table, Late, String), Failure> {
        let families = self.families();
        let (mut table, mut late) = (Table::default(), Late::new());
        let mut path = first;
        loop {
            let mut objects = self.connection.list(&path).await?.without_bulk();
            while let Some(json) = objects.next_soon().await? {
                let node = self.node(&json)?;
                let (name, seen) = (node.metadata.name.as_ref(), node.entry(&self.prefix, families));
                if !self.is_own(name) && before.lacks(name, seen.as_ref(), &node) {
                    table.keep(name, before);
                    late.insert(name.into(), (Instant::now() + GRACE, seen));
                } else {
                    table.put(name, seen, Some(before));
                }
            }
            let page = self.page(&objects)?;
            if page.next.is_empty() {
                return Ok((table, late, page.version));
            }
            path = format!("{NODES}?limit={PAGE}&continue={}", encoded(&page.next));
        }
    }

    fn is_own(&self, name: &str) -> bool {
        self.name.get().is_some_and(|own| own == name)
    }

    fn node<'a>(&self, json: &'a [u8]) -> Result<Node<'a>, Failure> {
        serde_json::from_slice(json)
            .map_err(|error| self.connection.away(format!("a node that can't be read: {error}")))
    }

    /// What a list says about itself.
    pub(super) fn page(&self, objects: &Objects<'_>) -> Result<Page, Failure> {
        #[derive(Deserialize)]
        struct Envelope {
            metadata: Page,
        }
        match serde_json::from_slice::<Envelope>(objects.rest()) {
            Ok(envelope) => Ok(envelope.metadata),
            Err(_) => Err(self.connection.away("it answers a list with something else".into())),
        }
    }
}

impl Place {
    /// The next listing has to be at least as new as what is known.
    fn outdated(&mut self) {
        self.version = None;
    }

    /// Publishes what is known: with what is wrong with watches, as long as they bring nothing.
    fn publish(&self, feed: &Feed) {
        match self.watching.why.as_ref().filter(|_| self.watching.fruitless > 0) {
            Some(why) => feed.share_in_trouble(&self.table.leases(), why),
            None => feed.snapshot(&self.table.leases()),
        }
    }

    /// Takes note of how a watch has ended.
    fn watch_ended(&mut self, ended: &Ended, kube: &Kube) {
        let watching = &mut self.watching;
        let Some(since) = watching.since.take() else { return };
        if std::mem::take(&mut watching.heard)
            || since.elapsed() >= SOON
            || matches!(ended, Ended::Refamilied)
        {
            return;
        }
        watching.fruitless += 1;
        let patient = match ended {
            Ended::Failed(failure) => {
                watching.why = Some(failure.error.clone());
                matches!(failure.status, 429 | 500..)
            }
            _ if watching.fruitless >= FRUITLESS => {
                let why = "its watches of nodes end at once and bring nothing: they are listed again and again instead";
                watching.why = Some(kube.connection.away(why.into()).error);
                false
            }
            // One connection may break at any time.
            Ended::Closed => watching.fruitless < 2,
            _ => false,
        };
        // A server that has too much to do is not asked for more before it goes on like that.
        if !patient || watching.fruitless >= FRUITLESS {
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

    /// Takes an event in; whether it changes any lease.
    fn take(&mut self, json: Vec<u8>, kube: &Kube) -> Result<bool, Ended> {
        #[derive(Deserialize)]
        struct Watched<'a> {
            #[serde(borrow, rename = "type")]
            kind: &'a str,
            #[serde(borrow)]
            object: Node<'a>,
        }
        let (kind, node) = match serde_json::from_slice::<Watched<'_>>(&json) {
            Ok(Watched { kind, object }) if Kind::of(kind) != Kind::Error => (Kind::of(kind), object),
            // Decoded as a node in one go, for nearly all are heartbeats. This one is something else.
            outcome => {
                let why = outcome.err().map(|error| format!("an event: {}", shortened(&error.to_string())));
                let why = why.unwrap_or_default();
                kube.event(json)?;
                return Err(kube.connection.away(why).into());
            }
        };
        let name = node.metadata.name.as_ref();
        let news = match kind {
            Kind::Put => self.put(&node, kube),
            Kind::Deleted => {
                self.late.remove(name);
                self.table.remove(name)
            }
            Kind::Error | Kind::Other => false,
        };
        self.watching.heard = true;
        if !node.metadata.resource_version.is_empty() {
            self.version = Some(node.metadata.resource_version.to_string());
            self.least = Least::Seen(node.metadata.resource_version.into_owned());
        }
        Ok(news)
    }
}

impl Watching {
    /// When the present watch has lived for long enough, if those before it have not.
    fn proof(&self) -> Option<Instant> {
        self.since.filter(|_| self.fruitless > 0).map(|since| since + SOON)
    }

    /// The present watch is a good one. Says whether that is news.
    fn proven(&mut self) -> bool {
        self.why = None;
        std::mem::take(&mut self.fruitless) > 0
    }
}

/// An event of a watch.
pub(super) struct Event {
    pub(super) kind: Kind,
    json: Vec<u8>,
    object: Range<usize>,
}

/// What an event says of its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is like this now: `ADDED` or `MODIFIED`.
    Put,
    Deleted,
    /// It is no object, but the reason why the watch ends.
    Error,
    /// A bookmark, or what is not known yet.
    Other,
}

impl Kind {
    fn of(text: &str) -> Self {
        match text {
            "ADDED" | "MODIFIED" => Self::Put,
            "DELETED" => Self::Deleted,
            "ERROR" => Self::Error,
            _ => Self::Other,
        }
    }
}

impl Event {
    /// The event, or its text if it is none.
    fn read(json: Vec<u8>) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Parts<'a> {
            #[serde(borrow, rename = "type")]
            kind: &'a str,
            #[serde(borrow)]
            object: &'a RawValue,
        }
        let Ok(parts) = serde_json::from_slice::<Parts<'_>>(&json) else {
            return Err(String::from_utf8_lossy(&json).into_owned());
        };
        let kind = Kind::of(parts.kind);
        // Where in the text it is, so that the text need not be read again to find it.
        let object = parts.object.get();
        let from = object.as_ptr().addr() - json.as_ptr().addr();
        let object = from..from + object.len();
        Ok(Self { kind, json, object })
    }

    /// Its object, as it came.
    pub(super) fn object(&self) -> &[u8] {
        &self.json[self.object.clone()]
    }
}

/// What a page of a list says about itself.
#[derive(Debug, Deserialize)]
pub(super) struct Page {
    #[serde(rename = "resourceVersion", default)]
    pub(super) version: String,
    #[serde(rename = "continue", default)]
    next: String,
}

/// A watch of nodes after `version`, which the server ends after 5 to 10 minutes.
pub(super) fn watch_path(version: &str) -> String {
    let seconds = 300 + random_below(300);
    format!(
        "{NODES}?watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={}",
        encoded(version)
    )
}

/// Fit for a query.
pub(super) fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Waits for the next event of a watch for as long as a living one may be silent.
pub(super) async fn heard(kube: &Kube, events: &mut Objects<'_>) -> Result<Event, Ended> {
    match timeout(SILENCE, kube.json(events)).await {
        Ok(json) => kube.event(json?),
        Err(_) => Err(Ended::Closed),
    }
}
