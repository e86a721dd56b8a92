//! `flanneld doctor`: its flags.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Parser};

use super::grammar::Setting;
use super::status::agent_at;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::cni;
use crate::doctor::DoctorOptions;

const EXAMPLES: &str = "\
It looks at agent, store, lease, kernel, settings, rules, peers, CNI, addresses and network policies, and changes nothing.
As root, on the node or in flanneld's pod. docs/troubleshooting.md goes from symptoms to commands.

Examples:
  flanneld doctor
      ✔ in order, ✘ trouble with its object and what to do, – not checked and why
  flanneld doctor --pod=10.244.1.7
      also at one pod, by its address or its container id
  flanneld doctor --fix=leaked-addresses --dry-run
      lists the reservations of pods that no longer exist; without --dry-run removes them

Exit codes: 0 without trouble; 1 with trouble, or when something can't be carried out; 2 when a flag or a variable can't
be used.";

/// Says what is wrong with this node's pod network, with the object and the remedy.
#[derive(Parser)]
#[command(
    name = "flanneld doctor",
    bin_name = "flanneld doctor",
    override_usage = "flanneld doctor [--pod=IP|ID] [--fix=leaked-addresses [--dry-run]] [--json] [FLAGS]",
    after_help = EXAMPLES
)]
pub(super) struct DoctorFlags {
    /// Look at this pod as well
    #[arg(long, value_name = "IP|ID", default_value = "")]
    pod: String,
    /// Put something right: leaked-addresses
    #[arg(long, value_name = "WHAT", default_value = "", value_parser = ["", "leaked-addresses"])]
    fix: String,
    /// With --fix, only say what would be done
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    dry_run: bool,
    /// Print JSON
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    json: bool,
    /// The file that tells the CNI plugin about this node
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file)]
    subnet_file: PathBuf,
    /// Directory of CNI configurations
    #[arg(long, value_name = "DIR", default_value = cni::DEFAULT_CONF_DIR)]
    cni_conf_dir: PathBuf,
    /// Directories of CNI plugins, separated by ':'
    #[arg(long, value_name = "DIRS", default_value = cni::DEFAULT_BIN_DIRS)]
    cni_bin_dirs: String,
    /// Address at which the agent of this node serves health; an unspecified one means loopback
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", value_parser = check::address)]
    healthz_ip: IpAddr,
    /// Port at which the agent of this node serves health
    #[arg(long, value_name = "PORT", default_value_t = 8081, value_parser = check::health_port)]
    healthz_port: i64,
}

impl SubcommandFlags for DoctorFlags {
    const NAME: &str = "doctor";
    const SYNOPSIS: &str = "[--pod=IP|ID] [--fix=WHAT] [--json]";
    const SUMMARY: &str = "what is wrong on this node, and what to do";

    fn check(self, _: &[Setting]) -> Result<Command, UsageError> {
        if self.dry_run && self.fix.is_empty() {
            return Err(UsageError("--dry-run is for --fix: doctor changes nothing without it".into()));
        }
        Ok(Command::Doctor(DoctorOptions {
            pod: Some(self.pod).filter(|pod| !pod.is_empty()),
            fix: !self.fix.is_empty(),
            dry_run: self.dry_run,
            json: self.json,
            at: agent_at(self.healthz_ip, self.healthz_port)?,
            subnet_file: self.subnet_file,
            cni_conf_dir: self.cni_conf_dir,
            cni_bin_dirs: self
                .cni_bin_dirs
                .split(':')
                .filter(|path| !path.is_empty())
                .map(PathBuf::from)
                .collect(),
        }))
    }
}
