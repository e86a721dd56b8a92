//! The objects of an answer of the API server, one by one while it arrives.

use http::{Method, Response, header};
use http_body_util::BodyExt;
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::timeout;

use super::coalesce::{Coalesced, Coalescing};
use super::connection::{Connection, Failure, OBJECTS, PART_WITHIN, PROTOBUF};
use super::frames::Frames;
use super::split::{Bulk, Splitter, Unintelligible};

impl Connection {
    /// Begins to read a list.
    pub(super) async fn list(&self, path: &str) -> Result<Objects<'_>, Failure> {
        let moves = self.moves();
        let answer = self.send(Method::GET, path, OBJECTS, None).await?;
        Ok(Objects::new(self, answer, Cutter::Json(Splitter::list()), moves))
    }

    /// Begins to watch objects in the form that `accept` asks for.
    pub(super) async fn watch(&self, path: &str, accept: &'static str) -> Result<Objects<'_>, Failure> {
        let moves = self.moves();
        let answer = match self.send(Method::GET, path, accept, None).await {
            // Something between this node and the server knows no other form.
            Err(failure) if failure.status == 406 && accept != OBJECTS => {
                self.send(Method::GET, path, OBJECTS, None).await?
            }
            outcome => outcome?,
        };
        let form = answer.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let form = form.and_then(|text| text.split(';').next()).unwrap_or_default();
        let cutter = match form.trim().eq_ignore_ascii_case(PROTOBUF) {
            true => Cutter::Protobuf(Frames::default()),
            false => Cutter::Json(Splitter::sequence()),
        };
        Ok(Objects::new(self, answer, cutter, moves))
    }
}

/// How an answer is cut, by its encoding.
enum Cutter {
    Json(Splitter),
    Protobuf(Frames),
}

impl Cutter {
    fn push(&mut self, bytes: &[u8]) -> Result<(), Unintelligible> {
        match self {
            Self::Json(splitter) => splitter.push(bytes),
            Self::Protobuf(frames) => frames.push(bytes),
        }
    }

    /// The next object that is complete, and what was set aside of it.
    fn next(&mut self) -> Option<(Vec<u8>, Vec<u8>)> {
        match self {
            Self::Json(splitter) => splitter.next().map(|object| (object.json, object.aside)),
            Self::Protobuf(frames) => frames.next().map(|event| (event, Vec::new())),
        }
    }
}

/// How the objects of an answer are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Json,
    Protobuf,
}

/// The objects of a list or the events of a watch, as they arrive.
pub(super) struct Objects<'a> {
    connection: &'a Connection,
    body: Body,
    cutter: Cutter,
    /// Whether what came was said to be protobuf and can't be.
    undecodable: bool,
    /// What was set aside of the last object.
    aside: Vec<u8>,
    /// This node's addresses.
    moves: watch::Receiver<u64>,
    /// How the connection is told to be read in a coalesced way.
    coalescing: Option<Coalescing>,
    coalesced: Option<Coalesced>,
}

impl<'a> Objects<'a> {
    fn new(
        connection: &'a Connection,
        answer: Response<Body>,
        cutter: Cutter,
        moves: watch::Receiver<u64>,
    ) -> Self {
        let coalescing = answer.extensions().get().cloned();
        let (body, aside) = (answer.into_body(), Vec::new());
        Self { connection, body, cutter, undecodable: false, aside, moves, coalescing, coalesced: None }
    }

    /// The same with what comes in quick succession read together, so that it wakes seldom.
    pub(super) fn coalesced(mut self) -> Self {
        self.coalesced = self.coalescing.take().map(Coalesced::new);
        self
    }

    /// Whether what comes has been collected already.
    pub(super) fn is_deferred(&self) -> bool {
        self.coalesced.as_ref().is_some_and(Coalesced::is_deferred)
    }

    /// What was read has changed something, so that what comes next is not to wait for long.
    pub(super) fn has_news(&self) {
        if let Some(coalesced) = &self.coalesced {
            coalesced.has_news();
        }
    }

    /// Whether what came was said to be protobuf and can't be.
    pub(super) fn is_undecodable(&self) -> bool {
        self.undecodable
    }

    /// How they are encoded.
    pub(super) fn encoding(&self) -> Encoding {
        match self.cutter {
            Cutter::Json(_) => Encoding::Json,
            Cutter::Protobuf(_) => Encoding::Protobuf,
        }
    }

    /// The same without this of each object, as far as it is JSON. Before the first.
    pub(super) fn without(mut self, bulk: Bulk) -> Self {
        if let Cutter::Json(splitter) = self.cutter {
            self.cutter = Cutter::Json(splitter.without(bulk));
        }
        self
    }

    /// The next object; `None` at the end. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if let Some((object, aside)) = self.cutter.next() {
                self.aside = aside;
                return Ok(Some(object));
            }
            let frame = tokio::select! {
                biased;
                frame = self.body.frame() => frame,
                _ = self.moves.changed() => return Err(self.connection.moved()),
            };
            let frame = match frame {
                None => return Ok(None),
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Err(self.connection.meaning(&error)),
            };
            if let Some(data) = frame.data_ref()
                && let Err(error) = self.cutter.push(data)
            {
                self.undecodable = self.encoding() == Encoding::Protobuf;
                return Err(self.connection.away(error.to_string()));
            }
        }
    }

    /// Like [`next`](Self::next), with an error where nothing comes.
    pub(super) async fn next_soon(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        match timeout(PART_WITHIN, self.next()).await {
            Ok(next) => next,
            Err(_) => Err(self.connection.away("an answer has no end".into())),
        }
    }

    /// What was set aside of the last object; empty if it had nothing of the kind.
    pub(super) fn aside(&self) -> &[u8] {
        &self.aside
    }

    /// What stood around the objects.
    pub(super) fn rest(&self) -> &[u8] {
        match &self.cutter {
            Cutter::Json(splitter) => splitter.rest(),
            Cutter::Protobuf(_) => &[],
        }
    }
}
