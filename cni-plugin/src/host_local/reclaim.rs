//! Which reservations belong to pods that are gone, when no DEL came for them: after a power cut, a kill, or a
//! runtime that lost its state.
//!
//! A runtime keeps what it knows about an attachment in a file of its own, with the path of the pod's namespace. If
//! there is nothing at that path any more, the pod is gone. If the file does not say, the address stays: the clock may have
//! been set since it was reserved, and then its age says nothing. If the runtime keeps no file, a reservation that is older
//! than this boot has no pod: no namespace outlives the kernel that it is in.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::store::Holder;
use crate::env::Attachment;
use crate::files;
use crate::netns::{Missing, Namespace};

/// Where libcni keeps what it knows about attachments.
const RESULTS: &str = "/var/lib/cni/results";

/// Whether the runtime knows of an ADD of the attachment that has succeeded, and of no DEL.
pub(crate) fn is_recorded(network: &str, attachment: &Attachment) -> bool {
    fs::symlink_metadata(Path::new(RESULTS).join(record(network, attachment))).is_ok()
}

/// The name of libcni's file.
fn record(network: &str, Attachment { container, ifname }: &Attachment) -> String {
    format!("{network}-{container}-{ifname}")
}

/// What tells on this host whether a pod is gone.
pub(crate) struct Evidence {
    results: PathBuf,
    boot: Option<SystemTime>,
}

impl Evidence {
    /// As this host is.
    pub(crate) fn of_host() -> Self {
        Self { results: RESULTS.into(), boot: boot_time() }
    }

    /// Whether the pod is gone for which an address of `network` is reserved by the file at `path`.
    pub(crate) fn is_gone(&self, network: &str, holder: &Holder, path: &Path) -> bool {
        match holder {
            Holder::Nobody => true,
            Holder::Unknown(_) => false,
            Holder::Attachment(attachment) => match self.namespace(&record(network, attachment)) {
                Known::Living | Known::Undecided => false,
                Known::Gone => true,
                Known::Nothing => self.is_older_than_boot(path),
            },
            // An old version wrote it, so that it is older than this boot in any case that matters.
            Holder::Container(_) => self.is_older_than_boot(path),
        }
    }

    fn namespace(&self, name: &str) -> Known {
        let content = match files::read(&self.results.join(name)) {
            Ok(content) => content,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Known::Nothing;
            }
            Err(_) => return Known::Undecided,
        };
        let entry: Value = serde_json::from_slice(&content).unwrap_or_default();
        let Some(path) = entry["netns"].as_str().filter(|path| !path.is_empty()) else {
            return Known::Undecided;
        };
        match Namespace::open(OsStr::new(path)) {
            Ok(_) => Known::Living,
            Err(Missing::Gone(_) | Missing::NoNamespace(_)) => Known::Gone,
            Err(Missing::Failed(_)) => Known::Undecided,
        }
    }

    fn is_older_than_boot(&self, path: &Path) -> bool {
        let written = fs::symlink_metadata(path).and_then(|meta| meta.modified());
        matches!((written, self.boot), (Ok(written), Some(boot)) if written < boot)
    }
}

/// What a runtime knows about a pod's namespace.
enum Known {
    /// It is there.
    Living,
    /// There is none at its path.
    Gone,
    /// There is a file, which does not say where the namespace is, or can't be read.
    Undecided,
    /// There is no file.
    Nothing,
}

fn boot_time() -> Option<SystemTime> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_is_gone_with_its_namespace_or_with_the_kernel_that_had_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("10.1.17.2");
        fs::write(&path, "c1\r\neth0").unwrap();
        let hour = Duration::from_secs(3600);
        let evidence = |booted: SystemTime| Evidence { results: directory.path().into(), boot: Some(booted) };
        let holder = Holder::Attachment(Attachment { container: "c1".into(), ifname: "eth0".into() });
        let gone = |booted: SystemTime| evidence(booted).is_gone("n", &holder, &path);
        let (before, after) = (SystemTime::now() - hour, SystemTime::now() + hour);
        assert!(!gone(before) && gone(after));
        let entry = directory.path().join("n-c1-eth0");
        for (netns, expected) in
            [("/proc/self/ns/net", false), ("/nowhere/netns", true), ("/etc/passwd", true)]
        {
            fs::write(&entry, json!({"netns": netns}).to_string()).unwrap();
            assert_eq!((gone(before), gone(after)), (expected, expected), "{netns}");
        }
        // A runtime that does not write where the namespace is, or whose file was damaged.
        for content in ["{}", r#"{"netns":""}"#, "", "\0\0"] {
            fs::write(&entry, content).unwrap();
            assert!(!gone(before) && !gone(after), "{content:?}");
        }
        fs::remove_file(&entry).unwrap();
        fs::create_dir(&entry).unwrap();
        assert!(!gone(before) && !gone(after));
        assert!(evidence(before).is_gone("n", &Holder::Nobody, &path));
        assert!(!evidence(after).is_gone("n", &Holder::Unknown("permission denied".into()), &path));
    }

    #[test]
    fn this_kernel_was_booted_in_the_past() {
        assert!(boot_time().unwrap() < SystemTime::now());
    }
}
