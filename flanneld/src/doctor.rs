//! `flanneld doctor`: what is wrong with this node's pod network, each trouble with its object and its remedy.
//!
//! ```text
//! agent ── /status, /peers ──┐
//! host ── links, settings, ──┤ observe ──► Observation ──► trees ──► findings ──► text or JSON
//!         rules, CNI, pools ─┘
//! ```
//!
//! The trees are pure: from what was seen to findings. A check that could not be made says so, and why.

mod calls;
mod direction;
mod finding;
mod fix;
mod host;
mod network;
mod node;
mod observe;
mod offline;
mod pods;
mod policy;
mod seen;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::json;

use crate::show::Style;
use finding::Finding;
use seen::Observation;

/// What `doctor` runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DoctorOptions {
    /// Look at one pod as well, by its address or its container id.
    pub(crate) pod: Option<String>,
    /// Remove leaked addresses.
    pub(crate) fix: bool,
    /// Only say which.
    pub(crate) dry_run: bool,
    pub(crate) json: bool,
    /// Where the agent of this node serves health.
    pub(crate) at: SocketAddr,
    pub(crate) subnet_file: PathBuf,
    pub(crate) cni_conf_dir: PathBuf,
    pub(crate) cni_bin_dirs: Vec<PathBuf>,
}

/// There is trouble; what it is was printed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Troubles(String);

/// Looks, and prints.
///
/// # Errors
/// [`Troubles`] when there are any; another one when something can't be carried out.
pub(crate) fn run(options: &DoctorOptions) -> anyhow::Result<()> {
    let seen = observe::look(options);
    if options.fix {
        return fix::leaked_addresses(&seen, options.dry_run);
    }
    let findings = diagnose(&seen);
    let troubles = findings.iter().filter(|finding| finding.is_trouble()).count();
    let text = if options.json {
        let answer = json!({ "schema": 1, "troubles": troubles, "findings": findings });
        format!("{answer}\n")
    } else {
        finding::text(&findings, Style::of_stdout())
    };
    crate::output::stdout().write_all(text.as_bytes())?;
    match troubles {
        0 => Ok(()),
        1 => Err(Troubles("1 trouble".to_owned()).into()),
        many => Err(Troubles(format!("{many} troubles")).into()),
    }
}

/// All findings, in the order in which they are best looked at.
fn diagnose(seen: &Observation) -> Vec<Finding> {
    let mut findings = node::findings(seen);
    findings.extend(host::findings(seen));
    findings.extend(network::findings(seen));
    findings.extend(pods::findings(seen));
    findings.extend(calls::findings(seen));
    findings.extend(policy::findings(seen));
    findings
}
