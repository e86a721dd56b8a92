//! Which routes lead through nexthop objects.
//!
//! The kernel keeps routes of one device, protocol and metric in one hash chain, which each new one walks: the hash leaves the
//! gateway out (net/ipv4/fib_semantics.c, `fib_create_info`). Routes that name an object are hashed by its id.
//! docs/adr/027-nexthop-objects.md has the figures.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv4Net};

use super::KernelState;
use super::name::Name;
use super::nexthop::{NexthopId, NexthopSupport, candidates, subnet_number};
use super::route::Route;

/// From so many routes over one tunnel device on, they lead through nexthop objects. Below, objects cost more than they save.
const MIN_ROUTES_TUNNEL: usize = 1000;
/// The same for devices that lose their carrier: the kernel removes nexthop objects and their routes with the carrier, and
/// leaves plain routes.
const MIN_ROUTES_UNDERLAY: usize = 4000;
/// Objects in use stay in use until there are so many fourths of these numbers.
const KEEP_FOURTHS: usize = 3;

/// How the routes of a plan lead through nexthop objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NexthopUse {
    /// How many routes over each device may lead through objects.
    counts: BTreeMap<Name, usize>,
    /// The devices over which they do.
    on: BTreeSet<Name>,
    /// What all IPv4 destinations have in common, if that tells that no two have one number.
    shape: Option<Shape>,
}

/// Length of a subnet, and the bits of its number that ids don't have: subnets of one shape have different ids.
type Shape = (u8, u32);

impl KernelState {
    /// Has the IPv4 routes to peers lead through nexthop objects where there are many over one device. `before` is what was
    /// planned before.
    pub fn use_nexthops(&mut self, support: &NexthopSupport, before: &Self) -> NexthopUse {
        let NexthopSupport::Usable { taken } = support else { return NexthopUse::default() };
        let mut counts: BTreeMap<Name, usize> = BTreeMap::new();
        for dev in self.routes.values().filter(|route| may_use(route)).filter_map(|route| route.dev) {
            *counts.entry(dev).or_default() += 1;
        }
        let on: BTreeSet<Name> = counts
            .iter()
            .filter(|(dev, count)| self.many(**dev, **count, before))
            .map(|(dev, _)| *dev)
            .collect();
        if !on.is_empty() {
            self.set_nexthops(taken, |dev| on.contains(&dev));
        }
        let mut shapes = self.routes.keys().filter_map(v4).map(shape);
        let first = shapes.next();
        NexthopUse { counts, on, shape: first.filter(|first| shapes.all(|other| other == *first)) }
    }

    /// As [`use_nexthops`](Self::use_nexthops), for a plan that was made of `before` by single routes, which lead through no
    /// objects yet. `None` if more than those routes are concerned.
    pub fn use_nexthops_since(
        &mut self,
        support: &NexthopSupport,
        before: &Self,
        known: &NexthopUse,
    ) -> Option<NexthopUse> {
        let NexthopSupport::Usable { taken } = support else { return Some(NexthopUse::default()) };
        let mut now = known.clone();
        let mut new = Vec::new();
        for (dst, was, is) in self.routes.changes(&before.routes) {
            if let Some(dev) = was.filter(|route| may_use(route)).and_then(|route| route.dev) {
                *now.counts.get_mut(&dev)? -= 1;
            }
            if let Some(route) = is {
                if let Some(dev) = route.dev.filter(|_| may_use(route)) {
                    *now.counts.entry(dev).or_default() += 1;
                }
                new.extend(v4(dst).zip(route.dev.filter(|_| may_use(route))));
                if v4(dst).map(shape).is_some_and(|shape| now.shape != Some(shape)) {
                    now.shape = None;
                }
            }
        }
        now.counts.retain(|_, count| *count > 0);
        let as_before =
            |(dev, count): (&Name, &usize)| self.many(*dev, *count, before) == now.on.contains(dev);
        let plain = now.on.is_empty() || now.shape.is_some();
        if !plain
            || !now.counts.iter().all(as_before)
            || now.on.iter().any(|dev| !now.counts.contains_key(dev))
        {
            return None;
        }
        for (dst, dev) in new {
            if now.on.contains(&dev)
                && let Some(route) = self.routes.get_mut(&dst.into())
            {
                route.nexthop = candidates(dst).find(|id| !taken.contains(id));
            }
        }
        Some(now)
    }

    /// Whether so many routes over a device lead through objects, given what was planned before.
    fn many(&self, dev: Name, count: usize, before: &Self) -> bool {
        let min = if self.links.contains_key(&dev) { MIN_ROUTES_TUNNEL } else { MIN_ROUTES_UNDERLAY };
        let in_use = |route: &Route| route.dev == Some(dev) && route.nexthop.is_some();
        count >= min || count >= min / 4 * KEEP_FOURTHS && before.routes.values().any(in_use)
    }

    /// The same, from the first route on; for tests with few peers.
    #[cfg(any(test, feature = "testing"))]
    pub fn use_nexthops_always(&mut self, support: &NexthopSupport) {
        if let NexthopSupport::Usable { taken } = support {
            self.set_nexthops(taken, |_| true);
        }
    }

    fn set_nexthops(&mut self, taken: &BTreeSet<NexthopId>, used_on: impl Fn(Name) -> bool) {
        let mut numbers: Vec<u32> = self.routes.keys().filter_map(v4).map(subnet_number).collect();
        numbers.sort_unstable();
        // Subnets have different numbers, unless there are some of several lengths: those with one that others have are plain.
        let shared: BTreeSet<u32> =
            numbers.windows(2).filter(|two| two[0] == two[1]).map(|two| two[0]).collect();
        for (dst, route) in self.routes.iter_mut() {
            if let IpNet::V4(dst) = dst
                && may_use(route)
                && route.dev.is_some_and(&used_on)
                && !shared.contains(&subnet_number(*dst))
            {
                route.nexthop = candidates(*dst).find(|id| !taken.contains(id));
            }
        }
    }
}

fn shape(dst: Ipv4Net) -> Shape {
    let len = dst.prefix_len();
    let number = u32::from(dst.network()).checked_shr(32 - u32::from(len)).unwrap_or_default();
    (len, number & !0x00ff_ffff)
}

fn v4(net: &IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
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

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]

        #[test]
        fn routes_that_come_and_go_use_objects_as_if_all_were_decided_again(
            first in 0u32..4,
            steps in proptest::collection::vec((0u32..1200, 0u32..1200, proptest::bool::ANY, 0u8..20), 1..8),
        ) {
            let support = NexthopSupport::Usable { taken: [id(0x460a_0005), id(0x470a_0005), id(0x460a_0300)].into() };
            let mut before = state(400 * first, "flannel.1");
            let mut known = before.use_nexthops(&support, &KernelState::default());
            for (from, to, come, odd) in steps {
                let mut next = before.clone();
                let mut plain = before.clone();
                plain.routes.values_mut().for_each(|route| route.nexthop = None);
                let all = state(1200, "flannel.1");
                for (dst, route) in all.routes.iter().skip(from as usize).take((to % 300) as usize) {
                    for state in [&mut next, &mut plain] {
                        if come && !before.routes.contains_key(dst) {
                            state.routes.insert(*dst, *route);
                        } else if !come {
                            state.routes.remove(dst);
                        }
                    }
                }
                if odd == 0 {
                    let dst: IpNet = "10.200.0.0/25".parse().unwrap();
                    let route = Route { dst, ..*all.routes.values().next().unwrap() };
                    next.routes.insert(dst, route);
                    plain.routes.insert(dst, route);
                }
                let usage = plain.use_nexthops(&support, &before);
                if let Some(found) = next.use_nexthops_since(&support, &before, &known) {
                    proptest::prop_assert_eq!(&next, &plain);
                    proptest::prop_assert_eq!((&found.counts, &found.on), (&usage.counts, &usage.on));
                    let known = found.shape.is_some() && !next.routes.is_empty();
                    proptest::prop_assert!(!known || found.shape == usage.shape);
                }
                (before, known) = (plain, usage);
            }
        }
    }

    #[test]
    fn one_route_more_is_decided_without_the_others() {
        let support = NexthopSupport::default();
        let mut before = state(1500, "flannel.1");
        let known = before.use_nexthops(&support, &KernelState::default());
        let mut next = before.clone();
        let route = *state(1501, "flannel.1").routes.values().next_back().unwrap();
        next.routes.insert(route.dst, route);
        assert!(next.use_nexthops_since(&support, &before, &known).is_some());
        assert_eq!(used(&next), 1501);
        // Of another length, it may have the number of another subnet.
        let dst: IpNet = "10.200.0.0/25".parse().unwrap();
        next.routes.insert(dst, Route { dst, nexthop: None, ..route });
        assert!(next.use_nexthops_since(&support, &before, &known).is_none());
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
        assert_eq!(used(&planned), 0);
    }
}
