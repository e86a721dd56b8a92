//! Receiving a packet together with the moment at which the kernel got it, which has no safe interface.

#![expect(
    unsafe_code,
    reason = "setsockopt and recvmsg take pointers, and the reactor trusts that a descriptor stays open"
)]

use std::io;
use std::mem;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use socket2::Socket;
use tokio::io::unix::AsyncFd;

/// A packet is read within this time of its arrival, unless the clock was set meanwhile.
const MAX_AGE: Duration = Duration::from_secs(60);

/// What one call received.
pub(super) struct ReceivedEcho {
    /// Length of the packet, of which the buffer may hold less.
    pub(super) len: usize,
    pub(super) from: Option<IpAddr>,
    /// How long ago the kernel received it.
    pub(super) age: Duration,
}

/// Room for the control message with the time (`SCM_TIMESTAMPNS`).
#[repr(C)]
struct TimeControl {
    header: libc::cmsghdr,
    time: libc::timespec,
}

/// Has the reactor of tokio tell when something arrives. Needs a running one.
pub(super) fn watch(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: the socket owns its descriptor and gives the same one for as long as it lives, and the result owns it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Has the kernel note when packets arrive.
pub(super) fn stamp_arrivals(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one int at the address, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TIMESTAMPNS,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives one packet without waiting.
pub(super) fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<ReceivedEcho> {
    // SAFETY: all-zero values of these plain C structures are valid.
    let (mut address, mut control, mut header): (libc::sockaddr_storage, TimeControl, libc::msghdr) =
        unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    header.msg_name = (&raw mut address).cast();
    header.msg_namelen = size_of::<libc::sockaddr_storage>() as _;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = size_of::<TimeControl>() as _;
    // SAFETY: the header points to `address`, `part`, `control` and, through `part`, to `buffer`, all of which live until
    // the call returns; the lengths are those of what they point to.
    let len =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT | libc::MSG_TRUNC) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let stamped = header.msg_controllen >= size_of::<TimeControl>() as _
        && control.header.cmsg_level == libc::SOL_SOCKET
        && control.header.cmsg_type == libc::SCM_TIMESTAMPNS;
    let age = if stamped { since(control.time) } else { Duration::ZERO };
    Ok(ReceivedEcho { len, from: ip(&address), age })
}

/// The time since a moment of the wall clock, which is a moment ago unless the clock was set meanwhile.
fn since(time: libc::timespec) -> Duration {
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let moment = UNIX_EPOCH + Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default());
    let age = SystemTime::now().duration_since(moment).unwrap_or_default();
    if age > MAX_AGE { Duration::ZERO } else { age }
}

fn ip(address: &libc::sockaddr_storage) -> Option<IpAddr> {
    match libc::c_int::from(address.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the storage, which is large and aligned enough for any, holds this type.
            let address = unsafe { &*(&raw const *address).cast::<libc::sockaddr_in>() };
            Some(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let address = unsafe { &*(&raw const *address).cast::<libc::sockaddr_in6>() };
            Some(IpAddr::from(address.sin6_addr.s6_addr))
        }
        _ => None,
    }
}
