//! What the CNI plugin did on this node: each call is one datagram to a socket beside the subnet file.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::net::UnixDatagram;
use tokio::time::sleep;

use crate::text::clean;

/// The socket's name, in the directory of the subnet file.
const SOCKET: &str = "cni.sock";
/// No report of the plugin is longer.
const MAX_DATAGRAM: usize = 8192;
/// Failures that are kept, and how much of each.
const MAX_FAILURES: usize = 10;
const MAX_MESSAGE: usize = 500;
/// After a failure of the socket.
const PAUSE: Duration = Duration::from_secs(1);

/// Verbs of the specification; of others nothing is counted.
const VERBS: [&str; 6] = ["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"];
/// Codes that are counted by themselves; all others are one.
const CODES: [u64; 7] = [0, 4, 6, 7, 11, 50, 999];
/// Upper bounds of the buckets of durations, in seconds; one more bucket is for all.
pub(crate) const BOUNDS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0, 10.0];

/// What was reported since the start.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct CniCalls {
    /// How many calls there were of each verb with each code; `other` is any code that is not common.
    pub(crate) requests: BTreeMap<String, BTreeMap<String, u64>>,
    /// How long calls of each verb took.
    pub(crate) durations: BTreeMap<String, Durations>,
    /// The last failures, the newest last.
    pub(crate) failures: VecDeque<FailedCall>,
}

/// Durations by [`BOUNDS`], not cumulated; the last bucket is for longer ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Durations {
    /// How many fell into each bucket.
    pub(crate) buckets: [u64; BOUNDS.len() + 1],
    /// Their sum in seconds.
    pub(crate) sum_seconds: f64,
}

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FailedCall {
    /// When, in seconds since 1970.
    pub(crate) at: u64,
    /// What was asked.
    pub(crate) verb: String,
    /// The error's code.
    pub(crate) code: u64,
    /// The error's message.
    pub(crate) message: String,
}

/// A report of the plugin.
#[derive(Deserialize)]
struct CallReport {
    verb: String,
    code: u64,
    us: u64,
    error: Option<String>,
}

impl CniCalls {
    /// Takes a datagram; one that is no report is passed over.
    fn take(&mut self, datagram: &[u8], at: u64) {
        let Ok(CallReport { verb, code, us, error }) = serde_json::from_slice(datagram) else { return };
        if !VERBS.contains(&verb.as_str()) {
            return;
        }
        let name = if CODES.contains(&code) { code.to_string() } else { "other".to_owned() };
        *self.requests.entry(verb.clone()).or_default().entry(name).or_default() += 1;
        let seconds = Duration::from_micros(us).as_secs_f64();
        let durations = self.durations.entry(verb.clone()).or_default();
        durations.sum_seconds += seconds;
        durations.buckets[BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len())] += 1;
        if code != 0 {
            if self.failures.len() == MAX_FAILURES {
                self.failures.pop_front();
            }
            let message = clean(&error.unwrap_or_default(), MAX_MESSAGE);
            self.failures.push_back(FailedCall { at, verb, code, message });
        }
    }
}

/// Calls, shared between the task that hears of them and those who show them.
#[derive(Clone, Default)]
pub(crate) struct CniListener(Arc<Mutex<CniCalls>>);

impl CniListener {
    fn calls(&self) -> MutexGuard<'_, CniCalls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was reported until now.
    pub(crate) fn report(&self) -> CniCalls {
        self.calls().clone()
    }

    /// Listens beside the subnet file for as long as the process lives. That it can't is logged: nothing depends on it.
    pub(crate) async fn run(self, subnet_file: PathBuf) {
        let path = socket_path(&subnet_file);
        let socket = match bind(&path) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::info!("calls of the CNI plugin are not counted: {}: {error}", path.display());
                return;
            }
        };
        let mut buffer = vec![0; MAX_DATAGRAM];
        loop {
            match socket.recv(&mut buffer).await {
                Ok(length) => {
                    let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
                    self.calls().take(&buffer[..length], at);
                }
                Err(error) => {
                    tracing::debug!(%error, "a report of the CNI plugin can't be received");
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Where the plugin tells, beside the subnet file.
pub(crate) fn socket_path(subnet_file: &Path) -> PathBuf {
    subnet_file.with_file_name(SOCKET)
}

/// A socket for root only, in place of one that an earlier run left.
fn bind(path: &Path) -> io::Result<UnixDatagram> {
    if fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket()) {
        let asked = std::os::unix::net::UnixDatagram::unbound()?;
        if asked.connect(path).is_ok() {
            let why =
                "another flanneld listens there: give each agent a directory of its own for --subnet-file";
            return Err(io::Error::new(io::ErrorKind::AddrInUse, why));
        }
        fs::remove_file(path)?;
    }
    let socket = UnixDatagram::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn calls_are_counted_by_verb_and_code_and_failures_are_kept() {
        let mut calls = CniCalls::default();
        calls.take(br#"{"v":1,"verb":"ADD","code":0,"us":1500,"error":null}"#, 1);
        for code in 0..12 {
            let report = format!(
                r#"{{"v":1,"verb":"ADD","code":{},"us":99000000,"error":"no\nway {code}"}}"#,
                100 + code
            );
            calls.take(report.as_bytes(), 2);
        }
        assert_eq!(calls.requests["ADD"], [("0".to_owned(), 1), ("other".to_owned(), 12)].into());
        assert_eq!(calls.durations["ADD"].buckets, [0, 1, 0, 0, 0, 0, 0, 0, 0, 12]);
        assert_eq!(calls.failures.len(), MAX_FAILURES);
        assert_eq!(calls.failures.back().unwrap().message, "no·way 11");
    }

    #[tokio::test]
    async fn the_socket_of_an_earlier_run_is_replaced_and_other_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(SOCKET);
        drop(bind(&path).unwrap());
        let living = bind(&path).unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(living);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(bind(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_never_panic_and_add_no_labels(bytes: Vec<u8>, verb: String, code: u64, us: u64) {
            let mut calls = CniCalls::default();
            calls.take(&bytes, 0);
            let report = serde_json::json!({"v": 1, "verb": verb, "code": code, "us": us, "error": null});
            calls.take(report.to_string().as_bytes(), 0);
            prop_assert!(calls.requests.keys().all(|verb| VERBS.contains(&verb.as_str())));
        }
    }
}
