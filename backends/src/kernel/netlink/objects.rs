//! Nexthop objects as they are found: ours, and those that have ids of our range.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::nexthop::{self, Target, Told};
use super::{Netlink, decode::RouteFacts};
use crate::kernel::Scope;
use crate::state::KernelState;
use crate::state::host::HostView;
use crate::state::name::Name;
use crate::state::nexthop::{NexthopId, NexthopSupport};

impl Netlink {
    /// The objects of ours, and which ids of our range others have. A kernel that refuses the question has no objects.
    pub(super) fn nexthops(
        &mut self,
        scope: &Scope,
    ) -> io::Result<(BTreeMap<NexthopId, Target>, NexthopSupport)> {
        let found = self.socket.dump_raw(&nexthop::all().into(), Default::default, |found, message| {
            let (ours, taken): &mut (BTreeMap<NexthopId, Target>, BTreeSet<NexthopId>) = found;
            match nexthop::told(message) {
                Some(Told::There(facts)) if !facts.marked => drop(taken.insert(facts.id)),
                Some(Told::There(facts)) if scope.owns_nexthop(facts.id) => {
                    ours.insert(facts.id, facts.hop);
                }
                _ => {}
            }
        });
        match found {
            Ok((ours, _)) if self.nexthops_refused => Ok((ours, NexthopSupport::Refused)),
            Ok((ours, taken)) => Ok((ours, NexthopSupport::Usable { taken })),
            Err(error) if nexthop::are_refused(&error) => Ok((BTreeMap::new(), NexthopSupport::Refused)),
            Err(error) => Err(error),
        }
    }
}

impl RouteFacts {
    /// Takes next hop and device from the route's object. One that is not ours makes the route another program's.
    pub(super) fn lead_through(
        &mut self,
        objects: &BTreeMap<NexthopId, Target>,
        name_of: impl Fn(u32) -> Option<Name>,
    ) {
        let Some(id) = self.route.nexthop else { return };
        match objects.get(&id) {
            Some(hop) => {
                (self.route.via, self.route.onlink, self.link) = (hop.via, hop.onlink, hop.link);
                self.route.dev = hop.link.and_then(name_of);
                self.route.foreign |= hop.foreign;
            }
            None => self.route.foreign = true,
        }
    }
}

/// Files the objects that no route leads through.
pub(super) fn note_orphans(
    state: &mut KernelState,
    mut objects: BTreeMap<NexthopId, Target>,
    host: &HostView,
) {
    for route in state.routes.values().chain(&state.shadowed_routes) {
        if let Some(id) = route.nexthop {
            objects.remove(&id);
        }
    }
    let dev = |hop: Target| Some(host.links.get(&hop.link?)?.name);
    state.orphaned_nexthops.extend(objects.into_iter().map(|(id, hop)| (id, dev(hop))));
}
