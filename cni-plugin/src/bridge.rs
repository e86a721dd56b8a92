//! `bridge`, the plugin: a pod is a port of the node's bridge.

mod add;
mod check;
pub(crate) mod config;
mod detect;
mod gateway;

use std::ffi::OsStr;
use std::net::IpAddr;

use serde_json::Value;

use crate::env::Attachment;
use crate::host_local::allocate::{self, Origin};
use crate::host_local::store::Store;
use crate::netlink::socket::{Socket, Told};
use crate::netlink::{Errno, address, link};
use crate::netns::{Missing, Namespace};
use crate::note;
use crate::result::Ip;

pub(crate) use add::add;
pub(crate) use config::{BridgeConfig, Reading};

/// One attachment of a pod, and where the pod is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pod<'a> {
    pub(crate) attachment: &'a Attachment,
    /// The path of the pod's namespace; empty if it is not known any more.
    pub(crate) netns: &'a OsStr,
}

/// What is told of an ADD while it is under way.
pub(crate) trait Witness {
    /// The pod has its addresses, and no link yet. The host's end of that is going to have the name `port`, unless another link
    /// gets it before.
    fn reserved(&mut self, port: &str, ips: &[Ip]);

    /// The ADD has failed. The link is gone; the addresses are given back after this.
    fn failed(&mut self);
}

/// Of an ADD without network policies nothing is told.
impl Witness for () {
    fn reserved(&mut self, _port: &str, _ips: &[Ip]) {}

    fn failed(&mut self) {}
}

/// Removes the pod's link, and gives its addresses back. What is gone already is fine.
///
/// # Errors
/// A sentence in the words of Go's plugin.
pub(crate) fn del(config: &BridgeConfig, pod: Pod<'_>, origin: Origin) -> Result<(), String> {
    let mut seen = Vec::new();
    if !pod.netns.is_empty() {
        match Namespace::open(pod.netns) {
            Ok(namespace) => seen = delete_link(&namespace, &pod.attachment.ifname)?,
            Err(Missing::Gone(_)) => {}
            Err(Missing::NoNamespace(text)) => note(&format!("{text}: taken for a pod that is gone")),
            Err(Missing::Failed(text)) => return Err(text),
        }
    }
    allocate::del(&config.ipam, pod.attachment, origin, &seen)
}

/// Removes the link; gives the addresses that the pod had.
fn delete_link(namespace: &Namespace, name: &str) -> Result<Vec<IpAddr>, String> {
    let delete = || {
        let requests = vec![address::dump(libc::AF_UNSPEC, 0), link::delete(name)];
        Socket::route()?.exchange(requests).map_err(Errno::from)
    };
    let failed = |errno: Errno| format!("failed to delete {name:?}: {errno}");
    let told = namespace
        .within(delete)
        .map_err(|error| format!("error switching to the namespace of the pod: {error}"))?
        .map_err(failed)?;
    let Ok([addresses, deleted]) = <[Told; 2]>::try_from(told) else { return Ok(Vec::new()) };
    match deleted {
        Ok(_) | Err(Errno::NO_DEVICE) => {
            Ok(addresses.map(|replies| address::all(&replies)).unwrap_or_default())
        }
        Err(errno) => Err(failed(errno)),
    }
}

/// Compares the pod with the result of its ADD.
///
/// # Errors
/// A sentence in the words of Go's plugin.
pub(crate) fn check(config: &BridgeConfig, pod: Pod<'_>, prev_result: Option<&Value>) -> Result<(), String> {
    let namespace = Namespace::open(pod.netns)
        .map_err(|missing| format!("failed to open netns {:?}: {}", pod.netns, missing.text()))?;
    allocate::check(&config.ipam, pod.attachment)?;
    let result = prev_result.ok_or("Required prevResult missing")?;
    check::check(config, pod, &namespace, result)
}

/// Says whether an ADD would succeed, as far as it depends on this node: on the bridge's name and the directory of
/// the reservations. That all addresses are in use does not count: pods that run keep running.
///
/// # Errors
/// A sentence.
pub(crate) fn status(config: &BridgeConfig) -> Result<(), String> {
    let name = &config.bridge;
    let mut host = Socket::route().map_err(|errno| format!("failed to open a netlink socket: {errno}"))?;
    match link::by_name(&mut host, name) {
        Ok(Some(link)) if link.kind != "bridge" => {
            return Err(format!(
                "{name:?} already exists but is not a bridge: remove it, or name another \"bridge\""
            ));
        }
        Ok(_) => {}
        Err(errno) => return Err(format!("could not lookup {name:?}: {errno}")),
    }
    Store::open(config.ipam.data_dir(), &config.ipam.network)?.check_writable()
}
