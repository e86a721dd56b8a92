//! The side of the agent that takes over.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use backends::{TunnelFiles, Tunnels};

use super::{Answer, Request, STOP, STOPPED, VERSION, network_namespace, path, wire};

/// The former agent may be in the middle of a piece of work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Its datapaths stop at once.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The former agent, which still moves packets.
#[derive(Debug)]
pub(crate) struct Former {
    socket: UnixStream,
    tunnels: Vec<TunnelFiles>,
}

/// Asks the agent with this subnet file to hand over. Afterwards its lock and its port are free.
///
/// # Errors
/// It can't be asked, or it refuses; it goes on then.
pub(crate) fn ask(subnet_file: &Path) -> io::Result<Former> {
    let socket = UnixStream::connect(path(subnet_file))?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let request = Request { take_over: VERSION, network_namespace: network_namespace()? };
    wire::send(&socket, &request, &[])?;
    match wire::receive(&socket)? {
        (Answer::Refused(why), _) => Err(io::Error::other(why)),
        (Answer::Tunnels(parts), files) => Ok(Former { tunnels: wire::together(parts, files)?, socket }),
    }
}

impl Former {
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
