//! How far `cleanup` reaches: the objects of one agent, as its record on this host tells them, or those of all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use backends::kernel::netlink::Netlink;
use backends::kernel::{Records, is_tunnel};
use backends::{Kernel, KernelError, KernelState, Scope};
use ipnet::IpNet;
use subnet::Family;
use subnet::env_file::Previous;
use subnet::saved::Saved;

use crate::cli::cleanup::CleanupOptions;
use crate::lock::{self, LockHolder};

/// Whose objects are meant.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// Those of one agent.
    Agent {
        /// Its networks and subnets.
        record: Previous,
        /// What told them, if that was not the subnet file.
        told_by: Option<PathBuf>,
    },
    /// Those of every agent on this host.
    Host,
    /// No file was named and there is no record: what looks like ours is only listed.
    Unknown,
}

impl Extent {
    /// What the options and the records on this host say, with what the agent saved.
    ///
    /// # Errors
    /// A file that was named is missing, or says nothing, and no saved state tells more.
    pub(super) fn of(options: &CleanupOptions) -> anyhow::Result<(Self, Option<Saved>)> {
        let file = &options.subnet_file;
        let state_file = crate::state_file(file);
        let saved = Saved::read_of_any_store(&state_file);
        if options.all {
            return Ok((Self::Host, saved.ok().flatten()));
        }
        let text = match subnet::regular::read_to_string(file) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Not even text.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Some(String::new()),
            Err(error) => return Err(error).context(format!("{} can't be read", file.display())),
        };
        let record = text.as_deref().map(Previous::parse).unwrap_or_default();
        if record.networks.iter().next().is_some() {
            return Ok((Self::Agent { record, told_by: None }, saved.ok().flatten()));
        }
        let damaged = match saved {
            Ok(Some(saved)) => {
                let record = Previous { networks: saved.network.networks(), subnets: saved.own };
                return Ok((Self::Agent { record, told_by: Some(state_file) }, Some(saved)));
            }
            Ok(None) if text.is_none() && !options.named => return Ok((Self::Unknown, None)),
            Ok(None) => None,
            Err(why) => Some(why),
        };
        let what = if text.is_none() { "does not exist" } else { "names no network" };
        let more = damaged.map(|why| format!(" ({why})")).unwrap_or_default();
        anyhow::bail!(
            "{} {what}{more}, so what its agent made is not known and nothing was removed: correct --subnet-file, or \
             remove what every agent left on this host with --all",
            file.display()
        )
    }

    /// The networks inside which objects are meant; all addresses if none is known.
    pub(super) fn networks(&self) -> Vec<IpNet> {
        match self {
            Self::Agent { record, .. } => record.networks.iter().collect(),
            Self::Host | Self::Unknown => vec![IpNet::V4(Default::default()), IpNet::V6(Default::default())],
        }
    }

    /// The same, as the kernel is asked for it.
    pub(super) fn scope(&self, kernel: &mut Netlink, saved: Option<&Saved>) -> Result<Scope, KernelError> {
        let subnets = match self {
            Self::Agent { record, .. } => record.subnets,
            Self::Host | Self::Unknown => Default::default(),
        };
        let mut records = Records::default();
        saved.iter().for_each(|saved| records.learn(&saved.leases, None));
        let mut scope = Scope {
            networks: self.networks(),
            subnets: subnets.iter().collect(),
            ranges: saved.iter().flat_map(|saved| saved.network.ranges().copied()).collect(),
            records: Arc::new(records),
            subnet_lens: subnets.iter().map(|net| (Family::of(net.addr()), net.prefix_len())).collect(),
            ..Scope::default()
        };
        // Every device named like ours is looked at; whether it is ours, its kind and its addresses tell.
        let host = kernel.observe(&KernelState::default(), &Scope::default())?.host;
        let named = host.links.values().map(|link| link.name).filter(|name| name.as_str().starts_with("fl"));
        let candidates =
            Scope { devices: named.collect(), networks: scope.networks.clone(), ..Scope::default() };
        let state = kernel.observe(&KernelState::default(), &candidates)?.state;
        for (name, link) in &state.links {
            let mut addresses = state.addresses.iter().filter(|(dev, _)| dev == name);
            let ours = !matches!(self, Self::Agent { .. })
                || addresses.any(|(_, net)| scope.networks.iter().any(|network| network.contains(net)));
            if ours && is_tunnel(name, &link.identity) {
                scope.devices.push(*name);
            }
        }
        // Routes that a Go flannel left point through one external interface; which one, its routes say.
        scope.underlay = host.defaults.iter().find_map(|route| route.link);
        Ok(scope)
    }
}

/// Whether the subnet file is an agent's record, which goes with what it tells of. With `--all` any path can be named
/// beside it: another program's file is not removed for that, and a device never.
pub(super) fn is_record(options: &CleanupOptions) -> bool {
    let Ok(about) = fs::symlink_metadata(&options.subnet_file) else { return true };
    let removable = about.is_file() || about.is_symlink();
    let says = || {
        let text = subnet::regular::read(&options.subnet_file).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // What a power cut leaves is empty or zeroed.
        text.trim_matches(['\0', '\n']).is_empty()
            || text.lines().any(|line| line.trim_start().starts_with("FLANNEL_"))
    };
    removable && (!options.all || !options.named || says())
}

/// The agents that would restore what is meant: the holder of the subnet file's lock, and for the whole host every
/// process named flanneld in this network namespace, Go flannel's among them.
///
/// # Errors
/// The lock can't be looked at.
pub(super) fn running(extent: &Extent, subnet_file: &Path) -> anyhow::Result<Vec<LockHolder>> {
    let held = lock::holder(subnet_file).with_context(|| lock::path(subnet_file).display().to_string())?;
    let mut found: Vec<LockHolder> = held.into_iter().collect();
    if !matches!(extent, Extent::Agent { .. }) {
        let others = processes_here().map(LockHolder::Process).filter(|other| Some(*other) != held);
        found.extend(others.collect::<Vec<_>>());
    }
    Ok(found)
}

fn processes_here() -> impl Iterator<Item = i32> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let (here, own) = (namespace("self"), std::process::id().cast_signed());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let name = entry.file_name().into_string().ok()?;
        let pid: i32 = name.parse().ok().filter(|pid| *pid != own)?;
        let named =
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == "flanneld");
        (named && namespace(&name) == here).then_some(pid)
    })
}
