//! The kernel's notifications: a socket that listens to multicast groups.

use std::io;

use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{SockFilter, SockRef};

/// Room for any notification; the kernel packs several into a page or two.
const LONGEST: usize = 64 * 1024;

/// Messages about links (include/uapi/linux/rtnetlink.h).
pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_DELLINK: u16 = 17;

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

    /// Leaves out what wakes the agent in vain, by a filter in the kernel, which does not fill the buffer with it either: what a bridge tells of its
    /// ports, a dozen times for each pod, and what the kernel tells of changes for which the socket with the number `echo_of` asked. For sockets of
    /// `NETLINK_ROUTE`.
    pub(crate) fn leave_out_ports(&self, echo_of: Option<u32>) -> io::Result<()> {
        SockRef::from(self.socket.socket_ref()).attach_filter(&filter(echo_of))
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

/// Classic BPF over a message that begins with `nlmsghdr` and, if it is about a link, goes on with `ifinfomsg`. Numbers are read in network order.
fn filter(echo_of: Option<u32>) -> Vec<SockFilter> {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const NLMSG_TYPE: u32 = 4;
    const NLMSG_PID: u32 = 12;
    const IFI_FAMILY: u32 = 16;
    const AF_BRIDGE: u32 = 7;
    let number = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let give = |bytes: u32| SockFilter::new(RETURN, 0, 0, bytes);
    let mut steps = Vec::new();
    if let Some(port) = echo_of {
        let port = u32::from_be_bytes(port.to_ne_bytes());
        steps.extend([
            SockFilter::new(LOAD_WORD, 0, 0, NLMSG_PID),
            SockFilter::new(JUMP_IF_EQUAL, 0, 1, port),
            give(0),
        ]);
    }
    steps.extend([
        SockFilter::new(LOAD_HALF, 0, 0, NLMSG_TYPE),
        SockFilter::new(JUMP_IF_EQUAL, 1, 0, number(RTM_NEWLINK)),
        SockFilter::new(JUMP_IF_EQUAL, 0, 3, number(RTM_DELLINK)),
        SockFilter::new(LOAD_BYTE, 0, 0, IFI_FAMILY),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, AF_BRIDGE),
        give(0),
        give(u32::MAX),
    ]);
    steps
}
