//! The delegates' configurations, kept from ADD until DEL (contract §7.4).
//!
//! Which file: Go knows one per container, `<dataDir>/<container id>`. The first attachment of a container
//! uses it, so that either plugin can take down the other's pods. When it is taken, the attachment is a
//! further one, and its file is `<container id>-<interface>`. It could also be the same one again, whose runtime calls
//! ADD twice without a DEL: then DEL removes both files. An attachment finds its own file under the second name first.
//! A file of either name is its own only if it is for the same network: the second name is also the plain one of a
//! container whose id has a dash. What is wrong about that guess is mended by DEL itself, which does without a file where
//! it finds none.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::conf::Delegate;
use crate::env::Attachment;
use crate::error::{self, CniError};
use crate::files;
use crate::host_local::allocate::Former;

/// What was kept for an attachment.
#[derive(Debug)]
pub(crate) enum Saved {
    /// Nothing.
    Nothing,
    /// A file that can't be used, and why.
    Broken(PathBuf, String),
    /// The configuration, and the file it is in.
    Config(PathBuf, Delegate),
}

/// Looks for the configuration of an attachment to `network`.
pub(crate) fn find(directory: &str, attachment: &Attachment, network: &str) -> Saved {
    let (plain, own) = names(directory, attachment);
    match read_for(own, network) {
        Saved::Nothing => read_for(plain, network),
        found => found,
    }
}

/// The plain file beside the own one of an attachment, `file`: it is that of an earlier ADD of the same attachment, or of
/// another one of the container to the same network.
pub(crate) fn earlier(
    directory: &str,
    attachment: &Attachment,
    network: &str,
    file: &Path,
) -> Option<PathBuf> {
    let (plain, own) = names(directory, attachment);
    if file != own {
        return None;
    }
    match read_for(plain, network) {
        Saved::Config(plain, _) => Some(plain),
        Saved::Nothing | Saved::Broken(..) => None,
    }
}

/// All that was kept for attachments to `network`, by the names of the files; of files that can't be used
/// their owner is unknown, and `unusable` is told about each.
///
/// # Errors
/// Code 999 with the directory.
pub(crate) fn of_network(
    directory: &str,
    network: &str,
    mut unusable: impl FnMut(&Path, &str),
) -> Result<BTreeMap<String, (PathBuf, Delegate)>, CniError> {
    let failed = |error: io::Error| {
        let msg = format!("failed to read {directory}: {error}: make the directory readable for the runtime");
        CniError::new(error::OTHER, msg)
    };
    let mut kept = BTreeMap::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(kept),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        // A name with a dot belongs to a file that is just being written.
        if name.starts_with('.') || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        match read(entry.path()) {
            Saved::Config(file, delegate) if delegate.network == network => {
                kept.insert(name, (file, delegate));
            }
            Saved::Broken(file, why) => unusable(&file, &why),
            Saved::Config(..) | Saved::Nothing => {}
        }
    }
    Ok(kept)
}

/// Keeps the configuration of a delegate for the attachment. Gives the file, and what was kept of an ADD before.
///
/// Nothing waits for the disk, as the delegates don't with the addresses they reserve: a power cut ends the
/// pods too, and for what it damages DEL does without the file.
///
/// # Errors
/// Code 999 with the path.
pub(crate) fn keep(
    directory: &str,
    attachment: &Attachment,
    delegate: &Delegate,
) -> Result<(PathBuf, Former), CniError> {
    let (plain, own) = names(directory, attachment);
    // A file for another network is a container's whose id ends with this interface: it needs it for its DEL.
    let (file, mut former) = match (read_for(own.clone(), &delegate.network), read(plain.clone())) {
        (Saved::Nothing, Saved::Nothing) => (plain, Former::Nothing),
        (Saved::Nothing, Saved::Broken(..)) => (plain, Former::Possible),
        (Saved::Config(..) | Saved::Broken(..), _) | (_, Saved::Config(..)) => (own, Former::Possible),
    };
    let text = delegate.text.as_bytes();
    let written = match files::replace(&file, text) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            make(directory).map_err(|error| failed(Path::new(directory), error))?;
            former = Former::Unknown;
            files::replace(&file, text)
        }
        outcome => outcome,
    };
    written.map_err(|error| failed(&file, error))?;
    Ok((file, former))
}

/// Says whether [`keep`] could write: makes the directory if it is missing, and writes and removes a file in it.
///
/// # Errors
/// Code 999 with the path.
pub(crate) fn check_writable(directory: &str) -> Result<(), CniError> {
    let file = Path::new(directory).join(format!(".status-{}", std::process::id()));
    make(directory)
        .and_then(|()| files::check_writable(&file))
        .map_err(|error| failed(Path::new(directory), error))
}

/// The directory is made for root only because its files may hold what pods are told in confidence.
fn make(directory: &str) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn failed(what: &Path, error: io::Error) -> CniError {
    let msg = format!(
        "failed to keep the delegate's configuration for DEL in {}: {error}: make room, or set \"dataDir\" to \
         a directory that can be written",
        what.display()
    );
    CniError::new(error::OTHER, msg)
}

/// Removes what an ADD of the attachment left beside its files if it was killed while it wrote one.
pub(crate) fn tidy(directory: &str, attachment: &Attachment) {
    let (plain, own) = names(directory, attachment);
    for file in [plain, own] {
        let _ = fs::remove_file(files::temporary(&file));
    }
}

/// Removes what any ADD that was killed left there.
pub(crate) fn sweep(directory: &str) {
    files::sweep(Path::new(directory), ".");
}

/// Removes a file whose attachment is gone.
///
/// # Errors
/// A sentence with the path. It is no reason to fail: the next DEL would find the file again.
pub(crate) fn remove(file: &Path) -> Result<(), String> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(format!("{} can't be removed: {error}", file.display()))
        }
        _ => Ok(()),
    }
}

fn names(directory: &str, Attachment { container, ifname }: &Attachment) -> (PathBuf, PathBuf) {
    let directory = Path::new(directory);
    (directory.join(container), directory.join(format!("{container}-{ifname}")))
}

/// [`read`]; a file that is for another network is none.
fn read_for(file: PathBuf, network: &str) -> Saved {
    match read(file) {
        Saved::Config(_, delegate) if delegate.network != network => Saved::Nothing,
        found => found,
    }
}

fn read(file: PathBuf) -> Saved {
    match files::read(&file) {
        Ok(bytes) => match Delegate::from_kept(&bytes) {
            Some(delegate) => Saved::Config(file, delegate),
            None => {
                Saved::Broken(file, format!("{} bytes that are no delegate's configuration", bytes.len()))
            }
        },
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Saved::Nothing
        }
        Err(error) => Saved::Broken(file, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const A: &str = r#"{"name":"a","type":"bridge"}"#;
    const B: &str = r#"{"name":"b","type":"macvlan"}"#;

    fn attachment(container: &str, ifname: &str) -> Attachment {
        Attachment { container: container.to_owned(), ifname: ifname.to_owned() }
    }

    fn keep(directory: &str, attachment: &Attachment, text: &str) -> Result<(PathBuf, Former), CniError> {
        super::keep(directory, attachment, &Delegate::from_kept(text.as_bytes()).unwrap())
    }

    fn kept(directory: &str, ifname: &str, network: &str) -> Option<(String, String)> {
        match find(directory, &attachment("c1", ifname), network) {
            Saved::Config(file, delegate) => {
                Some((file.file_name().unwrap().to_str().unwrap().to_owned(), delegate.text))
            }
            _ => None,
        }
    }

    fn pair(file: &str, text: &str) -> Option<(String, String)> {
        Some((file.to_owned(), text.to_owned()))
    }

    #[test]
    fn the_first_attachment_has_the_plain_name_and_a_further_one_its_interface_too() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("new/flannel");
        let directory = directory.to_str().unwrap();
        assert_eq!(keep(directory, &attachment("c1", "eth0"), A).unwrap().1, Former::Unknown);
        assert_eq!(keep(directory, &attachment("c1", "net1"), B).unwrap().1, Former::Possible);
        assert_eq!(kept(directory, "eth0", "a"), pair("c1", A));
        assert_eq!(kept(directory, "net1", "b"), pair("c1-net1", B));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(Path::new(directory)), 0o700);
        assert_eq!(mode(&Path::new(directory).join("c1")), 0o600);
        assert_eq!(fs::read_dir(directory).unwrap().count(), 2);
        // The plain name is free again, but the file of the interface still stands.
        remove(&Path::new(directory).join("c1")).unwrap();
        keep(directory, &attachment("c1", "net1"), B).unwrap();
        assert_eq!(kept(directory, "net1", "b"), pair("c1-net1", B));
        assert_eq!(fs::read_dir(directory).unwrap().count(), 1);
    }

    #[test]
    fn only_whole_files_are_seen_and_nothing_else_is_left() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().to_str().unwrap();
        fs::write(root.path().join("c1"), "{").unwrap();
        fs::set_permissions(root.path().join("c1"), fs::Permissions::from_mode(0o644)).unwrap();
        let broken = fs::File::open(root.path().join("c1")).unwrap();
        keep(directory, &attachment("c1", "eth0"), A).unwrap();
        assert_eq!(io::read_to_string(broken).unwrap(), "{", "it was written over in place");
        assert_eq!(fs::metadata(root.path().join("c1")).unwrap().permissions().mode() & 0o777, 0o600);
        // A directory in the way: the rename fails.
        fs::create_dir(root.path().join("c2")).unwrap();
        let error = keep(directory, &attachment("c2", "eth0"), A).unwrap_err();
        assert!(error.msg.contains("/c2: "), "{}", error.msg);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_plain_file_of_another_network_is_left_to_its_owner() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().to_str().unwrap();
        keep(directory, &attachment("c1", "eth0"), A).unwrap();
        assert!(matches!(find(directory, &attachment("c1", "net1"), "b"), Saved::Nothing));
        assert_eq!(kept(directory, "net1", "a"), pair("c1", A));
    }

    #[test]
    fn a_file_of_a_container_whose_id_ends_with_the_interface_is_left_to_it() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().to_str().unwrap();
        let (other, file) = (attachment("c1-eth0", "eth0"), root.path().join("c1-eth0"));
        let one = attachment("c1", "eth0");
        let plain = keep(directory, &one, A).unwrap().0;
        assert_eq!(keep(directory, &other, B).unwrap(), (file.clone(), Former::Nothing));
        assert_eq!(kept(directory, "eth0", "a"), pair("c1", A));
        assert_eq!(earlier(directory, &one, "a", &plain), None);
        // The other order.
        remove(&plain).unwrap();
        assert!(matches!(find(directory, &one, "a"), Saved::Nothing));
        assert_eq!(keep(directory, &one, A).unwrap(), (plain, Former::Nothing));
        assert_eq!((kept(directory, "eth0", "a"), fs::read(&file).unwrap()), (pair("c1", A), B.into()));
    }

    #[test]
    fn the_file_of_an_earlier_add_is_found_beside_that_of_the_last_one() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().to_str().unwrap();
        let one = attachment("c1", "eth0");
        let first = keep(directory, &one, A).unwrap();
        assert_eq!(earlier(directory, &one, "a", &first.0), None);
        let second = keep(directory, &one, A).unwrap();
        assert_eq!((first.1, second.1), (Former::Nothing, Former::Possible));
        assert_eq!(earlier(directory, &one, "a", &second.0), Some(first.0));
        assert_eq!(earlier(directory, &one, "b", &second.0), None);
    }

    #[test]
    fn an_unusable_file_is_reported_and_written_over() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().to_str().unwrap();
        for content in ["", "{", "null", "\0\0\0\0", r#"{"name":"a"}"#, r#"{"name":"a","type":""}"#] {
            fs::write(root.path().join("c1"), content).unwrap();
            assert!(
                matches!(find(directory, &attachment("c1", "eth0"), "a"), Saved::Broken(..)),
                "{content}"
            );
        }
        keep(directory, &attachment("c1", "eth0"), A).unwrap();
        assert_eq!(kept(directory, "eth0", "a"), pair("c1", A));
        fs::create_dir(root.path().join("c2")).unwrap();
        assert!(matches!(find(directory, &attachment("c2", "eth0"), "a"), Saved::Broken(..)));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named_with_the_remedy() {
        let error = keep("/proc/nowhere", &attachment("c1", "eth0"), A).unwrap_err();
        assert!(error.msg.contains("/proc/nowhere") && error.msg.contains("dataDir"), "{}", error.msg);
        assert_eq!(check_writable("/proc/nowhere").unwrap_err().msg, error.msg);
        let root = tempfile::tempdir().unwrap();
        check_writable(root.path().join("new/flannel").to_str().unwrap()).unwrap();
        assert_eq!(fs::read_dir(root.path().join("new/flannel")).unwrap().count(), 0);
        assert!(matches!(find("/dev/null", &attachment("c1", "eth0"), "a"), Saved::Nothing));
    }
}
