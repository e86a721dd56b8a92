//! The socket at which the CNI plugin asks for a pod's policies before the pod starts, and `flanneld policy` for
//! explanations: one line of JSON each way on each connection.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream as Blocking;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{interval, sleep, timeout};

use super::announce::{Announcer, OldConnections};
use super::request::Question;

/// A line that is longer is no request of the plugin.
const MAX_LINE: u64 = 64 << 10;
/// Time for sending a request, and for taking the answer.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 256;
/// How often the file is looked at: one that another program removed would make every ADD fail.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Between attempts to accept when there are no file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The socket can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Another process answers there.
    #[error("{} is in use: another flanneld with this subnet file's directory listens there; give each agent a \
             directory of its own for --subnet-file", .0.display())]
    InUse(PathBuf),
    /// What is there was not made by flanneld.
    #[error("{} is {}, not a socket: remove it", .path.display(), .kind)]
    InTheWay {
        /// Where.
        path: PathBuf,
        /// What.
        kind: &'static str,
    },
    /// The path is longer than the kernel allows.
    #[error("{} is too long for a socket (at most {} bytes): choose a shorter directory for --subnet-file",
            .0.display(), subnet::env_file::MAX_SOCKET_PATH)]
    TooLong(PathBuf),
    /// The file system refuses.
    #[error("{}: {}: flanneld has to be able to make files there", .path.display(), .source)]
    Refused {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket that listens and waits to be served. Its file stays when the process ends, so that the plugin sees that an
/// agent should be there, and waits for it.
#[derive(Debug)]
pub(crate) struct PolicySocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    identity: (u64, u64),
    /// Whether it was said that the file can't be made again.
    complained: bool,
}

impl PolicySocket {
    /// Listens at `path`, for root only. A socket without a listener is replaced, in one step; a link is
    /// never followed.
    ///
    /// # Errors
    /// [`SocketError`], with the remedy.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let refused = |source: io::Error| SocketError::Refused { path: path.to_owned(), source };
        let directory = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(refused)?;
        check_vacant(path)?;
        // Made under another name: no client can connect before the mode is set, and what is at `path` is replaced.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = directory.join(format!(".{name}.new"));
        if temporary.as_os_str().len() > subnet::env_file::MAX_SOCKET_PATH {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused(error)),
            _ => {}
        }
        let made = (|| {
            let listener = UnixListener::bind(&temporary)?;
            fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
            let about = fs::symlink_metadata(&temporary)?;
            fs::rename(&temporary, path)?;
            Ok((listener, (about.dev(), about.ino())))
        })();
        let (listener, identity) = made.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            refused(error)
        })?;
        Ok(Self { listener, path: path.to_owned(), identity, complained: false })
    }

    /// Answers, for as long as the process lives.
    pub(crate) async fn run(mut self, announcer: Announcer, log_group: Option<u16>) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut look = interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                _ = look.tick() => self.look(),
                accepted = accept(&self.listener, &room) => match accepted {
                    Ok((stream, permit)) => {
                        let announcer = announcer.clone();
                        tokio::spawn(async move {
                            serve(stream, &announcer, log_group).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, path = %self.path.display(), "no connection of the CNI plugin can be accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// Sees that the file is there.
    fn look(&mut self) {
        let there = fs::symlink_metadata(&self.path);
        if there.is_ok_and(|about| (about.dev(), about.ino()) == self.identity) {
            return;
        }
        match Self::bind(&self.path) {
            Ok(again) => {
                tracing::warn!(
                    "{} was removed or replaced by another program: made again",
                    self.path.display()
                );
                *self = again;
            }
            Err(error) if !std::mem::replace(&mut self.complained, true) => {
                tracing::error!(
                    "the CNI plugin can't ask for network policies, so that no pod starts: {error}"
                );
            }
            Err(_) => {}
        }
    }
}

/// Removes the socket of an agent that does not run any more. Whether there was one.
///
/// # Errors
/// The system's.
pub(crate) fn remove(path: &Path) -> io::Result<bool> {
    match check_vacant(path) {
        Ok(SocketPlace::Stale) => fs::remove_file(path).map(|()| true),
        Ok(SocketPlace::Free) | Err(_) => Ok(false),
    }
}

/// What is at a path without a listener.
#[derive(Debug, PartialEq, Eq)]
enum SocketPlace {
    Free,
    /// The socket of an agent that is gone.
    Stale,
}

fn check_vacant(path: &Path) -> Result<SocketPlace, SocketError> {
    let about = match fs::symlink_metadata(path) {
        Ok(about) => about.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SocketPlace::Free),
        Err(source) => return Err(SocketError::Refused { path: path.to_owned(), source }),
    };
    let in_the_way = |kind| Err(SocketError::InTheWay { path: path.to_owned(), kind });
    if about.is_symlink() {
        return in_the_way("a symbolic link");
    }
    if about.is_dir() {
        return in_the_way("a directory");
    }
    if !about.is_socket() {
        return in_the_way("a file");
    }
    match Blocking::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(SocketPlace::Stale),
        Err(source) if source.kind() != io::ErrorKind::WouldBlock => {
            Err(SocketError::Refused { path: path.to_owned(), source })
        }
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

type Permit = tokio::sync::OwnedSemaphorePermit;

async fn accept(listener: &UnixListener, room: &Arc<Semaphore>) -> io::Result<(UnixStream, Permit)> {
    let permit = Arc::clone(room).acquire_owned().await.map_err(io::Error::other)?;
    Ok((listener.accept().await?.0, permit))
}

/// One question and its answer. That the other side is gone by then is its own affair: it asks again.
async fn serve(mut stream: UnixStream, announcer: &Announcer, log_group: Option<u16>) {
    let answer = match timeout(TRANSFER_TIMEOUT, line(&mut stream)).await {
        Err(_) | Ok(Err(_)) => return,
        Ok(Ok(line)) => match line.strip_suffix(b"\n") {
            Some(line) => answer(line, announcer, log_group).await,
            None if line.len() as u64 > MAX_LINE => {
                json!({"error": format!("a request has at most {MAX_LINE} bytes")})
            }
            // A plugin that was killed.
            None if line.is_empty() => return,
            None => json!({"error": "the request ends without a line break"}),
        },
    };
    let _ = timeout(TRANSFER_TIMEOUT, async {
        stream.write_all(format!("{answer}\n").as_bytes()).await?;
        stream.shutdown().await
    })
    .await;
}

async fn line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_LINE + 1)).read_until(b'\n', &mut line).await?;
    Ok(line)
}

async fn answer(line: &[u8], announcer: &Announcer, log_group: Option<u16>) -> Value {
    let question = match Question::parse(line) {
        Ok(question) => question,
        Err(why) => {
            tracing::warn!("a request at the policy socket makes no sense: {why}");
            return json!({"error": why});
        }
    };
    let text = match question {
        Question::Add(pod) => match announcer.announce(pod).await {
            Ok(OldConnections::Forgotten) => return json!({"ok": true, "forgotten": true}),
            Ok(OldConnections::Kept) => Ok(None),
            Err(retry) => Err(retry),
        },
        Question::Del(ended) => announcer.release(ended).await.map(|()| None),
        Question::Ask(inquiry) => announcer.inquire(inquiry).await.map(Some),
        Question::Status | Question::NotOurs => Ok(None),
        Question::LogGroup => match log_group {
            Some(group) => Ok(Some(group.to_string())),
            None => {
                return json!({"error": "refused packets are not logged: start flanneld with --network-policy-log=GROUP"});
            }
        },
    };
    match text {
        Ok(None) => json!({"ok": true}),
        Ok(Some(text)) => json!({"ok": true, "text": text}),
        Err(retry) => json!({"retry": true, "why": retry.why}),
    }
}

#[cfg(test)]
mod tests;
