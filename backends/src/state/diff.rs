//! From desired and actual kernel state to an ordered list of changes; pure.
//!
//! The order keeps packets flowing: what is new goes in before what is stale goes out, the things that a
//! route needs before the route, a replacement in place where the kernel has one. A device that must be
//! recreated takes everything on it along, so what is on it counts as absent.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::SharedMap;
use subnet::shared_map::Pair;

use crate::state::name::Name;
use crate::state::nexthop::NexthopId;
use crate::state::{KernelChange, KernelState, Link, LinkIdentity, PROTOCOL_KERNEL, Route};

/// The changes that turn `actual` into `desired`, in the order in which they are to be made.
pub fn diff(desired: &KernelState, actual: &KernelState) -> Vec<KernelChange> {
    let mut changes = renames(desired, actual);
    let renamed = (!changes.is_empty()).then(|| {
        let mut actual = actual.clone();
        changes.iter().for_each(|change| actual.apply(change));
        actual
    });
    let actual = renamed.as_ref().unwrap_or(actual);

    let rebuilt = links(desired, actual, &mut changes);
    let moved = moved_ipv6(&changes);
    let devices = Devices { desired, actual, rebuilt, moved };
    additions(&devices, &mut changes);
    removals(&devices, &mut changes);
    changes
}

/// What becomes of devices, and with them of what is on them.
struct Devices<'a> {
    desired: &'a KernelState,
    actual: &'a KernelState,
    /// Those that are recreated.
    rebuilt: BTreeSet<Name>,
    /// VXLAN devices that send from another IPv6 address from now on.
    moved: BTreeSet<Name>,
}

impl Devices<'_> {
    /// Whether what is on a device that has this name now is still there after [`links`].
    fn there(&self, name: &Name) -> bool {
        !self.rebuilt.contains(name)
    }

    /// What there is and should be in two maps of entries on devices: all of them if devices are recreated or have moved, and else
    /// those that differ.
    fn entries<'a, K: Ord, V: PartialEq>(
        &self,
        desired: &'a SharedMap<K, V>,
        actual: &'a SharedMap<K, V>,
    ) -> Box<dyn Iterator<Item = Pair<'a, K, V>> + 'a> {
        if self.rebuilt.is_empty() && self.moved.is_empty() {
            Box::new(desired.changes(actual))
        } else {
            Box::new(desired.side_by_side(actual))
        }
    }

    fn is_stale(&self, name: &Name) -> bool {
        self.actual.links.contains_key(name) && !self.desired.links.contains_key(name)
    }

    /// What is on a device that goes away needs no change of its own.
    fn stays(&self, name: &Name) -> bool {
        self.there(name) && !self.is_stale(name)
    }
}

/// Devices that are made or corrected; gives those that are recreated.
fn links(desired: &KernelState, actual: &KernelState, changes: &mut Vec<KernelChange>) -> BTreeSet<Name> {
    let mut rebuilt: BTreeSet<Name> = BTreeSet::new();
    for (name, want) in &desired.links {
        match actual.links.get(name) {
            None => changes.push(KernelChange::AddLink(*name, want.clone())),
            Some(have) if want.identity.takes_over(&have.identity) => {
                rebuilt.insert(*name);
                changes.push(KernelChange::AddLink(*name, want.clone()));
            }
            Some(have) if !want.identity.accepts(&have.identity) => {
                rebuilt.insert(*name);
                changes.extend(routes_through_objects(actual, name).map(KernelChange::DelRoute));
                changes.push(KernelChange::DelLink(*name));
                changes.push(KernelChange::AddLink(*name, want.clone()));
            }
            Some(have) => {
                let patch = have.settings.patch_to(&want.settings);
                if !patch.is_empty() {
                    changes.push(KernelChange::SetLink(*name, patch));
                }
            }
        }
    }
    rebuilt
}

/// Routes that have to go before their device does: for each nexthop object of a device that goes, the kernel searches its
/// tables for routes (net/ipv4/nexthop.c, `__remove_nexthop_fib`), which takes 6 s for 20,000.
fn routes_through_objects(actual: &KernelState, name: &Name) -> impl Iterator<Item = Route> {
    let all = actual.routes.values().chain(&actual.shadowed_routes);
    all.filter(move |route| route.nexthop.is_some() && route.dev == Some(*name)).copied()
}

/// The devices of which an IPv6 `local` is changed. Each of their forwarding entries remembers, for each CPU, a route with the
/// address that it sent from (`dst_cache` in drivers/net/vxlan/vxlan_core.c). For IPv4 the kernel forgets these routes when
/// an address goes. For IPv6 it does not, and peers drop what comes from the old address; so the entries are made again.
fn moved_ipv6(changes: &[KernelChange]) -> BTreeSet<Name> {
    let moved = |change: &KernelChange| match change {
        KernelChange::SetLink(name, patch) if patch.local.is_some_and(|local| local.is_ipv6()) => Some(*name),
        _ => None,
    };
    changes.iter().filter_map(moved).collect()
}

/// What is new, and what is stale and has to go before something new.
fn additions(devices: &Devices<'_>, changes: &mut Vec<KernelChange>) {
    let Devices { desired, actual, .. } = *devices;
    for (name, net) in &desired.addresses {
        if !(devices.there(name) && actual.addresses.contains(&(*name, *net))) {
            changes.push(KernelChange::AddAddress(*name, *net));
        }
    }
    // Only after the new one is there: a device without any address loses its routes.
    for (name, net) in actual.addresses.difference(&desired.addresses) {
        if devices.stays(name) {
            changes.push(KernelChange::DelAddress(*name, *net));
        }
    }
    for (name, forwarding) in &desired.forwarding {
        if !(devices.there(name) && actual.forwarding.get(name) == Some(forwarding)) {
            changes.push(KernelChange::SetForwarding(*name, Arc::clone(forwarding)));
        }
    }
    for (name, want) in &desired.wireguard {
        let have = actual.wireguard.get(name).filter(|_| devices.there(name));
        if let Some(identity) = &want.identity
            && have.is_none_or(|have| (have.port, &have.identity) != (want.port, &want.identity))
        {
            changes.push(KernelChange::SetWireguard(*name, want.port, Arc::clone(identity)));
        }
        let peers = want.peers_from(have.map(|have| &**have));
        if !peers.is_empty() {
            changes.push(KernelChange::SetWireguardPeers(*name, Arc::new(peers)));
        }
    }
    for ((name, mac), have, want) in devices.entries(&desired.fdb, &actual.fdb) {
        let Some(dst) = want else { continue };
        let present = devices.there(name) && have == Some(dst);
        if present && devices.moved.contains(name) {
            changes.push(KernelChange::DelFdb(*name, *mac));
        }
        if !present || devices.moved.contains(name) {
            changes.push(KernelChange::SetFdb(*name, *mac, *dst));
        }
    }
    for ((name, ip), have, want) in devices.entries(&desired.neighbours, &actual.neighbours) {
        if let Some(mac) = want
            && !(devices.there(name) && have == Some(mac))
        {
            changes.push(KernelChange::SetNeighbour(*name, *ip, *mac));
        }
    }
    routes(devices, changes);
}

/// Routes that are new, after those of ours that only stand in their place.
fn routes(devices: &Devices<'_>, changes: &mut Vec<KernelChange>) {
    let Devices { desired, actual, .. } = *devices;
    for route in &actual.shadowed_routes {
        if route.dev.is_none_or(|dev| devices.stays(&dev)) {
            changes.push(KernelChange::DelRoute(*route));
        }
    }
    for (dst, have, want) in devices.entries(&desired.routes, &actual.routes) {
        let have = have.filter(|route| route.dev.is_none_or(|dev| devices.there(&dev)));
        if let Some(want) = want
            && have != Some(want)
            && !is_connected(desired, actual, dst)
        {
            changes.push(KernelChange::SetRoute(*want));
        }
    }
}

/// What is stale.
fn removals(devices: &Devices<'_>, changes: &mut Vec<KernelChange>) {
    let Devices { desired, actual, .. } = *devices;
    let (wanted, found) = (&desired.blackholes, &actual.blackholes);
    changes.extend(wanted.difference(found).map(|dst| KernelChange::AddBlackhole(*dst)));
    changes.extend(found.difference(wanted).map(|dst| KernelChange::DelBlackhole(*dst)));
    for (_, have, want) in devices.entries(&desired.routes, &actual.routes) {
        let Some(route) = have.filter(|_| want.is_none()) else { continue };
        let gone_before = route.dev.is_some_and(|dev| !devices.there(&dev));
        let goes_with_device = route.nexthop.is_none() && route.dev.is_some_and(|dev| devices.is_stale(&dev));
        if !gone_before && !goes_with_device && route.protocol != PROTOCOL_KERNEL {
            changes.push(KernelChange::DelRoute(*route));
        }
    }
    nexthops(devices, changes);
    for name in actual.forwarding.keys() {
        if devices.stays(name) && !desired.forwarding.contains_key(name) {
            changes.push(KernelChange::DelForwarding(*name));
        }
    }
    for ((name, ip), _, want) in devices.entries(&desired.neighbours, &actual.neighbours) {
        if want.is_none() && devices.stays(name) {
            changes.push(KernelChange::DelNeighbour(*name, *ip));
        }
    }
    for ((name, mac), _, want) in devices.entries(&desired.fdb, &actual.fdb) {
        if want.is_none() && devices.stays(name) {
            changes.push(KernelChange::DelFdb(*name, *mac));
        }
    }
    changes.extend(
        actual.links.keys().filter(|name| devices.is_stale(name)).map(|name| KernelChange::DelLink(*name)),
    );
}

/// Nexthop objects that nothing leads through any more, after the routes: with an object the kernel removes its routes.
fn nexthops(devices: &Devices<'_>, changes: &mut Vec<KernelChange>) {
    let Devices { desired, actual, .. } = *devices;
    let left = |(route, want): (&Route, Option<&Route>)| {
        let want = want.and_then(|want| want.nexthop);
        // The object of a foreign route may be another program's. If it is ours, the next look finds it unused.
        let id = route.nexthop.filter(|id| Some(*id) != want && !route.foreign)?;
        Some((id, route.dev))
    };
    let first = devices.entries(&desired.routes, &actual.routes);
    let first = first.filter_map(|(_, have, want)| Some((have?, want)));
    let shadowed = actual.shadowed_routes.iter().map(|route| (route, desired.routes.get(&route.dst)));
    let of_routes = first.chain(shadowed).filter_map(left);
    let orphans = actual.orphaned_nexthops.iter().map(|(id, dev)| (*id, *dev));
    let mut stale: BTreeSet<NexthopId> = of_routes
        .chain(orphans)
        .filter(|(_, dev)| dev.is_none_or(|dev| devices.stays(&dev)))
        .map(|(id, _)| id)
        .collect();
    if !stale.is_empty() {
        for want in desired.routes.values() {
            if let Some(id) = want.nexthop.filter(|id| stale.contains(id))
                && !is_connected(desired, actual, &want.dst)
            {
                stale.remove(&id);
            }
        }
        changes.extend(stale.into_iter().map(KernelChange::DelNexthop));
    }
}

/// Devices that get another name: because their name belongs to another device, or because they are the
/// desired device of that name. A renamed device keeps its packets.
fn renames(desired: &KernelState, actual: &KernelState) -> Vec<KernelChange> {
    let mut all = renames_at_once(desired, actual);
    if !all.is_empty() {
        // A name that became free may be another one's.
        let mut renamed = actual.clone();
        all.iter().for_each(|change| renamed.apply(change));
        all.append(&mut renames_at_once(desired, &renamed));
    }
    all
}

fn renames_at_once(desired: &KernelState, actual: &KernelState) -> Vec<KernelChange> {
    let missing = desired.links.iter().filter(|(name, _)| !actual.links.contains_key(name));
    let rename = |(to, want): (&Name, &Link)| {
        let unwelcome = |name: &Name, have: &Link| {
            desired.links.get(name).is_none_or(|other| {
                !other.identity.accepts(&have.identity) && !other.identity.takes_over(&have.identity)
            })
        };
        let vxlan = matches!(want.identity, LinkIdentity::Vxlan(_));
        let (from, _) = actual
            .links
            .iter()
            .find(|(name, have)| vxlan && want.identity.accepts(&have.identity) && unwelcome(name, have))?;
        Some((*from, *to))
    };
    let mut done = BTreeSet::new();
    let pairs = missing.filter_map(rename).filter(|(from, _)| done.insert(*from));
    pairs.map(|(from, to)| KernelChange::RenameLink(from, to)).collect()
}

/// Whether the host itself has an address in `dst`: replacing the kernel's own route would cut off what
/// is attached there (often a bridge left from an earlier lease), so it is reported instead. A device of
/// ours that goes away takes its route along and doesn't count.
fn is_connected(desired: &KernelState, actual: &KernelState, dst: &IpNet) -> bool {
    let Some(route) = actual.routes.get(dst).filter(|route| route.protocol == PROTOCOL_KERNEL) else {
        return false;
    };
    let ours = route.dev.and_then(|dev| Some((dev, actual.links.get(&dev)?)));
    ours.is_none_or(|(dev, have)| {
        desired.links.get(&dev).is_some_and(|want| want.identity.accepts(&have.identity))
    })
}

/// The wanted routes that can't be set because the host has an address in their destination, in words.
pub(crate) fn conflicts(desired: &KernelState, actual: &KernelState) -> Vec<String> {
    // A route of the kernel's own is not as desired.
    let other = desired.routes.changes(&actual.routes).filter(|(_, _, want)| want.is_some());
    let taken = other.map(|(dst, ..)| dst).filter(|dst| is_connected(desired, actual, dst));
    taken
        .map(|dst| {
            let dev = actual.routes[dst].dev.map_or_else(|| "a device".to_owned(), |dev| dev.to_string());
            format!(
                "{dst} belongs to another node, but {dev} of this host has an address in it: \
                 remove that address (ip address flush dev {dev}), or delete {dev} if it is a bridge left over \
                 from an earlier subnet"
            )
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests;
