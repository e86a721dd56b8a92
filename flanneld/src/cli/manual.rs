//! `flanneld completions` and `flanneld man`: generated from the flags as they are, so that they can't differ from them.
//!
//! clap's own generators know another grammar: this one takes `-flag`, and a boolean's value only after `=`.

mod completions;
#[cfg(test)]
mod document;
mod page;
mod reference;

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::Parser;

use super::grammar::Setting;
use super::{Command, Print, SubcommandFlags, UsageError, Words};
use reference::topics;

const COMPLETIONS_USAGE: &str = "flanneld completions bash|zsh|fish";

const COMPLETIONS_EXAMPLES: &str = "\
Prints a script that completes commands, flags and their values, for standard output.

Examples:
  source <(flanneld completions bash)
  flanneld completions bash > /usr/share/bash-completion/completions/flanneld
  flanneld completions zsh > /usr/share/zsh/vendor-completions/_flanneld
  flanneld completions fish > /usr/share/fish/vendor_completions.d/flanneld.fish

Exit codes: 0 when it is printed; 2 when an argument can't be used.";

/// Prints the completions of a shell.
#[derive(Parser)]
#[command(
    name = "flanneld completions",
    bin_name = "flanneld completions",
    override_usage = COMPLETIONS_USAGE,
    after_help = COMPLETIONS_EXAMPLES
)]
pub(super) struct CompletionsFlags {
    #[arg(hide = true)]
    words: Vec<String>,
}

impl SubcommandFlags for CompletionsFlags {
    const NAME: &str = "completions";
    const SYNOPSIS: &str = "bash|zsh|fish";
    const SUMMARY: &str = "print the completions of a shell";
    const WORDS: Words = Words::OneOf(&["bash", "zsh", "fish"]);

    fn check(self, _: &[Setting]) -> Result<Command, UsageError> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        let script = match words[..] {
            ["bash"] => completions::bash,
            ["zsh"] => completions::zsh,
            ["fish"] => completions::fish,
            [other] => {
                let shown = subnet::text::shortened(other);
                return Err(UsageError(format!(
                    "completions: {shown:?} is no shell that it knows: give bash, zsh or fish"
                )));
            }
            _ => return Err(UsageError("completions takes one shell: bash, zsh or fish".into())),
        };
        Ok(Command::Print(Print::Generated(script(&topics()))))
    }
}

const MAN_USAGE: &str = "flanneld man [DIR]";

const MAN_EXAMPLES: &str = "\
Without a directory, prints the manual page flanneld(1). With one, writes flanneld.1 and a page for each command, such as
flanneld-status.1, into it, and makes the directory if it is missing.

Examples:
  flanneld man | man -l -
  flanneld man /usr/local/share/man/man1

Exit codes: 0 when they are written; 1 when one can't be; 2 when an argument can't be used.";

/// Prints or writes manual pages.
#[derive(Parser)]
#[command(name = "flanneld man", bin_name = "flanneld man", override_usage = MAN_USAGE, after_help = MAN_EXAMPLES)]
pub(super) struct ManFlags {
    #[arg(hide = true)]
    words: Vec<String>,
}

impl SubcommandFlags for ManFlags {
    const NAME: &str = "man";
    const SYNOPSIS: &str = "[DIR]";
    const SUMMARY: &str = "print or write manual pages";
    const WORDS: Words = Words::Directories;

    fn check(self, _: &[Setting]) -> Result<Command, UsageError> {
        let topics = topics();
        match self.words.as_slice() {
            [] => Ok(Command::Print(Print::Generated(page::page(&topics[0], &topics)))),
            [directory] => Ok(Command::Pages(Pages {
                directory: PathBuf::from(directory),
                pages: topics.iter().map(|topic| (topic.page_name(), page::page(topic, &topics))).collect(),
            })),
            _ => Err(UsageError("man takes one directory at most".into())),
        }
    }
}

/// Manual pages, and where they belong.
#[derive(Debug)]
pub(crate) struct Pages {
    directory: PathBuf,
    /// Names of files without the section, with their texts.
    pages: Vec<(String, String)>,
}

impl Pages {
    /// Writes them.
    ///
    /// # Errors
    /// When the directory can't be made or a file can't be written.
    pub(crate) fn write(&self) -> anyhow::Result<()> {
        let failed = |path: &Path, error: io::Error| {
            anyhow::anyhow!("man: {} can't be written: {error}", path.display())
        };
        fs::create_dir_all(&self.directory).map_err(|error| failed(&self.directory, error))?;
        for (name, text) in &self.pages {
            let path = self.directory.join(format!("{name}.1"));
            fs::write(&path, text).map_err(|error| failed(&path, error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
