//! `flanneld cleanup`: its flags and options.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::log::Verbosity;

const EXAMPLES: &str = "\
Stop flanneld first: cleanup refuses to run beside it.

Examples:
  flanneld cleanup --dry-run
      lists what the agent of /run/flannel/subnet.env left; as root, others can't see traffic rules
  flanneld cleanup --subnet-file=/run/second/subnet.env
      removes what another agent of this host left, and its files at the end
  flanneld cleanup --all
      removes what every agent left, if the subnet file is lost

Exit codes: 0 when nothing is left; 1 when something could not be seen or removed, or an agent is running; 2 when a
flag or a variable can't be used.";

/// Removes the devices, routes, rules and files that flanneld left on this host.
#[derive(Parser)]
#[command(
    name = "flanneld cleanup",
    bin_name = "flanneld cleanup",
    override_usage = "flanneld cleanup [FLAGS]",
    after_help = EXAMPLES
)]
pub(super) struct CleanupFlags {
    /// Print what would be removed, and remove nothing
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    dry_run: bool,
    /// Remove what every agent left on this host, not only the one of --subnet-file
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    all: bool,
    /// The file that told the CNI plugin about this node: its network is what is removed, then the file itself
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file)]
    subnet_file: PathBuf,
    /// Detail of the log, as for flanneld
    #[arg(long = "v", value_name = "LEVEL", default_value_t = 0)]
    v: i64,
}

/// What `cleanup` runs with.
#[derive(Debug)]
pub(crate) struct CleanupOptions {
    /// Print what would be removed, and remove nothing.
    pub(crate) dry_run: bool,
    /// Remove what every agent left on this host.
    pub(crate) all: bool,
    /// The file that told the CNI plugin about this node.
    pub(crate) subnet_file: PathBuf,
    /// Whether that file was named, by flag or variable.
    pub(crate) named: bool,
    /// How much is logged.
    pub(crate) verbosity: Verbosity,
}

impl SubcommandFlags for CleanupFlags {
    const NAME: &'static str = "cleanup";
    const SYNOPSIS: &'static str = "[--dry-run] [FLAGS]";
    const SUMMARY: &'static str = "remove what flanneld left on this host";

    fn check(self, settings: &[Setting]) -> Result<Command, UsageError> {
        Ok(Command::Cleanup(CleanupOptions {
            dry_run: self.dry_run,
            all: self.all,
            named: settings.iter().any(|setting| setting.flag == "subnet-file"),
            subnet_file: self.subnet_file,
            verbosity: Verbosity::new(self.v),
        }))
    }
}
