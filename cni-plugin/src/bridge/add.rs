//! ADD: the bridge, a pair of links between it and the pod, addresses and routes.
//!
//! The order is that of Go's plugin, but for two things. The bridge and the pod have their addresses before there is the link,
//! so that others can work for the pod meanwhile. And the addresses are announced at the end, when the announcement gets through.
//! What the kernel is asked for goes to it in as few datagrams as possible.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::AsFd;
use std::time::Duration;

use ipnet::IpNet;

use super::config::BridgeConfig;
use super::{Pod, Witness, detect, gateway};
use crate::host_local::allocate::{self, Allocated, Former};
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

/// Connects a pod, of which there may be something from a `former` ADD.
///
/// # Errors
/// A sentence in the words of Go's plugin. The link and the addresses are gone again then.
pub(crate) fn add(
    config: &BridgeConfig,
    pod: Pod<'_>,
    former: Former,
    witness: &mut dyn Witness,
) -> Result<Attached, String> {
    let mut host = Socket::route().map_err(|errno| format!("failed to open a netlink socket: {errno}"))?;
    let bridge = ensure_bridge(&mut host, config)
        .map_err(|error| format!("failed to create bridge {:?}: {error}", config.bridge))?;
    let namespace = Namespace::open(pod.netns)
        .map_err(|missing| format!("failed to open netns {:?}: {}", pod.netns, missing.text()))?;
    let ifname = &pod.attachment.ifname;
    // A pod that has its link keeps its addresses, what was announced of it, and its gateway on the bridge.
    if former == Former::Possible && has_link(&namespace, ifname) {
        return Err(is_taken(ifname));
    }
    // A former link of the pod says more than its former address.
    let allocated = allocate::add(&config.ipam, pod.attachment, former)
        .map_err(|error| if has_link(&namespace, ifname) { is_taken(ifname) } else { error })?;
    let reserved = allocated.ips.clone();
    let outcome = attach(&mut host, config, pod, (&bridge, &namespace), allocated, witness);
    if outcome.is_err() {
        // The runtime's DEL would do it as well, if it comes.
        witness.failed();
        allocate::take_back(&config.ipam, pod.attachment, &reserved);
    }
    outcome
}

/// Makes the link of a pod that has its addresses. If that fails, there is none.
fn attach(
    host: &mut Socket,
    config: &BridgeConfig,
    pod: Pod<'_>,
    (bridge, namespace): (&Link, &Namespace),
    allocated: Allocated,
    witness: &mut dyn Witness,
) -> Result<Attached, String> {
    if config.is_gateway {
        let gateways = gateway::of(&allocated.ips)?;
        gateway::ensure(host, bridge, &gateways, config.force_address)?;
    }
    let name = random_name();
    witness.reserved(&name, &allocated.ips);
    let port = add_pair(host, config, (bridge, namespace), &pod.attachment.ifname, name)?;
    let connected = join(host, bridge, &port)
        .and_then(|()| connect(host, config, pod, namespace, (bridge, &port), allocated));
    if connected.is_err() {
        let _ = host.execute(vec![link::delete(&port.name)]);
    }
    connected
}

fn has_link(namespace: &Namespace, name: &str) -> bool {
    let found = namespace.within(|| link::by_name(&mut Socket::route()?, name));
    matches!(found, Ok(Ok(Some(_))))
}

fn is_taken(ifname: &str) -> String {
    format!("container veth name provided ({ifname}) already exists")
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
                Err(errno) => return Err(format!("could not add {name:?}: {errno} (MTU {})", config.mtu)),
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

/// Makes the pair, and its end here a port of the bridge, named so if that can be had; gives that end. It gets its carrier when
/// the pod's end is set up.
fn add_pair(
    host: &mut Socket,
    config: &BridgeConfig,
    (bridge, namespace): (&Link, &Namespace),
    ifname: &str,
    mut name: String,
) -> Result<Link, String> {
    let pod_end = PodEnd { name: ifname, mac: config.mac, namespace: namespace.as_fd() };
    for _ in 0..10 {
        let lookup = |errno: Errno| format!("failed to lookup {name:?}: {errno}");
        let request = link::new_pair(&name, config.mtu, bridge.index, &pod_end);
        match host.ask(request) {
            Ok(told) => {
                let port = match link::found(Ok(told)) {
                    Ok(Some(port)) => Some(Link { master: bridge.index, ..port }),
                    _ => link::by_name(host, &name).map_err(lookup)?,
                };
                return port.ok_or_else(|| format!("failed to lookup {name:?}: Link not found"));
            }
            // Either name may be taken.
            Err(Errno::EXISTS) if matches!(link::by_name(host, &name), Ok(Some(_))) => name = random_name(),
            Err(Errno::EXISTS) => return Err(is_taken(ifname)),
            Err(errno) => {
                let (mtu, bridge) = (config.mtu, &config.bridge);
                return Err(format!(
                    "failed to make veth pair: {errno} (MTU {mtu}, name in the pod {ifname:?}, port of {bridge:?})"
                ));
            }
        }
    }
    Err("failed to find a unique veth name".into())
}

/// What the port still lacks of a port, before it has a carrier.
fn join(host: &mut Socket, bridge: &Link, port: &Link) -> Result<(), String> {
    let mut requests = vec![link::without_link_local(port.index)];
    // Old kernels don't look at the bridge of a link that is new.
    if port.master != bridge.index {
        requests.push(link::set_master(port.index, bridge.index));
    }
    let told = host.outcomes(requests).map_err(|refusal| refusal.errno.to_string())?;
    // The first is refused where there is no IPv6.
    told.into_iter()
        .skip(1)
        .collect::<Result<(), _>>()
        .map_err(|errno| format!("failed to connect {:?} to bridge {}: {errno}", port.name, bridge.name))
}

/// The standard library's hashers are made with keys from the kernel's random numbers.
fn random_name() -> String {
    let random = RandomState::new().build_hasher().finish();
    format!("veth{:08x}", random as u32)
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
    let ifname = &pod.attachment.ifname;
    let inside = namespace
        .within(|| configure(config, (ifname, veth.peer), &addresses, &with_gateways(&routes, &ips)))
        .map_err(|error| format!("error switching to the namespace of the pod: {error}"))?;
    let (mut inner, end) = inside?;

    let (bridge, port) = settle(host, config, bridge, veth)?;
    // It begins when the link has a carrier, and asks by the port.
    if config.detect_duplicates && addresses.iter().any(|one| one.addr().is_ipv6()) {
        detect::wait(namespace, &mut inner, &end, &bridge)?;
    }
    // Neighbours may hold the address with the MAC of another pod that had it a moment ago. The announcement
    // is sent once the port forwards. The pod's end sends since it was set up, because the port was up before it.
    inner
        .execute(vec![link::set_mac(end.index, &end.mac)])
        .map_err(|refusal| format!("failed to announce the addresses of {ifname:?}: {}", refusal.errno))?;
    let interface =
        |link: &Link, sandbox: String| Interface { name: link.name.clone(), mac: link.mac_text(), sandbox };
    let sandbox = pod.netns.to_string_lossy().into_owned();
    let interfaces =
        vec![interface(&bridge, String::new()), interface(&port, String::new()), interface(&end, sandbox)];
    let dns = if config.dns.is_empty() { dns } else { config.dns.clone() };
    Ok(Attached { interfaces, ips, routes, dns })
}

/// Gives the port its modes, and waits until it forwards; gives the bridge, whose MAC may be that of the new port, and the port.
fn settle(
    host: &mut Socket,
    config: &BridgeConfig,
    bridge: &Link,
    veth: &Link,
) -> Result<(Link, Link), String> {
    let lookup = |errno: Errno| format!("failed to lookup {:?}: {errno}", veth.name);
    let mut requests = vec![link::look(&bridge.name), link::look(&veth.name)];
    if config.hairpin || config.isolated {
        requests.push(link::set_port(veth.index, config.hairpin, config.isolated));
    }
    let mut told = host.exchange(requests).map_err(|refusal| lookup(refusal.errno))?.into_iter();
    let mut next = || told.next().unwrap_or(Ok(Vec::new()));
    let bridge = link::found(next()).ok().flatten().unwrap_or_else(|| bridge.clone());
    let port = link::found(next()).map_err(lookup)?.ok_or_else(|| lookup(Errno::NO_DEVICE))?;
    next().map_err(|errno| format!("failed to setup hairpin mode for {}: {errno}", veth.name))?;
    if port.running {
        return Ok((bridge, port));
    }
    let port = until_running(host, &veth.name, PORT_TIMEOUT).map_err(lookup)?;
    if !port.running {
        return Err("bridge port in error state: it does not come up".into());
    }
    Ok((bridge, port))
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
    (ifname, index): (&str, u32),
    addresses: &[IpNet],
    routes: &[Route],
) -> Result<(Socket, Link), String> {
    let lookup = |errno: Errno| format!("failed to lookup {ifname:?}: {errno}");
    let mut socket = Socket::route().map_err(lookup)?;
    switch(config, ifname, addresses)?;
    let up = link::set_up_announcing(index);
    let mut requests: Vec<(Message, String)> = vec![(up, format!("failed to set {ifname:?} UP"))];
    for one in addresses {
        let message = address::add(index, *one, config.detect_duplicates);
        requests.push((message, format!("failed to add IP addr {one} to {ifname:?}")));
    }
    for route in routes {
        let via = route.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
        let what = format!("failed to add route '{}{via} dev {ifname}'", route.destination);
        requests.push((route::add(index, route), what));
    }
    requests.push((link::look_at(index), format!("failed to lookup {ifname:?}")));
    let (messages, what): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
    let told = socket.exchange(messages).map_err(|refusal| lookup(refusal.errno))?;
    let mut last = Vec::new();
    for (told, what) in told.into_iter().zip(what) {
        last = told.map_err(|errno| format!("{what}: {errno}"))?;
    }
    let end = link::found(Ok(last)).ok().flatten().filter(|end| end.name == ifname);
    let end = end.ok_or_else(|| format!("failed to lookup {ifname:?}: Link not found"))?;
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
