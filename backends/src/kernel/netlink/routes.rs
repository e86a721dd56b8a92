//! The routes of the main table, as they are found: ours, those in the place of ours, and those that are in the way.

use std::collections::BTreeMap;
use std::io;

use netlink_packet_route::route::{RouteHeader, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use subnet::Family;

use super::decode::{self, Blackhole, RouteFacts};
use super::nexthop::Target;
use super::objects::note_orphans;
use super::{Netlink, failed, or_nothing};
use crate::kernel::{KernelError, Scope};
use crate::state::host::{DefaultRoute, HostView};
use crate::state::name::Name;
use crate::state::nexthop::NexthopId;
use crate::state::{KernelState, Route};

/// What a look at the kernel goes by.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    pub(super) desired: &'a KernelState,
    pub(super) scope: &'a Scope,
    /// The tunnel devices that are ours, by index.
    pub(super) own: &'a BTreeMap<u32, Name>,
}

/// The routes that matter to us, and the default routes.
#[derive(Default)]
struct Found {
    /// Ours, or in the place of ours.
    routes: Vec<RouteFacts>,
    defaults: Vec<DefaultRoute>,
    /// Other programs' routes into the pod networks.
    intruders: Vec<Route>,
}

impl Netlink {
    /// Takes in the routes of both families and nexthop objects: what is ours, and what of others matters.
    pub(super) fn read_routes(
        &mut self,
        look: Look<'_>,
        host: &mut HostView,
        state: &mut KernelState,
    ) -> Result<(), KernelError> {
        let (objects, support) = self.nexthops(look.scope).map_err(failed("reading nexthop objects"))?;
        host.nexthops = support;
        for family in Family::BOTH {
            let found = self.routes(family, look, &objects, host).map_err(failed("reading routes"))?;
            host.defaults.extend(found.defaults);
            host.intruders.extend(found.intruders);
            sort_routes(state, found.routes, look.scope, look.own);
        }
        note_orphans(state, objects, host);
        Ok(())
    }

    /// The routes of the main table that are ours or in our place, and the default routes.
    fn routes(
        &mut self,
        family: Family,
        look: Look<'_>,
        objects: &BTreeMap<NexthopId, Target>,
        host: &HostView,
    ) -> io::Result<Found> {
        let Look { desired, scope, own } = look;
        let mut request = RouteMessage::default();
        request.header.address_family = match family {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        request.header.table = RouteHeader::RT_TABLE_MAIN;
        let request = RouteNetlinkMessage::GetRoute(request);
        let name_of = |index: u32| host.links.get(&index).map(|link| link.name);
        let found = self.socket.dump(&request, Found::default, |found, message| {
            let RouteNetlinkMessage::NewRoute(message) = message else { return };
            // A kernel without a family answers with what it has of the others.
            let Some(mut facts) = decode::route(&message, name_of).filter(|facts| facts.family() == family)
            else {
                return;
            };
            facts.lead_through(objects, name_of);
            let (route, link) = (&facts.route, facts.link);
            if route.dst.prefix_len() == 0 {
                found.defaults.push(DefaultRoute { family, link, metric: route.metric, gateway: route.via });
            }
            let own_device = link.is_some_and(|link| own.contains_key(&link));
            let go_blackhole = facts.blackhole == Some(Blackhole::Go) && scope.subnets.contains(&route.dst);
            if go_blackhole
                || scope.owns_route(route, own_device, link)
                || (route.metric == 0 && desired.routes.contains_key(&route.dst))
            {
                found.routes.push(facts);
            } else if facts.blackhole != Some(Blackhole::Ours) && scope.intrudes(route, own_device, link) {
                found.intruders.push(facts.route);
            }
        });
        or_nothing(found)
    }
}

/// Files routes: of those to one destination the kernel uses the first one.
fn sort_routes(state: &mut KernelState, routes: Vec<RouteFacts>, scope: &Scope, own: &BTreeMap<u32, Name>) {
    for RouteFacts { route, link, blackhole } in routes {
        if blackhole == Some(Blackhole::Ours) {
            state.blackholes.insert(route.dst);
            continue;
        }
        let own_device = link.is_some_and(|link| own.contains_key(&link));
        let first = route.metric == 0 && !state.routes.contains_key(&route.dst);
        if first {
            state.routes.insert(route.dst, route);
        } else if scope.owns_route(&route, own_device, link) {
            state.shadowed_routes.insert(route);
        }
    }
}
