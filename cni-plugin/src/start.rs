//! The program's entry. It does what the standard library does before `main`, but for the message at a stack overflow: for that,
//! /proc/self/maps is read and a stack for signals is mapped, which is a fortieth of the CPU time of an ADD.

#![cfg_attr(test, expect(dead_code, reason = "tests have an entry of their own"))]

use std::ffi::{CStr, OsStr, OsString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::process;

const SUCCESS: i32 = 0;
const FAILURE: i32 = 1;

/// Called by the C library. Of the arguments [`std::env::args_os`] knows with the GNU C library alone, since musl gives them only to this
/// function.
#[cfg(not(test))]
#[expect(unsafe_code, reason = "the C library looks the function up by its name")]
// SAFETY: there is no other function of this name: the standard library's is left out by `no_main`.
#[unsafe(no_mangle)]
extern "C" fn main(count: i32, arguments: *const *const c_char) -> i32 {
    crate::bump::claim();
    // SAFETY: the C library gives as many texts as it says.
    enter(&unsafe { owned(count, arguments) })
}

/// Copies the arguments.
///
/// # Safety
/// There have to be `count` texts that end with a zero.
#[expect(unsafe_code, reason = "texts of C are pointers")]
unsafe fn owned(count: i32, texts: *const *const c_char) -> Vec<OsString> {
    let count = usize::try_from(count).unwrap_or_default();
    // SAFETY: the caller's.
    let text = |number| unsafe { CStr::from_ptr(*texts.add(number)) };
    (0..count).map(|number| OsStr::from_bytes(text(number).to_bytes()).to_owned()).collect()
}

fn enter(arguments: &[OsString]) -> i32 {
    open_standard_streams();
    // A reader that is gone is an error of write(2), not a reason to be killed half-way through an ADD.
    ignore_broken_pipes();
    // Flushes what is printed.
    process::exit(if crate::succeeds(arguments) { SUCCESS } else { FAILURE })
}

/// Else the first file that is opened would become one of them, and the result would be written into it.
#[expect(unsafe_code, reason = "poll and open have no safe form in what is linked already")]
fn open_standard_streams() {
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: the array lives through the call, and its length is given.
    unsafe { libc::poll(streams.as_mut_ptr(), streams.len() as libc::nfds_t, 0) };
    for _ in streams.iter().filter(|stream| stream.revents & libc::POLLNVAL != 0) {
        // SAFETY: the path ends with a zero. The lowest number that is free is taken: that of the stream.
        unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
    }
}

#[expect(unsafe_code, reason = "signal has no safe form in what is linked already")]
fn ignore_broken_pipes() {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
