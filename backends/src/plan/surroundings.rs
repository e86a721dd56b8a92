//! What of the host's own network no pod subnet may cover: its addresses, its way out, the store; pure.

use std::net::IpAddr;

use ipnet::IpNet;
use subnet::env_file::gateway;
use subnet::net::{is_of_a_node, overlap};
use subnet::{Family, NetworkConfig, PublicAddrs};

use crate::state::host::HostView;
use crate::state::name::Name;
use crate::state::{KernelState, Route, is_tunnel_name};

/// The addresses around this node that are not the pods', each with what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Addresses of this host with the length of their LAN, by device; no bridge of pods, no tunnel device.
    pub addresses: Vec<(Name, IpNet)>,
    /// The routers of the default routes.
    pub gateways: Vec<IpAddr>,
    /// Where the store answers.
    pub stores: Vec<IpAddr>,
    /// The addresses that peers send to, which are others behind address translation.
    pub public: PublicAddrs,
    /// Addresses of this host in its own pod subnets that are not there for pods, by device.
    pub strays: Vec<(Name, IpNet)>,
    /// Other programs' routes into the pod networks.
    pub intruders: Vec<Route>,
}

/// What tells the pods' addresses on this host from its own.
#[derive(Clone, Copy, Debug)]
pub struct Ours<'a> {
    /// The cluster's configuration.
    pub network: &'a NetworkConfig,
    /// The subnets that this node holds or held.
    pub subnets: &'a [IpNet],
    /// Tunnel devices.
    pub devices: &'a [Name],
    /// The external interface, which carries no pods.
    pub underlay: Option<u32>,
}

impl Surroundings {
    /// What the host looks like, without what is there for pods: an address of a subnet of this node, a bridge with
    /// the gateway address of any subnet, a tunnel device.
    pub fn of(host: &HostView, ours: Ours<'_>, stores: &[IpAddr], public: PublicAddrs) -> Self {
        let in_own = |net: &IpNet| ours.subnets.iter().any(|subnet| subnet.contains(net));
        // A bridge's address may be any that the CNI configuration names.
        let is_gateway = |net: &IpNet| ours.subnets.iter().any(|own| net.addr() == gateway(*own));
        let is_stray = |bridge: bool, net: &IpNet| !bridge && in_own(net) && !is_gateway(net);
        let pods = |bridge: bool, net: &IpNet| {
            let range = ours.network.range(Family::of(net.addr()));
            let of_a_subnet = range.is_some_and(|range| {
                range.network.contains(net)
                    && range.subnet_len == net.prefix_len()
                    && net.addr() == gateway(*net)
            });
            bridge && of_a_subnet || in_own(net)
        };
        let mut addresses = Vec::new();
        let mut strays = Vec::new();
        for link in host.links.values().filter(|link| !ours.devices.contains(&link.name)) {
            let external = Some(link.index) == ours.underlay;
            let nets = link.addresses.iter().map(|address| address.net);
            let (pods, own): (Vec<IpNet>, Vec<IpNet>) =
                nets.filter(|net| is_global(net.addr())).partition(|net| !external && pods(link.bridge, net));
            addresses.extend(own.into_iter().map(|net| (link.name, net)));
            strays.extend(
                pods.into_iter().filter(|net| is_stray(link.bridge, net)).map(|net| (link.name, net)),
            );
        }
        let gateways = host.defaults.iter().filter_map(|route| route.gateway).collect();
        let stores = stores.iter().copied().filter(|addr| !addr.is_loopback()).collect();
        Self { addresses, gateways, stores, public, strays, intruders: host.intruders.clone() }
    }

    /// What of this host takes packets that are for pods, each with the remedy: addresses and other programs' routes in
    /// this node's own subnets and in those of `peers`, given with their public addresses. Against a route that is as
    /// long as `planned`'s, or longer, another one does nothing.
    pub fn intrusions(&self, own: &[IpNet], peers: &[(IpNet, IpAddr)], planned: &KernelState) -> Vec<String> {
        let mut notes = Vec::new();
        for (name, net) in &self.strays {
            notes.push(format!(
                "{name} has the address {net}, which lies in this node's own pod subnet, so a pod that gets it can't be \
                 reached: remove it (ip address del {net} dev {name})"
            ));
        }
        for (name, net) in &self.addresses {
            let of_peer = peers.iter().find(|(subnet, _)| subnet.contains(&net.addr()));
            if let Some((subnet, public)) = of_peer {
                notes.push(format!(
                    "{name} has the address {net}, which lies in the subnet {subnet} of the node at {public}, so no route \
                     to that subnet is set: remove it (ip address del {net} dev {name}), or give that node another subnet"
                ));
            }
        }
        for route in &self.intruders {
            let longer = |subnet: &IpNet| {
                let mut around = std::iter::successors(Some(*subnet), IpNet::supernet);
                let longest = around.find(|net| planned.routes.contains_key(net));
                longest.is_some_and(|longest| route.dst.prefix_len() > longest.prefix_len())
            };
            let whose = if own.iter().any(|own| own.contains(&route.dst) && *own != route.dst) {
                "this node's own pods".to_owned()
            } else {
                let mut taken =
                    peers.iter().filter(|(subnet, _)| overlap(*subnet, route.dst) && longer(subnet));
                let Some((subnet, public)) = taken.next() else { continue };
                match taken.count() {
                    0 => format!("the subnet {subnet} of the node at {public}"),
                    more => format!("the subnet {subnet} of the node at {public} and {more} more"),
                }
            };
            notes.push(format!(
                "another program's route {route} takes packets that are for {whose}: remove it (ip route del {route})"
            ));
        }
        notes
    }

    /// Every address with what it is.
    fn named(&self) -> impl Iterator<Item = (IpAddr, String)> {
        let hosts =
            self.addresses.iter().map(|(name, net)| (net.addr(), format!("this host's address on {name}")));
        let gateways = self.gateways.iter().map(|addr| (*addr, "this host's default gateway".to_owned()));
        let stores = self.stores.iter().map(|addr| (*addr, "where the store answers".to_owned()));
        let public = Family::BOTH.into_iter().filter_map(|family| self.public.get(family));
        let public = public.map(|addr| (addr, "this node's public address".to_owned()));
        hosts.chain(gateways).chain(stores).chain(public)
    }

    /// Why no packet for `subnet` may be sent to a pod: it contains an address that is something else.
    pub fn covered(&self, subnet: IpNet) -> Option<String> {
        let (addr, what) = self.named().find(|(addr, _)| subnet.contains(addr))?;
        Some(format!("{subnet} contains {addr}, {what}"))
    }

    /// The addresses that no subnet may contain.
    pub fn reserved(&self) -> Vec<IpNet> {
        let mut all: Vec<IpNet> = self.named().map(|(addr, _)| IpNet::from(addr)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The LANs of this host, in which there may be hosts that this node doesn't know.
    pub fn lans(&self) -> Vec<IpNet> {
        let mut all: Vec<IpNet> = self.addresses.iter().map(|(_, net)| net.trunc()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Why peers can't be reached at `public`, if they can't: the reason begins after "its public address …".
    pub(crate) fn unreachable(&self, public: IpAddr, networks: &[IpNet]) -> Option<String> {
        if !is_of_a_node(public) {
            return Some("is not that of a node".to_owned());
        }
        for (name, net) in &self.addresses {
            if net.addr() == public {
                return Some(format!("is this host's own, on {name}"));
            }
            let lan = net.trunc();
            let ends = matches!(lan, IpNet::V4(_)) && lan.prefix_len() <= 30 && lan.contains(&public);
            if ends && (public == lan.broadcast() || public == lan.network()) {
                return Some(format!(
                    "is the broadcast address of {lan} on {name}: every packet would go to the whole LAN"
                ));
            }
        }
        // A network that overlaps the LAN is the operator's mistake, and the LAN's hosts are there all the same.
        let on_link = self.addresses.iter().any(|(_, net)| net.contains(&public));
        let network = networks.iter().find(|network| network.contains(&public) && !on_link)?;
        Some(format!(
            "is inside the pod network {network}: what is sent there would be sent to a pod again, without end"
        ))
    }

    /// What the operator has to know if networks and the host's own network have addresses in common.
    pub fn overlaps(&self, network: &NetworkConfig) -> Vec<String> {
        network
            .networks()
            .iter()
            .filter_map(|pods| {
                let left = |addr: &IpAddr| self.leftovers(network).any(|(_, net)| net.addr() == *addr);
                let (addr, what) = self.named().find(|(addr, _)| pods.contains(addr) && !left(addr))?;
                let key = if pods.addr().is_ipv4() { "Network" } else { "IPv6Network" };
                Some(format!(
                    "{key} {pods} overlaps the network of the nodes: it contains {addr}, {what}; subnets with such \
                     addresses are not used, and hosts that are unknown here may be cut off: choose another {key}, or \
                     limit it with {} and {}",
                    if key == "Network" { "SubnetMin" } else { "IPv6SubnetMin" },
                    if key == "Network" { "SubnetMax" } else { "IPv6SubnetMax" },
                ))
            })
            .chain(self.leftovers(network).map(|(name, net)| {
                format!(
                    "{name} is a device of flannel with {} in the pod network, and not this agent's: if no other agent \
                     runs on this host, it is left over from an earlier one; remove it (ip link del {name})",
                    net.addr()
                )
            }))
            .collect()
    }

    /// Tunnel devices in the networks of which this agent has no record.
    fn leftovers(&self, network: &NetworkConfig) -> impl Iterator<Item = &(Name, IpNet)> {
        let networks = network.networks();
        self.addresses.iter().filter(move |(name, net)| {
            is_tunnel_name(name) && networks.iter().any(|pods| pods.contains(&net.addr()))
        })
    }

    /// What the operator has to know of addresses that this node announces and no other node can use.
    pub fn unusable(&self) -> Vec<String> {
        let public = Family::BOTH.into_iter().filter_map(|family| self.public.get(family));
        public
            .filter(|addr| !is_of_a_node(*addr))
            .map(|addr| {
                let family = Family::of(addr);
                let flag = if family == Family::V4 { "--public-ip" } else { "--public-ipv6" };
                format!(
                    "this node announces {addr}, to which other nodes can't send, so that no {family} packet passes \
                     between its pods and theirs: give its interface an address that is not link-local, or another one \
                     with {flag}"
                )
            })
            .collect()
    }
}

/// Whether the address means the same on every device of the host.
fn is_global(addr: IpAddr) -> bool {
    !addr.is_loopback() && !matches!(addr, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::host::{DefaultRoute, HostAddr, HostLink};
    use subnet::Mac;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str, bridge: bool, addresses: &[&str]) -> (u32, HostLink) {
        let address =
            |text: &&str| HostAddr { net: net(text), deprecated: false, permanent: true, temporary: false };
        let addresses = addresses.iter().map(address).collect();
        let (name, mac) = (name.parse().unwrap(), Mac([2, 0, 0, 0, 0, 1]));
        (
            index,
            HostLink {
                index,
                name,
                altnames: Vec::new(),
                mtu: 1500,
                up: true,
                carrier: true,
                bridge,
                controller: None,
                mac,
                addresses,
            },
        )
    }

    /// A node with a LAN inside the network, an etcd and a gateway in it, and pods.
    fn overlapping() -> (NetworkConfig, Surroundings) {
        let network = NetworkConfig::parse(r#"{"Network":"172.16.0.0/12"}"#).unwrap();
        let host = HostView {
            links: [
                link(1, "lo", false, &["127.0.0.1/8", "::1/128"]),
                link(2, "eth0", false, &["172.16.5.1/16", "fe80::1/64"]),
                link(3, "cni0", true, &["172.20.7.1/24"]),
                link(4, "old0", true, &["172.20.8.1/24"]),
                link(5, "docker0", true, &["172.17.0.1/16"]),
                link(6, "flannel.1", false, &["172.20.7.0/32"]),
                link(7, "lo1", false, &["172.20.7.9/32"]),
            ]
            .into(),
            defaults: vec![DefaultRoute {
                family: Family::V4,
                link: Some(2),
                metric: 0,
                gateway: Some(ip("172.16.0.1")),
            }],
            ..HostView::default()
        };
        let (own, devices) = ([net("172.20.7.0/24")], ["flannel.1".parse().unwrap()]);
        let ours = Ours { network: &network, subnets: &own, devices: &devices, underlay: Some(2) };
        let stores = [ip("172.16.9.9"), ip("127.0.0.1")];
        let found = Surroundings::of(&host, ours, &stores, PublicAddrs::default());
        (network, found)
    }

    #[test]
    fn what_no_subnet_may_contain_is_the_hosts_and_not_the_pods() {
        let (network, found) = overlapping();
        let reserved: Vec<String> = found.reserved().iter().map(ToString::to_string).collect();
        assert_eq!(reserved, ["172.16.0.1/32", "172.16.5.1/32", "172.16.9.9/32", "172.17.0.1/32"]);
        for (subnet, part) in [
            ("172.16.5.0/24", "172.16.5.1, this host's address on eth0"),
            ("172.16.0.0/24", "172.16.0.1, this host's default gateway"),
            ("172.16.9.0/24", "172.16.9.9, where the store answers"),
            ("172.17.0.0/24", "172.17.0.1, this host's address on docker0"),
        ] {
            let why = found.covered(net(subnet)).unwrap();
            assert!(why.contains(part), "{why}");
        }
        assert_eq!(found.covered(net("172.20.7.0/24")), None, "the own subnet");
        assert_eq!(found.covered(net("172.16.6.0/24")), None);
        let notes = found.overlaps(&network);
        assert!(
            notes[0].contains("Network 172.16.0.0/12 overlaps") && notes[0].contains("SubnetMin"),
            "{notes:?}"
        );
        let apart = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        assert!(found.overlaps(&apart).is_empty());
    }

    #[test]
    fn a_tunnel_that_no_record_knows_is_named_as_left_over_and_is_no_network_of_nodes() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        let links =
            [link(2, "eth0", false, &["192.0.2.1/24"]), link(3, "flannel.1", false, &["10.244.9.0/32"])];
        let host = HostView { links: links.into(), ..HostView::default() };
        let ours = Ours { network: &network, subnets: &[], devices: &[], underlay: Some(2) };
        let found = Surroundings::of(&host, ours, &[], PublicAddrs::default());
        let notes = found.overlaps(&network);
        assert!(notes.len() == 1 && notes[0].contains("remove it (ip link del flannel.1)"), "{notes:?}");
        assert!(found.covered(net("10.244.9.0/24")).is_some(), "its subnet is not taken");
    }

    #[test]
    fn an_announced_address_that_means_nothing_to_other_nodes_is_named() {
        let said = |public: &[&str]| {
            let public = public.iter().map(|addr| ip(addr)).collect();
            Surroundings { public, ..Surroundings::default() }.unusable()
        };
        let notes = said(&["192.0.2.1", "fe80::1"]);
        assert!(
            notes.len() == 1 && notes[0].contains("announces fe80::1") && notes[0].contains("--public-ipv6"),
            "{notes:?}"
        );
        assert_eq!(said(&["192.0.2.1", "2001:db8::1"]), [""; 0]);
    }

    /// What a node says whose host has these addresses, each of a bridge or not, and these routes of other programs.
    fn notes(planned: &[&str], addresses: &[(bool, &str)], routes: &[(&str, u32)]) -> Vec<String> {
        let network = NetworkConfig::parse(
            r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48"}"#,
        )
        .unwrap();
        let (own, devices) =
            ([net("10.244.1.0/24"), net("fd00:244:0:1::/64")], ["flannel.1".parse().unwrap()]);
        let peers = [
            (net("10.244.7.0/24"), ip("192.0.2.7")),
            (net("10.244.8.0/24"), ip("192.0.2.8")),
            (net("fd00:244:0:7::/64"), ip("2001:db8::7")),
        ];
        let mut links: Vec<(u32, HostLink)> = vec![
            link(2, "eth0", false, &["192.0.2.1/24", "2001:db8::1/64"]),
            link(3, "cni0", true, &["10.244.1.1/24", "fd00:244:0:1::1/64"]),
            link(4, "veth1", false, &["10.244.1.1/32"]),
            link(5, "flannel.1", false, &["10.244.1.0/32"]),
        ];
        let more = addresses.iter().zip(6..);
        links.extend(more.map(|((bridge, net), index)| link(index, "eth1", *bridge, &[net])));
        let route = |(dst, metric): &(&str, u32)| Route {
            via: Some(ip("192.0.2.254")),
            dev: Some("eth0".parse().unwrap()),
            protocol: 4,
            metric: *metric,
            ..Route::ours(net(dst))
        };
        let intruders = routes.iter().map(route).collect();
        let host = HostView { links: links.into_iter().collect(), intruders, ..HostView::default() };
        let ours = Ours { network: &network, subnets: &own, devices: &devices, underlay: Some(2) };
        let mut state = KernelState::default();
        state.routes.extend(planned.iter().map(|dst| (net(dst), Route::ours(net(dst)))));
        Surroundings::of(&host, ours, &[], PublicAddrs::default()).intrusions(&own, &peers, &state)
    }

    #[test]
    fn what_of_the_host_takes_packets_that_are_for_pods_is_named_with_the_remedy() {
        let each = ["10.244.7.0/24", "10.244.8.0/24", "fd00:244:0:7::/64"];
        for address in ["10.244.7.9/24", "10.244.7.9/32", "10.244.7.9/8", "fd00:244:0:7::9/128"] {
            let notes = notes(&each, &[(false, address)], &[]);
            assert_eq!(notes.len(), 1, "{address}: {notes:?}");
            let (subnet, public) = if address.contains(':') {
                ("fd00:244:0:7::/64", "2001:db8::7")
            } else {
                ("10.244.7.0/24", "192.0.2.7")
            };
            for part in [
                &format!("eth1 has the address {address}"),
                &format!("subnet {subnet} of the node at {public}"),
                &format!("ip address del {address} dev eth1"),
            ] {
                assert!(notes[0].contains(part), "{address}: {notes:?}");
            }
        }
        for address in ["10.244.1.77/24", "10.244.1.77/32", "fd00:244:0:1::77/64"] {
            let notes = notes(&each, &[(false, address)], &[]);
            assert!(notes.len() == 1 && notes[0].contains("own pod subnet"), "{address}: {notes:?}");
        }
        // A subnet without a node, a bridge of pods whose gateway is not the first address, and the LAN.
        let harmless = [(false, "10.244.99.1/24"), (true, "10.244.1.77/24"), (false, "192.0.2.77/24")];
        assert_eq!(notes(&each, &harmless, &[]), Vec::<String>::new());

        for (planned, dst, metric, part) in [
            (&each[..], "10.244.7.128/25", 0, Some("the subnet 10.244.7.0/24 of the node at 192.0.2.7:")),
            (&each, "10.244.7.9/32", 100, Some("the subnet 10.244.7.0/24 of the node at 192.0.2.7:")),
            (&each, "fd00:244:0:7:8000::/65", 0, Some("fd00:244:0:7::/64 of the node at 2001:db8::7:")),
            (&each, "10.244.1.128/25", 0, Some("this node's own pods:")),
            // Ours is as long, and preferred or put in its place; ours are longer.
            (&each, "10.244.7.0/24", 100, None),
            (&each, "10.244.1.0/24", 100, None),
            (&each, "10.244.0.0/20", 0, None),
            (&each, "10.244.99.0/25", 0, None),
            // With one route for the whole network.
            (&["10.244.0.0/16"], "10.244.7.0/24", 100, Some("10.244.7.0/24 of the node at 192.0.2.7:")),
            (
                &["10.244.0.0/16"],
                "10.244.0.0/20",
                0,
                Some("10.244.7.0/24 of the node at 192.0.2.7 and 1 more:"),
            ),
            (&["10.244.0.0/16"], "10.244.0.0/16", 9, None),
            // To a peer that is not reached anyway.
            (&[], "10.244.7.128/25", 0, None),
        ] {
            let notes = notes(planned, &[], &[(dst, metric)]);
            assert_eq!(notes.len(), usize::from(part.is_some()), "{dst}: {notes:?}");
            for (note, part) in notes.iter().zip(part) {
                assert!(note.contains(part) && note.contains(&format!("ip route del {dst} via")), "{note}");
            }
        }
    }

    #[test]
    fn a_public_address_at_which_no_node_can_be_is_refused_with_the_reason() {
        let (_, found) = overlapping();
        let networks = [net("172.16.0.0/12"), net("10.244.0.0/16")];
        for (public, part) in [
            ("0.0.0.0", "not that of a node"),
            ("0.1.2.3", "not that of a node"),
            ("127.0.0.1", "not that of a node"),
            ("224.0.0.1", "not that of a node"),
            ("240.0.0.1", "not that of a node"),
            ("255.255.255.255", "not that of a node"),
            ("::", "not that of a node"),
            ("::1", "not that of a node"),
            ("ff02::1", "not that of a node"),
            ("fe80::2", "not that of a node"),
            ("::ffff:192.0.2.1", "not that of a node"),
            ("172.16.255.255", "broadcast address of 172.16.0.0/16 on eth0"),
            ("172.16.0.0", "broadcast address of 172.16.0.0/16 on eth0"),
            ("172.16.5.1", "this host's own, on eth0"),
            ("10.244.200.5", "inside the pod network 10.244.0.0/16"),
            ("172.20.9.1", "inside the pod network 172.16.0.0/12"),
        ] {
            let why = found.unreachable(ip(public), &networks).unwrap_or_default();
            assert!(why.contains(part), "{public}: {why}");
        }
        for public in ["192.0.2.1", "169.254.7.7", "2001:db8::1", "172.16.5.2"] {
            assert_eq!(found.unreachable(ip(public), &networks), None, "{public}");
        }
    }
}
