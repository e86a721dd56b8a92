//! Tells the agent of this node what became of a call, for its figures: one datagram, best effort.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::env::Verb;
use crate::error::{CniError, bounded};

/// The socket's name, in the directory of the subnet file.
const SOCKET: &str = "cni.sock";

/// Tells what became of a call, unless there is no listener or it is behind: nothing here waits.
pub(crate) fn tell(subnet_file: &Path, verb: Verb, took: Duration, error: Option<&CniError>) {
    let Some(directory) = subnet_file.parent() else { return };
    let socket: PathBuf = directory.join(SOCKET);
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    let report = json!({
        "v": 1,
        "verb": verb.word(),
        "code": error.map_or(0, |error| error.code),
        "us": micros,
        "error": error.map(|error| bounded(&error.msg)),
    });
    let Ok(sender) = UnixDatagram::unbound() else { return };
    if sender.set_nonblocking(true).is_ok() {
        let _ = sender.send_to(report.to_string().as_bytes(), socket);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::Value;

    use super::*;

    fn call(directory: &Path, error: Option<&CniError>) {
        tell(&directory.join("subnet.env"), Verb::Add, Duration::from_micros(1500), error);
    }

    #[test]
    fn the_agent_is_told_verb_code_and_duration() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixDatagram::bind(directory.path().join(SOCKET)).unwrap();
        let read = || {
            let mut buffer = [0; 8192];
            let length = listener.recv(&mut buffer).unwrap();
            serde_json::from_slice::<Value>(&buffer[..length]).unwrap()
        };
        call(directory.path(), None);
        assert_eq!(read(), json!({"v": 1, "verb": "ADD", "code": 0, "us": 1500, "error": null}));
        call(directory.path(), Some(&CniError::new(11, "x".repeat(100_000))));
        let told = read();
        assert!(told["code"] == 11 && told["error"].as_str().unwrap().len() < 2100);
    }

    #[test]
    fn nobody_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        call(directory.path(), None);
        call(Path::new("/nonexistent"), None);
        // A listener that does not read: the kernel holds a few datagrams, and the rest is lost.
        let _listener = UnixDatagram::bind(directory.path().join(SOCKET)).unwrap();
        let begun = Instant::now();
        (0..5000).for_each(|_| call(directory.path(), None));
        assert!(begun.elapsed() < Duration::from_secs(30), "a call that waits would wait for ever");
    }
}
