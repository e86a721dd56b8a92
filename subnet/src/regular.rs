//! Reading files that an operator or another program names: only what is a file is opened, because opening a pipe waits
//! for a writer, and with it health and signals would wait.

use std::fs;
use std::io::{self, Read};
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

/// More than this has no certificate, key, token or kubeconfig.
const SMALL: usize = 4 << 20;

/// The content of a file with credentials, or of another that a name for the wrong file must not fill the memory with.
///
/// # Errors
/// Those of [`read`], and that it is too long for such a file.
pub fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    check(path)?;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(SMALL as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > SMALL {
        let why = format!(
            "it has more than {} MiB, so it is another file than is meant: name the right one",
            SMALL >> 20
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(bytes)
}

/// An error of reading, with what to do about it.
pub fn with_remedy(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => ": correct the path, or mount the file into the container",
        io::ErrorKind::PermissionDenied => ": let the user that flanneld runs as read it",
        io::ErrorKind::IsADirectory => ": name a file",
        _ => "",
    };
    format!("{error}{remedy}")
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
        for (length, is_read) in [(SMALL, true), (SMALL + 1, false)] {
            fs::write(path("file"), vec![b'a'; length]).unwrap();
            match read_small(&path("link")) {
                Ok(read) => assert!(is_read && read.len() == length),
                Err(error) => assert!(!is_read && error.to_string().contains("more than 4 MiB"), "{error}"),
            }
        }
        assert!(read_small(&path("pipe")).unwrap_err().to_string().contains("name a file"));
        assert_eq!(read(&path("missing")).unwrap_err().kind(), io::ErrorKind::NotFound);
        for (name, remedy) in [("missing", "correct the path"), ("", "name a file")] {
            let error = with_remedy(&read_small(&path(name)).unwrap_err());
            assert!(error.contains("os error") && error.contains(remedy), "{error}");
        }
        assert!(read(directory.path()).is_err());
    }
}
