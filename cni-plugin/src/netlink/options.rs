//! Options of netlink sockets, which have no safe form in what is linked already.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets an option of the level `SOL_NETLINK` that takes a number.
///
/// # Errors
/// The system's; `ENOPROTOOPT` for what this kernel does not know.
#[expect(unsafe_code, reason = "there is no safe form of these options in what is linked already")]
pub(super) fn set(socket: BorrowedFd<'_>, option: i32, value: i32) -> io::Result<()> {
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option's value is an i32 that lives through the call, and its size is given.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, option, (&raw const value).cast(), length)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
