//! Which links and addresses can't carry the traffic between nodes, because that traffic is for pods.
//!
//! A device of flannel that is chosen as its own underlay sends its packets into itself, and an address
//! inside the network is a pod's: both are excluded before any selector is tried, and offered by no message.

use std::collections::BTreeMap;
use std::net::IpAddr;

use backends::host::{HostAddr, HostLink, HostView};
use backends::kernel::is_tunnel_name;
use ipnet::IpNet;
use subnet::Family;
use subnet::env_file::gateway;

use super::is_link_local;

/// The prefixes that belong to pods.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodPrefixes {
    /// The networks of the configuration: no node's address is in them.
    pub(crate) networks: Vec<IpNet>,
    /// The subnets that this node has or had, also in earlier networks: a link with the gateway's address of
    /// one serves pods. Only that address counts, because hosts may be renumbered into a network that was
    /// given up.
    pub(crate) own: Vec<IpNet>,
}

/// A host without what is excluded, and why each link or address was.
pub(super) struct Candidates {
    pub(super) host: HostView,
    /// By the link's index.
    links: BTreeMap<u32, String>,
    /// Links that stay without this address.
    addresses: Vec<(u32, IpAddr, String)>,
}

impl Candidates {
    pub(super) fn of(host: &HostView, pods: &PodPrefixes) -> Self {
        let mut links: BTreeMap<u32, String> =
            host.links.values().filter_map(|link| Some((link.index, excluded(host, link, pods)?))).collect();
        for port in host.links.values() {
            let bridge = port.controller.and_then(|index| host.links.get(&index)).filter(|link| link.bridge);
            if let Some(bridge) = bridge.filter(|bridge| links.contains_key(&bridge.index)) {
                let why = format!("{} is a port of {}, a bridge of pods", port.name, bridge.name);
                links.entry(port.index).or_insert(why);
            }
        }
        let mut found = Self { host: host.clone(), links, addresses: Vec::new() };
        found.host.links.retain(|index, _| !found.links.contains_key(index));
        for link in found.host.links.values_mut() {
            let inside = |addr| pods.networks.iter().find(|network| network.contains(&addr));
            link.addresses.retain(|own| {
                let addr = own.net.addr();
                let network = inside(addr);
                if let Some(network) = network {
                    let key = if addr.is_ipv4() { "Network" } else { "IPv6Network" };
                    let why = format!(
                        "{addr} of {} lies inside the pod network {network}: give {key} a prefix that no node has an \
                         address in",
                        link.name
                    );
                    found.addresses.push((link.index, addr, why));
                }
                network.is_none()
            });
            // A link-local address is one for nodes that have no other, not for those that may not use it.
            let lost: Vec<IpAddr> = found
                .addresses
                .iter()
                .filter(|(index, _, _)| *index == link.index)
                .map(|(_, addr, _)| *addr)
                .collect();
            for family in
                Family::BOTH.into_iter().filter(|family| lost.iter().any(|addr| Family::of(*addr) == *family))
            {
                let of_family = |own: &&HostAddr| Family::of(own.net.addr()) == family;
                if link.addresses.iter().filter(of_family).all(|own| is_link_local(own.net.addr())) {
                    link.addresses.retain(|own| Family::of(own.net.addr()) != family);
                }
            }
        }
        found
    }

    /// Why the link with this index is no candidate.
    pub(super) fn why_not(&self, index: u32) -> Option<&str> {
        self.links.get(&index).map(String::as_str)
    }

    /// Why an address of the host is no candidate.
    pub(super) fn why_not_address(&self, all: &HostView, addr: IpAddr) -> Option<&str> {
        let has = |link: &&HostLink| link.addresses.iter().any(|own| own.net.addr() == addr);
        let of_link = || self.why_not(all.links.values().find(has)?.index);
        let of_address = self.addresses.iter().find(|(_, excluded, _)| *excluded == addr);
        of_address.map(|(_, _, why)| why.as_str()).or_else(of_link)
    }

    /// The addresses that a link lost to the pod networks, in words; empty if there are none.
    pub(super) fn lost_by(&self, index: u32) -> String {
        let of_link = self.addresses.iter().filter(|(link, _, _)| *link == index);
        of_link.map(|(_, _, why)| format!(" ({why})")).collect()
    }
}

/// Why a link is no candidate, as far as that needs no other link.
fn excluded(host: &HostView, link: &HostLink, pods: &PodPrefixes) -> Option<String> {
    let name = link.name;
    let has = |serves: &dyn Fn(IpAddr) -> bool| link.addresses.iter().any(|own| serves(own.net.addr()));
    let in_network = |addr| pods.networks.iter().any(|network| network.contains(&addr));
    // The record of a subnet may be another machine's, or of a network that is one of nodes today: a link that leads
    // out of the host serves no pods of an earlier network.
    let leads_out = host.defaults.iter().any(|route| route.link == Some(link.index));
    let current = |subnet: &IpNet| pods.networks.iter().any(|network| network.contains(subnet));
    let is_gateway = |addr| {
        let mut own = pods.own.iter().filter(|subnet| !leads_out || current(subnet));
        own.any(|subnet| gateway(*subnet) == addr)
    };
    if name.as_str() == "lo" {
        return Some("lo is the loopback device, which leads to no other node".to_owned());
    }
    if is_tunnel_name(&name) {
        return Some(format!("{name} is a device of flannel itself, and would carry its own packets"));
    }
    let bridge_of_pods =
        link.bridge && (matches!(name.as_str(), "cni0" | "cbr0") || has(&in_network) || has(&is_gateway));
    if bridge_of_pods {
        return Some(format!("{name} is a bridge of pods"));
    }
    has(&is_gateway).then(|| format!("{name} has the gateway address of this node's pods"))
}
