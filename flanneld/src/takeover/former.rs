//! The side of the agent that hands over.

use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as Blocking;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::pin::{Pin, pin};
use std::process::Command;
use std::time::Duration;

use backends::Tunnels;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::{STOP, STOPPED, TakeoverAnswer, TakeoverRequest, VERSION, network_namespace, path, wire};

/// Time for a request to arrive, and for an answer to be taken.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(2);
/// Between attempts to accept when there are no file descriptors.
const PAUSE: Duration = Duration::from_secs(1);
/// How long packets are moved on after a signal, for a successor that is about to be ready.
const GRACE: Duration = Duration::from_secs(20);

/// Where a successor asks.
#[derive(Debug)]
pub(crate) struct Listener(Option<UnixListener>);

/// The successor, which waits for its answer.
#[derive(Debug)]
pub(crate) struct Successor(Blocking);

impl Listener {
    /// Listens beside the subnet file, for root only. An agent that can't listen runs nevertheless: it can be
    /// restarted, only not taken over.
    pub(crate) fn bind(subnet_file: &Path) -> Self {
        let at = path(subnet_file);
        let bind = || {
            match fs::remove_file(&at) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&at)?;
            fs::set_permissions(&at, Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        match bind() {
            Ok(listener) => Self(Some(listener)),
            Err(error) => {
                tracing::debug!("no other agent can take over from this one: {}: {error}", at.display());
                Self(None)
            }
        }
    }

    /// Waits for a successor that may take over.
    pub(crate) async fn asked(&self) -> Successor {
        let Some(listener) = &self.0 else { return std::future::pending().await };
        loop {
            let socket = match listener.accept().await {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::debug!("{error}");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            match judge(socket).await {
                Ok(successor) => return successor,
                Err(error) => tracing::warn!("somebody asked to take over and was refused: {error}"),
            }
        }
    }
}

/// Reads the request. One that can't be granted is answered with the reason.
async fn judge(socket: UnixStream) -> io::Result<Successor> {
    let user = socket.peer_cred()?.uid();
    let socket = socket.into_std()?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(TRANSFER_TIMEOUT))?;
    socket.set_write_timeout(Some(TRANSFER_TIMEOUT))?;
    let read = move || {
        let (request, _) = wire::receive::<TakeoverRequest>(&socket)?;
        match refusal(&request, user, network_namespace()?) {
            None => Ok(Successor(socket)),
            Some(why) => {
                wire::send(&socket, &TakeoverAnswer::Refused(why.clone()), &[])?;
                Err(io::Error::other(why))
            }
        }
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

/// Why this request can't be granted.
fn refusal(request: &TakeoverRequest, user: u32, network_namespace: u64) -> Option<String> {
    if user != 0 {
        return Some(format!("only root may take over from this agent, not user {user}"));
    }
    if request.take_over != VERSION {
        let asked = request.take_over;
        return Some(format!(
            "this flanneld hands over by version {VERSION} and is asked for version {asked}: stop it first"
        ));
    }
    (request.network_namespace != network_namespace).then(|| {
        "this flanneld is in another network namespace: give the other agent a subnet file of its own"
            .to_owned()
    })
}

impl Successor {
    /// Hands the tunnels over and returns when this process is told to end. It has already let go of everything else.
    ///
    /// # Errors
    /// The successor ended before it took over, and this process can't start again.
    pub(crate) fn hand_over(self, tunnels: &Tunnels) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        match runtime.block_on(self.serve(tunnels)) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::warn!("the agent that was to take over is gone ({error}): starting again");
                match again()? {}
            }
        }
    }

    async fn serve(self, tunnels: &Tunnels) -> io::Result<()> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let files = tunnels.files()?;
        let (parts, descriptors) = wire::parts(&files);
        wire::send(&self.0, &TakeoverAnswer::Tunnels(parts), &descriptors)?;
        drop(descriptors);
        drop(files);
        self.0.set_nonblocking(true)?;
        let mut socket = UnixStream::from_std(self.0)?;
        let mut ended = pin!(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        let told_to_end = match last_word(&mut socket, ended.as_mut()).await? {
            Last::Stop { told_to_end } => told_to_end,
            Last::Nothing => return Ok(()),
        };
        tunnels.stop();
        let _ = socket.write_all(STOPPED).await;
        drop(socket);
        tracing::info!("another agent has taken over; this process does nothing but wait to be stopped");
        if !told_to_end {
            ended.await;
        }
        Ok(())
    }
}

/// What the successor says last.
#[derive(Debug)]
enum Last {
    /// That it is ready; meanwhile this process may have been told to end.
    Stop { told_to_end: bool },
    /// Nothing, and this process is told to end.
    Nothing,
}

/// Waits for it. When this process is told to end, the successor is about to start, and pods need their packets until
/// then, for some time.
///
/// # Errors
/// The successor is gone, or says something else.
async fn last_word(socket: &mut UnixStream, ended: Pin<&mut impl Future<Output = ()>>) -> io::Result<Last> {
    let mut told = pin!(async {
        let mut word = [0; STOP.len()];
        socket.read_exact(&mut word).await?;
        if word == STOP { Ok(()) } else { Err(io::Error::other("it does not say that it is ready")) }
    });
    tokio::select! {
        said = &mut told => said.map(|()| Last::Stop { told_to_end: false }),
        () = ended => tokio::select! {
            said = &mut told => Ok(said.map_or(Last::Nothing, |()| Last::Stop { told_to_end: true })),
            () = sleep(GRACE) => Ok(Last::Nothing),
        },
    }
}

/// Becomes a new process with the same arguments: the way back, which is that of every start.
fn again() -> anyhow::Result<Infallible> {
    // The program may have been replaced or removed meanwhile.
    let error = Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec();
    Err(anyhow::Error::new(error).context("/proc/self/exe"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_granted_to_root_in_the_same_network_namespace_and_version() {
        let request = |take_over, network_namespace| TakeoverRequest { take_over, network_namespace };
        assert_eq!(refusal(&request(VERSION, 5), 0, 5), None);
        for (request, user, words) in [
            (request(VERSION, 5), 1000, "user 1000"),
            (request(VERSION + 1, 5), 0, "version 2"),
            (request(VERSION, 6), 0, "network namespace"),
        ] {
            let why = refusal(&request, user, 5).unwrap();
            assert!(why.contains(words), "{why}");
        }
    }
}
