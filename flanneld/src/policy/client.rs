//! `flanneld policy`: asks the agent of this node, and prints its answer.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use serde_json::json;
use subnet::env_file::Reading;

use super::exchange::ask;
use crate::cli::policy::{PolicyQuestion, Query};

/// Asks, and prints the answer.
///
/// # Errors
/// A sentence, when there is no answer.
pub(crate) fn run(question: &PolicyQuestion) -> anyhow::Result<()> {
    let socket = socket(&question.subnet_file)?;
    let request = match &question.query {
        Query::Explain { source, destination, protocol } => {
            json!({"v": 1, "verb": "explain", "source": source, "destination": destination, "protocol": protocol})
        }
        Query::List(None) => json!({"v": 1, "verb": "list"}),
        Query::List(Some(pod)) => json!({"v": 1, "verb": "list", "pod": pod}),
        Query::Denied => return super::denied::run(&socket),
    };
    let text = ask(&socket, &request)?;
    crate::output::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What network policies do to a connection between two addresses.
///
/// # Errors
/// A sentence, when there is no answer.
pub(crate) fn explain(
    subnet_file: &Path,
    source: &str,
    destination: &str,
    protocol: &str,
) -> anyhow::Result<String> {
    let request = json!({"v": 1, "verb": "explain", "source": source, "destination": destination, "protocol": protocol});
    ask(&socket(subnet_file)?, &request)
}

/// Where the agent of this subnet file listens.
fn socket(subnet_file: &Path) -> anyhow::Result<PathBuf> {
    let shown = subnet_file.display();
    let text = std::fs::read_to_string(subnet_file).with_context(|| {
        format!("{shown} can't be read: flanneld writes it when this node has a subnet; --subnet-file names another one")
    })?;
    let reading = Reading::parse(&text).with_context(|| shown.to_string())?;
    reading.policy_socket.ok_or_else(|| {
        anyhow!("network policies are not enforced on this node ({shown} names no socket): start flanneld with --network-policy=on")
    })
}
