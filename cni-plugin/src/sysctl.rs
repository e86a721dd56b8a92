//! Switches of the kernel's network stack, in the namespace that this process is in.

use std::fs;
use std::io;
use std::path::PathBuf;

fn path(key: &str) -> PathBuf {
    ["/proc/sys/net", key].iter().collect()
}

/// Sets `net/<key>` unless it is so.
///
/// # Errors
/// The system's.
pub(crate) fn set(key: &str, value: &str) -> io::Result<()> {
    let path = path(key);
    if fs::read_to_string(&path).is_ok_and(|present| present.trim() == value) {
        return Ok(());
    }
    fs::write(path, value)
}

/// Sets `net/<key>`, where a kernel without the switch does not need it. Does not look first: finding the file is what
/// costs, and the more, the more namespaces there are.
pub(crate) fn try_set(key: &str, value: &str) {
    let _ = fs::write(path(key), value);
}
