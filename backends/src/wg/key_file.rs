//! The file with this node's private key, in Go flannel's form: base64 without a line break.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use subnet::env_file::write_atomically;
use subnet::wireguard::PublicKey;
use zeroize::Zeroizing;

use super::identity::Identity;

/// Names another file (contract §2).
pub const VARIABLE: &str = "WIREGUARD_KEY_FILE";
/// Where Go flannel keeps it, which a reboot empties.
const VOLATILE: &str = "/run/flannel/wgkey";
/// Where a copy stays over a reboot.
const LASTING: &str = "/var/lib/flannel/wgkey";
/// A key has 44 characters, and perhaps a line break.
const LONGEST: u64 = 64;

/// Where the key is, and where its copy is, if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFiles {
    /// The file.
    pub key: PathBuf,
    /// Its copy.
    pub copy: Option<PathBuf>,
}

impl KeyFiles {
    /// Those of this process.
    pub fn of_environment() -> Self {
        match std::env::var_os(VARIABLE) {
            Some(path) => Self { key: path.into(), copy: None },
            None => Self { key: VOLATILE.into(), copy: Some(LASTING.into()) },
        }
    }

    /// All of them.
    pub fn paths(self) -> Vec<PathBuf> {
        [self.key].into_iter().chain(self.copy).collect()
    }

    /// The identity in the file, or in its copy, or a new one; it is in both afterwards.
    ///
    /// # Errors
    /// A sentence that names the file and the remedy. A key that can't be read is never replaced.
    pub fn identity(&self) -> Result<Identity, String> {
        if self.key.as_os_str().is_empty() {
            return Err(format!("{VARIABLE} is empty: name a file, or remove the variable"));
        }
        let found = read(&self.key)?;
        let copied = match &self.copy {
            Some(copy) => read(copy)?,
            None => None,
        };
        let fresh = found.is_none();
        let identity = match found.or_else(|| copied.clone()) {
            Some(identity) => identity,
            None => Identity::generate().map_err(|why| format!("a new key: {why}"))?,
        };
        if fresh {
            write(&self.key, &identity)?;
            tracing::info!(file = %self.key.display(), key = %identity.public(), "WireGuard has a key file");
        }
        if let Some(copy) = self.copy.as_ref().filter(|_| copied.as_ref() != Some(&identity))
            && copy.parent().is_some_and(Path::is_dir)
            && let Err(why) = write(copy, &identity)
        {
            tracing::warn!("after a reboot this node has another WireGuard key: {why}");
        }
        Ok(identity)
    }

    /// Puts a new key in the place of the one with this public key, also in the copy, unless somebody has done so. Gives the
    /// public key that this host has then.
    ///
    /// # Errors
    /// A sentence that names the file and the remedy; the key is then what it was.
    pub fn renew(&self, former: &PublicKey) -> Result<PublicKey, String> {
        if read(&self.key)?.is_some_and(|found| found.public() == former) {
            let identity = Identity::generate().map_err(|why| format!("a new key: {why}"))?;
            write(&self.key, &identity)?;
        }
        // The copy follows.
        Ok(*self.identity()?.public())
    }
}

/// The key in a file; `None` if there is no file.
fn read(path: &Path) -> Result<Option<Identity>, String> {
    let remedy = "correct it, or remove it: the node makes another key then and announces that";
    let failed = |error: io::Error| format!("the WireGuard key file {}: {error}: {remedy}", path.display());
    let wrong = |why: &str| format!("the WireGuard key file {} {why}: {remedy}", path.display());
    // Opening a pipe would wait for a writer, and health and signals with it.
    let mut options = OpenOptions::new();
    let file = match options.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(wrong("is no file"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(format!(
            "the WireGuard key file {} can be read by others (mode {:04o}): chmod 0400 {0}, and make another key if \
             somebody may have read it",
            path.display(),
            metadata.mode() & 0o7777
        ));
    }
    let mut text = Zeroizing::new(String::with_capacity(LONGEST as usize + 1));
    file.take(LONGEST + 1).read_to_string(&mut text).map_err(failed)?;
    match Identity::from_text(&text) {
        Ok(identity) if identity.private() == &[0; 32] => {
            Err(wrong("has a key of zeros alone, which everybody can guess"))
        }
        Ok(identity) => Ok(Some(identity)),
        Err(_) if text.trim_ascii().is_empty() => Err(wrong("is empty")),
        Err(why) => Err(wrong(&format!("has no key ({} characters; {why})", text.trim_ascii().len()))),
    }
}

fn write(path: &Path, identity: &Identity) -> Result<(), String> {
    let failed = |error: io::Error| {
        format!(
            "the WireGuard key file {} can't be written: {error}: make its directory writable for flanneld, or name \
             another file with {VARIABLE}",
            path.display()
        )
    };
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
    }
    write_atomically(path, identity.to_text().as_bytes(), 0o600).map_err(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o400)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(directory: &Path) -> KeyFiles {
        KeyFiles { key: directory.join("run/wgkey"), copy: Some(directory.join("lib/wgkey")) }
    }

    fn put(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_key_stays_over_restarts_and_reboots_and_is_readable_by_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        let first = files.identity().unwrap();
        assert!(!files.copy.as_ref().unwrap().exists(), "no directory is made for the copy");
        fs::create_dir(directory.path().join("lib")).unwrap();
        assert_eq!(files.identity().unwrap(), first);
        for path in [&files.key, files.copy.as_ref().unwrap()] {
            assert_eq!(fs::read_to_string(path).unwrap(), *first.to_text());
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o400);
        }
        fs::remove_dir_all(directory.path().join("run")).unwrap();
        assert_eq!(files.identity().unwrap(), first, "after a reboot");
        // Somebody put another one in its place.
        let other = Identity::generate().unwrap();
        fs::remove_file(&files.key).unwrap();
        put(&files.key, &format!("{}\n", *other.to_text()), 0o600);
        assert_eq!(files.identity().unwrap(), other);
        fs::remove_file(&files.key).unwrap();
        assert_eq!(files.identity().unwrap(), other, "the copy followed");
    }

    #[test]
    fn a_key_is_renewed_in_both_files_and_only_if_it_still_is_the_one_that_is_meant() {
        let directory = tempfile::tempdir().unwrap();
        let files = files(directory.path());
        fs::create_dir(directory.path().join("lib")).unwrap();
        let first = *files.identity().unwrap().public();
        let second = files.renew(&first).unwrap();
        assert_ne!(first, second);
        assert_eq!(files.renew(&first).unwrap(), second, "that was done before");
        for path in [&files.key, files.copy.as_ref().unwrap()] {
            let text = fs::read_to_string(path).unwrap();
            assert_eq!(*Identity::from_text(&text).unwrap().public(), second);
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o7777, 0o400);
        }
        // What can't be used is not replaced.
        fs::set_permissions(&files.key, Permissions::from_mode(0o444)).unwrap();
        assert!(files.renew(&second).unwrap_err().contains("chmod 0400"));
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_the_remedy_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let files = KeyFiles { key: directory.path().join("wgkey"), copy: None };
        let good = Identity::generate().unwrap().to_text();
        let zeros = subnet::wireguard::encode(&[0; 32]);
        for (text, mode, part) in [
            ("", 0o400, "is empty"),
            ("\n", 0o400, "is empty"),
            (&good[..43], 0o400, "has no key (43 characters"),
            ("!!!!", 0o400, "has no key"),
            (zeros.as_str(), 0o400, "has a key of zeros alone"),
            (good.as_str(), 0o444, "mode 0444): chmod 0400"),
            (good.as_str(), 0o640, "mode 0640): chmod 0400"),
            (&"A".repeat(10_000), 0o400, "has no key"),
        ] {
            put(&files.key, text, mode);
            let error = files.identity().unwrap_err();
            assert!(
                error.contains(part) && error.contains("wgkey") && !error.contains(&good[..43]),
                "{error}"
            );
            assert_eq!(fs::read_to_string(&files.key).unwrap(), text);
            fs::remove_file(&files.key).unwrap();
        }
        fs::write(&files.key, b"\xff\xfe").unwrap();
        fs::set_permissions(&files.key, Permissions::from_mode(0o400)).unwrap();
        assert!(files.identity().unwrap_err().contains("remove it"));
        fs::remove_file(&files.key).unwrap();
        fs::create_dir(&files.key).unwrap();
        assert!(files.identity().unwrap_err().contains("is no file"));
        fs::remove_dir(&files.key).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&files.key).status().unwrap().success());
        assert!(files.identity().unwrap_err().contains("is no file"), "a pipe is not waited for");
        let nowhere = KeyFiles { key: PathBuf::from("/proc/wgkey"), copy: None };
        assert!(nowhere.identity().unwrap_err().contains(VARIABLE));
        let unnamed = KeyFiles { key: PathBuf::new(), copy: None };
        assert!(unnamed.identity().unwrap_err().contains("is empty"));
    }
}
