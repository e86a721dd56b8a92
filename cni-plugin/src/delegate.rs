//! Finding the delegate plugin and running it.

mod orphan;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use subnet::gojson;

use crate::env::{Attachment, Verb};
use crate::error::{self, CniError};

/// Why a delegate gave no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The program did not start, or knows nothing of the configuration's version: it has done nothing.
    Nothing(CniError),
    /// It ran and failed; what it did until then is for DEL to undo.
    Halfway(CniError),
}

impl From<Failure> for CniError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Nothing(error) | Failure::Halfway(error) => error,
        }
    }
}

/// The program of `plugin` in one of the directories of `CNI_PATH`.
///
/// # Errors
/// Code 999 with the name, the directories and what to do.
pub(crate) fn find(plugin: &str, path: &OsStr, verb: Verb) -> Result<PathBuf, CniError> {
    if plugin.is_empty() || plugin.contains('/') {
        return Err(failed(
            verb,
            format!("invalid plugin name: {plugin:?}: give the name of a file in CNI_PATH"),
        ));
    }
    // An empty entry would mean the directory the runtime happens to be in.
    let directories: Vec<_> =
        std::env::split_paths(path).filter(|directory| !directory.as_os_str().is_empty()).collect();
    let mut programs = directories.iter().map(|directory| directory.join(plugin));
    programs.find(|program| program.is_file()).ok_or_else(|| {
        let searched: Vec<_> = directories.iter().map(|directory| directory.display().to_string()).collect();
        let searched = searched.join(" ");
        failed(
            verb,
            format!(
                "failed to find plugin {plugin:?} in path [{searched}]: install the containernetworking plugins \
                 there, or name another plugin as the type of the delegate"
            ),
        )
    })
}

/// Runs `program` with this process's environment, the verb, and `config` on its standard input; gives what
/// it printed. Its standard error is ours.
///
/// # Errors
/// [`Failure`]; the delegate's own error object if it printed one.
pub(crate) fn run(program: &Path, verb: Verb, config: &str) -> Result<Vec<u8>, Failure> {
    run_for(program, verb, config, None)
}

/// [`run`] for another attachment than this process's environment names, whose pod is gone.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_for(
    program: &Path,
    verb: Verb,
    config: &str,
    attachment: Option<&Attachment>,
) -> Result<Vec<u8>, Failure> {
    let trouble =
        |error: io::Error| failed(verb, format!("failed to run plugin {}: {error}", program.display()));
    let mut command = Command::new(program);
    command.env("CNI_COMMAND", verb.word());
    if let Some(Attachment { container, ifname }) = attachment {
        command.env("CNI_CONTAINERID", container).env("CNI_IFNAME", ifname).env("CNI_NETNS", "");
    }
    let mut child = started(&mut command, || thread::sleep(Duration::from_secs(1)))
        .map_err(|error| Failure::Nothing(trouble(error)))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A delegate that ends without reading tells more by its exit status than this error would.
        let _ = stdin.write_all(config.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| Failure::Halfway(trouble(error)))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let error = CniError::from_delegate(&output.stdout).unwrap_or_else(|| {
        let said = gojson::shortened(&String::from_utf8_lossy(&output.stdout));
        failed(
            verb,
            format!(
                "plugin {} ended with {} and printed no CNI error but {said:?}: see its standard error in the \
                 log of the container runtime",
                program.display(),
                output.status
            ),
        )
    });
    // The version is checked before anything is done.
    let nothing_done = error.code == error::INCOMPATIBLE_VERSION;
    Err(if nothing_done { Failure::Nothing(error) } else { Failure::Halfway(error) })
}

/// Whether `program` says that it speaks `version` of the specification. One without a proper answer to
/// VERSION is older than all that matters here.
///
/// # Errors
/// Code 999, when it can't be run at all.
pub(crate) fn speaks(program: &Path, version: &str) -> Result<bool, CniError> {
    let question = format!(r#"{{"cniVersion":{}}}"#, gojson::to_string(&version));
    let answer = match run(program, Verb::Version, &question) {
        Ok(answer) => answer,
        Err(Failure::Nothing(error)) if error.code != error::INCOMPATIBLE_VERSION => return Err(error),
        Err(_) => return Ok(false),
    };
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    let supported = answer.get("supportedVersions").and_then(Value::as_array);
    Ok(supported.is_some_and(|supported| supported.iter().any(|known| known == version)))
}

/// An installer that is just writing the program makes execve fail for a moment.
fn started(command: &mut Command, mut pause: impl FnMut()) -> io::Result<Child> {
    refuse_what_is_no_program(Path::new(command.get_program()))?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    orphan::end_with_this_process(command);
    let mut again = 1..6;
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && again.next().is_some() => {
                pause()
            }
            outcome => return outcome,
        }
    }
}

/// execvp hands a file that the kernel does not know to a shell, which would run its text.
fn refuse_what_is_no_program(program: &Path) -> io::Result<()> {
    let mut start = Vec::new();
    File::open(program)?.take(4).read_to_end(&mut start)?;
    let known = start.starts_with(b"\x7fELF") || start.starts_with(b"#!");
    if known { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOEXEC)) }
}

fn failed(verb: Verb, what: String) -> CniError {
    CniError::new(error::OTHER, format!("failed to delegate {}: {what}", verb.word().to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};

    fn program(directory: &Path, content: &str) -> PathBuf {
        let program = directory.join("plug");
        // Not by this process: a program that another test starts at that moment would hold it open for writing.
        let mut writer = Command::new("sh");
        writer.args(["-c", r#"cat >"$0" && chmod 755 "$0""#]).arg(&program).stdin(Stdio::piped());
        let mut writer = writer.spawn().unwrap();
        writer.stdin.take().unwrap().write_all(content.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
        program
    }

    #[test]
    fn only_a_regular_file_in_cni_path_is_found() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(first.path().join("plug")).unwrap();
        let wanted = program(second.path(), "");
        let path = std::env::join_paths([Path::new(""), first.path(), second.path()]).unwrap();
        assert_eq!(find("plug", &path, Verb::Add).unwrap(), wanted);
        let error = find("other", OsStr::new("/a::/b"), Verb::Add).unwrap_err();
        let expected = r#"failed to delegate add: failed to find plugin "other" in path [/a /b]: install"#;
        assert!(error.code == 999 && error.msg.starts_with(expected), "{}", error.msg);
        for name in ["", "../plug", "/bin/sh", ".", ".."] {
            assert!(find(name, &path, Verb::Del).is_err(), "{name}");
        }
    }

    #[test]
    fn a_delegate_that_says_nothing_useful_is_named_with_its_exit_status() {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path(), "#!/bin/sh\necho nonsense; exit 3\n");
        let Err(Failure::Halfway(error)) = run(&program, Verb::Del, "{}") else { panic!("it failed") };
        assert_eq!(error.code, 999);
        assert!(error.msg.contains("exit status: 3") && error.msg.contains("nonsense"), "{}", error.msg);
        assert!(error.msg.contains(program.to_str().unwrap()), "{}", error.msg);
    }

    #[test]
    fn a_file_that_is_no_program_has_done_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path(), "\u{0}nothing");
        assert!(matches!(run(&program, Verb::Add, "{}"), Err(Failure::Nothing(_))));
    }

    #[test]
    fn a_delegate_speaks_the_versions_that_it_lists_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let answers = |script: &str| {
            let program = program(directory.path(), &format!("#!/bin/sh\n{script}\n"));
            speaks(&program, "1.1.0").map_err(|error| error.msg)
        };
        let list =
            |versions: &str| answers(&format!("cat >/dev/null; echo '{{\"supportedVersions\":{versions}}}'"));
        assert_eq!(list(r#"["1.0.0","1.1.0"]"#), Ok(true));
        assert_eq!(
            answers(r#"test $CNI_COMMAND = VERSION && echo '{"supportedVersions":["1.1.0"]}'"#),
            Ok(true)
        );
        for old in [r#"["1.0.0"]"#, r#"["1.1.0.1", 1.1, null]"#, r#""1.1.0""#, "{", "[]"] {
            assert_eq!(list(old), Ok(false), "{old}");
        }
        assert_eq!(answers("exit 1"), Ok(false));
        assert_eq!(answers(r#"echo '{"code":1,"msg":"unknown CNI_COMMAND: VERSION"}'; exit 1"#), Ok(false));
        let broken = program(directory.path(), "\u{0}nothing");
        assert!(speaks(&broken, "1.1.0").unwrap_err().msg.contains(broken.to_str().unwrap()));
    }

    #[test]
    fn a_program_that_is_being_written_is_tried_six_times() {
        let directory = tempfile::tempdir().unwrap();
        let program = program(directory.path(), "#!/bin/sh\ncat\n");
        let mut writer = Some(OpenOptions::new().append(true).open(&program).unwrap());
        let mut pauses = 0;
        let error = started(&mut Command::new(&program), || pauses += 1).unwrap_err();
        assert_eq!((error.kind(), pauses), (io::ErrorKind::ExecutableFileBusy, 5));
        let mut child = started(&mut Command::new(&program), || writer = None).unwrap();
        assert!(writer.is_none(), "the first attempt came too early");
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
