//! Settings of devices below `/proc/sys/net`, in the network namespace of the calling thread.

use std::fs;
use std::io;

use rustix::fs::StatVfsMountFlags;

use crate::kernel::prerequisites::Sysctls as Values;
use crate::state::name::Name;
use crate::state::{LinkPatch, LinkSettings};

/// Reads and sets what belongs to a device's settings.
///
/// The kernel forgets them when a device's MTU falls below what a family needs (1280 for IPv6), and begins
/// with the namespace's defaults when it rises again.
#[derive(Debug)]
pub(super) struct Sysctls {
    /// They can't be written, for `/proc/sys` is read-only in an unprivileged container: there the settings
    /// are the runtime's business (contract K17), and count as unknown.
    read_only: bool,
}

impl Sysctls {
    /// A mount that is read-only is recognised before the first write, so that `flanneld doctor`, which writes nothing, expects no more
    /// than the agent beside it.
    pub(super) fn new() -> Self {
        let mount = rustix::fs::statvfs("/proc/sys/net");
        Self { read_only: mount.is_ok_and(|mount| mount.f_flag.contains(StatVfsMountFlags::RDONLY)) }
    }

    /// Reads those of the desired state.
    pub(super) fn read(&self, name: &Name, want: &LinkSettings, have: &mut LinkSettings) {
        let known = |wanted: Option<bool>, path: &str| {
            wanted.filter(|_| !self.read_only)?;
            fs::read_to_string(path).ok().map(|text| text.trim() != "0")
        };
        have.accept_ra = known(want.accept_ra, &accept_ra(name));
        have.accept_local = known(want.accept_local, &accept_local(name));
    }

    /// Sets those that are in the patch. What can't be set is not worth a node's readiness.
    pub(super) fn set(&mut self, name: &Name, patch: &LinkPatch) {
        for (on, path) in [(patch.accept_ra, accept_ra(name)), (patch.accept_local, accept_local(name))] {
            let Some(on) = on else { continue };
            if let Err(error) = fs::write(&path, if on { "1" } else { "0" })
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::debug!(%error, path, "a setting of a device can't be written");
                self.read_only = true;
            }
        }
    }
}

/// The values of settings, by their paths.
pub(super) fn values(keys: &[String]) -> Values {
    let read = |key: &String| {
        let text = fs::read_to_string(format!("/proc/sys/net/{key}")).ok()?;
        Some((key.clone(), text.trim().to_owned()))
    };
    keys.iter().filter_map(read).collect()
}

/// Sets one by its path.
pub(super) fn write(key: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/net/{key}"), value)
}

fn accept_ra(name: &Name) -> String {
    format!("/proc/sys/net/ipv6/conf/{name}/accept_ra")
}

fn accept_local(name: &Name) -> String {
    format!("/proc/sys/net/ipv4/conf/{name}/accept_local")
}
