//! `flanneld report`: its flags.

use std::path::PathBuf;

use clap::Parser;

use super::agent_flags::AgentFlags;
use super::grammar::Setting;
use super::{Command, SubcommandFlags, UsageError, check};
use crate::show::report::ReportOptions;

const USAGE: &str = "flanneld report [--from=FILE] [FLAGS] > page.html";

const EXAMPLES: &str = "\
Asks the agents of all nodes how they and the ways between them stand, and prints one page of HTML: what is wrong, the matrix
of ways, a row for each node. The page loads nothing. Of more than 100 nodes, the matrix has those with the worst ways.

Examples:
  flanneld report > page.html
  kubectl exec -n kube-flannel ds/kube-flannel-ds -- /opt/bin/flanneld report > page.html
  flanneld status --all --json > nodes.json; flanneld report --from=nodes.json > page.html
      a page of what nodes answered earlier

Exit codes: 0 when the page is printed, whatever it says; 1 when this node's agent does not answer or the file can't be used; 2
when a flag can't be used.";

/// Prints how all nodes stand, as one static page of HTML.
#[derive(Parser)]
#[command(name = "flanneld report", bin_name = "flanneld report", override_usage = USAGE, after_help = EXAMPLES)]
pub(super) struct ReportFlags {
    /// What flanneld status --all --json printed, instead of asking; '-' for standard input
    #[arg(long, value_name = "FILE", value_parser = check::file)]
    from: Option<PathBuf>,
    #[command(flatten)]
    agent: AgentFlags,
}

impl SubcommandFlags for ReportFlags {
    const NAME: &str = "report";
    const SYNOPSIS: &str = "> page.html";
    const SUMMARY: &str = "how all nodes stand, as a page of HTML";

    fn check(self, _: &[Setting]) -> Result<Command, UsageError> {
        Ok(Command::Report(ReportOptions { at: self.agent.at()?, from: self.from }))
    }
}
