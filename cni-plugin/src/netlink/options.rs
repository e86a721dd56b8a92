//! What netlink sockets need that has no safe form in what is linked already.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets an option of the level `SOL_NETLINK` that takes a number.
///
/// # Errors
/// The system's; `ENOPROTOOPT` for what this kernel does not know.
pub(super) fn set(socket: BorrowedFd<'_>, option: i32, value: i32) -> io::Result<()> {
    set_at(socket, libc::SOL_NETLINK, option, value)
}

/// Sets an option of the level `SOL_SOCKET` that takes a number.
///
/// # Errors
/// The system's.
pub(super) fn set_socket(socket: BorrowedFd<'_>, option: i32, value: i32) -> io::Result<()> {
    set_at(socket, libc::SOL_SOCKET, option, value)
}

#[expect(unsafe_code, reason = "there is no safe form of these options in what is linked already")]
fn set_at(socket: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the option's value is an i32 that lives through the call, and its size is given.
    let outcome =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Receives a datagram into the buffer, as much of it as there is room for. The buffer is not cleared before, so that of a large one
/// only the pages are touched that something is received into.
///
/// # Errors
/// The system's.
#[expect(unsafe_code, reason = "the standard library can't yet receive into a buffer that is not cleared")]
pub(super) fn receive(socket: &socket2::Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    let length = socket.recv(buffer.spare_capacity_mut())?;
    // SAFETY: the first `length` bytes of the room behind the elements were written by recv, and there are no elements.
    unsafe { buffer.set_len(length) };
    Ok(())
}
