//! `flanneld cleanup`: finds and removes everything that an agent makes on a host, without the store.

mod extent;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use backends::firewall::nftables::NftFirewall;
use backends::kernel::netlink::Netlink;
use backends::state::KernelChange;
use backends::{Firewall, Kernel, KernelState, Look, Scope, converge};
use ipnet::IpNet;
use subnet::saved::Saved;

use crate::cli::cleanup::CleanupOptions;
use crate::extension;
use crate::lock::{self, LockError};
use crate::policy;
use crate::text::with_causes;
use extent::Extent;

/// Prints each object, and removes it unless this is a dry run.
///
/// Whose objects they are is told by a record: the subnet file, or else what the agent saved. Without one, nothing
/// is removed unless `--all` asks for all that is made like ours. The record goes last, and only if all else went:
/// a run after a failure needs it.
///
/// # Errors
/// A sentence naming what could not be read or removed, or which agent is still running.
pub(crate) fn run(options: &CleanupOptions) -> anyhow::Result<()> {
    let (extent, saved) = Extent::of(options)?;
    let saved = saved.as_ref();
    if let Extent::Agent { told_by: Some(file), .. } = &extent {
        let subnet_file = options.subnet_file.display();
        eprintln!("flanneld: {subnet_file} says no network: {} tells what is its agent's", file.display());
    }
    name_remaining(options);
    name_foreign(options);
    let running = extent::running(&extent, &options.subnet_file);
    if options.dry_run || matches!(extent, Extent::Unknown) {
        let found = preview(&extent, saved, options);
        match running {
            Ok(holders) => holders.iter().for_each(|holder| {
                eprintln!("flanneld: {holder}: stop it before you run cleanup without --dry-run");
            }),
            Err(error) => {
                eprintln!("flanneld: whether an agent is running was not seen: {}", with_causes(&error))
            }
        }
        return found;
    }
    if let Some(holder) = running?.first() {
        anyhow::bail!("{holder} and would restore what is removed: stop it first, then run cleanup again");
    }
    let _lock = match lock::take(&options.subnet_file) {
        Ok(lock) => Some(lock),
        // Without its directory there is no agent with this subnet file.
        Err(LockError::Unusable { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
        Err(LockError::Held(holder)) => {
            anyhow::bail!("{holder} and would restore what is removed: stop it first, then run cleanup again")
        }
        Err(error) => {
            anyhow::bail!("the lock of the subnet file can't be taken: {error}; run cleanup as root")
        }
    };
    remove(&extent, saved, options)
}

/// Prints what would be removed, and what could not be looked at.
fn preview(extent: &Extent, saved: Option<&Saved>, options: &CleanupOptions) -> anyhow::Result<()> {
    let (mut found, mut unseen) = (Vec::new(), Vec::new());
    let scope = Netlink::open().and_then(|mut kernel| {
        let scope = extent.scope(&mut kernel, saved)?;
        let observed = kernel.observe(&KernelState::default(), &scope)?;
        Ok((scope, observed))
    });
    let scope = match scope {
        Ok((scope, observed)) => {
            let changes = backends::diff::diff(&KernelState::default(), &observed.state);
            found.extend(changes.iter().map(object));
            scope
        }
        Err(error) => {
            unseen.push(format!("devices, addresses and routes ({error})"));
            Scope { networks: extent.networks(), ..Scope::default() }
        }
    };
    match NftFirewall::open()
        .map_err(anyhow::Error::from)
        .and_then(|mut firewall| Ok(firewall.preview(&[], &known(&scope))?))
    {
        Ok(rules) => found.extend(rules.iter().map(|rule| rule_object(rule))),
        Err(error) => unseen.push(format!("traffic rules ({error})")),
    }
    found.extend(backends::trace::left().unwrap_or_default().iter().map(|id| format!("nftables table {id}")));
    let (policies, unread) = policy::clean(&options.subnet_file, &scope.networks, false);
    found.extend(policies);
    unseen.extend(unread);
    for file in files(options) {
        match file.symlink_metadata() {
            Ok(_) => found.push(format!("file {}", file.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => unseen.push(format!("{} ({error})", file.display())),
        }
    }
    let mut out = crate::output::stdout();
    for object in &found {
        writeln!(out, "would remove: {object}")?;
    }
    if found.is_empty() && unseen.is_empty() {
        writeln!(out, "nothing to remove")?;
    }
    anyhow::ensure!(unseen.is_empty(), "not seen: {}: run it as root (CAP_NET_ADMIN)", unseen.join("; "));
    if matches!(extent, Extent::Unknown) && !options.dry_run && !found.is_empty() {
        let file = options.subnet_file.display();
        anyhow::bail!(
            "nothing was removed: {file} does not exist, so which of this was made by its agent is not known; name \
             that agent's --subnet-file, or remove what every agent left on this host with --all"
        );
    }
    Ok(())
}

fn remove(extent: &Extent, saved: Option<&Saved>, options: &CleanupOptions) -> anyhow::Result<()> {
    let mut kernel = Netlink::open()?;
    let scope = extent.scope(&mut kernel, saved)?;
    let mut out = crate::output::stdout();
    let report = converge(&mut kernel, &KernelState::default(), &scope)?;
    let mut failures: Vec<String> = report.failed.iter().map(ToString::to_string).collect();
    let (rules, obstacles) = remove_rules(&known(&scope));
    failures.extend(obstacles);
    let (policies, left) = policy::clean(&options.subnet_file, &scope.networks, true);
    failures.extend(left);
    let traces =
        backends::trace::sweep().unwrap_or_default().into_iter().map(|id| format!("nftables table {id}"));
    let removed: Vec<String> =
        report.applied.iter().map(object).chain(rules).chain(policies).chain(traces).collect();
    for object in &removed {
        writeln!(out, "removed: {object}")?;
    }
    let there = || files(options).into_iter().filter(|file| file.symlink_metadata().is_ok());
    if !failures.is_empty() {
        let kept: Vec<String> = there().map(|file| file.display().to_string()).collect();
        let kept = if kept.is_empty() {
            String::new()
        } else {
            format!("; the next run needs {} and finds it in place", kept.join(" and "))
        };
        anyhow::bail!("not everything could be removed: {}{kept}", failures.join("; "));
    }
    let mut nothing = removed.is_empty();
    for file in there() {
        nothing = false;
        match remove_file(&file) {
            Ok(()) => writeln!(out, "removed: file {}", file.display())?,
            Err(error) => failures.push(format!("{}: {error}", file.display())),
        }
    }
    // They disturb no other program.
    let _ = fs::remove_file(crate::cni_calls::socket_path(&options.subnet_file));
    let _ = fs::remove_file(crate::takeover::path(&options.subnet_file));
    match remove_file(&lock::path(&options.subnet_file)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => failures.push(format!("the lock: {error}")),
        _ => {}
    }
    if nothing && failures.is_empty() {
        writeln!(out, "nothing to remove")?;
    }
    anyhow::ensure!(failures.is_empty(), "not everything could be removed: {}", failures.join("; "));
    Ok(())
}

/// Traffic rules of either mechanism: those that went, and what did not. Those of iptables go over nftables, as
/// far as they are visible there.
fn remove_rules(known: &[IpNet]) -> (Vec<String>, Vec<String>) {
    let (mut removed, mut failures) = (Vec::new(), Vec::new());
    let mut firewall = match NftFirewall::open() {
        Ok(firewall) => firewall,
        Err(error) => return (removed, vec![error.to_string()]),
    };
    for outcome in [
        firewall.converge(&[], known),
        firewall.filter_tunnels(&[], known, Look::Kernel),
        firewall.remove_offload(known),
    ] {
        match outcome {
            Ok(report) => {
                removed.extend(report.changed.iter().map(|rule| rule_object(rule)));
                failures.extend(report.obstacles);
            }
            Err(error) => failures.push(error.to_string()),
        }
    }
    (removed, failures)
}

/// The record of what is an agent's, in the order in which it goes. WireGuard's key is this host's identity and stays,
/// unless everything goes.
fn files(options: &CleanupOptions) -> Vec<PathBuf> {
    let keys = if options.all { backends::key_files() } else { Vec::new() };
    let state = crate::state_file(&options.subnet_file);
    let subnet_file = extent::is_record(options).then(|| options.subnet_file.clone());
    keys.into_iter().chain([extension::file(&state), state]).chain(subnet_file).collect()
}

/// Says that what was named as the subnet file is something else and stays.
fn name_foreign(options: &CleanupOptions) {
    if options.subnet_file.exists() && !extent::is_record(options) {
        eprintln!(
            "flanneld: {} stays: it is no subnet file, which is a file with lines that begin with FLANNEL_",
            options.subnet_file.display()
        );
    }
}

/// Says what commands of the `extension` backend have made, which may be anywhere.
fn name_remaining(options: &CleanupOptions) {
    let file = extension::file(&crate::state_file(&options.subnet_file));
    match extension::remaining(&file) {
        Ok(peers) if peers.is_empty() => {}
        Ok(peers) => {
            let peers: Vec<String> = peers.iter().map(ToString::to_string).collect();
            eprintln!(
                "flanneld: SubnetAddCommand ran for {}: undo by hand what it made, for cleanup runs no commands",
                peers.join(", ")
            );
        }
        Err(why) => eprintln!("flanneld: for which peers SubnetAddCommand ran is not known: {why}"),
    }
}

/// The networks whose rules are ours. Where no network is known, every table of our name is.
fn known(scope: &Scope) -> Vec<IpNet> {
    scope.networks.iter().copied().filter(|net| net.prefix_len() > 0).collect()
}

/// The file, and its directory if that was made for it and is empty now.
fn remove_file(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    if let Some(directory) = path.parent().filter(|directory| directory.ends_with("flannel")) {
        let _ = fs::remove_dir(directory);
    }
    Ok(())
}

/// The object of a removal, in words.
fn object(change: &KernelChange) -> String {
    let text = change.to_string();
    text.replacen(" del ", " ", 1)
}

/// The same for a change of traffic rules, which is told in the past tense.
fn rule_object(text: &str) -> String {
    text.replacen(" removed", "", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_is_named_by_its_object_so_that_it_reads_right_before_and_after() {
        for (text, object) in [
            ("nftables table ip flannel-ipv4 removed", "nftables table ip flannel-ipv4"),
            ("chain FLANNEL-FWD removed from table ip filter", "chain FLANNEL-FWD from table ip filter"),
            (
                "rules that accept the network's packets removed from chain FORWARD of table ip filter",
                "rules that accept the network's packets from chain FORWARD of table ip filter",
            ),
        ] {
            assert_eq!(rule_object(text), object);
        }
    }
}
