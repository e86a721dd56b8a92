//! Messages with files: one line of JSON, and file descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use backends::{Name, SocketFiles, TunnelFiles};
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{MAX_MESSAGE, SocketParts, TunnelParts};

/// The kernel takes no more in one message (`SCM_MAX_FD`).
const MAX_FILES: usize = 253;

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Sends one message with files. The socket has to be blocking.
pub(super) fn send(socket: impl AsFd, message: &impl Serialize, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    if files.len() > MAX_FILES {
        return Err(invalid(format!("{} files are more than one message carries", files.len())));
    }
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(files));
    }
    let message = [IoSlice::new(&line)];
    let mut sent = retry_on_intr(|| sendmsg(&socket, &message, &mut control, SendFlags::NOSIGNAL))?;
    while sent < line.len() {
        sent += retry_on_intr(|| rustix::net::send(&socket, &line[sent..], SendFlags::NOSIGNAL))?;
    }
    Ok(())
}

/// Receives one message with its files. The socket has to be blocking. A call that is interrupted is repeated: on a socket
/// with a time limit that happens whenever the process is stopped and continued (signal(7)).
pub(super) fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let (mut line, mut files) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let mut part = [0; 4096];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut part)];
        let count = retry_on_intr(|| recvmsg(&socket, into, &mut control, RecvFlags::CMSG_CLOEXEC))?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                files.extend(more);
            }
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&part[..count]);
        if line.len() > MAX_MESSAGE {
            return Err(invalid(format!("a message of more than {MAX_MESSAGE} bytes")));
        }
    }
    Ok((serde_json::from_slice(&line)?, files))
}

/// Takes tunnels apart: what is said of them, and their files in that order.
pub(super) fn parts(tunnels: &[TunnelFiles]) -> (Vec<TunnelParts>, Vec<BorrowedFd<'_>>) {
    let mut files = Vec::new();
    let mut parts = Vec::new();
    for tunnel in tunnels {
        files.extend(tunnel.queues.iter().map(AsFd::as_fd));
        for socket in tunnel.sockets.iter().flatten() {
            files.push(socket.socket.as_fd());
            files.extend(socket.sender.iter().map(AsFd::as_fd));
        }
        let socket =
            |socket: &SocketFiles| SocketParts { local: socket.local, sender: socket.sender.is_some() };
        parts.push(TunnelParts {
            name: tunnel.name.to_string(),
            index: tunnel.index,
            vnet: tunnel.vnet,
            udp: tunnel.udp,
            queues: tunnel.queues.len(),
            sockets: tunnel.sockets.iter().map(|worker| worker.iter().map(socket).collect()).collect(),
        });
    }
    (parts, files)
}

/// Puts tunnels together.
///
/// # Errors
/// A name that no device has, or another number of files than the parts ask for.
pub(super) fn together(parts: Vec<TunnelParts>, files: Vec<OwnedFd>) -> io::Result<Vec<TunnelFiles>> {
    let mut files = files.into_iter();
    let mut next = || files.next().ok_or_else(|| invalid("fewer files than tunnels ask for"));
    let mut tunnels = Vec::new();
    for part in parts {
        let queues = (0..part.queues).map(|_| next()).collect::<io::Result<_>>()?;
        let mut sockets = Vec::new();
        for worker in part.sockets {
            let mut of_worker = Vec::new();
            for SocketParts { local, sender } in worker {
                let socket = next()?;
                of_worker.push(SocketFiles { local, socket, sender: sender.then(&mut next).transpose()? });
            }
            sockets.push(of_worker);
        }
        let name: Name = part.name.parse().map_err(|_| invalid(format!("{:?} is no device", part.name)))?;
        let TunnelParts { index, vnet, udp, .. } = part;
        tunnels.push(TunnelFiles { name, index, vnet, udp, queues, sockets });
    }
    match files.next() {
        None => Ok(tunnels),
        Some(_) => Err(invalid("more files than tunnels ask for")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};
    use std::os::unix::net::UnixStream;

    use super::super::TakeoverAnswer;
    use super::*;

    fn file() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    fn tunnel(name: &str) -> TunnelFiles {
        let bound = UdpSocket::bind("127.0.0.1:0").unwrap();
        let local = bound.local_addr().unwrap();
        let socket = SocketFiles { local, socket: bound.into(), sender: None };
        let two = SocketFiles { local, socket: file(), sender: Some(file()) };
        TunnelFiles {
            name: name.parse().unwrap(),
            index: 7,
            vnet: true,
            udp: false,
            queues: vec![file(), file()],
            sockets: vec![vec![socket], vec![two]],
        }
    }

    #[test]
    fn tunnels_arrive_with_each_file_in_its_place() {
        let (from, to) = UnixStream::pair().unwrap();
        let tunnels = [tunnel("flannel0"), tunnel("flannel.5")];
        let locals: Vec<SocketAddr> = tunnels.iter().map(|tunnel| tunnel.sockets[0][0].local).collect();
        let (said, files) = parts(&tunnels);
        assert_eq!(files.len(), 10);
        send(&from, &TakeoverAnswer::Tunnels(said), &files).unwrap();
        let (answer, files): (TakeoverAnswer, _) = receive(&to).unwrap();
        let TakeoverAnswer::Tunnels(said) = answer else { panic!("{answer:?}") };
        let arrived = together(said, files).unwrap();
        for (tunnel, local) in arrived.into_iter().zip(locals) {
            assert_eq!((tunnel.index, tunnel.vnet, tunnel.udp, tunnel.queues.len()), (7, true, false, 2));
            let socket = UdpSocket::from(tunnel.sockets.into_iter().next().unwrap().remove(0).socket);
            assert_eq!(socket.local_addr().unwrap(), local);
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let one = || tunnel("flannel0");
        let said = || parts(&[one()]).0;
        let files = |count: usize| (0..count).map(|_| file()).collect::<Vec<_>>();
        assert!(together(said(), files(5)).is_ok());
        assert!(together(said(), files(4)).unwrap_err().to_string().contains("fewer"));
        assert!(together(said(), files(6)).unwrap_err().to_string().contains("more"));
        let mut odd = said();
        odd[0].name = "no/device".to_owned();
        assert!(together(odd, files(5)).unwrap_err().to_string().contains("no/device"));
        let mut many = said();
        many[0].queues = usize::MAX;
        assert!(together(many, files(5)).is_err());
    }

    #[test]
    fn a_message_that_is_cut_or_too_long_is_an_error() {
        let (from, to) = UnixStream::pair().unwrap();
        rustix::io::write(&from, b"{\"refused\":").unwrap();
        drop(from);
        assert_eq!(receive::<TakeoverAnswer>(&to).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let (from, to) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            let long = vec![b'x'; 2 * MAX_MESSAGE];
            let _ = io::Write::write_all(&mut &from, &long);
        });
        assert!(receive::<TakeoverAnswer>(&to).unwrap_err().to_string().contains("more than"));
        drop(to);
        writer.join().unwrap();
    }
}
