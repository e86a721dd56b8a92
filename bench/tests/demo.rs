//! How the demo ends when the user asks it to.

#![expect(clippy::unwrap_used, reason = "a failed assumption of a test fails the test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use backends::testing::wait_for_some;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::{NamedTempFile, TempDir};

const TIMEOUT: Duration = Duration::from_secs(60);

/// `demo --keep` with its pods attached, in a process group of its own as on a terminal.
struct Demo {
    child: Child,
    files: TempDir,
    /// Its standard error.
    said: NamedTempFile,
}

impl Demo {
    fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
        let said = NamedTempFile::new().unwrap();
        command.arg("--keep").env("TMPDIR", files.path()).stdout(Stdio::piped()).process_group(0);
        command.stderr(said.reopen().unwrap());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut lines = output.lines().map_while(Result::ok);
        let ready = lines.any(|line| line.contains("Ctrl-C ends it"));
        // What it prints later must not wait for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        let demo = Self { child, files, said };
        assert!(ready, "the demo ended before its cluster was there: {}", demo.said());
        demo
    }

    /// What it said on its standard error so far.
    fn said(&self) -> String {
        fs::read_to_string(self.said.path()).unwrap()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What Ctrl-C does: a signal to the whole group.
    fn interrupt(&self) {
        kill(Pid::from_raw(-self.pid().as_raw()), Signal::SIGINT).unwrap();
    }

    /// Its exit status, and what it left in the directory for temporary files.
    fn end(mut self) -> (ExitStatus, Vec<String>) {
        let status = wait_for_some("the demo to end", TIMEOUT, || self.child.try_wait().unwrap()).unwrap();
        let left = fs::read_dir(self.files.path()).unwrap();
        (status, left.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect())
    }
}

/// Processes that have one of the demo's, by `/proc/PID/stat`: id, name, parent, group.
fn processes() -> Vec<(i32, String, i32, i32)> {
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let stat = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        let (head, tail) = stat.rsplit_once(") ")?;
        let (pid, name) = head.split_once(" (")?;
        let mut fields = tail.split(' ').skip(1);
        let mut number = || fields.next()?.parse().ok();
        Some((pid.parse().ok()?, name.to_owned(), number()?, number()?))
    });
    all.collect()
}

#[test]
fn one_ctrl_c_reaches_the_demo_alone_and_it_ends_in_good_order_without_leaving_files() {
    let demo = Demo::start();
    let own = demo.pid().as_raw();
    let in_group: Vec<_> =
        processes().into_iter().filter(|(pid, _, _, group)| *group == own && *pid != own).collect();
    assert!(in_group.is_empty(), "Ctrl-C reaches these, too: {in_group:?}");
    demo.interrupt();
    let (status, left) = demo.end();
    assert!(status.success(), "{status}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_second_ctrl_c_ends_it_at_once_without_leaving_files_or_processes() {
    let demo = Demo::start();
    let own = demo.pid().as_raw();
    let agents: Vec<i32> = processes()
        .into_iter()
        .filter_map(|(pid, name, parent, _)| (parent == own && name == "flanneld").then_some(pid))
        .collect();
    assert_eq!(agents.len(), 3);
    // An agent that does not end holds up the good order for half a minute.
    agents.iter().for_each(|&agent| kill(Pid::from_raw(agent), Signal::SIGSTOP).unwrap());
    demo.interrupt();
    // Signals of one kind that follow at once become one.
    wait_for_some("a word about the first", TIMEOUT, || {
        demo.said().contains("once more to end at once").then_some(())
    })
    .unwrap();
    demo.interrupt();
    let (status, left) = demo.end();
    assert!(!status.success(), "{status}");
    assert!(left.is_empty(), "{left:?}");
    wait_for_some("the agents to be gone", TIMEOUT, || {
        let alive =
            processes().into_iter().any(|(pid, name, ..)| agents.contains(&pid) && name == "flanneld");
        (!alive).then_some(())
    })
    .unwrap();
}
