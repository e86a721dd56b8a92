//! The kernel's notifications: a socket that listens to multicast groups.

use std::io;

use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{SockFilter, SockRef};

/// Room for any notification; the kernel packs several into a page or two.
const LONGEST: usize = 64 * 1024;

/// What a call of [`MulticastSocket::receive`] brought.
pub(crate) enum Received<'a> {
    /// One datagram with one or more messages.
    Datagram(&'a [u8]),
    /// The buffer overflowed and notifications were lost, so anything may have changed.
    Lost,
}

/// A socket of the network namespace in which it was opened. Needs a running tokio reactor.
pub(crate) struct MulticastSocket {
    socket: TokioSocket,
}

impl MulticastSocket {
    /// Subscribes to `groups` of `protocol`. `room` is the size of the receive buffer in bytes; `None` leaves the default.
    pub(crate) fn subscribe(protocol: isize, groups: &[u32], room: Option<usize>) -> io::Result<Self> {
        let mut socket = TokioSocket::new(protocol)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        if let Some(room) = room {
            // Without privilege the kernel gives what rmem_max allows; overruns are reported as lost.
            let receiver = socket.socket_ref();
            sockopt::set_socket_recv_buffer_size_force(receiver, room)
                .or_else(|_| sockopt::set_socket_recv_buffer_size(receiver, room))?;
        }
        groups.iter().try_for_each(|group| socket.socket_mut().add_membership(*group))?;
        Ok(Self { socket })
    }

    /// Subscribes to one group more.
    pub(crate) fn join(&mut self, group: u32) -> io::Result<()> {
        self.socket.socket_mut().add_membership(group)
    }

    /// Leaves out what the kernel tells of changes for which the socket with this number asked: a filter in the kernel, so that the
    /// echo of many changes neither wakes anybody nor fills the buffer.
    pub(crate) fn without_echo_of(&self, port: u32) -> io::Result<()> {
        // Classic BPF: load the word at `nlmsg_pid`, which a filter reads in network order; drop what has this number.
        const LOAD_WORD: u16 = 0x20;
        const JUMP_IF_EQUAL: u16 = 0x15;
        const RETURN: u16 = 0x06;
        const NLMSG_PID: u32 = 12;
        let port = u32::from_be_bytes(port.to_ne_bytes());
        let filter = [
            SockFilter::new(LOAD_WORD, 0, 0, NLMSG_PID),
            SockFilter::new(JUMP_IF_EQUAL, 0, 1, port),
            SockFilter::new(RETURN, 0, 0, 0),
            SockFilter::new(RETURN, 0, 0, u32::MAX),
        ];
        SockRef::from(self.socket.socket_ref()).attach_filter(&filter)
    }

    /// A buffer for [`Self::receive`].
    pub(crate) fn buffer() -> Vec<u8> {
        Vec::with_capacity(LONGEST)
    }

    /// Waits for the next datagram.
    pub(crate) async fn receive<'a>(&self, buffer: &'a mut Vec<u8>) -> io::Result<Received<'a>> {
        loop {
            buffer.clear();
            let Err(error) = self.socket.recv(buffer).await else { return Ok(Received::Datagram(buffer)) };
            match Errno::from_io_error(&error) {
                Some(Errno::NOBUFS) => return Ok(Received::Lost),
                Some(Errno::INTR) => {}
                _ => return Err(error),
            }
        }
    }
}
