//! Replacing a file in one step, and what is left of that by processes that were killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Replaces `path` by `content` in one step that survives a power cut: temporary file in the same
/// directory, fsync, rename, fsync of the directory. An existing file keeps its mode, a new one gets `mode`
/// independent of the umask.
///
/// # Errors
/// The I/O error, with the path in its text.
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(directory).map_err(named)?;
    replaceable(path).map_err(named)?;
    let mode = match fs::symlink_metadata(path) {
        Ok(existing) if existing.is_file() => existing.permissions().mode() & 0o7777,
        _ => mode,
    };
    sweep(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        // Left by an agent with the same process id, as every agent in a container has.
        let _ = fs::remove_file(&temporary);
        // Never an existing file, and never through a link that somebody put there.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(named)
}

/// Refuses what a rename would take away from other programs: a device such as `/dev/null`, a pipe or a socket, also
/// behind a link, and a directory.
fn replaceable(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(there) if !there.is_file() => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is a directory, a device, a pipe or a socket, which other programs may need, and is not replaced: \
             give the name of a file",
        )),
        _ => Ok(()),
    }
}

/// Removes the temporary files that killed processes left when they were writing `path`: those of processes that
/// are gone, and those that are older than any writing takes.
pub fn sweep(path: &Path) {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let Ok(entries) = fs::read_dir(directory) else { return };
    let prefix = format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy());
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(&prefix)).filter(|pid| is_pid(pid));
        let Some(pid) = pid else { continue };
        let old = entry.metadata().and_then(|about| about.modified()).is_ok_and(|changed| {
            changed.elapsed().map_or(true, |age| age > STALE) // from the future: a clock was wrong
        });
        if old || !Path::new("/proc").join(pid).exists() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A temporary file that was not written to for this long is left over from a process that has ended.
const STALE: std::time::Duration = std::time::Duration::from_secs(60);

fn is_pid(text: &str) -> bool {
    (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_agents_were_writing_is_swept_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let outside = tempfile::NamedTempFile::new().unwrap();
        let own = format!(".subnet.env.{}", std::process::id());
        // No process has this number, and one always has that.
        for name in
            [".subnet.env.4194305", ".subnet.env.1", ".subnet.env.backup", "subnet.env.7", ".other.4194305"]
        {
            fs::write(at(name), "x").unwrap();
        }
        std::os::unix::fs::symlink(outside.path(), at(&own)).unwrap();
        write_atomically(&at("subnet.env"), b"x", 0o644).unwrap();
        let mut left: Vec<String> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(
            left,
            [".other.4194305", ".subnet.env.1", ".subnet.env.backup", "subnet.env", "subnet.env.7"]
        );
        assert_eq!(fs::read(outside.path()).unwrap(), b"", "a link is not followed");
        let past = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        fs::File::options().write(true).open(at(".subnet.env.1")).unwrap().set_modified(past).unwrap();
        sweep(&at("subnet.env"));
        assert!(!at(".subnet.env.1").exists());
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        fs::create_dir(at("directory")).unwrap();
        std::os::unix::fs::symlink("/dev/null", at("link")).unwrap();
        let kind = |name: &str| fs::symlink_metadata(at(name)).unwrap().file_type();
        for name in ["socket", "pipe", "directory", "link"] {
            let before = kind(name);
            let error = write_atomically(&at(name), b"x", 0o644).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("give the name of a file"), "{error}");
            assert_eq!(kind(name), before);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4, "nothing is left behind");
        std::os::unix::fs::symlink("nothing", at("dangling")).unwrap();
        write_atomically(&at("dangling"), b"x", 0o644).unwrap();
    }
}
