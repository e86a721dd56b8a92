//! Looks: asks the agent, and reads the host. Changes nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use backends::firewall::blocking::{Blocking, Packet, Passing};
use backends::firewall::nftables::NftFirewall;
use backends::host::HostView;
use backends::kernel::netlink::Netlink;
use backends::prerequisites::{self, Obstacle};
use backends::{Kernel, Name};
use ipnet::IpNet;
use subnet::env_file::{Reading, gateway};
use subnet::{Family, Subnets};

use super::seen::{Addresses, AgentAnswer, Env, Link, Observation, Pod, Read};
use super::{DoctorOptions, direction, offline};
use crate::status::{NodeStatus, PeerEntry, PeerList, checksum_errors, pool};
use crate::{ask, cni, lock};

/// Where the agent compares the kernel with its plan.
const LOOK: &str = "/status?look";
/// Within this time damage is repaired, if nothing is in the way.
const REPAIRED: Duration = Duration::from_millis(700);
/// More peers than this are not asked about one by one.
const MAX_PEERS: usize = 50;

/// All that there is to see.
pub(super) fn look(options: &DoctorOptions) -> Observation {
    let checksums = checksum_errors();
    let agent = agent(options);
    let env = env(&options.subnet_file);
    let status = agent.status();
    let peers = match status {
        Some(_) => ask::value::<PeerList>(options.at, "/peers").map(|list| list.peers).unwrap_or_default(),
        None => Vec::new(),
    };
    let confs = options.cni_conf_dir.is_dir().then(|| cni::read(&options.cni_conf_dir));
    let host = Netlink::open()
        .and_then(|mut kernel| kernel.links_and_addresses())
        .map_err(|error| error.to_string());
    let living = living();
    let directory = pool::directory(&options.cni_conf_dir);
    let usable: Vec<&PeerEntry> =
        peers.iter().filter(|peer| peer.state != "skipped").take(MAX_PEERS).collect();
    Observation {
        obstacles: host.as_ref().map(|host| obstacles(status, env.subnets(), host)).map_err(Clone::clone),
        detours: detours(status, &usable),
        directions: direction::find(&peers, options.at.port()),
        asked: usable.iter().filter(|peer| peer.public.is_some()).count(),
        blocking: blocking(status, host.as_ref().ok(), &usable),
        links: host.map(|host| links(&host)),
        missing_plugins: missing_plugins(confs.as_deref().unwrap_or_default(), &options.cni_bin_dirs),
        addresses: addresses(env.subnets(), directory.clone(), &living),
        pod: options.pod.as_deref().map(|asked| pod(asked, &directory, env.subnets(), &living)),
        agent,
        peers,
        subnet_file: options.subnet_file.clone(),
        env,
        confs,
        cni_conf_dir: options.cni_conf_dir.clone(),
        cni_bin_dirs: options.cni_bin_dirs.clone(),
        checksum_errors: checksum_errors().saturating_sub(checksums),
    }
}

fn agent(options: &DoctorOptions) -> AgentAnswer {
    match ask::value::<NodeStatus>(options.at, LOOK) {
        Ok(status) => AgentAnswer::Answers(lasting(options, status)),
        Err(why) => {
            let running = lock::holder(&options.subnet_file).ok().flatten().map(|holder| holder.to_string());
            AgentAnswer::Silent { why, running, lacking: offline::changes(&options.subnet_file) }
        }
    }
}

/// With what differs now and still does a moment later: flanneld puts right at once what it can.
fn lasting(options: &DoctorOptions, status: NodeStatus) -> NodeStatus {
    if status.kernel.changes.is_empty() {
        return status;
    }
    std::thread::sleep(REPAIRED);
    let Ok(mut later) = ask::value::<NodeStatus>(options.at, LOOK) else { return status };
    later.kernel.changes.retain(|change| status.kernel.changes.contains(change));
    later
}

fn env(path: &Path) -> Env {
    match subnet::regular::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Env::Missing,
        Err(error) => Env::Bad(error.to_string()),
        Ok(text) => match Reading::parse(&text) {
            Err(bad) => Env::Bad(bad.to_string()),
            Ok(reading) => match reading.missing().first() {
                Some(name) => Env::Bad(format!("it lacks {name}")),
                None => Env::Written(reading.subnets),
            },
        },
    }
}

fn links(host: &HostView) -> Vec<Link> {
    let link = |link: &backends::host::HostLink| Link {
        name: link.name.to_string(),
        up: link.up,
        carrier: link.carrier,
        bridge: link.bridge,
        addresses: link.addresses.iter().map(|address| address.net).collect(),
    };
    host.links.values().map(link).collect()
}

/// Reads the settings that matter and judges them as the agent does.
fn obstacles(status: Option<&NodeStatus>, subnets: Subnets, host: &HostView) -> Vec<Obstacle> {
    let node = status.and_then(|status| status.node.as_ref());
    let name = |text: &String| text.parse::<Name>().ok().filter(|name| host.link(name.as_str()).is_some());
    let own: Vec<IpNet> = subnets.iter().collect();
    let passage = prerequisites::Passage {
        families: own.iter().map(|subnet| Family::of(subnet.addr())).collect(),
        underlay: node.and_then(|node| name(&node.interface)),
        tunnels: node.into_iter().flat_map(|node| node.devices.iter().filter_map(name)).collect(),
        bridges: host.serving_bridge(&own).map(|link| link.name).into_iter().collect(),
        services: node.is_some_and(|node| node.services),
    };
    match Netlink::open() {
        Ok(mut kernel) => passage.judge(&kernel.sysctls(&passage.keys())),
        Err(_) => Vec::new(),
    }
}

/// The peers to whom packets leave by another device than the external interface.
fn detours(status: Option<&NodeStatus>, peers: &[&PeerEntry]) -> Read<Vec<(IpAddr, String)>> {
    let Some(node) = status.and_then(|status| status.node.as_ref()) else {
        return Err("it needs the agent's answer".to_owned());
    };
    let mut kernel = Netlink::open().map_err(|error| error.to_string())?;
    let host = kernel.links_and_addresses().map_err(|error| error.to_string())?;
    let mut found = Vec::new();
    for address in peers.iter().filter_map(|peer| peer.public) {
        match kernel.route_to(address) {
            Ok(way) => {
                let device = host.links.get(&way.link).map(|link| link.name.to_string()).unwrap_or_default();
                if device != node.interface {
                    found.push((address, device));
                }
            }
            Err(error) => found.push((address, error.to_string())),
        }
    }
    Ok(found)
}

/// The rules that drop datagrams of the tunnel, or pods' packets to the first peer of each family.
fn blocking(
    status: Option<&NodeStatus>,
    host: Option<&HostView>,
    peers: &[&PeerEntry],
) -> Read<Vec<(String, Blocking)>> {
    let Some(node) = status.and_then(|status| status.node.as_ref()) else {
        return Err("it needs the agent's answer".to_owned());
    };
    let bridge = if node.bridge.is_empty() { "cni0" } else { node.bridge.as_str() };
    let index = |name: &str| host.and_then(|host| host.link(name)).map(|link| link.index).unwrap_or_default();
    let mut packets: Vec<(String, Packet)> = Vec::new();
    for own in node.subnets.iter().filter_map(|text| text.parse::<IpNet>().ok()) {
        let family = Family::of(own.addr());
        let first = peers.iter().find_map(|peer| {
            let subnet: IpNet = peer.subnet.parse().ok()?;
            let public = peer.public.filter(|_| Family::of(subnet.addr()) == family)?;
            Some((subnet, public))
        });
        let (Some((subnet, public)), Some(mine)) =
            (first, node.public.iter().copied().find(|addr| Family::of(*addr) == family))
        else {
            continue;
        };
        let packet = |passage, input: &str, output: &str, source, destination, udp| Packet {
            passage,
            input: (input.to_owned(), index(input)),
            output: (output.to_owned(), index(output)),
            source,
            destination,
            udp,
        };
        for port in &node.ports {
            let what = |verb: &str| format!("UDP {port} {verb}");
            packets.push((
                what("from peers"),
                packet(Passing::In, &node.interface, "", public, mine, Some(*port)),
            ));
            packets.push((
                what("to peers"),
                packet(Passing::Out, "", &node.interface, mine, public, Some(*port)),
            ));
        }
        let tunnel = node.devices.iter().find(|name| host.is_some_and(|host| host.link(name).is_some()));
        let outer = tunnel.unwrap_or(&node.interface).as_str();
        let (here, there) = (next(gateway(own)), next(gateway(subnet)));
        packets.push((
            "what pods send to other nodes".to_owned(),
            packet(Passing::Through, bridge, outer, here, there, None),
        ));
        packets.push((
            "what pods get from other nodes".to_owned(),
            packet(Passing::Through, outer, bridge, there, here, None),
        ));
    }
    let (words, packets): (Vec<String>, Vec<Packet>) = packets.into_iter().unzip();
    let found = NftFirewall::open().and_then(|mut firewall| firewall.blocking(&packets));
    let found = found.map_err(|error| error.to_string())?;
    Ok(words.into_iter().zip(found).filter_map(|(what, blocking)| Some((what, blocking?))).collect())
}

/// The address behind this one.
fn next(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => std::net::Ipv4Addr::from_bits(v4.to_bits().wrapping_add(1)).into(),
        IpAddr::V6(v6) => std::net::Ipv6Addr::from_bits(v6.to_bits().wrapping_add(1)).into(),
    }
}

/// The plugins of the configuration that counts, of which the runtime would find no file. `flannel` delegates to two
/// more, which ours has built in, and Go's has not: a delegate is asked for only if it is named.
fn missing_plugins(confs: &[cni::ConfFile], directories: &[PathBuf]) -> Option<Vec<String>> {
    let first = confs.iter().find_map(|file| file.conf.as_ref().ok());
    let exists = |name: &str| directories.iter().any(|directory| directory.join(name).is_file());
    let types = first.into_iter().flat_map(cni::Conf::types);
    let missing = types.filter(|name| !exists(name)).map(str::to_owned).collect();
    directories.iter().any(|directory| directory.is_dir()).then_some(missing)
}

/// The addresses of all pods.
fn living() -> Read<BTreeSet<IpAddr>> {
    Netlink::open().and_then(|mut kernel| kernel.pod_addresses()).map_err(|error| error.to_string())
}

fn addresses(subnets: Subnets, directory: PathBuf, living: &Read<BTreeSet<IpAddr>>) -> Addresses {
    let now = SystemTime::now();
    let all = pool::reservations(&directory, subnets);
    let of = |subnet: IpNet| all.iter().filter(|one| subnet.contains(&one.address)).count() as u64;
    let pools = subnets.iter().map(|subnet| (subnet, pool::size(subnet), of(subnet))).collect();
    let age = |since: Option<SystemTime>| Some(now.duration_since(since?).ok()?.as_secs());
    let leaked = living.as_ref().map_err(Clone::clone).map(|living| {
        let leaked = pool::leaked(all, living, now).into_iter();
        leaked.map(|one| (one.address, one.path, age(one.since))).collect()
    });
    Addresses { exists: directory.is_dir(), directory, pools, leaked }
}

fn pod(asked: &str, directory: &Path, subnets: Subnets, living: &Read<BTreeSet<IpAddr>>) -> Pod {
    let address: Option<IpAddr> = asked.parse().ok();
    let holds = |one: &pool::Reservation| match address {
        Some(address) => one.address == address,
        None => {
            let holder = fs::read_to_string(&one.path).unwrap_or_default();
            let holder = holder.lines().next().unwrap_or_default().trim();
            // As container runtimes do, the beginning of an id is enough.
            asked.len() >= 8 && holder.starts_with(asked) || holder == asked
        }
    };
    let all = pool::reservations(directory, subnets);
    let reserved: Vec<IpAddr> = all.iter().filter(|one| holds(one)).map(|one| one.address).collect();
    let candidates: Vec<IpAddr> = reserved.iter().copied().chain(address).collect();
    let living = living.as_ref().map_err(Clone::clone);
    let living = living.map(|living| candidates.into_iter().filter(|addr| living.contains(addr)).collect());
    Pod { asked: asked.to_owned(), reserved, living }
}
