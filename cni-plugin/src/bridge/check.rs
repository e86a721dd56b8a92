//! CHECK: whether links, addresses and routes are still as the result of the ADD says.

use std::ffi::OsStr;

use serde_json::Value;

use super::Pod;
use super::config::BridgeConfig;
use crate::netlink::link::{self, Link};
use crate::netlink::socket::Socket;
use crate::netlink::{Errno, address, route};
use crate::netns::Namespace;
use crate::result::{Attached, Interface};

/// Compares.
///
/// # Errors
/// The first difference, in the words of Go's plugin.
pub(super) fn check(
    config: &BridgeConfig,
    pod: Pod<'_>,
    namespace: &Namespace,
    result: &Value,
) -> Result<(), String> {
    let result = Attached::read(result);
    let ifname = &pod.attachment.ifname;
    let is_bridge = |one: &&Interface| one.name == config.bridge;
    let is_pod = |one: &&Interface| one.name == *ifname && OsStr::new(&one.sandbox) == pod.netns;
    let find = |is: &dyn Fn(&&Interface) -> bool| result.interfaces.iter().rev().find(is);
    let mut host = Socket::route().map_err(|errno| format!("failed to open a netlink socket: {errno}"))?;
    let bridge = check_bridge(&mut host, config, find(&is_bridge))?;
    let Some(inner) = find(&is_pod) else {
        return Err(format!(
            "Sandbox in prevResult  doesn't match configured netns: {}",
            pod.netns.display()
        ));
    };
    let within = namespace.within(|| check_pod(inner, &result));
    let end = within.map_err(|error| format!("error switching to the namespace of the pod: {error}"))??;
    let others = result.interfaces.iter().filter(|one| one.name != config.bridge && one.name != *ifname);
    for one in others {
        if check_port(&mut host, one, &bridge, &end)? {
            return Ok(());
        }
    }
    Err(format!("CNI veth created for bridge {} was not found", config.bridge))
}

/// The link of an interface of the result, which has to be of this kind and to have the MAC.
fn find(socket: &mut Socket, one: &Interface) -> Result<Link, String> {
    if one.name.is_empty() {
        return Err("Interface name missing ".into());
    }
    match link::by_name(socket, &one.name) {
        Ok(Some(link)) => Ok(link),
        Ok(None) => Err(format!("Interface name {} not found", one.name)),
        Err(errno) => Err(format!("Interface name {} not found: {errno}", one.name)),
    }
}

fn check_bridge(host: &mut Socket, config: &BridgeConfig, one: Option<&Interface>) -> Result<Link, String> {
    let name = &config.bridge;
    let one = one.ok_or_else(|| format!("CNI created bridge {name} in host namespace was not found"))?;
    let link = find(host, one)?;
    if link.kind != "bridge" {
        return Err(format!("Interface {name} does not have link type of bridge"));
    }
    if !one.mac.is_empty() && one.mac != link.mac_text() {
        return Err(format!("Bridge interface {name} Mac doesn't match: {}", one.mac));
    }
    if link.promiscuous != config.promiscuous {
        return Err(format!(
            "Bridge interface {name} configured Promisc Mode {} doesn't match current state: {} ",
            config.promiscuous, link.promiscuous
        ));
    }
    Ok(link)
}

/// In the pod; gives its end of the pair.
fn check_pod(one: &Interface, result: &Attached) -> Result<Link, String> {
    let mut socket = Socket::route().map_err(|errno| format!("failed to open a netlink socket: {errno}"))?;
    let link = find(&mut socket, one)?;
    let name = &one.name;
    if link.kind != "veth" {
        return Err(format!("Error: Container interface {name} not of type veth"));
    }
    if !one.mac.is_empty() && one.mac != link.mac_text() {
        let mac = link.mac_text();
        return Err(format!("Interface {name} Mac {} doesn't match container Mac: {mac}", one.mac));
    }
    let assigned = address::of(&mut socket, link.index)
        .map_err(|errno| format!("Cannot obtain List of IP Addresses: {errno}"))?;
    for ip in &result.ips {
        if !assigned.iter().any(|one| one.address == ip.address) {
            return Err(format!("Failed to match addr {} on interface {name}", ip.address));
        }
    }
    check_routes(&mut socket, result)?;
    Ok(link)
}

fn check_routes(socket: &mut Socket, result: &Attached) -> Result<(), String> {
    let mut tables = [None, None];
    for wanted in &result.routes {
        let ipv6 = wanted.destination.addr().is_ipv6();
        let table = &mut tables[usize::from(ipv6)];
        if table.is_none() {
            let lookup =
                |errno: Errno| format!("Expected Route {wanted:?} not route table lookup error {errno}");
            *table = Some(route::all(socket, ipv6).map_err(lookup)?);
        }
        let there = table.iter().flatten().any(|found| {
            found.destination == wanted.destination.trunc()
                && (wanted.gateway.is_none() || found.gateway == wanted.gateway)
        });
        if !there {
            let via = wanted.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            return Err(format!("Expected Route {}{via} not found in routing table", wanted.destination));
        }
    }
    Ok(())
}

/// Whether an interface of the result is the port that leads to the pod.
fn check_port(host: &mut Socket, one: &Interface, bridge: &Link, end: &Link) -> Result<bool, String> {
    let link = find(host, one)?;
    let ours = link.kind == "veth"
        && link.index == end.peer
        && link.peer == end.index
        && link.master == bridge.index;
    if ours && !one.mac.is_empty() && one.mac != link.mac_text() {
        return Err(format!("Interface {} Mac doesn't match: {} not found", one.name, one.mac));
    }
    Ok(ours)
}
