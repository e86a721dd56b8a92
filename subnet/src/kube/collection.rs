//! A collection of objects at the API server: listed in pages, watched from there, and how watches end.

use std::ops::Range;
use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout};

use super::connection::{Connection, Failure, METADATA, METADATA_IN_JSON, OBJECTS};
use super::objects::{Encoding, Objects};
use super::split::Bulk;
use crate::store::{StoreError, random_below};
use crate::text::shortened;

/// Objects per page, where the server cares for it.
const PAGE: usize = 500;
/// The server sends a bookmark about once a minute, so a watch that is silent for this long is dead.
pub(super) const SILENCE: Duration = Duration::from_secs(150);
/// A watch that ends sooner than this and brought nothing may never bring anything: the objects are listed again.
const SOON: Duration = Duration::from_secs(10);
/// So many such watches in a row are worth a word, although each for itself may have a good reason.
const FRUITLESS: u32 = 3;

/// Objects of one kind, all of them or those that a selector selects.
#[derive(Clone, Debug)]
pub(super) struct Collection {
    path: String,
    /// `fieldSelector=...`, fit for a query.
    selector: Option<String>,
    bulk: Bulk,
    /// The form that watches ask for.
    accept: &'static str,
}

impl Collection {
    /// All objects under `path`, without what is `bulk`.
    pub(super) fn new(path: impl Into<String>, bulk: Bulk) -> Self {
        Self { path: path.into(), selector: None, bulk, accept: OBJECTS }
    }

    /// Of which a watch brings the metadata alone, where the server can do that.
    pub(super) fn metadata(self, encoding: Encoding) -> Self {
        let accept = match encoding {
            Encoding::Protobuf => METADATA,
            Encoding::Json => METADATA_IN_JSON,
        };
        Self { accept, ..self }
    }

    /// Those of them whose field has this value.
    pub(super) fn selected(self, field: &str, value: &str) -> Self {
        Self { selector: Some(format!("fieldSelector={field}%3D{}", encoded(value))), ..self }
    }

    fn with(&self, query: &str) -> String {
        let parts = [self.selector.as_deref().unwrap_or_default(), query];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let mark = if parts.is_empty() { "" } else { "?" };
        format!("{}{mark}{}", self.path, parts.join("&"))
    }

    /// A watch after `version`, which the server ends after 5 to 10 minutes.
    fn watch_path(&self, version: &str) -> String {
        let seconds = 300 + random_below(300);
        let version = encoded(version);
        self.with(&format!(
            "watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={version}"
        ))
    }
}

/// How new a listing has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Least {
    /// As the server has it at hand; what it lacks follows by the watch. Asking for more would make the
    /// server read all nodes from its store for each of thousands of agents that start together.
    AtHand,
    /// Not older than what was seen already.
    Seen(String),
    /// The newest there is.
    Newest,
}

impl Least {
    fn query(&self) -> String {
        match self {
            Self::AtHand => format!("limit={PAGE}&resourceVersion=0"),
            Self::Seen(version) => {
                let version = encoded(version);
                format!("limit={PAGE}&resourceVersion={version}&resourceVersionMatch=NotOlderThan")
            }
            Self::Newest => format!("limit={PAGE}"),
        }
    }
}

/// A list that is read page by page.
pub(super) struct Pages<'a> {
    connection: &'a Connection,
    collection: Collection,
    query: String,
    objects: Option<Objects<'a>>,
    /// The version as of which these are all, once everything is read.
    pub(super) version: String,
}

impl Pages<'_> {
    /// The next object; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            let objects = match &mut self.objects {
                Some(objects) => objects,
                none => {
                    let objects = self.connection.list(&self.collection.with(&self.query)).await?;
                    none.insert(objects.without(self.collection.bulk))
                }
            };
            if let Some(json) = objects.next_soon().await? {
                return Ok(Some(json));
            }
            let page = self.connection.page(objects)?;
            if page.next.is_empty() {
                self.version = page.version;
                return Ok(None);
            }
            self.query = format!("limit={PAGE}&continue={}", encoded(&page.next));
            self.objects = None;
        }
    }
}

impl Connection {
    /// Reads a collection, as new as is asked for.
    pub(super) fn pages(&self, collection: &Collection, least: &Least) -> Pages<'_> {
        self.begin(collection, least.query())
    }

    /// Reads the newest in one piece.
    pub(super) fn one_page(&self, collection: &Collection) -> Pages<'_> {
        self.begin(collection, String::new())
    }

    fn begin(&self, collection: &Collection, query: String) -> Pages<'_> {
        let collection = collection.clone();
        Pages { connection: self, collection, query, objects: None, version: String::new() }
    }

    /// Begins to watch what happens after `version`.
    pub(super) async fn watch_from(
        &self,
        collection: &Collection,
        version: &str,
    ) -> Result<Objects<'_>, Failure> {
        let events = self.watch(&collection.watch_path(version), collection.accept).await?;
        Ok(events.without(collection.bulk))
    }

    /// The text of the next event of a watch. May be dropped and called again.
    pub(super) async fn event_text(&self, events: &mut Objects<'_>) -> Result<Vec<u8>, Ended> {
        match events.next().await {
            Ok(Some(json)) => Ok(json),
            Ok(None) if events.rest().is_empty() => Err(Ended::Closed),
            Ok(None) => Err(self.away("it answers a watch with something else".into()).into()),
            Err(failure) if events.is_undecodable() => Err(Ended::Undecodable(failure)),
            Err(failure) => {
                tracing::debug!(error = %failure.error, "a watch broke off");
                Err(Ended::Closed)
            }
        }
    }

    /// What an event says, unless it is the end of the watch.
    pub(super) fn event(&self, json: Vec<u8>) -> Result<Event, Ended> {
        let event = Event::read(json).map_err(|text| {
            self.away(format!("it answers a watch with something else: {}", shortened(&text)))
        })?;
        if event.kind != Kind::Error {
            return Ok(event);
        }
        // Nearly always: this version is too old. For any other reason the same version won't do either.
        tracing::debug!(status = %shortened(&String::from_utf8_lossy(event.object())), "a watch was ended");
        Err(Ended::Outdated)
    }

    /// Waits for the next event of a watch for as long as a living one may be silent.
    pub(super) async fn heard(&self, events: &mut Objects<'_>) -> Result<Event, Ended> {
        match timeout(SILENCE, self.event_text(events)).await {
            Ok(json) => self.event(json?),
            Err(_) => Err(Ended::Closed),
        }
    }

    /// What a list says about itself.
    pub(super) fn page(&self, objects: &Objects<'_>) -> Result<ListPage, Failure> {
        #[derive(Deserialize)]
        struct Envelope {
            metadata: ListPage,
        }
        match serde_json::from_slice::<Envelope>(objects.rest()) {
            Ok(envelope) => Ok(envelope.metadata),
            Err(_) => Err(self.away("it answers a list with something else".into())),
        }
    }
}

/// How watches fare.
#[derive(Default)]
pub(super) struct Watching {
    /// When the present one began.
    since: Option<Instant>,
    /// It was asked for, and there was no answer yet.
    asking: bool,
    /// Whether it has brought anything.
    heard: bool,
    /// How many in a row ended soon and brought nothing.
    fruitless: u32,
    /// Why, once that is worth a word.
    why: Option<StoreError>,
}

/// How to go on after a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Continue {
    /// By a watch from the version that was seen last.
    Watching,
    /// By a new list.
    Listing,
}

impl Watching {
    /// A watch is asked for now.
    pub(super) fn asks(&mut self) {
        (self.since, self.asking) = (Some(Instant::now()), true);
    }

    /// A watch begins now.
    pub(super) fn begins(&mut self) {
        (self.since, self.asking) = (Some(Instant::now()), false);
    }

    /// A list failed: it is the server that is in trouble, and not its watches alone.
    pub(super) fn list_failed(&mut self) {
        (self.why, self.fruitless) = (None, 0);
    }

    /// The present watch has brought something.
    pub(super) fn hears(&mut self) {
        self.heard = true;
    }

    /// What is wrong with watches, as long as they bring nothing.
    pub(super) fn why(&self) -> Option<&StoreError> {
        self.why.as_ref().filter(|_| self.fruitless > 0)
    }

    /// Takes note of how a watch of such objects has ended.
    pub(super) fn ended(&mut self, ended: &Ended, connection: &Connection, objects: &str) -> Continue {
        let Some(since) = self.since.take() else { return Continue::Watching };
        if std::mem::take(&mut self.heard) || since.elapsed() >= SOON || matches!(ended, Ended::Refamilied) {
            return Continue::Watching;
        }
        if self.asking && matches!(ended, Ended::Failed(failure) if failure.status == 0) {
            // The server is away, and that says nothing about its watches.
            return Continue::Listing;
        }
        self.fruitless += 1;
        let patient = match ended {
            Ended::Failed(failure) => {
                self.why = Some(failure.error.clone());
                matches!(failure.status, 429 | 500..)
            }
            _ if self.fruitless >= FRUITLESS => {
                let why = format!(
                    "its watches of {objects} end at once and bring nothing: they are listed again and again instead"
                );
                self.why = Some(connection.away(why).error);
                false
            }
            // One connection may break at any time.
            Ended::Closed => self.fruitless < 2,
            _ => false,
        };
        // A server that has too much to do is not asked for more before it goes on like that.
        if patient && self.fruitless < FRUITLESS { Continue::Watching } else { Continue::Listing }
    }

    /// When the present watch has lived for long enough, if those before it have not.
    pub(super) fn proof(&self) -> Option<Instant> {
        self.since.filter(|_| self.fruitless > 0).map(|since| since + SOON)
    }

    /// The present watch is a good one. Says whether that is news.
    pub(super) fn proven(&mut self) -> bool {
        self.why = None;
        std::mem::take(&mut self.fruitless) > 0
    }
}

/// Why a watch ended.
pub(super) enum Ended {
    /// It is to be continued: its time was over, or nothing was heard, or the connection broke.
    Closed,
    /// It can't be continued.
    Outdated,
    /// Other families are in force now.
    Refamilied,
    /// What came was said to be protobuf and could not be decoded.
    Undecodable(Failure),
    /// The store failed.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        if failure.status == 410 { Self::Outdated } else { Self::Failed(failure) }
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
    pub(super) fn of(text: &str) -> Self {
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
pub(super) struct ListPage {
    #[serde(rename = "resourceVersion", default)]
    pub(super) version: String,
    #[serde(rename = "continue", default)]
    next: String,
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
