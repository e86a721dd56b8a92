//! Waiting until a link carries traffic, or its addresses can be used, by the kernel's notifications.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Type};

use super::Errno;
use super::address::{self, Detection};
use super::link::{self, Link};
use super::message::Message;
use super::options;
use super::socket::Socket;

/// `RTNLGRP_LINK` and `RTNLGRP_IPV6_IFADDR`.
const LINKS: i32 = 1;
const IPV6_ADDRESSES: i32 = 9;

/// Looks at a link until it runs, or until `limit` is over; gives how it was at last. The socket and this process have
/// to be in one namespace.
///
/// # Errors
/// The kernel's refusal; `NO_DEVICE` when it is gone.
pub(crate) fn until_running(socket: &mut Socket, name: &str, limit: Duration) -> Result<Link, Errno> {
    let look = || link::by_name(socket, name)?.ok_or(Errno::NO_DEVICE);
    until(LINKS, limit, look, |link| link.running)
}

/// Looks at the addresses of a link until the detection of duplicates is over, or until `limit` is; gives how far it was at last. The
/// socket and this process have to be in one namespace.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn until_detected(socket: &mut Socket, index: u32, limit: Duration) -> Result<Detection, Errno> {
    let look = || address::of(socket, index).map(|assigned| address::detection(&assigned));
    until(IPV6_ADDRESSES, limit, look, |detection| *detection != Detection::UnderWay)
}

/// Looks whenever the group is notified of something, until what is seen is `enough` or `limit` is over; gives what was seen at last.
fn until<T>(
    group: i32,
    limit: Duration,
    mut look: impl FnMut() -> Result<T, Errno>,
    enough: impl Fn(&T) -> bool,
) -> Result<T, Errno> {
    let start = Instant::now();
    let mut notifications = subscribed(group)?;
    loop {
        // What happened before the subscription is not notified.
        let seen = look()?;
        let left = limit.saturating_sub(start.elapsed());
        if enough(&seen) || left.is_zero() {
            return Ok(seen);
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

fn subscribed(group: i32) -> io::Result<socket2::Socket> {
    let protocol = Some(Protocol::from(libc::NETLINK_ROUTE));
    let socket = socket2::Socket::new(Domain::from(libc::AF_NETLINK), Type::from(libc::SOCK_RAW), protocol)?;
    options::set(socket.as_fd(), libc::NETLINK_ADD_MEMBERSHIP, group)?;
    // A socket has no number of its own until it is bound or sends, and one without a number is told nothing: the kernel sends its
    // notifications under the number 0, and leaves out the sender.
    (&socket).write_all(&Message::new(libc::NLMSG_NOOP as u16, 0, &[]).finished(0))?;
    Ok(socket)
}
