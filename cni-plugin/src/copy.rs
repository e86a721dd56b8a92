//! Copies of programs and configurations, put in place in one step.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::files;

/// Makes `destination` a file with the content and the mode of `source`, in one step: also where it is a
/// program that runs, and without a moment in which somebody could read half of it. It is left alone if it
/// is so already: what watches these directories needn't be alarmed at each start of a pod.
pub(crate) fn copy(source: &Path, destination: &Path) -> Result<(), String> {
    let unreadable = |error: io::Error| format!("{source:?} can't be read: {error}");
    let mut from = File::open(source).map_err(unreadable)?;
    let kind = from.metadata().map_err(unreadable)?;
    if !kind.is_file() {
        return Err(format!("{source:?} is not a regular file, and only such are copied"));
    }
    let mode = Permissions::from_mode(kind.permissions().mode() & 0o777);
    if is(destination, source, &mode) {
        return Ok(());
    }
    replace(&mut from, mode, destination).map_err(|error| {
        let remedy = "it has to be a file in a directory that exists, and that the user and the capabilities of this \
                      container may write to";
        format!("{destination:?} can't be written: {error}: {remedy}")
    })
}

fn is(destination: &Path, source: &Path, mode: &Permissions) -> bool {
    let regular = |meta: fs::Metadata| meta.is_file() && meta.permissions().mode() & 0o7777 == mode.mode();
    fs::symlink_metadata(destination).is_ok_and(regular)
        && matches!((fs::read(source), fs::read(destination)), (Ok(new), Ok(old)) if new == old)
}

fn replace(from: &mut File, mode: Permissions, destination: &Path) -> io::Result<()> {
    let name = destination.file_name().ok_or(io::ErrorKind::IsADirectory)?;
    let prefix = format!(".{}.tmp", name.to_string_lossy());
    if let Some(directory) = destination.parent() {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        files::sweep(directory, &prefix);
    }
    let temporary = temporary(destination);
    let written = (|| {
        let mut to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        io::copy(from, &mut to)?;
        to.set_permissions(mode)?;
        to.sync_all()?;
        fs::rename(&temporary, destination)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Where a file is written before it is renamed.
pub(crate) fn temporary(destination: &Path) -> PathBuf {
    destination.with_file_name(temporary_name(destination.file_name().unwrap_or_default()))
}

/// The process id would not do: in a container it is 1 every time.
fn temporary_name(name: &OsStr) -> OsString {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".tmp{}", now.as_nanos()));
    temporary
}
