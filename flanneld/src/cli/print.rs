//! Texts that are printed and end the process, and `flanneld version`.

use std::io::{self, Write};

use clap::{ArgAction, Parser};

use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError};

/// A text that was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Print {
    /// The usage, which goes to stdout.
    Help(String),
    /// A script or a manual page, to stdout.
    Generated(String),
    /// What `version` prints, to stdout.
    Version(String),
    /// What `--version` prints, to stderr as Go flannel's does.
    VersionFlag(String),
}

impl Print {
    /// Writes the text to where it belongs.
    ///
    /// # Errors
    /// When the reader is gone, for example.
    pub(crate) fn print(&self) -> io::Result<()> {
        match self {
            Self::Help(text) | Self::Generated(text) => crate::output::stdout().write_all(text.as_bytes()),
            Self::Version(text) => writeln!(crate::output::stdout(), "{text}"),
            Self::VersionFlag(text) => writeln!(io::stderr(), "{text}"),
        }
    }
}

/// The version, with the commit.
pub(crate) fn version() -> String {
    format!("v{} (commit {})", crate::version::VERSION, crate::version::commit())
}

/// The same as a JSON object.
fn version_as_json() -> String {
    let version = format!("v{}", crate::version::VERSION);
    serde_json::json!({ "schema": 1, "version": version, "commit": crate::version::commit() }).to_string()
}

/// Prints the version and the commit.
#[derive(Parser)]
#[command(
    name = "flanneld version",
    bin_name = "flanneld version",
    override_usage = "flanneld version [--json]",
    after_help = "Exit codes: 0; 2 when an argument can't be used."
)]
pub(super) struct VersionFlags {
    /// Print a JSON object
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
}

impl SubcommandFlags for VersionFlags {
    const NAME: &str = "version";
    const SYNOPSIS: &str = "[--json]";
    const SUMMARY: &str = "print version and commit";

    fn check(self, _: &[Setting]) -> Result<Command, UsageError> {
        Ok(Command::Print(Print::Version(if self.json { version_as_json() } else { version() })))
    }
}
