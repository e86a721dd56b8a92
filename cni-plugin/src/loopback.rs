//! `loopback`: the pod's own link is up.

use crate::chained::passed_on;
use crate::conf::Network;
use crate::env::{Call, Verb};
use crate::netlink::link::{self, Link};
use crate::netlink::socket::Socket;
use crate::netlink::{Errno, address};
use crate::netns::{Missing, Namespace};
use crate::result::{Attached, Interface, Ip};

const NAME: &str = "lo";

/// What is printed when a call succeeds.
///
/// # Errors
/// A sentence.
pub(crate) fn answer(call: &Call, network: &Network) -> Result<String, String> {
    match call.verb {
        Verb::Add => {
            let assigned = within(call, up)??;
            Ok(match &network.prev_result {
                Some(previous) => passed_on(previous),
                None => result(call, assigned).text(network.version()),
            })
        }
        Verb::Del => del(call).map(|()| String::new()),
        Verb::Check => match within(call, || lookup().map(|(_, link)| link.up))?? {
            true => Ok(String::new()),
            false => Err("loopback interface is down".into()),
        },
        Verb::Status | Verb::Gc | Verb::Version => Ok(String::new()),
    }
}

fn within<T>(call: &Call, work: impl FnOnce() -> T) -> Result<T, String> {
    let namespace = Namespace::open(&call.netns).map_err(Missing::text)?;
    namespace.within(work).map_err(|error| format!("error switching to the namespace of the pod: {error}"))
}

fn lookup() -> Result<(Socket, Link), String> {
    let failed = |errno: Errno| format!("failed to lookup {NAME:?}: {errno}");
    let mut socket = Socket::route().map_err(failed)?;
    let link = link::by_name(&mut socket, NAME).map_err(failed)?;
    Ok((socket, link.ok_or_else(|| failed(Errno::NO_DEVICE))?))
}

/// Sets it up; gives its addresses, the first of each family.
fn up() -> Result<Vec<Ip>, String> {
    let (mut socket, link) = lookup()?;
    socket
        .execute(vec![link::set_flags(link.index, libc::IFF_UP)])
        .map_err(|refusal| format!("failed to set {NAME:?} UP: {}", refusal.errno))?;
    let assigned = address::of(&mut socket, link.index).map_err(|errno| format!("{NAME}: {errno}"))?;
    let addresses: Vec<_> = assigned.into_iter().map(|one| one.address).collect();
    if let Some(strange) = addresses.iter().find(|one| !one.addr().is_loopback()) {
        return Err(format!("loopback interface found with non-loopback address \"{}\"", strange.addr()));
    }
    let first = |ipv6: bool| addresses.iter().find(|one| one.addr().is_ipv6() == ipv6);
    let ips = [false, true].into_iter().filter_map(first);
    Ok(ips.map(|address| Ip { address: *address, gateway: None, interface: Some(0) }).collect())
}

fn result(call: &Call, ips: Vec<Ip>) -> Attached {
    let interface = Interface {
        name: NAME.into(),
        mac: "00:00:00:00:00:00".into(),
        sandbox: call.netns.to_string_lossy().into_owned(),
    };
    Attached { interfaces: vec![interface], ips, ..Attached::default() }
}

fn del(call: &Call) -> Result<(), String> {
    if call.netns.is_empty() {
        return Ok(());
    }
    let namespace = match Namespace::open(&call.netns) {
        Ok(namespace) => namespace,
        Err(Missing::Gone(_) | Missing::NoNamespace(_)) => return Ok(()),
        Err(Missing::Failed(text)) => return Err(text),
    };
    let down = || {
        let (mut socket, link) = lookup()?;
        socket
            .execute(vec![link::clear_flags(link.index, libc::IFF_UP)])
            .map_err(|refusal| format!("failed to set {NAME:?} down: {}", refusal.errno))
    };
    namespace.within(down).map_err(|error| format!("error switching to the namespace of the pod: {error}"))?
}
