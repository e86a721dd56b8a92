//! A delegate that ends when this process does: a runtime that kills a plugin follows up with DEL, and nothing may
//! go on making what that DEL has removed.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the kernel kill the program when this process, which must have one thread, ends before it.
#[expect(unsafe_code, reason = "pre_exec has no safe form")]
pub(super) fn end_with_this_process(command: &mut Command) {
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: prctl with PR_SET_PDEATHSIG takes a number and touches no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // The signal is only sent for a death after the call above: one before it shows by another parent.
        if std::os::unix::process::parent_id() != parent {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        Ok(())
    };
    // SAFETY: between fork and exec only prctl and getppid are called, which are async-signal-safe, and nothing
    // is allocated.
    unsafe { command.pre_exec(prepare) };
}
