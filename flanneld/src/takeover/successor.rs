//! The side of the agent that takes over.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use backends::{TunnelFiles, Tunnels};

use super::{STOP, STOPPED, TakeoverAnswer, TakeoverRequest, VERSION, network_namespace, path, wire};

/// The former agent may be in the middle of a piece of work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Its datapaths stop at once.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The former agent, which still moves packets.
#[derive(Debug)]
pub(crate) struct FormerAgent {
    socket: UnixStream,
    tunnels: Vec<TunnelFiles>,
}

/// Why there is nothing to take over, as the end of a sentence about the agent that was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// It lets go of connections that it has not looked at.
    #[error(
        "closed the connection without an answer: it ends, or hands over to another agent already; start one agent with \
         --take-over at a time, and this one when the other is ready"
    )]
    Closed,
    /// It can't be asked, or refuses; it goes on then.
    #[error("does not hand over; stop it first: {0}")]
    Refused(io::Error),
}

impl From<io::Error> for AskError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error.kind() {
            BrokenPipe | ConnectionReset | UnexpectedEof => Self::Closed,
            _ => Self::Refused(error),
        }
    }
}

/// Asks the agent with this subnet file to hand over. Afterwards its lock and its port are free.
///
/// # Errors
/// [`AskError`].
pub(crate) fn ask(subnet_file: &Path) -> Result<FormerAgent, AskError> {
    let socket = UnixStream::connect(path(subnet_file))?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let request = TakeoverRequest { take_over: VERSION, network_namespace: network_namespace()? };
    wire::send(&socket, &request, &[])?;
    match wire::receive(&socket)? {
        (TakeoverAnswer::Refused(why), _) => Err(AskError::Refused(io::Error::other(why))),
        (TakeoverAnswer::Tunnels(parts), files) => {
            Ok(FormerAgent { tunnels: wire::together(parts, files)?, socket })
        }
    }
}

impl FormerAgent {
    /// Lets `tunnels` go on with those of the former agent, which stops just before the first of them is used. One
    /// without tunnels stops now.
    pub(crate) fn hand_to(self, tunnels: &Tunnels) {
        let Self { socket, tunnels: files } = self;
        if files.is_empty() {
            return stop(socket);
        }
        let names: Vec<String> = files.iter().map(|tunnel| tunnel.name.to_string()).collect();
        let left = socket.try_clone();
        match tunnels.inherit(files, move || stop(socket)) {
            Ok(()) => tracing::info!("taken over with its sockets: {}", names.join(", ")),
            Err(error) => {
                tracing::warn!("{} can't be taken over and is made again: {error}", names.join(", "));
                if let Ok(socket) = left {
                    stop(socket);
                }
            }
        }
    }
}

/// Has the former agent stop, and waits until it has.
fn stop(mut socket: UnixStream) {
    let mut answer = [0; STOPPED.len()];
    let outcome = socket
        .set_read_timeout(Some(STOP_TIMEOUT))
        .and_then(|()| socket.write_all(STOP))
        .and_then(|()| socket.read_exact(&mut answer));
    match outcome {
        Ok(()) if answer == STOPPED => tracing::info!("the agent before this one has handed over"),
        Ok(()) => tracing::warn!("the agent before this one answered {:?}", String::from_utf8_lossy(&answer)),
        Err(error) => tracing::warn!(
            "the agent before this one did not say that it has stopped ({error}): while it runs, it may take packets \
             of the tunnel; stop it"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_closed_connection_is_told_as_an_agent_that_ends_or_hands_over_to_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let subnet_file = directory.path().join("subnet.env");
        let listener = UnixListener::bind(path(&subnet_file)).unwrap();
        // What waits to be accepted when the listener goes is closed, before or after the request is written.
        let closing = std::thread::spawn(move || drop(listener.accept()));
        let closed = ask(&subnet_file).unwrap_err();
        closing.join().unwrap();
        assert!(matches!(closed, AskError::Closed), "{closed}");
        assert!(closed.to_string().contains("hands over to another agent"), "{closed}");
        let missing = ask(&directory.path().join("none.env")).unwrap_err();
        assert!(
            missing.to_string().starts_with("does not hand over; stop it first: No such file"),
            "{missing}"
        );
    }
}
