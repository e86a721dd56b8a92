//! ADD: the bridge, a pair of links between it and the pod, addresses and routes.
//!
//! The order is that of Go's plugin, but for two things. The port joins the bridge when the pod's end is up: it forwards
//! at once then, and ADD does not wait for it. The addresses are announced after that, when the announcement gets through.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::Duration;

use ipnet::IpNet;

use super::config::BridgeConfig;
use super::{Pod, gateway};
use crate::host_local::allocate::{self, Allocated};
use crate::netlink::link::{self, Link, PodEnd};
use crate::netlink::listen::until_running;
use crate::netlink::message::Message;
use crate::netlink::route::{self, Route};
use crate::netlink::socket::Socket;
use crate::netlink::{Errno, address};
use crate::netns::Namespace;
use crate::result::{Attached, Interface};
use crate::sysctl;

/// As long as Go's plugin waits for a port, all attempts together.
const PORT_TIMEOUT: Duration = Duration::from_millis(2550);

/// Connects a pod.
///
/// # Errors
/// A sentence in the words of Go's plugin. The link and the addresses are gone again then.
pub(crate) fn add(config: &BridgeConfig, pod: Pod<'_>) -> Result<Attached, String> {
    let mut host = Socket::route().map_err(|errno| format!("failed to open a netlink socket: {errno}"))?;
    let bridge = ensure_bridge(&mut host, config)
        .map_err(|error| format!("failed to create bridge {:?}: {error}", config.bridge))?;
    let namespace = Namespace::open(pod.netns)
        .map_err(|missing| format!("failed to open netns {:?}: {}", pod.netns, missing.text()))?;
    let veth = add_pair(&mut host, config, &namespace, &pod.attachment.ifname)?;
    let mut allocated = false;
    let outcome = (|| {
        let addresses = allocate::add(&config.ipam, pod.attachment)?;
        allocated = true;
        connect(&mut host, config, pod, &namespace, (&bridge, &veth), addresses)
    })();
    if outcome.is_err() {
        // The runtime's DEL would do it as well, if it comes.
        let _ = host.execute(vec![link::delete(&veth.name)]);
        if allocated {
            let _ = allocate::del(&config.ipam, pod.attachment);
        }
    }
    outcome
}

fn ensure_bridge(host: &mut Socket, config: &BridgeConfig) -> Result<Link, String> {
    let name = &config.bridge;
    let lookup = |host: &mut Socket| {
        link::by_name(host, name).map_err(|errno| format!("could not lookup {name:?}: {errno}"))
    };
    let bridge = match lookup(host)? {
        Some(bridge) => bridge,
        None => {
            match host.execute(vec![link::new_bridge(name, config.mtu)]).map_err(Errno::from) {
                // Another pod's ADD was faster.
                Ok(()) | Err(Errno::EXISTS) => {}
                Err(errno) => return Err(format!("could not add {name:?}: {errno}")),
            }
            sysctl::try_set(&format!("ipv6/conf/{name}/accept_ra"), "0");
            // Else its link-local address is tentative for two seconds, in which nothing is forwarded to pods: their
            // MACs are asked for with that address.
            sysctl::try_set(&format!("ipv6/conf/{name}/accept_dad"), "0");
            lookup(host)?.ok_or_else(|| format!("could not lookup {name:?}: Link not found"))?
        }
    };
    if bridge.kind != "bridge" {
        return Err(format!("{name:?} already exists but is not a bridge"));
    }
    let mut flags = 0;
    if config.promiscuous && !bridge.promiscuous {
        flags |= libc::IFF_PROMISC;
    }
    if !bridge.up {
        flags |= libc::IFF_UP;
    }
    if flags != 0 {
        host.execute(vec![link::set_flags(bridge.index, flags)])
            .map_err(|refusal| format!("failed to set {name:?} up: {}", refusal.errno))?;
    }
    Ok(bridge)
}

/// Makes the pair; gives the host's end.
fn add_pair(
    host: &mut Socket,
    config: &BridgeConfig,
    namespace: &Namespace,
    ifname: &str,
) -> Result<Link, String> {
    let pod_end = PodEnd { name: ifname, mac: config.mac, namespace: namespace.as_fd() };
    for _ in 0..10 {
        let name = random_name()?;
        match host.execute(vec![link::new_pair(&name, config.mtu, &pod_end)]).map_err(Errno::from) {
            Ok(()) => {
                sysctl::try_set(&format!("ipv6/conf/{name}/accept_ra"), "0");
                let found = link::by_name(host, &name);
                let found = found.map_err(|errno| format!("failed to lookup {name:?}: {errno}"))?;
                return found.ok_or_else(|| format!("failed to lookup {name:?}: Link not found"));
            }
            // Either name may be taken.
            Err(Errno::EXISTS) if matches!(link::by_name(host, &name), Ok(Some(_))) => {}
            Err(Errno::EXISTS) => {
                return Err(format!("container veth name provided ({ifname}) already exists"));
            }
            Err(errno) => return Err(format!("failed to make veth pair: {errno}")),
        }
    }
    Err("failed to find a unique veth name".into())
}

fn random_name() -> Result<String, String> {
    let mut bytes = [0; 4];
    let read = File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut bytes));
    read.map_err(|error| format!("failed to generate random veth name: {error}"))?;
    Ok(format!("veth{:08x}", u32::from_ne_bytes(bytes)))
}

/// All that follows when there are links and addresses.
fn connect(
    host: &mut Socket,
    config: &BridgeConfig,
    pod: Pod<'_>,
    namespace: &Namespace,
    (bridge, veth): (&Link, &Link),
    Allocated { mut ips, dns }: Allocated,
) -> Result<Attached, String> {
    let mut routes = config.ipam.routes.clone();
    for ip in &mut ips {
        // The interfaces of the result are: bridge, host's end, pod's end.
        ip.interface = Some(2);
        if config.is_default_gateway {
            routes.extend(default_route(&routes, ip.address, ip.gateway));
        }
    }
    let addresses: Vec<IpNet> = ips.iter().map(|ip| ip.address).collect();
    let gateways: Vec<IpNet> = ips
        .iter()
        .filter_map(|ip| IpNet::new(ip.gateway?, ip.address.prefix_len()).ok())
        .filter(|_| config.is_gateway)
        .collect();
    let ifname = &pod.attachment.ifname;
    let inside = namespace
        .within(|| configure(config, ifname, &addresses, &with_gateways(&routes, &ips)))
        .map_err(|error| format!("error switching to the namespace of the pod: {error}"))?;
    let (mut inner, end) = inside?;

    join(host, config, bridge, veth)?;
    gateway::ensure(host, bridge, &gateways, config.force_address)?;
    let lookup = |name: &str, errno: Errno| format!("failed to lookup {name:?}: {errno}");
    let port = until_running(host, &veth.name, PORT_TIMEOUT).map_err(|errno| lookup(&veth.name, errno))?;
    if !port.running {
        return Err("bridge port in error state: it does not come up".into());
    }
    // Neighbours may hold the address with the MAC of another pod that had it a moment ago. The announcement
    // is sent once both ends run: the kernel drops what a link sends before, and the port what it gets.
    namespace
        .within(|| until_running(&mut inner, ifname, PORT_TIMEOUT))
        .map_err(|error| format!("error switching to the namespace of the pod: {error}"))?
        .map_err(|errno| lookup(ifname, errno))?;
    inner
        .execute(vec![link::set_mac(end.index, &end.mac)])
        .map_err(|refusal| format!("failed to announce the addresses of {ifname:?}: {}", refusal.errno))?;
    let bridge = link::by_name(host, &bridge.name).ok().flatten().unwrap_or_else(|| bridge.clone());
    let interface =
        |link: &Link, sandbox: String| Interface { name: link.name.clone(), mac: link.mac_text(), sandbox };
    let sandbox = pod.netns.to_string_lossy().into_owned();
    let interfaces =
        vec![interface(&bridge, String::new()), interface(&port, String::new()), interface(&end, sandbox)];
    let dns = if config.dns.is_empty() { dns } else { config.dns.clone() };
    Ok(Attached { interfaces, ips, routes, dns })
}

/// The default route of an address's family, unless there is one.
fn default_route(routes: &[Route], address: IpNet, gateway: Option<std::net::IpAddr>) -> Option<Route> {
    let ipv6 = address.addr().is_ipv6();
    let is_default = |route: &Route| {
        route.destination.prefix_len() == 0
            && route.destination.addr().is_ipv6() == ipv6
            && route.gateway.is_some()
    };
    if routes.iter().any(is_default) {
        return None;
    }
    let nowhere: std::net::IpAddr = if ipv6 { [0; 16].into() } else { [0; 4].into() };
    let destination = IpNet::new(nowhere, 0).ok()?;
    Some(Route { destination, gateway, mtu: 0, advmss: 0, priority: 0, table: None, scope: None })
}

/// Routes as they are made: those that name no gateway go through the first one of their family.
fn with_gateways(routes: &[Route], ips: &[crate::result::Ip]) -> Vec<Route> {
    let gateway =
        |ipv6: bool| ips.iter().filter_map(|ip| ip.gateway).find(|gateway| gateway.is_ipv6() == ipv6);
    let made = |route: &Route| {
        let own = route
            .gateway
            .or_else(|| gateway(route.destination.addr().is_ipv6()).filter(|_| route.scope.is_none()));
        Route { gateway: own, ..route.clone() }
    };
    routes.iter().map(made).collect()
}

/// In the pod: addresses and routes. Gives the conversation there, and the pod's end.
fn configure(
    config: &BridgeConfig,
    ifname: &str,
    addresses: &[IpNet],
    routes: &[Route],
) -> Result<(Socket, Link), String> {
    let lookup = |errno: Errno| format!("failed to lookup {ifname:?}: {errno}");
    let mut socket = Socket::route().map_err(lookup)?;
    let end = link::by_name(&mut socket, ifname).map_err(lookup)?;
    let end = end.ok_or_else(|| format!("failed to lookup {ifname:?}: Link not found"))?;
    switch(config, ifname, addresses)?;
    let up = link::set_up_announcing(end.index);
    let mut requests: Vec<(Message, String)> = vec![(up, format!("failed to set {ifname:?} UP"))];
    for one in addresses {
        let message = address::add(end.index, *one, config.detect_duplicates);
        requests.push((message, format!("failed to add IP addr {one} to {ifname:?}")));
    }
    for route in routes {
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let what = format!("failed to add route '{}{via} dev {ifname}'", route.destination);
        requests.push((route::add(end.index, route), what));
    }
    let (messages, what): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
    let failed = |index: usize, errno: Errno| {
        format!("{}: {errno}", what.get(index).map_or("failed to configure the pod", String::as_str))
    };
    socket.execute(messages).map_err(|refusal| failed(refusal.index, refusal.errno))?;
    Ok((socket, end))
}

/// Switches in the pod, before its link is set up.
fn switch(config: &BridgeConfig, ifname: &str, addresses: &[IpNet]) -> Result<(), String> {
    let detect = if config.detect_duplicates { "1" } else { "0" };
    if config.detect_duplicates {
        sysctl::try_set(&format!("ipv6/conf/{ifname}/enhanced_dad"), "1");
    }
    sysctl::try_set(&format!("ipv6/conf/{ifname}/accept_dad"), detect);
    // Each announcement goes to all pods of the node. A link-local address has had this MAC only, so without another one
    // there is nothing to announce.
    if !addresses.iter().any(|one| one.addr().is_ipv6()) {
        return Ok(());
    }
    sysctl::try_set(&format!("ipv6/conf/{ifname}/ndisc_notify"), "1");
    for link in ["lo", ifname] {
        let key = format!("ipv6/conf/{link}/disable_ipv6");
        sysctl::set(&key, "0").map_err(|error| {
            format!("failed to enable IPv6 for interface {link:?} (net/{key}): {error}: does this kernel have IPv6?")
        })?;
    }
    Ok(())
}

/// Makes the host's end a port of the bridge.
fn join(host: &mut Socket, config: &BridgeConfig, bridge: &Link, veth: &Link) -> Result<(), String> {
    let mut requests = vec![link::set_master(veth.index, bridge.index)];
    if config.hairpin || config.isolated {
        requests.push(link::set_port(veth.index, config.hairpin, config.isolated));
    }
    host.execute(requests).map_err(|refusal| match refusal.index {
        0 => format!("failed to connect {:?} to bridge {}: {}", veth.name, bridge.name, refusal.errno),
        _ => format!("failed to setup hairpin mode for {}: {}", veth.name, refusal.errno),
    })
}
