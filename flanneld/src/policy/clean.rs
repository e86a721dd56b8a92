//! Switching network policies off: everything that an earlier run with them left is removed.

use std::fs;
use std::io;
use std::path::Path;

use backends::NftError;
use backends::policy::{Owner, owner, remove_tables};
use ipnet::IpNet;

use super::announce::socket_path;
use super::kept;
use super::socket;

/// What was found, and removed unless it was only looked for: in words.
pub(crate) fn clean(subnet_file: &Path, networks: &[IpNet], remove: bool) -> (Vec<String>, Vec<String>) {
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    let directory = kept::directory(subnet_file);
    let recorded = directory.is_dir();
    match tables(recorded, networks, remove) {
        Ok(true) => found.push("tables of network policies (flannel-policy)".to_owned()),
        Ok(false) => {}
        Err(error) if recorded => failures.push(format!("tables of network policies ({error})")),
        // Where nftables can't be used, there are none.
        Err(error) => tracing::debug!(%error, "tables of network policies were not looked for"),
    }
    if !recorded {
        return (found, failures);
    }
    // Tables that are left judge pods by what is kept here.
    if remove && failures.is_empty() {
        let gone = |outcome: io::Result<()>| match outcome {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Some(error),
            _ => None,
        };
        let path = socket_path(subnet_file);
        failures.extend(socket::remove(&path).err().map(|error| format!("{}: {error}", path.display())));
        let removed = gone(fs::remove_dir_all(&directory));
        failures.extend(removed.map(|error| format!("{}: {error}", directory.display())));
    }
    found.push(format!("what was kept of pods in {}", directory.display()));
    (found, failures)
}

/// Whether there are tables of this agent.
fn tables(recorded: bool, networks: &[IpNet], remove: bool) -> Result<bool, NftError> {
    let ours = match owner()? {
        Owner::Nobody => false,
        // The record tells, or else that they are about a network of this agent.
        Owner::Nodes(nodes) => {
            let all = networks.iter().any(|net| net.prefix_len() == 0);
            recorded || all || nodes.iter().any(|node| networks.iter().any(|net| net.contains(node)))
        }
    };
    if ours && remove {
        remove_tables()?;
    }
    Ok(ours)
}
