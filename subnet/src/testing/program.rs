//! Programs that tests write and run.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes a program that can be run at once. This process never has it open for writing: a program that another thread starts
/// at that moment would hold it until it is executed itself, and nobody could run it (`ETXTBSY`, "Text file busy").
///
/// # Errors
/// When it can't be written.
pub fn write_program(path: &Path, text: &str) -> io::Result<()> {
    let mut writer = Command::new("sh");
    writer.args(["-c", r#"cat >"$0" && chmod 755 "$0""#]).arg(path).stdin(Stdio::piped());
    let mut writer = writer.spawn()?;
    if let Some(mut stdin) = writer.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    if writer.wait()?.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{} can't be written", path.display())))
    }
}
