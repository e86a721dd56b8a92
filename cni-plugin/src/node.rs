//! `subnet.env` as a call needs it: read, complete, or an error that says what is wrong and what to do.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use subnet::env_file::Reading;

use crate::note;

/// [`read`]s the file, and waits up to `limit` for one that is missing: pods that were scheduled while
/// flanneld starts then come up with it, instead of failing and being tried again later and later.
///
/// # Errors
/// As [`read`]. A file that is there and can't be used is not waited for: flanneld writes it in one step.
pub(crate) fn wait(file: &str, limit: Duration) -> Result<Reading, String> {
    let missing = || fs::metadata(file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    if let Ok(reading) = read(file) {
        return Ok(reading);
    }
    if !limit.is_zero() && missing() {
        note(&format!("waiting up to {} s for {file}", limit.as_secs()));
        let start = Instant::now();
        while start.elapsed() < limit && missing() {
            thread::sleep(Duration::from_millis(20));
        }
    }
    read(file)
}

/// Reads what flanneld wrote about this node.
///
/// # Errors
/// Go's sentence, which people search for, followed by the cause and the remedy.
pub(crate) fn read(file: &str) -> Result<Reading, String> {
    let failed = |what: String, remedy: &str| {
        format!(
            "failed to load flannel 'subnet.env' file: {what}. Check the flannel pod log for this node. {remedy}"
        )
    };
    let bytes = subnet::regular::read(Path::new(file))
        .map_err(|error| failed(format!("open {file}: {}", in_words(&error)), &remedy(file, &error)))?;
    let reading = Reading::parse(&String::from_utf8_lossy(&bytes)).map_err(|error| {
        failed(
            format!("{file}: {error}"),
            "Remove the file and restart flanneld on this node: it writes a new one.",
        )
    })?;
    let missing = reading.missing();
    if missing.is_empty() {
        return Ok(reading);
    }
    Err(failed(
        format!("{file} is missing {}", missing.join(", ")),
        "flanneld writes all of them at once: restart it on this node, and make sure that nothing else writes the file.",
    ))
}

/// The words that Go prints for the usual failures, which log searches expect.
fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file or directory".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        io::ErrorKind::IsADirectory => "is a directory".into(),
        _ => error.to_string(),
    }
}

fn remedy(file: &str, error: &io::Error) -> String {
    if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::IsADirectory) {
        return "Remove it and restart flanneld on this node, or correct \"subnetFile\".".into();
    }
    if error.kind() != io::ErrorKind::NotFound {
        return "Make the file readable for the container runtime.".into();
    }
    let directory = Path::new(file).parent().unwrap_or(Path::new(""));
    if directory.is_dir() {
        return "flanneld has not written the file: it is still starting, waits for a subnet for this node (in \
                Kubernetes: the node's podCIDR), or is not running. Pods are connected as soon as it is there."
            .into();
    }
    format!(
        "{} does not exist either: flanneld has not run since this node started, or its pod does not mount \
         that directory of the host. Start flanneld on this node.",
        directory.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GO: &str = "failed to load flannel 'subnet.env' file: ";

    #[test]
    fn a_missing_file_gives_gos_sentence_and_then_the_cause() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("subnet.env");
        let file = file.to_str().unwrap();
        let error = read(file).unwrap_err();
        let go =
            format!("{GO}open {file}: no such file or directory. Check the flannel pod log for this node.");
        assert!(error.starts_with(&go) && error.contains("podCIDR"), "{error}");
        let error = read("/nowhere/subnet.env").unwrap_err();
        assert!(error.contains("/nowhere does not exist either"), "{error}");
    }

    #[test]
    fn what_would_keep_its_reader_waiting_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        for (file, part) in [
            ("/dev/null", "it is a pipe, a socket or a device"),
            (directory.path().to_str().unwrap(), "is a directory"),
        ] {
            let error = read(file).unwrap_err();
            assert!(error.starts_with(&format!("{GO}open {file}: {part}")), "{error}");
            assert!(error.contains("Remove it") && error.contains("subnetFile"), "{error}");
        }
    }

    #[test]
    fn an_incomplete_file_names_what_is_missing_and_lines_without_a_value_are_harmless() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("subnet.env");
        let text = |content: &[u8]| {
            fs::write(&file, content).unwrap();
            read(file.to_str().unwrap()).map_err(|error| {
                error
                    .replace(&format!("{GO}{}", file.display()), "")
                    .split(". Check")
                    .next()
                    .unwrap()
                    .to_owned()
            })
        };
        let all = " is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, \
                   FLANNEL_MTU, FLANNEL_IPMASQ";
        assert_eq!(text(b"").unwrap_err(), all);
        assert_eq!(text(b"FLANNEL_NETWORK\nFLANNEL_SUBNET\n\xff\xfe\n").unwrap_err(), all);
        assert_eq!(
            text(b"FLANNEL_MTU=much\n").unwrap_err(),
            r#": FLANNEL_MTU="much" is not a number of bytes"#
        );
        let whole =
            b"FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";
        assert_eq!(text(whole).unwrap().mtu, Some(1472));
    }
}
