//! From how many bytes on a TCP socket is readable.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets `SO_RCVLOWAT`: the kernel wakes no reader for less. The end of the stream, errors and a full receive buffer
/// wake all the same (tcp(7); `tcp_epollin_ready`).
#[expect(unsafe_code, reason = "no crate that is linked has a safe form of this option")]
pub(super) fn set(socket: impl AsFd, bytes: libc::c_int) -> io::Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is borrowed, so it is open, and the kernel reads `size` bytes of an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
