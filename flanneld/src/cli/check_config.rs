//! `flanneld check-config`: its flags and arguments.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, Words};
use crate::check_config::CheckConfigOptions;

const USAGE: &str = "flanneld check-config FILE [FLAGS]";

const EXAMPLES: &str = "\
Reads a network configuration as the agent does, and says what it would say. Nothing is started or changed.

Examples:
  flanneld check-config net-conf.json
  kubectl get cm -n kube-flannel kube-flannel-cfg -o jsonpath='{.data.net-conf\\.json}' | flanneld check-config - --kube-subnet-mgr
  etcdctl get --print-value-only /coreos.com/network/config | flanneld check-config -

Exit codes: 0 when it can be used, perhaps with warnings; 1 when it can't; 2 when an argument can't be used.";

/// Checks a network configuration (net-conf.json) without starting anything.
#[derive(Parser)]
#[command(
    name = "flanneld check-config",
    bin_name = "flanneld check-config",
    override_usage = USAGE,
    after_help = EXAMPLES
)]
pub(super) struct CheckConfigFlags {
    #[arg(hide = true)]
    words: Vec<String>,
    /// Subnets are given by Kubernetes, as with the agent's flag of this name
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    kube_subnet_mgr: bool,
    /// Print a JSON object
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
}

impl SubcommandFlags for CheckConfigFlags {
    const NAME: &str = "check-config";
    const SYNOPSIS: &str = "FILE";
    const SUMMARY: &str = "check a network configuration without starting";
    const WORDS: Words = Words::Files;

    fn check(self, _settings: &[Setting]) -> Result<Command, UsageError> {
        let Self { words, kube_subnet_mgr: given_subnets, json } = self;
        match words.as_slice() {
            [file] => Ok(Command::CheckConfig(CheckConfigOptions {
                file: PathBuf::from(file),
                given_subnets,
                json,
            })),
            _ => Err(UsageError("check-config takes one file, or - for standard input".into())),
        }
    }
}
