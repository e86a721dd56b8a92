//! The lock beside the subnet file: one agent for each, and `cleanup` can tell that it runs and which process it is.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, fcntl_lock};
use rustix::process::{Flock, FlockType, fcntl_getlk};

/// Held until it is dropped or the process ends, however it ends: the kernel keeps it, not the file's content.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Why the lock can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// By another process.
    #[error("{0}")]
    Held(LockHolder),
    /// The file can't be used.
    #[error("{path}: {source}")]
    Unusable {
        /// The lock's file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// The process that holds a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockHolder {
    /// Its id, as this process sees it.
    Process(i32),
    /// It is in another PID namespace.
    OutOfSight,
}

impl std::fmt::Display for LockHolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Process(pid) => write!(f, "flanneld is running with pid {pid}"),
            Self::OutOfSight => f.write_str("flanneld is running in another container (PID namespace)"),
        }
    }
}

/// The lock's file.
pub(crate) fn path(subnet_file: &Path) -> PathBuf {
    let mut path = subnet_file.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// Takes the lock, and makes its file in a directory that exists.
///
/// # Errors
/// [`LockError::Held`] by another process, or [`LockError::Unusable`].
pub(crate) fn take(subnet_file: &Path) -> Result<Lock, LockError> {
    let path = path(subnet_file);
    let unusable = |source| LockError::Unusable { path: path.display().to_string(), source };
    loop {
        // Only root may open it: any process that could open it could hold it.
        let file = options().write(true).create(true).mode(0o600).open(&path).map_err(unusable)?;
        if let Err(error) = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            let busy = matches!(error, rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS);
            return match busy.then(|| holder_of(&file)).transpose().map_err(unusable)? {
                Some(Some(holder)) => Err(LockError::Held(holder)),
                // It has ended meanwhile.
                Some(None) => continue,
                None => Err(unusable(error.into())),
            };
        }
        // `cleanup` may have removed the file between the two calls; the lock is then on no path.
        let locked = file.metadata().map_err(unusable)?;
        if fs::metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (locked.dev(), locked.ino())) {
            return Ok(Lock { _file: file });
        }
    }
}

/// Who holds the lock, without taking it.
///
/// # Errors
/// The file is there and can't be opened.
pub(crate) fn holder(subnet_file: &Path) -> io::Result<Option<LockHolder>> {
    match options().open(path(subnet_file)) {
        Ok(file) => holder_of(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

fn holder_of(file: &File) -> io::Result<Option<LockHolder>> {
    let found = fcntl_getlk(file, &Flock::from(FlockType::WriteLock))?;
    Ok(found.map(|lock| match lock.pid {
        Some(pid) => LockHolder::Process(pid.as_raw_nonzero().get()),
        None => LockHolder::OutOfSight,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_made_in_a_directory_that_exists_and_its_own_process_does_not_stand_in_its_way() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("subnet.env");
        assert_eq!(holder(&file).unwrap(), None);
        let lock = take(&file).unwrap();
        assert!(directory.path().join("subnet.env.lock").exists());
        assert_eq!(holder(&file).unwrap(), None, "the kernel tells of other processes");
        drop(lock);
        let missing = take(&directory.path().join("none/subnet.env")).unwrap_err();
        assert!(matches!(missing, LockError::Unusable { .. }), "{missing}");
    }

    #[test]
    fn a_lock_is_never_followed_through_a_symbolic_link() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("subnet.env");
        std::os::unix::fs::symlink("/etc/hostname", path(&file)).unwrap();
        assert!(matches!(take(&file), Err(LockError::Unusable { .. })));
    }
}
