//! Routes of the main table.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::name::Name;
use super::nexthop::NexthopId;

/// Protocol number (`rtm_protocol`) that marks our routes. Not assigned in
/// include/uapi/linux/rtnetlink.h, and not in iproute2's `rt_protos`.
pub(crate) const ROUTE_PROTOCOL: u8 = 70;

/// Protocol number of routes that the kernel makes for addresses (`RTPROT_KERNEL`).
pub(crate) const PROTOCOL_KERNEL: u8 = 2;

/// Protocol number that Go flannel's routes carry, like those of boot scripts (`RTPROT_BOOT`).
pub(crate) const PROTOCOL_BOOT: u8 = 3;

/// Metric of our blackhole routes: the worst there is, so that any other route to the same subnet, a
/// bridge's above all, wins.
pub(crate) const BLACKHOLE_METRIC: u32 = u32::MAX;

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Device; `None` for several next hops, or a type that has none.
    pub dev: Option<Name>,
    /// Next hop is taken to be on the device's link (`RTNH_F_ONLINK`).
    pub onlink: bool,
    /// The object that holds next hop, device and flag. Ours are for one destination each; with any other the route is foreign.
    pub nexthop: Option<NexthopId>,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Metric (`RTA_PRIORITY`).
    pub metric: u32,
    /// It has a type, a scope or attributes that we never set, so it is not the same as one of ours.
    pub foreign: bool,
}

impl Route {
    /// A route of ours to `dst`, without next hop and device yet.
    pub fn ours(dst: IpNet) -> Self {
        Self {
            dst,
            via: None,
            dev: None,
            onlink: false,
            nexthop: None,
            protocol: ROUTE_PROTOCOL,
            metric: 0,
            foreign: false,
        }
    }
}

impl fmt::Display for Route {
    /// As `ip route` would take it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dst)?;
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if let Some(dev) = self.dev {
            write!(f, " dev {dev}")?;
        }
        if self.onlink {
            f.write_str(" onlink")?;
        }
        if let Some(id) = self.nexthop {
            write!(f, " nhid {id}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        match self.protocol {
            PROTOCOL_BOOT => f.write_str(" proto boot"),
            PROTOCOL_KERNEL => f.write_str(" proto kernel"),
            number => write!(f, " proto {number}"),
        }
    }
}
