//! `flanneld cleanup`: finds and removes everything that an agent makes on a host, without the store.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use backends::firewall::nftables::NftFirewall;
use backends::kernel::netlink::Netlink;
use backends::kernel::{Records, is_tunnel};
use backends::state::Change;
use backends::{Firewall, Kernel, KernelState, Look, Scope, converge};
use ipnet::IpNet;
use subnet::Family;
use subnet::env_file::Previous;
use subnet::saved::Saved;

use crate::cli::options::CleanupOptions;

/// Prints each object, and removes it unless this is a dry run.
///
/// What is ours is told by the subnet file: objects inside its network, and none of another agent on this
/// host. Without a subnet file, every route with our protocol number and every device that is named and
/// made like ours is.
///
/// # Errors
/// A sentence naming what could not be read or removed.
pub(crate) fn run(options: &CleanupOptions) -> anyhow::Result<()> {
    let mut kernel = Netlink::open()?;
    let saved = Saved::read_of_any_store(&crate::state_file(&options.subnet_file));
    let scope = scope(&mut kernel, &Previous::read(&options.subnet_file), saved.as_ref())?;
    let mut out = io::stdout().lock();
    let mut removed = 0usize;
    let mut failures = Vec::new();
    if options.dry_run {
        let observed = kernel.observe(&KernelState::default(), &scope)?;
        for change in backends::diff::diff(&KernelState::default(), &observed.state) {
            writeln!(out, "would remove: {}", object(&change))?;
            removed += 1;
        }
    } else {
        let report = converge(&mut kernel, &KernelState::default(), &scope)?;
        for change in &report.applied {
            writeln!(out, "removed: {}", object(change))?;
            removed += 1;
        }
        failures.extend(report.failed.iter().map(ToString::to_string));
    }
    let mut rules = rules(&scope, options.dry_run, &mut failures)?;
    removed += rules.len();
    for rule in rules.drain(..) {
        writeln!(out, "{}: {rule}", if options.dry_run { "would change" } else { "changed" })?;
    }
    for file in [&crate::state_file(&options.subnet_file), &options.subnet_file] {
        if file.symlink_metadata().is_err() {
            continue;
        }
        removed += 1;
        if options.dry_run {
            writeln!(out, "would remove: file {}", file.display())?;
        } else {
            match remove_file(file) {
                Ok(()) => writeln!(out, "removed: file {}", file.display())?,
                Err(error) => failures.push(format!("{}: {error}", file.display())),
            }
        }
    }
    if removed == 0 && failures.is_empty() {
        writeln!(out, "nothing to remove")?;
    }
    anyhow::ensure!(failures.is_empty(), "not everything could be removed: {}", failures.join("; "));
    Ok(())
}

/// Traffic rules of either mechanism. Those of iptables go over nftables, as far as they are visible there.
fn rules(scope: &Scope, dry_run: bool, failures: &mut Vec<String>) -> anyhow::Result<Vec<String>> {
    // Without a subnet file no network is known, and then every table of our name is ours.
    let known: Vec<IpNet> = scope.networks.iter().copied().filter(|net| net.prefix_len() > 0).collect();
    let mut firewall = NftFirewall::open()?;
    if dry_run {
        return Ok(firewall.preview(&[], &known).unwrap_or_default());
    }
    let report = firewall.converge(&[], &known)?;
    failures.extend(report.obstacles);
    let filter = firewall.filter_tunnels(&[], &known, Look::Kernel)?;
    Ok(report.changed.into_iter().chain(filter.changed).collect())
}

/// The file, and its directory if that was made for it and is empty now.
fn remove_file(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    if let Some(directory) = path.parent().filter(|directory| directory.ends_with("flannel")) {
        let _ = fs::remove_dir(directory);
    }
    Ok(())
}

fn scope(kernel: &mut Netlink, previous: &Previous, saved: Option<&Saved>) -> anyhow::Result<Scope> {
    let mut records = Records::default();
    saved.iter().for_each(|saved| records.learn(&saved.leases));
    let mut scope = Scope {
        networks: previous.networks.iter().collect(),
        subnets: previous.subnets.iter().collect(),
        subnet_lens: previous.subnets.iter().map(|net| (Family::of(net.addr()), net.prefix_len())).collect(),
        ranges: saved.iter().flat_map(|saved| saved.network.ranges().copied()).collect(),
        records: Arc::new(records),
        ..Scope::default()
    };
    let known = !scope.networks.is_empty();
    if !known {
        scope.networks = vec![IpNet::V4(Default::default()), IpNet::V6(Default::default())];
    }
    // Every device named like ours is looked at; whether it is ours, its kind and its addresses tell.
    let host = kernel.observe(&KernelState::default(), &Scope::default())?.host;
    let named = host.links.values().map(|link| link.name).filter(|name| name.as_str().starts_with("fl"));
    let candidates = Scope { devices: named.collect(), networks: scope.networks.clone(), ..Scope::default() };
    let state = kernel.observe(&KernelState::default(), &candidates)?.state;
    for (name, link) in &state.links {
        let mut addresses = state.addresses.iter().filter(|(dev, _)| dev == name);
        let ours =
            !known || addresses.any(|(_, net)| scope.networks.iter().any(|network| network.contains(net)));
        if ours && is_tunnel(name, &link.identity) {
            scope.devices.push(*name);
        }
    }
    // Routes that a Go flannel left point through one external interface; which one, its routes say.
    scope.underlay = host.defaults.iter().find_map(|route| route.link);
    Ok(scope)
}

/// The object of a removal, in words.
fn object(change: &Change) -> String {
    let text = change.to_string();
    text.replacen(" del ", " ", 1)
}
