//! `flanneld diags`: its flags and arguments.

use std::path::PathBuf;

use clap::Parser;

use super::agent_flags::AgentFlags;
use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, Words, check};
use crate::diags::DiagsOptions;

const USAGE: &str = "flanneld diags [FILE] [FLAGS]";

const EXAMPLES: &str = "\
Collects what a bug report needs into one archive: what the agent says about itself and its peers, routes, neighbours,
forwarding entries, rules, settings and counters of this host. Passwords, tokens and keys are taken out; names and addresses
stay.

Examples:
  flanneld diags
      writes flannel-diags-<time>.tar
  kubectl exec -n kube-flannel ds/kube-flannel-ds -- /opt/bin/flanneld diags - > node.tar

Exit codes: 0 when the archive is written, whatever could be collected; 1 when it can't be; 2 when an argument can't be used.";

/// Writes one archive to attach to a bug report.
#[derive(Parser)]
#[command(name = "flanneld diags", bin_name = "flanneld diags", override_usage = USAGE, after_help = EXAMPLES)]
pub(super) struct DiagsFlags {
    #[arg(hide = true)]
    words: Vec<String>,
    #[command(flatten)]
    agent: AgentFlags,
    /// The file of the agent of this node
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file)]
    subnet_file: PathBuf,
}

impl SubcommandFlags for DiagsFlags {
    const NAME: &str = "diags";
    const SYNOPSIS: &str = "[FILE]";
    const SUMMARY: &str = "write an archive to attach to a bug report";
    const WORDS: Words = Words::Files;

    fn check(self, _settings: &[Setting]) -> Result<Command, UsageError> {
        let Self { words, agent, subnet_file } = self;
        let file = match words.as_slice() {
            [] => None,
            [file] => Some(PathBuf::from(file)),
            _ => return Err(UsageError("diags takes one file at most, or - for standard output".into())),
        };
        Ok(Command::Diags(DiagsOptions { file, at: agent.at()?, subnet_file }))
    }
}
