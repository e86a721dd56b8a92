//! Small files in directories that others write to as well: read without following a link, replaced in one step.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// More than any file that this plugin reads can have.
const MAX_SIZE: u64 = 1 << 20;
/// A temporary file lives for milliseconds; one of this age belongs to a process that was killed.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// The content of a regular file. A link is not followed, and a pipe is not waited for.
///
/// # Errors
/// The system's, and `InvalidData` for what is no regular file or larger than [`MAX_SIZE`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(link_named)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    if meta.len() > MAX_SIZE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than 1 MiB"));
    }
    // One byte more than there is: a read that does not fill the buffer has met the end.
    let mut content = vec![0; meta.len() as usize + 1];
    let length = file.read(&mut content)?;
    let ended = length < content.len();
    content.truncate(length);
    if ended {
        return Ok(content);
    }
    file.take(MAX_SIZE + 1 - length as u64).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_SIZE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than 1 MiB"));
    }
    Ok(content)
}

/// ELOOP of `O_NOFOLLOW` would be printed as "too many levels of symbolic links".
fn link_named(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(libc::ELOOP) {
        return io::Error::new(io::ErrorKind::InvalidData, "a symbolic link, which is not followed");
    }
    error
}

/// Makes `path` a file with this content and mode 0600; no reader sees a part of it.
///
/// # Errors
/// The system's; nothing is left behind then.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = temporary(path);
    let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary);
    let written = (|| {
        let mut file = match open() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Of a process that was killed: one attachment is never worked on by two at a time.
                fs::remove_file(&temporary)?;
                open()?
            }
            outcome => outcome?,
        };
        file.write_all(content)?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Writes a file and removes it: whether its file system takes changes, and has room. What is there by this name was left by
/// a process that was killed.
///
/// # Errors
/// The system's; nothing is left behind then.
pub(crate) fn check_writable(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .and_then(|mut open| open.write_all(b"written by STATUS, and removed\n"));
    if written.is_err() {
        let _ = fs::remove_file(file);
        return written;
    }
    fs::remove_file(file)
}

/// Where [`replace`] writes before it renames: one name per file, so that the next to handle the file finds
/// what a killed process left.
pub(crate) fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Removes temporary files of processes that were killed: files in `directory` whose names begin with
/// `prefix`, a dot at least, and that was not written to for a minute.
pub(crate) fn sweep(directory: &Path, prefix: &str) {
    debug_assert!(prefix.starts_with('.'), "only hidden files are temporary");
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let named = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        let old = || {
            let meta = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            SystemTime::now().duration_since(meta.modified().ok()?).ok()
        };
        if named && old().is_some_and(|age| age > STALE_AFTER) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_a_regular_file_of_bearable_size_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("plain"), "content").unwrap();
        symlink(path("plain"), path("link")).unwrap();
        fs::create_dir(path("directory")).unwrap();
        File::create(path("large")).unwrap().set_len(MAX_SIZE + 1).unwrap();
        assert_eq!(read(&path("plain")).unwrap(), b"content");
        for (name, expected) in
            [("link", "symbolic link"), ("directory", "not a regular file"), ("large", "1 MiB")]
        {
            let error = read(&path(name)).unwrap_err();
            assert!(error.to_string().contains(expected), "{name}: {error}");
        }
        assert_eq!(read(&path("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_link_in_the_place_of_the_temporary_file_is_removed_and_not_written_through() {
        let directory = tempfile::tempdir().unwrap();
        let (target, file) = (directory.path().join("target"), directory.path().join("c1"));
        fs::write(&target, "foreign").unwrap();
        symlink(&target, temporary(&file)).unwrap();
        replace(&file, b"ours").unwrap();
        assert_eq!(
            (fs::read(&target).unwrap(), fs::read(&file).unwrap()),
            (b"foreign".into(), b"ours".into())
        );
        assert!(fs::symlink_metadata(temporary(&file)).is_err());
    }

    #[test]
    fn only_old_temporary_files_are_swept() {
        let directory = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * STALE_AFTER;
        for (name, time) in [(".c1.4711", old), (".c2.new", SystemTime::now()), ("c3", old), (".other", old)]
        {
            File::create(directory.path().join(name)).unwrap().set_modified(time).unwrap();
        }
        sweep(directory.path(), ".c");
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".c2.new", ".other", "c3"]);
    }
}
