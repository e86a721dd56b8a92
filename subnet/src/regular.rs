//! Reading files that an operator or another program names: only what is a file is opened, because opening a pipe waits
//! for a writer, and with it health and signals would wait.

use std::fs;
use std::io;
use std::path::Path;

/// The content of a file.
///
/// # Errors
/// Those of [`fs::read`], and that it is something else than a file.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    check(path)?;
    fs::read(path)
}

/// The text of a file.
///
/// # Errors
/// Those of [`fs::read_to_string`], and that it is something else than a file.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    check(path)?;
    fs::read_to_string(path)
}

/// Whether something may be opened without waiting; what is missing, or a directory, gives its own error when it is read.
pub(crate) fn check(path: &Path) -> io::Result<()> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() || kind.is_dir() {
        return Ok(());
    }
    let why =
        "it is a pipe, a socket or a device: name a file, since it is read again when it may have changed";
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_what_would_keep_its_reader_waiting_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        assert_eq!(
            (read(&path("link")).unwrap(), read_to_string(&path("file")).unwrap()),
            (b"text".to_vec(), "text".into())
        );
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(path("pipe")).status().unwrap();
        assert!(made.success());
        for other in [path("pipe"), path("socket"), "/dev/zero".into()] {
            assert!(read(&other).unwrap_err().to_string().contains("name a file"), "{}", other.display());
        }
        assert_eq!(read(&path("missing")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(read(directory.path()).is_err());
    }
}
