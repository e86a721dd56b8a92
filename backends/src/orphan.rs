//! A program that ends when this process does: one that hangs would otherwise go on after an agent that was stopped, and
//! change something then.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, set_parent_process_death_signal};

/// Has the kernel kill the program when the thread that starts it ends before it; that thread has to wait for it.
#[expect(unsafe_code, reason = "pre_exec has no safe form")]
pub fn end_with_this_thread(command: &mut Command) -> &mut Command {
    let prepare = || set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from);
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe, and nothing is allocated.
    unsafe { command.pre_exec(prepare) }
}
