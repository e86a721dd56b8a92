//! The other end of the policy socket: one question and its answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// The agent asks the API server about pods, and answers within this time.
const TIMEOUT: Duration = Duration::from_secs(15);
/// More than any answer has.
const MAX_ANSWER: u64 = 16 << 20;

/// The text of an answer.
///
/// # Errors
/// Why there is none.
pub(super) fn ask(socket: &Path, request: &Value) -> anyhow::Result<String> {
    let line = exchange(socket, request)
        .with_context(|| format!("flanneld does not answer at {}", socket.display()))?;
    let answer: Value = serde_json::from_slice(&line).context("flanneld's answer makes no sense")?;
    let text = |key: &str| answer[key].as_str().map(str::to_owned);
    if let Some(error) = text("error").or_else(|| text("why")) {
        bail!("{error}");
    }
    text("text").ok_or_else(|| anyhow!("flanneld's answer makes no sense: it has no text"))
}

fn exchange(socket: &Path, request: &Value) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER)).read_until(b'\n', &mut line)?;
    Ok(line)
}
