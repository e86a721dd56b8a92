//! One question to the agent and its answer: a line of JSON each way, over a connection of its own.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use subnet::gojson;

/// More than any answer has.
const MAX_ANSWER: usize = 64 << 10;

/// What the agent says to a question.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is done.
    Done,
    /// And connections from before the pod are forgotten.
    Forgotten,
    /// It can't be done now.
    NotYet(String),
    /// The question makes no sense to the agent.
    Refused(String),
}

impl Answer {
    /// Reads a line. `None` for what is no answer of this protocol.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let Ok(Value::Object(object)) = serde_json::from_slice(line) else { return None };
        let is = |key: &str| object.get(key) == Some(&Value::Bool(true));
        let text = |key: &str| object.get(key).and_then(Value::as_str).map(gojson::shortened);
        if is("ok") {
            Some(if is("forgotten") { Self::Forgotten } else { Self::Done })
        } else if is("retry") {
            Some(Self::NotYet(text("why").unwrap_or_else(|| "it gives no reason".into())))
        } else {
            text("error").map(Self::Refused)
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Trouble {
    /// No process listens.
    Away(String, io::Error),
    /// The answer did not come in time.
    Silent,
    /// The connection ended without an answer.
    Closed,
    /// It failed.
    Broken(io::Error),
    /// What came is no answer.
    Garbage(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(path, error) => write!(f, "flanneld does not listen on {path}: {error}"),
            Self::Silent => f.write_str("flanneld does not answer"),
            Self::Closed => f.write_str("flanneld closed the connection without an answer"),
            Self::Broken(error) => write!(f, "the connection to flanneld failed: {error}"),
            Self::Garbage(said) => write!(f, "flanneld's answer makes no sense: {said:?}"),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Broken(error),
        }
    }
}

/// A question that is on its way, and whose answer was not read yet.
pub(super) struct Asked(Socket);

impl Asked {
    /// Asks a question; waits `limit` at most until it is sent.
    pub(super) fn send(path: &Path, request: &Value, limit: Duration) -> Result<Self, Trouble> {
        let away = |error| Trouble::Away(path.display().to_string(), error);
        let mut socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.connect_timeout(&SockAddr::unix(path)?, limit).map_err(away)?;
        socket.set_write_timeout(Some(limit))?;
        socket.write_all(format!("{request}\n").as_bytes())?;
        Ok(Self(socket))
    }

    /// Reads the answer; waits `limit` at most.
    pub(super) fn answer(self, limit: Duration) -> Result<Answer, Trouble> {
        let deadline = Instant::now() + limit;
        let Self(mut socket) = self;
        let mut line = Vec::new();
        let mut part = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let length = match socket.read(&mut part) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            line.extend(&part[..length]);
            match line.iter().position(|byte| *byte == b'\n') {
                Some(end) => line.truncate(end),
                None if length == 0 && line.is_empty() => return Err(Trouble::Closed),
                None if length == 0 || line.len() > MAX_ANSWER => {}
                None if Instant::now() >= deadline => return Err(Trouble::Silent),
                None => continue,
            }
            let garbage = || Trouble::Garbage(gojson::shortened(&String::from_utf8_lossy(&line)));
            return Answer::parse(&line).ok_or_else(garbage);
        }
    }
}

/// Asks one question, and waits `limit` at most for the answer.
pub(super) fn ask(path: &Path, request: &Value, limit: Duration) -> Result<Answer, Trouble> {
    let deadline = Instant::now() + limit;
    let asked = Asked::send(path, request, limit.max(Duration::from_millis(1)))?;
    asked.answer(deadline.saturating_duration_since(Instant::now()))
}
