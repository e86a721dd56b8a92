//! Gives leaked addresses back: removes the files of exactly those that no pod has.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, bail};
use backends::kernel::netlink::Netlink;

use super::seen::Observation;
use crate::cni::Conf;

/// Removes them, or only says which.
///
/// # Errors
/// A sentence, when that can't be known or done.
pub(super) fn leaked_addresses(seen: &Observation, dry_run: bool) -> anyhow::Result<()> {
    let mut confs = seen.confs.iter().flatten().filter_map(|file| file.conf.as_ref().ok());
    let delegate = confs.find_map(Conf::flannel).map(|flannel| flannel.delegate().to_owned());
    if let Some(other) = delegate.filter(|delegate| delegate != "bridge") {
        bail!(
            "pods are attached by the plugin {other}, and only those behind a bridge are known to live: nothing was removed"
        );
    }
    let leaked = match &seen.addresses.leaked {
        Ok(leaked) => leaked,
        Err(why) => bail!("which addresses pods have can't be read, so nothing was removed: {why}"),
    };
    let directory = &seen.addresses.directory;
    let mut out = crate::output::stdout();
    if leaked.is_empty() {
        writeln!(out, "no leaked addresses in {}", directory.display())?;
        return Ok(());
    }
    if dry_run {
        for (address, path, _) in leaked {
            writeln!(out, "would remove {} ({address})", path.display())?;
        }
        return Ok(());
    }
    // No ADD or DEL runs meanwhile.
    let _lock = lock(directory)?;
    let living = Netlink::open()
        .and_then(|mut kernel| kernel.pod_addresses())
        .context("the addresses of pods can't be read")?;
    let living = |address: &IpAddr| living.contains(address);
    for (address, path, _) in leaked.iter().filter(|(address, ..)| !living(address)) {
        match fs::remove_file(path) {
            Ok(()) => writeln!(out, "removed {} ({address})", path.display())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => bail!("{} can't be removed: {error}; run doctor as root", path.display()),
        }
    }
    Ok(())
}

/// The lock that `host-local` takes for each request.
fn lock(directory: &Path) -> anyhow::Result<fs::File> {
    let path = directory.join("lock");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("{} can't be opened: run doctor as root", path.display()))?;
    file.lock().with_context(|| format!("{} can't be locked", path.display()))?;
    Ok(file)
}
