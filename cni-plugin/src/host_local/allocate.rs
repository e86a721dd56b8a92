//! What `host-local` does for each verb.

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::config::HostLocalConfig;
use super::range::{Range, RangeSet};
use super::reclaim;
use super::store::{Holder, Store};
use crate::env::Attachment;
use crate::note;
use crate::result::Ip;

/// The addresses of an attachment, and the `dns` of its result.
#[derive(Debug)]
pub(crate) struct Allocated {
    pub(crate) ips: Vec<Ip>,
    pub(crate) dns: Map<String, Value>,
}

/// What is known about an attachment before it gets addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Former {
    /// It is new: nothing is kept of an ADD, so that nothing is reserved for it. The reservations need not be read.
    Nothing,
    /// Nothing is kept of any attachment: it is the first one of this node, or what was kept was lost.
    Unknown,
    /// Addresses may be reserved for it.
    Possible,
}

/// Where the configuration of a DEL comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was kept by the only ADD of the attachment, which reserved an address of each of its sets.
    OnlyAdd,
    /// From elsewhere: it does not tell how many addresses there are.
    Other,
}

/// Reserves an address of each set.
///
/// # Errors
/// A sentence in the words of the original; nothing stays reserved then.
pub(crate) fn add(
    config: &HostLocalConfig,
    attachment: &Attachment,
    former: Former,
) -> Result<Allocated, String> {
    let dns = config.dns()?;
    let store = Store::open(config.data_dir(), &config.network)?;
    let mut reserved = Vec::new();
    let outcome = allocate(config, (attachment, former), &store, &mut reserved);
    match outcome {
        Ok(ips) => Ok(Allocated { ips, dns }),
        Err(error) => {
            reserved.iter().for_each(|address| store.give_back(*address, attachment));
            Err(error)
        }
    }
}

fn allocate(
    config: &HostLocalConfig,
    (attachment, former): (&Attachment, Former),
    store: &Store,
    reserved: &mut Vec<IpAddr>,
) -> Result<Vec<Ip>, String> {
    let own = match former {
        Former::Nothing if !reclaim::is_recorded(&config.network, attachment) => Vec::new(),
        Former::Nothing | Former::Unknown | Former::Possible => store.addresses_of(attachment)?,
    };
    let mut requested = config.requested.clone();
    let mut ips = Vec::new();
    for (index, set) in config.sets.iter().enumerate() {
        let failed = |error: String| format!("failed to allocate for range {index}: {error}");
        let wish = requested.iter().position(|address| set.range_of(*address).is_some());
        let (address, range) = match wish.map(|place| requested.remove(place)) {
            Some(wish) => {
                let Some(range) = set.range_of(wish) else { continue };
                reserve_wish(store, attachment, index, set, range, wish).map_err(failed)?;
                (wish, range)
            }
            None => {
                if let Some(double) = own.iter().find(|address| set.range_of(**address).is_some()) {
                    let Attachment { container, .. } = attachment;
                    return Err(failed(format!(
                        "{double} has been allocated to {container}, duplicate allocation is not allowed"
                    )));
                }
                reserve_free(config, store, attachment, index).map_err(failed)?
            }
        };
        reserved.push(address);
        let address =
            ipnet::IpNet::new(address, range.subnet.prefix_len()).map_err(|error| error.to_string())?;
        ips.push(Ip { address, gateway: Some(range.gateway), interface: None });
    }
    if requested.is_empty() {
        return Ok(ips);
    }
    let left: Vec<_> = requested.iter().map(IpAddr::to_string).collect();
    Err(format!("failed to allocate all requested IPs: {}", left.join(" ")))
}

/// Reserves the address of a set that was asked for.
fn reserve_wish(
    store: &Store,
    attachment: &Attachment,
    index: usize,
    set: &RangeSet,
    range: &Range,
    wish: IpAddr,
) -> Result<(), String> {
    if wish == range.gateway {
        return Err(format!("requested ip {wish} is subnet's gateway"));
    }
    if !store.reserve(wish, attachment, index)? {
        return Err(format!("requested IP address {wish} is not available in range set {}", set.text()));
    }
    Ok(())
}

/// Reserves the next free address of a set; if there is none, after those of pods that are gone are given back.
///
/// Addresses are handed out in turn, so the one after the last is nearly always free. The directory is read only if it is not.
fn reserve_free<'a>(
    config: &'a HostLocalConfig,
    store: &Store,
    attachment: &Attachment,
    index: usize,
) -> Result<(IpAddr, &'a Range), String> {
    let set = &config.sets[index];
    let last = store.last_reserved(index);
    if let Some((address, range)) = set.free(last, &[])
        && store.reserve(address, attachment, index)?
    {
        return Ok((address, range));
    }
    let mut free = set.free(last, &store.addresses()?);
    if free.is_none() && release_leaks(config, store) {
        free = set.free(last, &store.addresses()?);
    }
    let (address, range) =
        free.ok_or_else(|| format!("no IP addresses available in range set: {}", set.text()))?;
    if !store.reserve(address, attachment, index)? {
        return Err(format!("{address} was reserved although the lock is held"));
    }
    Ok((address, range))
}

/// Gives back what is reserved for pods that are gone; whether there was any.
fn release_leaks(config: &HostLocalConfig, store: &Store) -> bool {
    let evidence = reclaim::Evidence::of_host();
    let leaked = |holder: &Holder, path: &std::path::Path| evidence.is_gone(&config.network, holder, path);
    let (released, failures) = store.release_if(leaked);
    for one in &released {
        note(&format!(
            "{}: no address is free, and this one is reserved for {}, whose pod is gone: given back",
            one.path.display(),
            one.holder.text()
        ));
    }
    failures.iter().for_each(|failure| note(failure));
    !released.is_empty()
}

/// Gives back all addresses of an attachment, of which the pod had `seen`.
///
/// # Errors
/// A sentence with the directory, or with the files of the addresses that stay reserved.
pub(crate) fn del(
    config: &HostLocalConfig,
    attachment: &Attachment,
    origin: Origin,
    seen: &[IpAddr],
) -> Result<(), String> {
    let Some(store) = Store::existing(config.data_dir(), &config.network)? else { return Ok(()) };
    // An address that is asked for is reserved also for an attachment that has one.
    let count = match origin {
        Origin::OnlyAdd if config.requested.is_empty() => Some(config.sets.len()),
        Origin::OnlyAdd | Origin::Other => None,
    };
    let possible = |address: &IpAddr| config.sets.iter().any(|set| set.range_of(*address).is_some());
    let seen: Vec<_> = seen.iter().copied().filter(possible).collect();
    store.release(attachment, count, &seen)
}

/// Takes back what [`add`] reserved for an ADD that failed later. Addresses that the attachment had before stay: its pod
/// may use them. What can't be removed is left to the runtime's DEL.
pub(crate) fn take_back(config: &HostLocalConfig, attachment: &Attachment, ips: &[Ip]) {
    if let Ok(Some(store)) = Store::existing(config.data_dir(), &config.network) {
        ips.iter().for_each(|ip| store.give_back(ip.address.addr(), attachment));
    }
}

/// Says whether an address is reserved for the attachment.
///
/// # Errors
/// The words of the original.
pub(crate) fn check(config: &HostLocalConfig, attachment: &Attachment) -> Result<(), String> {
    if let Some(store) = Store::existing(config.data_dir(), &config.network)?
        && !store.addresses_of(attachment)?.is_empty()
    {
        return Ok(());
    }
    Err(format!("host-local: Failed to find address added by container {}", attachment.container))
}
