//! Kernel state as a value: what there should be, what there is, and the changes in between.

mod change;
pub mod diff;
pub mod forwarding;
mod hops;
pub mod host;
mod link;
pub mod name;
pub mod nexthop;
mod route;
pub(crate) mod tunnel;
pub mod wireguard;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::{Mac, SharedMap};

use forwarding::Forwarding;
use name::Name;
use nexthop::NexthopId;
use wireguard::WireguardDevice;

pub use change::KernelChange;
pub use hops::NexthopUse;
pub(crate) use link::{IPIP_DEVICE, LinkPatch, SPARE_PREFIXES};
pub use link::{IpipIdentity, Link, LinkIdentity, LinkSettings, VxlanIdentity, is_tunnel, is_tunnel_name};
pub use route::Route;
pub(crate) use route::{BLACKHOLE_METRIC, PROTOCOL_BOOT, PROTOCOL_KERNEL, ROUTE_PROTOCOL};

/// Everything that this agent makes in the kernel. Maps and sets in one order, so that two states compare
/// and print alike. What there is for each peer is shared by the plans that have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelState {
    /// Tunnel devices.
    pub links: BTreeMap<Name, Link>,
    /// What the datapaths of TUN devices do.
    pub forwarding: BTreeMap<Name, Arc<Forwarding>>,
    /// What WireGuard devices of the kernel do.
    pub wireguard: BTreeMap<Name, Arc<WireguardDevice>>,
    /// Addresses on these devices.
    pub addresses: BTreeSet<(Name, IpNet)>,
    /// Forwarding database: which node a destination MAC is behind.
    pub fdb: SharedMap<(Name, Mac), IpAddr>,
    /// Permanent neighbours: the MAC of each next hop on a tunnel device.
    pub neighbours: SharedMap<(Name, IpAddr), Mac>,
    /// Routes of the main table with metric 0 and TOS 0, by destination; where several have the same
    /// destination, the one that the kernel uses.
    pub routes: SharedMap<IpNet, Route>,
    /// Further routes of ours to one of these destinations, which the kernel doesn't use, and ours with a
    /// metric. Never wanted.
    pub shadowed_routes: BTreeSet<Route>,
    /// Nexthop objects of ours that none of these routes leads through, with their devices. Never wanted.
    pub orphaned_nexthops: BTreeMap<NexthopId, Option<Name>>,
    /// Destinations that end here unless a better route exists (`BLACKHOLE_METRIC`).
    pub blackholes: BTreeSet<IpNet>,
}

impl KernelState {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes in what `other` has besides; where both have something, `self` stays as it is.
    pub(crate) fn join(&mut self, other: Self) {
        fn add<K: Ord, V>(to: &mut BTreeMap<K, V>, from: BTreeMap<K, V>) {
            if to.is_empty() {
                *to = from;
                return;
            }
            for (key, value) in from {
                to.entry(key).or_insert(value);
            }
        }
        fn share<K: Ord + Clone, V: Clone>(to: &mut SharedMap<K, V>, from: SharedMap<K, V>) {
            if to.is_empty() {
                *to = from;
                return;
            }
            for (key, value) in &from {
                if !to.contains_key(key) {
                    to.insert(key.clone(), value.clone());
                }
            }
        }
        add(&mut self.links, other.links);
        add(&mut self.forwarding, other.forwarding);
        add(&mut self.wireguard, other.wireguard);
        share(&mut self.fdb, other.fdb);
        share(&mut self.neighbours, other.neighbours);
        share(&mut self.routes, other.routes);
        add(&mut self.orphaned_nexthops, other.orphaned_nexthops);
        self.addresses.extend(other.addresses);
        self.shadowed_routes.extend(other.shadowed_routes);
        self.blackholes.extend(other.blackholes);
    }
}
