//! Runs one command: no shell, a limited time, its own process group, and its output kept up to a limit.

use std::ffi::OsString;
use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::words::{Variables, words};

/// How long a command may take.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

/// How much of its output is kept; the rest is read and dropped.
pub(super) const MAX_OUTPUT: usize = 64 * 1024;

/// How long the output of a command that has ended is waited for: a daemon that it started may hold it open.
const REST: Duration = Duration::from_millis(200);

/// Variables that no command gets, because they are secrets of this process or lead to its supervisor.
const WITHHELD: [&str; 4] = ["FLANNELD_ETCD_PASSWORD", "ACCESS_KEY_ID", "ACCESS_KEY_SECRET", "NOTIFY_SOCKET"];

/// What a command printed on both outputs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Output {
    /// Without white space around it.
    pub(super) text: String,
    /// There was more.
    pub(super) cut: bool,
}

/// The variables of this process that commands get.
pub(super) fn inherited() -> Variables {
    let all = std::env::vars_os().filter_map(|(name, value)| {
        let text = |text: OsString| text.into_string().ok();
        text(name).zip(text(value))
    });
    all.filter(|(name, _)| !WITHHELD.contains(&name.as_str())).collect()
}

/// Runs a command with these variables besides those of this process, and writes `data` and a line break to it.
///
/// # Errors
/// A sentence with the reason and the remedy: it can't be run, takes longer than `limit`, or fails.
pub(super) async fn run(
    command: &str,
    variables: &Variables,
    data: &str,
    limit: Duration,
) -> Result<Output, String> {
    let mut environment = inherited();
    environment.extend(variables.clone());
    let words = words(command, &environment);
    let Some((program, arguments)) = words.split_first() else { return Err("it is empty".to_owned()) };
    let path = find(program, environment.get("PATH"))?;
    let (mut child, output) =
        spawn(&path, arguments, &environment).map_err(|error| format!("{program} can't be run: {error}"))?;
    let group = Group::of(&child);
    let input = child.stdin.take();
    let input = async move {
        if let Some(mut input) = input {
            // A command that doesn't read its input closes it.
            let _ = input.write_all(format!("{data}\n").as_bytes()).await;
        }
    };
    let mut kept = CapturedOutput::default();
    let ended = timeout(limit, finish(child.wait(), input, kept.read(output))).await;
    let status = match ended {
        Ok(status) => status.map_err(|error| format!("{program}: {error}"))?,
        Err(_) => {
            drop(group);
            let _ = child.wait().await;
            return Err(format!("{program} did not end within {} s, so it was killed", limit.as_secs_f64()));
        }
    };
    group.has_ended();
    let output = kept.output();
    if status.success() { Ok(output) } else { Err(failure(program, status, &output, data)) }
}

/// The end of a command, while it is fed and heard. Its input and output may outlive it.
async fn finish(
    wait: impl Future<Output = io::Result<ExitStatus>>,
    input: impl Future<Output = ()>,
    output: impl Future<Output = ()>,
) -> io::Result<ExitStatus> {
    tokio::pin!(wait, input, output);
    let (mut fed, mut heard) = (false, false);
    let status = loop {
        tokio::select! {
            status = &mut wait => break status?,
            () = &mut input, if !fed => fed = true,
            () = &mut output, if !heard => heard = true,
        }
    };
    if !heard {
        let _ = timeout(REST, output).await;
    }
    Ok(status)
}

fn spawn(path: &Path, arguments: &[String], environment: &Variables) -> io::Result<(Child, pipe::Receiver)> {
    let (reader, writer) = io::pipe()?;
    let mut command = std::process::Command::new(path);
    command
        .args(arguments)
        .env_clear()
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    // This runtime has one thread, which lives as long as the process.
    backends::orphan::end_with_this_thread(&mut command);
    let child = Command::from(command).spawn()?;
    Ok((child, pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?))
}

/// The processes of a command: they are killed unless it has ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| Pid::from_raw(id.cast_signed())))
    }

    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// The beginning of an output.
#[derive(Default)]
struct CapturedOutput {
    bytes: Vec<u8>,
    cut: bool,
}

impl CapturedOutput {
    async fn read(&mut self, mut output: pipe::Receiver) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = output.read(&mut buffer).await {
            let room = MAX_OUTPUT - self.bytes.len();
            self.cut |= length > room;
            self.bytes.extend_from_slice(&buffer[..length.min(room)]);
        }
    }

    fn output(self) -> Output {
        Output { text: String::from_utf8_lossy(&self.bytes).trim().to_owned(), cut: self.cut }
    }
}

/// What a command that failed said last, unless that repeats what it was given, which is somebody else's.
fn failure(program: &str, status: ExitStatus, output: &Output, data: &str) -> String {
    let repeated = data.lines().any(|line| !line.trim().is_empty() && output.text.contains(line.trim()));
    let last = output.text.lines().last().unwrap_or_default();
    let said = match (repeated, last) {
        (_, "") => "it printed nothing".to_owned(),
        (true, _) => "what it printed repeats the peer's data and is not shown".to_owned(),
        (false, last) => subnet::gojson::shortened(last),
    };
    format!("{program} failed ({status}): {said}")
}

/// The file of a program: what has no slash is looked for in `PATH`.
fn find(program: &str, path: Option<&String>) -> Result<PathBuf, String> {
    if program.is_empty() {
        return Err("the program's name is empty: the variable in it is not set".to_owned());
    }
    let file = if program.contains('/') {
        PathBuf::from(program)
    } else {
        let directories = path.map(String::as_str).unwrap_or_default();
        let mut files = std::env::split_paths(directories).map(|directory| directory.join(program));
        files
            .find(|file| file.is_file())
            .ok_or_else(|| format!("there is no program {program} in PATH ({directories:?}): {ABSENT}"))?
    };
    let at = file.display();
    // Opening a pipe waits for a writer.
    if file.metadata().is_ok_and(|about| !about.is_file()) {
        return Err(format!("{at} is a directory, a device, a pipe or a socket: name a program"));
    }
    let mut magic = [0; 4];
    let read = File::open(&file).and_then(|mut file| file.read(&mut magic));
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("there is no program {at}: {ABSENT}"))
        }
        // A program may be executable without being readable.
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(format!("{at}: {error}")),
        // The C library would have a shell run it.
        Ok(_) if !(magic.starts_with(b"#!") || magic == *b"\x7fELF") => {
            Err(format!("{at} is neither a program nor a script: begin a script with #!/bin/sh or the like"))
        }
        _ if !is_executable(&file) => Err(format!("{at} is not executable: chmod 755 {at}")),
        _ => Ok(file),
    }
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|about| about.permissions().mode() & 0o111 != 0)
}

/// What to do about a program that is not there.
const ABSENT: &str = "install it where flanneld runs; flanneld's image has no other programs, so there mount a directory \
                      of the host that has it (docs/extension.md)";
