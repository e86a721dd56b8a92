//! Where the line runs between this agent's objects and everybody else's: by record, never by shape.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::config::Range;
use subnet::env_file::gateway;
use subnet::net::bits_of;
use subnet::{Family, Lease, Leases, SharedMap, SharedSet};

use crate::state::name::Name;
use crate::state::nexthop::NexthopId;
use crate::state::{PROTOCOL_BOOT, PROTOCOL_KERNEL, ROUTE_PROTOCOL, Route};

/// What belongs to this agent.
///
/// Two agents with other networks, VNIs or ports can share a host; neither sees the other's objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// The overlay networks: the current ones and those of the previous run.
    pub networks: Vec<IpNet>,
    /// Where the nodes' subnets are within a network (`SubnetMin`, `SubnetMax`): what lies in the network
    /// but beyond them is somebody else's, unless a lease is or was about it.
    pub ranges: Vec<Range>,
    /// This node's own subnets: the current ones and those of the previous run.
    pub subnets: Vec<IpNet>,
    /// The prefix length of subnets, by network family; recognises routes that a Go flannel left.
    pub subnet_lens: Vec<(Family, u8)>,
    /// The leases of all nodes, those of earlier times included.
    pub records: Arc<Records>,
    /// The external interface.
    pub underlay: Option<u32>,
    /// The tunnel devices that this agent made.
    pub devices: Vec<Name>,
    /// The peers are those that an earlier run saved, and there may be more: what the kernel has for others stays.
    pub recalled: bool,
}

/// What leases said and say: whose subnet a route leads to, and which next hop is a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    subnets: SharedSet<IpNet>,
    publics: SharedSet<IpAddr>,
}

fn publics(lease: &Lease) -> impl Iterator<Item = IpAddr> {
    Family::BOTH.into_iter().filter_map(|family| lease.public.get(family))
}

impl Records {
    /// More than this many times the leases that there are is not remembered of those that are gone.
    const FORMER: usize = 4;
    /// But always so many.
    const MIN_FORMER: usize = 1024;

    /// Takes in what these leases say. What earlier ones said is kept. What is as in `before` was learnt then.
    pub fn learn(&mut self, all: &Leases, before: Option<&Leases>) {
        let limit = Self::MIN_FORMER + Self::FORMER * all.leases.len();
        let too_many = self.subnets.len() > limit || self.publics.len() > limit;
        if too_many {
            *self = Self::default();
        }
        let nothing = SharedMap::default();
        let before = before.filter(|_| !too_many).map_or(&nothing, |before| &before.leases);
        for lease in all.leases.changes(before).filter_map(|(_, _, now)| now) {
            self.subnets.extend(lease.subnets.iter().map(|subnet| (subnet, ())));
            self.publics.extend(publics(lease).map(|addr| (addr, ())));
        }
    }

    /// Whether [`learn`](Self::learn) would change nothing.
    pub fn know(&self, all: &Leases, before: Option<&Leases>) -> bool {
        let nothing = SharedMap::default();
        let before = before.map_or(&nothing, |before| &before.leases);
        all.leases.changes(before).filter_map(|(_, _, now)| now).all(|lease| {
            publics(lease).all(|addr| self.publics.contains_key(&addr))
                && lease.subnets.iter().all(|subnet| self.subnets.contains_key(&subnet))
        })
    }

    /// Whether a lease is or was about this subnet.
    pub fn has_subnet(&self, subnet: IpNet) -> bool {
        self.subnets.contains_key(&subnet)
    }

    /// Whether this is or was a node's public address.
    pub(crate) fn has_public(&self, addr: IpAddr) -> bool {
        self.publics.contains_key(&addr)
    }
}

impl Scope {
    /// Whether a route of the main table is ours: it carries our protocol number and lies inside a
    /// network of ours; or a Go flannel left it, which gives its routes the number of boot scripts: then
    /// it has a node's prefix length and no metric, and leaves by a device of ours, or by the external
    /// interface to a next hop that is or was a node.
    pub(crate) fn owns_route(&self, route: &Route, own_device: bool, link: Option<u32>) -> bool {
        let inside = self.inside(route.dst)
            && (own_device || self.in_range(route.dst) || self.records.has_subnet(route.dst));
        if !inside {
            return false;
        }
        match route.protocol {
            ROUTE_PROTOCOL => true,
            PROTOCOL_BOOT => {
                let family = Family::of(route.dst.addr());
                let to_node = || {
                    link.is_some()
                        && link == self.underlay
                        && route.via.is_some_and(|via| self.records.has_public(via))
                };
                !route.foreign
                    && route.metric == 0
                    && route.via.is_some()
                    && self.subnet_lens.contains(&(family, route.dst.prefix_len()))
                    && (own_device || to_node())
            }
            _ => false,
        }
    }

    /// Whether a route of the main table is another program's and may take packets that are for pods: it leads into a
    /// network of ours. The kernel's own routes are known by the addresses that they are there for. In a subnet of this
    /// node, routes to devices are how some CNI plugins attach pods.
    pub fn intrudes(&self, route: &Route, own_device: bool, link: Option<u32>) -> bool {
        let to_pod = || route.via.is_none() && link != self.underlay && self.serves_pods(route.dst);
        route.protocol != PROTOCOL_KERNEL
            && self.inside(route.dst)
            && !own_device
            && !to_pod()
            && !self.owns_route(route, own_device, link)
    }

    /// Whether an address that the host gets or loses may be in the way of pods: it is inside a network of ours, and not
    /// the gateway of this node's pods, which some CNI plugins give to the host's end of each pod's link.
    pub fn intrudes_with(&self, net: IpNet) -> bool {
        self.inside(IpNet::from(net.addr()))
            && !self.subnets.iter().any(|subnet| net.addr() == gateway(*subnet))
    }

    fn serves_pods(&self, net: IpNet) -> bool {
        self.subnets.iter().any(|subnet| subnet.contains(&net))
    }

    /// Whether an address on a tunnel device of ours is ours to remove (contract §5.0): for IPv4 those
    /// inside the networks, for IPv6 all but link-local ones.
    pub(crate) fn owns_address(&self, net: IpNet) -> bool {
        match net.addr() {
            IpAddr::V4(_) => self.inside(net),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
    }

    /// Whether a device named like ours is one that an earlier configuration left: it carries the base
    /// address of a subnet of ours.
    pub(crate) fn owns_device_with(&self, addresses: impl IntoIterator<Item = IpNet>) -> bool {
        let bases: Vec<IpAddr> = self.subnets.iter().map(IpNet::network).collect();
        addresses.into_iter().any(|net| bases.contains(&net.addr()))
    }

    /// Whether a nexthop object with our mark is this agent's, and not one's of another network.
    pub(crate) fn owns_nexthop(&self, id: NexthopId) -> bool {
        let no_record = self.lens_v4().next().is_none();
        self.networks.iter().any(|network| match network {
            IpNet::V4(network) if network.prefix_len() == 0 => true,
            // No record says how long subnets are.
            IpNet::V4(network) if no_record => (8..=30).any(|len| id.subnet_in(*network, len).is_some()),
            IpNet::V4(network) => self.lens_v4().any(|len| id.subnet_in(*network, len).is_some()),
            IpNet::V6(_) => false,
        })
    }

    /// The IPv4 subnets for which the object of this id may have been made.
    pub(crate) fn subnets_of(&self, id: NexthopId) -> impl Iterator<Item = IpNet> {
        let networks = self.networks.iter().filter_map(|network| match network {
            IpNet::V4(network) => Some(*network),
            IpNet::V6(_) => None,
        });
        networks.flat_map(move |network| {
            self.lens_v4().filter_map(move |len| id.subnet_in(network, len)).map(IpNet::V4)
        })
    }

    /// How long nodes' IPv4 subnets are or were.
    fn lens_v4(&self) -> impl Iterator<Item = u8> {
        let now =
            self.ranges.iter().filter(|range| range.network.addr().is_ipv4()).map(|range| range.subnet_len);
        let own = self.subnets.iter().filter(|subnet| subnet.addr().is_ipv4()).map(IpNet::prefix_len);
        now.chain(own)
    }

    fn inside(&self, net: IpNet) -> bool {
        self.networks.iter().any(|network| network.contains(&net))
    }

    /// Whether nodes' subnets may be there, in each network that contains it.
    fn in_range(&self, net: IpNet) -> bool {
        let mut around = self.ranges.iter().filter(|range| range.network.contains(&net));
        around.all(|range| {
            let (first, last) = (bits_of(range.min), bits_of(range.max) + (range.step() - 1));
            (first..=last).contains(&bits_of(net.network()))
                && (first..=last).contains(&bits_of(net.broadcast()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scope in which nodes' subnets are in a part of the network, with one lease.
    fn scope() -> Scope {
        let config =
            r#"{"Network":"192.168.0.0/16","SubnetMin":"192.168.128.0","SubnetMax":"192.168.199.0"}"#;
        let network = subnet::NetworkConfig::parse(config).unwrap();
        let mut all = Leases::default();
        let value = br#"{"PublicIP":"192.0.2.2","BackendType":"host-gw"}"#;
        all.insert_entry("192.168.130.0-24", value, 1);
        let mut records = Records::default();
        records.learn(&all, None);
        Scope {
            networks: network.networks().iter().collect(),
            ranges: network.ranges().copied().collect(),
            subnet_lens: vec![(Family::V4, 24)],
            records: Arc::new(records),
            underlay: Some(2),
            ..Scope::default()
        }
    }

    fn route(dst: &str, via: &str, protocol: u8) -> Route {
        let dev = Some("eth0".parse().unwrap());
        Route { via: Some(via.parse().unwrap()), dev, protocol, ..Route::ours(dst.parse().unwrap()) }
    }

    #[test]
    fn a_route_is_ours_by_its_mark_or_by_a_node_as_its_next_hop_and_never_outside_the_range() {
        let (marked, boot) = (ROUTE_PROTOCOL, PROTOCOL_BOOT);
        for (dst, via, protocol, ours) in [
            ("192.168.131.0/24", "192.0.2.9", marked, true),
            ("192.168.131.0/24", "192.0.2.2", boot, true),
            // A boot script's: the next hop is no node.
            ("192.168.131.0/24", "192.0.2.254", boot, false),
            ("192.168.122.0/24", "192.0.2.2", boot, false),
            ("192.168.122.0/24", "192.0.2.2", marked, false),
            ("192.168.199.0/24", "192.0.2.2", marked, true),
            ("192.168.200.0/24", "192.0.2.2", marked, false),
            // Reaches beyond the range.
            ("192.168.128.0/17", "192.0.2.2", marked, false),
            ("10.1.1.0/24", "192.0.2.2", marked, false),
            ("192.168.131.0/24", "192.0.2.2", 4, false),
        ] {
            let route = route(dst, via, protocol);
            assert_eq!(scope().owns_route(&route, false, Some(2)), ours, "{route}");
        }
        let by_another = route("192.168.131.0/24", "192.0.2.2", boot);
        assert!(!scope().owns_route(&by_another, false, Some(3)), "not by the external interface");
        assert!(scope().owns_route(&route("192.168.0.0/16", "192.0.2.9", marked), true, Some(9)));
    }

    #[test]
    fn a_subnet_of_a_lease_that_is_gone_is_remembered_outside_the_range_too() {
        let mut scope = scope();
        let mut records = (*scope.records).clone();
        let mut before = Leases::default();
        before.insert_entry("192.168.20.0-24", br#"{"PublicIP":"192.0.2.20","BackendType":"host-gw"}"#, 1);
        records.learn(&before, None);
        scope.records = Arc::new(records);
        assert!(scope.owns_route(&route("192.168.20.0/24", "192.0.2.20", PROTOCOL_BOOT), false, Some(2)));
        assert!(!scope.owns_route(&route("192.168.21.0/24", "192.0.2.20", PROTOCOL_BOOT), false, Some(2)));
    }

    #[test]
    fn a_route_of_another_program_into_the_pods_network_intrudes_and_one_to_a_pod_does_not() {
        let mut scope = scope();
        scope.subnets = vec!["192.168.129.0/24".parse().unwrap()];
        let to_device = |dst: &str, link| {
            let dev = Some("veth1".parse().unwrap());
            (Route { dev, protocol: PROTOCOL_BOOT, ..Route::ours(dst.parse().unwrap()) }, Some(link))
        };
        let via = |dst: &str, protocol| (route(dst, "192.0.2.254", protocol), Some(2));
        for ((route, link), intrudes) in [
            (via("192.168.130.128/25", PROTOCOL_BOOT), true),
            (via("192.168.130.7/32", 4), true),
            (via("192.168.0.0/16", 4), true),
            (via("192.168.130.128/25", PROTOCOL_KERNEL), false),
            (via("192.168.131.0/24", ROUTE_PROTOCOL), false),
            (via("192.0.2.0/24", 4), false),
            (via("0.0.0.0/0", 4), false),
            (via("192.168.129.128/25", 4), true),
            // A pod's.
            (to_device("192.168.129.5/32", 9), false),
            (to_device("192.168.129.5/32", 2), true),
            (to_device("192.168.130.5/32", 9), true),
        ] {
            assert_eq!(scope.intrudes(&route, false, link), intrudes, "{route}");
        }
        assert!(!scope.intrudes(&via("192.168.130.128/25", 4).0, true, Some(2)), "by a device of ours");
        for (net, intrudes) in [
            ("192.168.129.1/24", false),
            ("192.168.129.1/32", false),
            ("192.168.129.9/32", true),
            ("192.168.130.1/24", true),
            ("192.168.5.1/8", true),
            ("192.0.2.1/24", false),
        ] {
            assert_eq!(scope.intrudes_with(net.parse().unwrap()), intrudes, "{net}");
        }
    }

    #[test]
    fn the_memory_of_leases_that_are_gone_has_an_end() {
        let mut records = Records::default();
        for number in 0..40_000u32 {
            let mut all = Leases::default();
            let [_, _, third, fourth] = number.to_be_bytes();
            let value = format!(r#"{{"PublicIP":"198.51.{third}.{fourth}","BackendType":"host-gw"}}"#);
            all.insert_entry(&format!("10.{third}.{fourth}.0-24"), value.as_bytes(), 1);
            records.learn(&all, None);
            assert!(records.subnets.len() <= 1100 && records.publics.len() <= 1100);
        }
    }
}
