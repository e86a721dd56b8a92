//! The routes of the main table, as they are found: ours, those in the place of ours, and those that are in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use ipnet::IpNet;
use netlink_packet_route::route::{RouteHeader, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use subnet::{Family, Recount};

use super::decode::{self, Blackhole, RouteFacts};
use super::objects::{Objects, Used};
use super::{Netlink, failed, or_nothing};
use crate::kernel::{KernelError, Scope};
use crate::state::host::{DefaultRoute, HostView};
use crate::state::name::Name;
use crate::state::{KernelState, Route};

/// What a look at the kernel goes by.
#[derive(Clone, Copy)]
pub(super) struct ReadContext<'a> {
    pub(super) desired: &'a KernelState,
    pub(super) scope: &'a Scope,
    /// The tunnel devices that are ours, by index.
    pub(super) own: &'a BTreeMap<u32, Name>,
}

/// The routes that matter to us, and the default routes.
struct FoundRoutes<'a> {
    /// Ours, or in the place of ours: of those to one destination the kernel uses the first one.
    routes: Recount<'a, IpNet, Route>,
    /// The others of ours.
    shadowed: BTreeSet<Route>,
    blackholes: BTreeSet<IpNet>,
    defaults: Vec<DefaultRoute>,
    /// Other programs' routes into the pod networks.
    intruders: Vec<Route>,
    /// The nexthop objects that any of these routes of ours leads through.
    used: Used,
}

impl<'a> FoundRoutes<'a> {
    fn new(desired: &'a KernelState, objects: &Objects) -> Self {
        Self {
            routes: Recount::new(&desired.routes),
            shadowed: BTreeSet::new(),
            blackholes: BTreeSet::new(),
            defaults: Vec::new(),
            intruders: Vec::new(),
            used: objects.unused(),
        }
    }

    /// Files a route of the main table. `through` is the place of its object.
    fn note(&mut self, facts: RouteFacts, through: Option<usize>, look: ReadContext<'_>) {
        let ReadContext { desired, scope, own } = look;
        let RouteFacts { route, link, blackhole } = facts;
        if route.dst.prefix_len() == 0 {
            let family = facts.family();
            self.defaults.push(DefaultRoute { family, link, metric: route.metric, gateway: route.via });
        }
        let own_device = link.is_some_and(|link| own.contains_key(&link));
        let owned = scope.owns_route(&route, own_device, link);
        let go_blackhole = blackhole == Some(Blackhole::Go) && scope.subnets.contains(&route.dst);
        let in_place = route.metric == 0 && desired.routes.contains_key(&route.dst);
        if !(go_blackhole || owned || in_place) {
            if blackhole != Some(Blackhole::Ours) && scope.intrudes(&route, own_device, link) {
                self.intruders.push(route);
            }
        } else if blackhole == Some(Blackhole::Ours) {
            self.blackholes.insert(route.dst);
        } else if route.metric == 0 && !self.routes.has(&route.dst) {
            self.used.mark(through);
            self.routes.note(route.dst, route);
        } else if owned {
            self.used.mark(through);
            self.shadowed.insert(route);
        }
    }

    fn absorb(&mut self, other: Self) {
        self.routes.absorb(other.routes);
        self.shadowed.extend(other.shadowed);
        self.blackholes.extend(other.blackholes);
        self.defaults.extend(other.defaults);
        self.intruders.extend(other.intruders);
        self.used.absorb(&other.used);
    }
}

impl Netlink {
    /// Takes in the routes of both families and nexthop objects: what is ours, and what of others matters.
    pub(super) fn read_routes(
        &mut self,
        look: ReadContext<'_>,
        host: &mut HostView,
        state: &mut KernelState,
    ) -> Result<(), KernelError> {
        let (objects, support) = self.nexthops(look.scope).map_err(failed("reading nexthop objects"))?;
        host.nexthops = support;
        let mut all = FoundRoutes::new(look.desired, &objects);
        for family in Family::BOTH {
            let found = self.routes(family, look, &objects, host);
            if let Some(found) = or_nothing(found).map_err(failed("reading routes"))? {
                all.absorb(found);
            }
        }
        let FoundRoutes { routes, shadowed, blackholes, defaults, intruders, used } = all;
        host.defaults.extend(defaults);
        host.intruders.extend(intruders);
        state.routes = routes.finish();
        state.shadowed_routes.extend(shadowed);
        state.blackholes.extend(blackholes);
        state.orphaned_nexthops.extend(objects.orphans(&used, host));
        Ok(())
    }

    /// The routes of the main table that are ours or in our place, and the default routes.
    fn routes<'a>(
        &mut self,
        family: Family,
        look: ReadContext<'a>,
        objects: &Objects,
        host: &HostView,
    ) -> io::Result<FoundRoutes<'a>> {
        let mut request = RouteMessage::default();
        request.header.address_family = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        request.header.table = RouteHeader::RT_TABLE_MAIN;
        let request = RouteNetlinkMessage::GetRoute(request);
        let name_of = |index: u32| host.links.get(&index).map(|link| link.name);
        let start = || FoundRoutes::new(look.desired, objects);
        self.socket.dump_raw(&request.into(), start, |found, message| {
            if message.kind == decode::RTM_NEWROUTE
                && let Some(mut facts) = decode::route(message.payload, name_of)
                // A kernel without a family answers with what it has of the others.
                && facts.family() == family
            {
                let through = facts.lead_through(objects, &found.used, name_of);
                found.note(facts, through, look);
            }
        })
    }
}
