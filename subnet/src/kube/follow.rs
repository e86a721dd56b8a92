//! All leases, from the API server to the feed: list, watch from there, and list again when the watch
//! can't be continued. Heartbeats of nodes, which are most of what a watch brings, end at the table.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, timeout, timeout_at};

use super::Kube;
use super::connection::{Failure, Objects};
use super::node::Node;
use super::table::Table;
use crate::net::Family;
use crate::pace::Backoff;
use crate::store::{Feed, random_below};

/// Nodes per page, where the server cares for it.
const PAGE: usize = 500;
/// The server sends a bookmark about once a minute, so a watch that is silent for this long is dead.
pub(super) const SILENCE: Duration = Duration::from_secs(150);
/// Changes that follow on another within this time make one snapshot.
const TOGETHER: Duration = Duration::from_millis(50);

/// A server that answers, but can't do what it is asked, has too much to do already.
const BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

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
        let mut place = Place { table: Table::default(), version: None, least: Least::AtHand };
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
                let (table, version) = match listed {
                    Ok(listed) => listed,
                    Err(failure) => {
                        // Perhaps the server can't be as new as we want: its store was restored.
                        place.least = Least::Newest;
                        return Err(Ended::Failed(failure));
                    }
                };
                place.table = table;
                place.version = Some(version.clone());
                place.least = Least::Seen(version.clone());
                feed.snapshot(&place.table.leases());
                version
            }
        };
        let path = watch_path(&version);
        let mut events = self.connection.watch(&path).await?.without_bulk();
        // Ends the trouble that there may have been.
        feed.snapshot(&place.table.leases());
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
            let until = due.unwrap_or_else(|| Instant::now() + SILENCE);
            let outcome = match timeout_at(until, self.json(events)).await {
                Ok(Ok(event)) => match place.take(event, self) {
                    Ok(true) => {
                        due.get_or_insert_with(|| Instant::now() + TOGETHER);
                        Ok(())
                    }
                    Ok(false) => Ok(()),
                    Err(ended) => Err(ended),
                },
                Ok(Err(ended)) => Err(ended),
                Err(_) if due.is_some() => Ok(()),
                Err(_) => Err(Ended::Closed),
            };
            if let Some(at) = due
                && (outcome.is_err() || at <= Instant::now())
            {
                feed.snapshot(&place.table.leases());
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
        let event = Event::read(json).map_err(|error| self.connection.away(format!("an event: {error}")))?;
        if event.kind != Kind::Error {
            return Ok(event);
        }
        // Nearly always: this version is too old. Whatever else it is, the same version won't do.
        tracing::debug!(status = %String::from_utf8_lossy(event.object()), "a watch was ended");
        Err(Ended::Outdated)
    }

    /// All nodes that Flannel manages, and the version as of which these are all.
    async fn list(&self, before: &Table, least: &Least) -> Result<(Table, String), Failure> {
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

    async fn pages(&self, before: &Table, first: String) -> Result<(Table, String), Failure> {
        let families = self.families();
        let mut table = Table::default();
        let mut path = first;
        loop {
            let mut objects = self.connection.list(&path).await?.without_bulk();
            while let Some(json) = objects.next_soon().await? {
                let node = self.node(&json)?;
                table.put(&node.metadata.name, node.entry(&self.prefix, families), Some(before));
            }
            let page = self.page(&objects)?;
            if page.next.is_empty() {
                return Ok((table, page.version));
            }
            path = format!("{NODES}?limit={PAGE}&continue={}", encoded(&page.next));
        }
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
                let why = outcome.err().map(|error| format!("an event: {error}")).unwrap_or_default();
                kube.event(json)?;
                return Err(kube.connection.away(why).into());
            }
        };
        let name = node.metadata.name.as_ref();
        let news = match kind {
            Kind::Put => self.table.put(name, node.entry(&kube.prefix, kube.families()), None),
            Kind::Deleted => self.table.remove(name),
            Kind::Error | Kind::Other => false,
        };
        if !node.metadata.resource_version.is_empty() {
            self.version = Some(node.metadata.resource_version.to_string());
            self.least = Least::Seen(node.metadata.resource_version.into_owned());
        }
        Ok(news)
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
    fn read(json: Vec<u8>) -> serde_json::Result<Self> {
        #[derive(Deserialize)]
        struct Parts<'a> {
            #[serde(borrow, rename = "type")]
            kind: &'a str,
            #[serde(borrow)]
            object: &'a RawValue,
        }
        let parts: Parts<'_> = serde_json::from_slice(&json)?;
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
