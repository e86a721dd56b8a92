//! Pods of two nodes don't reach each other: from this node outwards.

use ipnet::IpNet;
use subnet::lease::parse_key;

use super::direction::Direction;
use super::finding::Finding;
use super::seen::Observation;
use crate::status::model::PeerCounts;
use crate::status::{NodeStatus, PeerEntry};

/// Of more peers with the same trouble, these are named.
const NAMED: usize = 5;
/// Datagrams with wrong checksums that are a trouble: single ones happen on any wire.
const MANY_CHECKSUM_ERRORS: u64 = 10;
/// … within this time.
const RECENTLY: u64 = 600;

pub(super) fn findings(seen: &Observation) -> Vec<Finding> {
    let Some(status) = seen.agent.status() else {
        return vec![Finding::not_run("peers", "it needs the agent's answer")];
    };
    let mut findings = Vec::new();
    devices(seen, status, &mut findings);
    interface(seen, status, &mut findings);
    checksums(seen, status, &mut findings);
    skipped(seen, &mut findings);
    probes(seen, &mut findings);
    if findings.is_empty() {
        findings.push(Finding::ok("peers", peers(&status.peers)));
    }
    findings
}

/// What is known of them, where nothing is wrong.
fn peers(peers: &PeerCounts) -> String {
    let probed = match peers.reachable {
        Some(reachable) => format!(", {reachable} answer probes"),
        None => ", and not probed".to_owned(),
    };
    format!("{} of {} are programmed{probed}", peers.programmed, peers.known)
}

fn devices(seen: &Observation, status: &NodeStatus, findings: &mut Vec<Finding>) {
    let (Ok(links), Some(node)) = (&seen.links, &status.node) else {
        if let Err(why) = &seen.links {
            findings.push(Finding::not_run("devices", why.clone()));
        }
        return;
    };
    for name in node.devices.iter().chain([&node.interface]) {
        match links.iter().find(|link| link.name == *name) {
            None => findings.push(Finding::trouble(
                "device",
                name.clone(),
                "it does not exist",
                "flanneld makes it within a moment: if it does not, its log says why",
            )),
            Some(link) if !link.up => findings.push(Finding::trouble(
                "device",
                name.clone(),
                "it is set down, so no other node can be reached",
                format!("ip link set {name} up; if it goes down again, find the program that does it"),
            )),
            Some(link) if !link.carrier && *name == node.interface => findings.push(Finding::trouble(
                "device",
                name.clone(),
                "it has no carrier",
                "look at its cable, its switch port or its peer",
            )),
            Some(_) => {}
        }
    }
}

/// The wrong interface: peers are behind another one.
fn interface(seen: &Observation, status: &NodeStatus, findings: &mut Vec<Finding>) {
    let (Ok(detours), Some(node)) = (&seen.detours, &status.node) else { return };
    let Some((address, device)) = detours.first().filter(|_| detours.len() == seen.asked) else { return };
    let is_device = seen.links.iter().flatten().any(|link| link.name == *device);
    findings.push(if is_device {
        Finding::trouble(
            "interface",
            node.interface.clone(),
            format!(
                "flanneld uses {} ({}), and this host reaches peers such as {address} by {device}",
                node.interface, node.interface_why
            ),
            format!("give flanneld --iface={device}, on every node the interface of that network"),
        )
    } else {
        Finding::trouble(
            "interface",
            address.to_string(),
            format!("this host has no way to its peers: {device}"),
            format!(
                "add a route to the peers' addresses, or choose another interface than {} with --iface",
                node.interface
            ),
        )
    });
}

fn checksums(seen: &Observation, status: &NodeStatus, findings: &mut Vec<Finding>) {
    let host = &status.host;
    let recent = host.checksum_errors_at.is_some_and(|at| status.at.saturating_sub(at) < RECENTLY);
    if seen.checksum_errors == 0 && !(recent && host.checksum_errors_new >= MANY_CHECKSUM_ERRORS) {
        return;
    }
    let interface = status.node.as_ref().map(|node| node.interface.as_str()).unwrap_or_default();
    findings.push(Finding::trouble(
        "checksums",
        format!("UDP on {interface}"),
        format!(
            "{} datagrams with a wrong checksum came since flanneld started, {} of them while doctor looked: a NIC or \
             hypervisor does not compute those of tunnels",
            host.checksum_errors_new, seen.checksum_errors
        ),
        "set \"ChecksumOffload\": \"off\" in the Backend of net-conf.json, or ethtool -K on the sender's device (tx off)",
    ));
}

fn skipped(seen: &Observation, findings: &mut Vec<Finding>) {
    let skipped = seen.peers.iter().filter(|peer| peer.state == "skipped");
    let unusable = skipped.map(|peer| (name(peer), peer.why.as_deref().unwrap_or("its lease can't be used")));
    let all: Vec<(String, &str)> = unusable.chain(malformed(seen)).collect();
    for (name, why) in all.iter().take(NAMED) {
        findings.push(Finding::trouble(
            "peer",
            name.clone(),
            format!("it is left out: {why}"),
            remedy_for(why),
        ));
    }
    if all.len() > NAMED {
        let more = all.len() - NAMED;
        findings.push(Finding::trouble(
            "peer",
            format!("{more} more"),
            "they are left out, too",
            "flanneld status --peers lists them; flanneld status --json has the reason of each in skipped_why",
        ));
    }
    for peer in seen.peers.iter().filter(|peer| peer.state == "refused").take(NAMED) {
        let cause = "the kernel lacks its route, its neighbour or its forwarding entry";
        findings.push(Finding::trouble(
            "peer",
            name(peer),
            cause,
            "flanneld status says what the kernel refuses",
        ));
    }
}

/// Leases that can't be read, by their keys. They are not among the peers, because nothing else is known of them.
fn malformed(seen: &Observation) -> impl Iterator<Item = (String, &str)> {
    let is_peer = |key: &str| {
        let subnets = parse_key(key);
        let has = |subnet: IpNet| subnets.iter().flat_map(|all| all.iter()).any(|known| known == subnet);
        seen.peers.iter().any(|peer| peer.subnet.parse().is_ok_and(has))
    };
    let all = seen.agent.status().into_iter().flat_map(|status| &status.peers.skipped_why);
    all.filter(move |(key, _)| !is_peer(key)).map(|(key, why)| (key.clone(), why.as_str()))
}

/// What to do about a lease that can't be used, by its reason.
fn remedy_for(why: &str) -> &'static str {
    if why.contains("its backend is") {
        "give both nodes the same Backend in net-conf.json (Kubernetes: the ConfigMap kube-flannel-cfg), and restart an old flanneld"
    } else if why.contains("public address") {
        "give each node an address of its own (--public-ip, --iface, public-ip-overwrite), or delete the lease of a node that is gone"
    } else if why.contains("VtepMAC") {
        "restart flanneld on the node that was copied, so that it takes another MAC; or delete the lease of a node that is gone"
    } else if why.contains("outside the network") {
        "let the node take a subnet of the network in net-conf.json: restart its flanneld, or delete its lease"
    } else if why.contains("overlaps") {
        "delete the lease that is wrong, or let its node restart"
    } else {
        "look at the lease in the store, and at the log of its node"
    }
}

/// What probes found.
fn probes(seen: &Observation, findings: &mut Vec<Finding>) {
    let is_bad =
        |peer: &&PeerEntry| matches!(peer.state.as_str(), "degraded" | "unreachable") || peer.cause.is_some();
    let bad: Vec<&PeerEntry> = seen.peers.iter().filter(is_bad).collect();
    for peer in bad.iter().take(NAMED) {
        let mut cause = peer.cause.clone().unwrap_or_else(|| format!("it is {}", peer.state));
        let mut remedy =
            peer.remedy.clone().unwrap_or_else(|| "flanneld trace follows a packet to it".to_owned());
        if let Some(direction) = seen.directions.get(&peer.subnet) {
            cause += direction.evidence();
            remedy += &one_way(*direction, seen, peer);
        }
        findings.push(Finding::trouble("tunnel", name(peer), cause, remedy));
    }
    if bad.len() > NAMED {
        findings.push(Finding::trouble(
            "tunnel",
            format!("{} more", bad.len() - NAMED),
            "the way to them is bad, too",
            "flanneld status --peers lists them, the worst first",
        ));
    }
}

/// Where to begin to look.
fn one_way(direction: Direction, seen: &Observation, peer: &PeerEntry) -> String {
    let own = seen.agent.status().and_then(|status| status.node.as_ref());
    let Some(there) = peer.public else { return String::new() };
    let here = own.and_then(|own| own.public.iter().find(|here| here.is_ipv4() == there.is_ipv4()));
    let Some(here) = here else { return String::new() };
    let (from, to) = match direction {
        Direction::Forth => (*here, there),
        Direction::Back => (there, *here),
    };
    format!("; begin with what drops it from {from} to {to}")
}

fn name(peer: &PeerEntry) -> String {
    match &peer.name {
        Some(name) => format!("{name} ({})", peer.subnet),
        None => peer.subnet.clone(),
    }
}
