use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::time::Instant;

use tokio::sync::mpsc;

use super::super::announce::{Announcement, PolicyRequest, Retry};
use super::*;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn the_socket_is_for_root_only_in_a_directory_that_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/flannel/policy.sock");
    let socket = PolicySocket::bind(&path).unwrap();
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o755));
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    // One that is in use is left alone, and one of an agent that is gone is replaced.
    assert!(matches!(PolicySocket::bind(&path), Err(SocketError::InUse(_))));
    assert!(!remove(&path).unwrap());
    drop(socket);
    let again = PolicySocket::bind(&path).unwrap();
    assert_eq!(mode(&path), 0o600);
    drop(again);
    assert!(remove(&path).unwrap() && !remove(&path).unwrap());
}

#[tokio::test]
async fn nothing_is_followed_or_removed_that_is_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("target"), "foreign").unwrap();
    fs::create_dir(at("directory")).unwrap();
    symlink("target", at("link")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    // Left by a process that was killed, or put there.
    symlink("target", at(".policy.sock.new")).unwrap();
    for (name, kind) in [
        ("target", "a file"),
        ("directory", "a directory"),
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
    ] {
        let error = PolicySocket::bind(&at(name)).unwrap_err().to_string();
        assert!(error.contains(&format!("{name} is {kind}, not a socket: remove it")), "{error}");
        assert!(!remove(&at(name)).unwrap());
    }
    let _socket = PolicySocket::bind(&at("policy.sock")).unwrap();
    assert_eq!(fs::read_to_string(at("target")).unwrap(), "foreign");
    assert!(fs::symlink_metadata(at(".policy.sock.new")).is_err());
    let error = PolicySocket::bind(&at(&"x".repeat(100))).unwrap_err().to_string();
    assert!(error.contains("too long for a socket"), "{error}");
    let error = PolicySocket::bind(Path::new("/proc/nowhere/policy.sock")).unwrap_err().to_string();
    assert!(error.contains("/proc/nowhere/policy.sock"), "{error}");
}

/// A socket that is served, with the requests that reach the policy task.
struct Served {
    _directory: tempfile::TempDir,
    path: PathBuf,
    requests: mpsc::Receiver<PolicyRequest>,
}

impl Served {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.sock");
        let (announcer, requests) = Announcer::channel();
        tokio::spawn(PolicySocket::bind(&path).unwrap().run(announcer, Some(7)));
        Self { _directory: directory, path, requests }
    }

    /// Asks from a thread, as another process does.
    fn ask(&self, text: impl Into<Vec<u8>>) -> tokio::task::JoinHandle<String> {
        let (path, text) = (self.path.clone(), text.into());
        tokio::task::spawn_blocking(move || {
            let mut stream = Blocking::connect(path).unwrap();
            let _ = stream.write_all(&text);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer
        })
    }
}

const ADD: &str = "{\"v\":1,\"verb\":\"add\",\"namespace\":\"shop\",\"pod\":\"web\",\"container\":\"c1\",\"ips\":[\"10.244.1.7\"]}\n";

#[tokio::test]
async fn a_pod_is_announced_to_the_policy_task_whose_answer_is_passed_on() {
    let mut served = Served::new();
    for (outcome, expected) in [
        (Ok(OldConnections::Kept), "{\"ok\":true}\n"),
        (Ok(OldConnections::Forgotten), "{\"forgotten\":true,\"ok\":true}\n"),
        (Err(Retry { why: "not yet".into() }), "{\"retry\":true,\"why\":\"not yet\"}\n"),
    ] {
        let asked = served.ask(ADD);
        let Some(PolicyRequest::Announce(Announcement { pod, .. }, answer)) = served.requests.recv().await
        else {
            panic!("no announcement")
        };
        assert_eq!(pod, "web");
        answer.send(outcome).unwrap();
        assert_eq!(asked.await.unwrap(), expected);
    }
    let asked = served.ask(ADD.replace("add", "del"));
    let Some(PolicyRequest::Release(ended, answer)) = served.requests.recv().await else {
        panic!("no release")
    };
    assert_eq!(ended.container, "c1");
    answer.send(Ok(())).unwrap();
    assert_eq!(asked.await.unwrap(), "{\"ok\":true}\n");
    assert_eq!(served.ask("{\"v\":1,\"verb\":\"status\"}\n").await.unwrap(), "{\"ok\":true}\n");
    let asked = served.ask("{\"v\":1,\"verb\":\"list\"}\n");
    let Some(PolicyRequest::Ask(_, answer)) = served.requests.recv().await else { panic!("no inquiry") };
    answer.send(Ok("nobody\n".into())).unwrap();
    assert_eq!(asked.await.unwrap(), "{\"ok\":true,\"text\":\"nobody\\n\"}\n");
    let group = served.ask("{\"v\":1,\"verb\":\"log-group\"}\n").await.unwrap();
    assert_eq!(group, "{\"ok\":true,\"text\":\"7\"}\n");
}

#[tokio::test]
async fn bad_requests_are_answered_with_an_error_and_harm_no_others() {
    let mut served = Served::new();
    let silent: Vec<Blocking> = (0..100).map(|_| Blocking::connect(&served.path).unwrap()).collect();
    for (text, expected) in [
        ("pardon?\n".to_owned(), "is no JSON object"),
        ("{\"v\":9}\n".to_owned(), "it speaks 1"),
        (format!("{}\n", "x".repeat(100_000)), "at most 65536 bytes"),
    ] {
        let answer = served.ask(text).await.unwrap();
        assert!(answer.starts_with("{\"error\":\"") && answer.contains(expected), "{answer}");
    }
    // A line that never ends is given up.
    let begin = Instant::now();
    assert_eq!(served.ask("{\"v\":1").await.unwrap(), "");
    assert!(begin.elapsed() >= TRANSFER_TIMEOUT);
    let asked = served.ask(ADD);
    let Some(PolicyRequest::Announce(_, answer)) = served.requests.recv().await else {
        panic!("no announcement")
    };
    answer.send(Ok(OldConnections::Kept)).unwrap();
    assert_eq!(asked.await.unwrap(), "{\"ok\":true}\n");
    drop(silent);
}

#[tokio::test]
async fn a_socket_file_that_was_removed_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.sock");
    let mut socket = PolicySocket::bind(&path).unwrap();
    let inode = || fs::symlink_metadata(&path).unwrap().ino();
    let before = inode();
    socket.look();
    assert_eq!(inode(), before);
    fs::remove_file(&path).unwrap();
    socket.look();
    assert_eq!(mode(&path), 0o600);
    // What somebody else put there stays.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "foreign").unwrap();
    socket.look();
    assert_eq!(fs::read(&path).unwrap(), b"foreign");
}
