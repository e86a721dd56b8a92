//! Waiting until a link carries traffic, by the kernel's notifications.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Type};

use super::Errno;
use super::link::{self, Link};
use super::options;
use super::socket::Socket;

/// `RTNLGRP_LINK`.
const LINKS: i32 = 1;

/// Looks at a link until it runs, or until `limit` is over; gives how it was at last. The socket and this process have
/// to be in one namespace.
///
/// # Errors
/// The kernel's refusal; `NO_DEVICE` when it is gone.
pub(crate) fn until_running(socket: &mut Socket, name: &str, limit: Duration) -> Result<Link, Errno> {
    let mut look = || link::by_name(socket, name)?.ok_or(Errno::NO_DEVICE);
    let start = Instant::now();
    let mut notifications = subscribed()?;
    loop {
        // What happened before the subscription is not notified.
        let link = look()?;
        let left = limit.saturating_sub(start.elapsed());
        if link.running || left.is_zero() {
            return Ok(link);
        }
        notifications.set_read_timeout(Some(left))?;
        // What is told does not matter, only that something is.
        match notifications.read(&mut [0; 64]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nothing came within the time, or too much at once: the next look tells.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)) => {}
            outcome => drop(outcome?),
        }
    }
}

fn subscribed() -> io::Result<socket2::Socket> {
    let protocol = Some(Protocol::from(libc::NETLINK_ROUTE));
    let socket = socket2::Socket::new(Domain::from(libc::AF_NETLINK), Type::from(libc::SOCK_RAW), protocol)?;
    options::set(socket.as_fd(), libc::NETLINK_ADD_MEMBERSHIP, LINKS)?;
    Ok(socket)
}
