//! Nexthop objects (`RTM_NEWNEXTHOP`, Linux 5.3): which routes lead through one, and the ids that they have.
//!
//! The kernel keeps routes of one device, protocol and metric in one hash chain, which each new one walks: the hash leaves the
//! gateway out (net/ipv4/fib_semantics.c, `fib_create_info`). Routes that name an object are hashed by its id.
//! docs/adr/027-nexthop-objects.md has the figures.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net};

use super::KernelState;
use super::name::Name;
use super::route::{ROUTE_PROTOCOL, Route};

/// From so many routes over one tunnel device on, they lead through nexthop objects. Below, objects cost more than they save.
const MIN_ROUTES_TUNNEL: usize = 1000;
/// The same for devices that lose their carrier: the kernel removes nexthop objects and their routes with the carrier, and
/// leaves plain routes.
const MIN_ROUTES_UNDERLAY: usize = 4000;
/// Objects in use stay in use until there are so many fourths of these numbers.
const KEEP_FOURTHS: usize = 3;

/// The first byte of an id: our route protocol number, or one of those that follow if another program has the id.
const REGIONS: RangeInclusive<u8> = ROUTE_PROTOCOL..=ROUTE_PROTOCOL + 3;

/// The id of a nexthop object.
///
/// In those of flannel-rs the last three bytes are the number of the subnet that is reached through the object: the address
/// without its host part, so for 10.1.2.0/24 the id is 0x460a0102. Agents of different networks have different ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NexthopId(NonZeroU32);

impl NexthopId {
    /// The number as the kernel has it.
    pub(crate) fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number).map(Self)
    }

    /// Whether it is of the range from which agents of flannel-rs take ids.
    pub(crate) fn is_of_range(self) -> bool {
        REGIONS.contains(&self.get().to_be_bytes()[0])
    }

    /// The number.
    pub(crate) fn get(self) -> u32 {
        self.0.get()
    }

    fn subnet_number(self) -> u32 {
        self.get() & 0x00ff_ffff
    }

    /// Whether it is one of those that a route of ours to `dst` may have.
    pub(crate) fn is_for(self, dst: IpNet) -> bool {
        matches!(dst, IpNet::V4(dst) if self.is_of_range() && subnet_number(dst) == self.subnet_number())
    }

    /// The subnets in `network` that it may be for, where subnets have this length.
    pub(crate) fn subnet_in(self, network: Ipv4Net, len: u8) -> Option<Ipv4Net> {
        let shift = 32 - u32::from(len);
        let number = self.subnet_number();
        if len < network.prefix_len() || !(8..=30).contains(&len) {
            return None;
        }
        // Longer subnets have more bits than an id: the network has the others.
        let base = u32::from(network.network()) >> shift;
        let candidate = (base & !0x00ff_ffff) | number;
        let candidate = if candidate < base { candidate.checked_add(0x0100_0000)? } else { candidate };
        let subnet = Ipv4Net::new(candidate.checked_shl(shift)?.into(), len).ok()?;
        (network.contains(&subnet) && subnet_number(subnet) == number).then_some(subnet)
    }
}

impl fmt::Display for NexthopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The ids that the object of a route to `dst` may have: the first that no other program has.
fn candidates(dst: Ipv4Net) -> impl Iterator<Item = NexthopId> {
    let number = subnet_number(dst);
    REGIONS.filter_map(move |region| NexthopId::new(u32::from(region) << 24 | number))
}

fn subnet_number(subnet: Ipv4Net) -> u32 {
    u32::from(subnet.network()).checked_shr(32 - u32::from(subnet.prefix_len())).unwrap_or_default()
        & 0x00ff_ffff
}

/// Whether this kernel has nexthop objects for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NexthopSupport {
    /// It has them. `taken` are the ids of our range that other programs have.
    Usable {
        /// Those ids.
        taken: BTreeSet<NexthopId>,
    },
    /// It does not know them (before Linux 5.3), or refuses them: routes are plain.
    Refused,
}

impl Default for NexthopSupport {
    fn default() -> Self {
        Self::Usable { taken: BTreeSet::new() }
    }
}

impl KernelState {
    /// Has the IPv4 routes to peers lead through nexthop objects where there are many over one device. `before` is what was
    /// planned before.
    pub fn use_nexthops(&mut self, support: &NexthopSupport, before: &Self) {
        let NexthopSupport::Usable { taken } = support else { return };
        let mut counts: BTreeMap<Name, usize> = BTreeMap::new();
        for dev in self.routes.values().filter(|route| may_use(route)).filter_map(|route| route.dev) {
            *counts.entry(dev).or_default() += 1;
        }
        counts.retain(|dev, count| {
            let min = if self.links.contains_key(dev) { MIN_ROUTES_TUNNEL } else { MIN_ROUTES_UNDERLAY };
            let in_use = |route: &Route| route.dev == Some(*dev) && route.nexthop.is_some();
            *count >= min || *count >= min / 4 * KEEP_FOURTHS && before.routes.values().any(in_use)
        });
        if !counts.is_empty() {
            self.set_nexthops(taken, |dev| counts.contains_key(&dev));
        }
    }

    /// The same, from the first route on; for tests with few peers.
    #[cfg(any(test, feature = "testing"))]
    pub fn use_nexthops_always(&mut self, support: &NexthopSupport) {
        if let NexthopSupport::Usable { taken } = support {
            self.set_nexthops(taken, |_| true);
        }
    }

    fn set_nexthops(&mut self, taken: &BTreeSet<NexthopId>, used_on: impl Fn(Name) -> bool) {
        let mut numbers = BTreeSet::new();
        for (dst, route) in &mut self.routes {
            // Two subnets with one number, which only networks of different prefix lengths have: the second is plain.
            if let IpNet::V4(dst) = dst
                && may_use(route)
                && route.dev.is_some_and(&used_on)
                && numbers.insert(subnet_number(*dst))
            {
                route.nexthop = candidates(*dst).find(|id| !taken.contains(id));
            }
        }
    }
}

/// Whether a route can lead through an object of ours: one hop, of IPv4.
fn may_use(route: &Route) -> bool {
    route.dst.addr().is_ipv4() && route.via.is_some_and(|via| via.is_ipv4()) && route.dev.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Link, LinkIdentity, LinkSettings};

    fn id(number: u32) -> NexthopId {
        NexthopId::new(number).unwrap()
    }

    fn state(count: u32, dev: &str) -> KernelState {
        let route = |number: u32| {
            let dst = Ipv4Net::new((0x0a00_0000 + (number << 8)).into(), 24).unwrap();
            let via = Some(dst.network().into());
            Route { via, dev: Some(dev.parse().unwrap()), ..Route::ours(dst.into()) }
        };
        let link = Link { identity: LinkIdentity::Tun, settings: LinkSettings::plain(1400) };
        KernelState {
            links: [("flannel.1".parse().unwrap(), link)].into(),
            routes: (0..count).map(|number| (route(number).dst, route(number))).collect(),
            ..KernelState::default()
        }
    }

    fn used(state: &KernelState) -> usize {
        state.routes.values().filter(|route| route.nexthop.is_some()).count()
    }

    #[test]
    fn routes_of_many_peers_use_objects_and_go_on_while_a_few_leave() {
        let support = NexthopSupport::default();
        let (none, min) = (KernelState::default(), MIN_ROUTES_TUNNEL as u32);
        for (count, dev, before, uses) in [
            (min, "flannel.1", &none, true),
            (min - 1, "flannel.1", &none, false),
            (min, "eth0", &none, false),
            (MIN_ROUTES_UNDERLAY as u32, "eth0", &none, true),
        ] {
            let mut planned = state(count, dev);
            planned.use_nexthops(&support, before);
            assert_eq!(used(&planned), if uses { count as usize } else { 0 }, "{count} {dev}");
        }
        let mut before = state(min, "flannel.1");
        before.use_nexthops(&support, &none);
        for (count, uses) in [(min * 3 / 4, true), (min * 3 / 4 - 1, false)] {
            let mut planned = state(count, "flannel.1");
            planned.use_nexthops(&support, &before);
            assert_eq!(used(&planned) > 0, uses, "{count}");
        }
        let mut refused = state(min, "flannel.1");
        refused.use_nexthops(&NexthopSupport::Refused, &before);
        assert_eq!(used(&refused), 0);
    }

    #[test]
    fn an_id_names_its_subnet_and_one_that_another_program_has_is_passed_over() {
        let mut planned = state(3, "flannel.1");
        let taken =
            [id(0x460a_0001), id(0x460a_0002), id(0x470a_0002), id(0x480a_0002), id(0x490a_0002)].into();
        planned.use_nexthops_always(&NexthopSupport::Usable { taken });
        let ids: Vec<_> = planned.routes.values().map(|route| route.nexthop.map(NexthopId::get)).collect();
        assert_eq!(ids, [Some(0x460a_0000), Some(0x470a_0001), None]);
        assert!(planned.routes.iter().all(|(dst, route)| route.nexthop.is_none_or(|id| id.is_for(*dst))));
        assert!(!id(7).is_of_range() && !id(0x4a00_0000).is_of_range() && id(0x4900_0000).is_of_range());
    }

    #[test]
    fn subnets_with_one_number_share_no_id() {
        // Their numbers have 26 bits, of which ids have 24.
        let mut planned = KernelState::default();
        for dst in ["0.64.128.64/26", "64.64.128.64/26"] {
            let dst: IpNet = dst.parse().unwrap();
            let dev = Some("flannel.1".parse().unwrap());
            planned.routes.insert(dst, Route { via: Some(dst.addr()), dev, ..Route::ours(dst) });
        }
        planned.use_nexthops_always(&NexthopSupport::default());
        assert_eq!(used(&planned), 1);
    }

    #[test]
    fn the_subnet_of_an_id_is_found_in_its_network_and_in_no_other() {
        for (subnet, network) in [
            ("10.1.2.0/24", "10.1.0.0/16"),
            ("10.0.0.0/24", "10.0.0.0/8"),
            ("255.255.255.0/24", "255.0.0.0/8"),
            ("10.1.2.192/26", "10.1.0.0/16"),
            ("10.255.255.252/30", "10.0.0.0/8"),
            ("172.16.0.0/20", "172.16.0.0/12"),
        ] {
            let (subnet, network): (Ipv4Net, Ipv4Net) = (subnet.parse().unwrap(), network.parse().unwrap());
            for id in candidates(subnet) {
                assert_eq!(id.subnet_in(network, subnet.prefix_len()), Some(subnet));
                assert_eq!(id.subnet_in("192.168.0.0/16".parse().unwrap(), subnet.prefix_len()), None);
            }
        }
    }
}
