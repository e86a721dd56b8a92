//! Routes, from the bytes of a message (`struct rtmsg`, include/uapi/linux/rtnetlink.h).

use ipnet::IpNet;
use subnet::Family;

use super::{address_in, number};
use crate::netlink::wire::{attributes, native_u32};
use crate::state::name::Name;
use crate::state::nexthop::NexthopId;
use crate::state::{BLACKHOLE_METRIC, PROTOCOL_BOOT, ROUTE_PROTOCOL, Route};

const HEADER: usize = 12;

const RT_TABLE_MAIN: u32 = 254;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const RTN_BLACKHOLE: u8 = 6;
const RTNH_F_ONLINK: u32 = 4;
const RTM_F_CLONED: u32 = 0x200;
/// The metric of IPv6 routes without one (`IP6_RT_PRIO_USER`, include/net/ip6_fib.h).
const NO_METRIC_V6: u32 = 1024;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_PREF: u16 = 20;
const RTA_UID: u16 = 25;
const RTA_NH_ID: u16 = 30;

/// A route of the main table with the index of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct RouteFacts {
    pub(in super::super) route: Route,
    pub(in super::super) link: Option<u32>,
    /// It is a blackhole of a flanneld.
    pub(in super::super) blackhole: Option<Blackhole>,
}

impl RouteFacts {
    pub(in super::super) fn family(&self) -> Family {
        Family::of(self.route.dst.addr())
    }
}

/// Who made a blackhole route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Blackhole {
    /// We: it has our protocol number and the worst metric.
    Ours,
    /// Perhaps a Go flannel (`--ip-blackhole-route`): it has the number of boot scripts and no metric.
    Go,
}

/// A route; `None` for other tables, other types of service, cached clones, and what is malformed. `name_of` gives the name
/// of a link's index, where it is known.
pub(in super::super) fn route(payload: &[u8], name_of: impl Fn(u32) -> Option<Name>) -> Option<RouteFacts> {
    let header: &[u8; HEADER] = payload.first_chunk()?;
    let [family, prefix_len, _, tos, table, protocol, scope, kind, ..] = *header;
    let flags = native_u32(header, 8)?;
    let family = match i32::from(family) {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        _ => return None,
    };
    if tos != 0 || flags & RTM_F_CLONED != 0 {
        return None;
    }
    let (mut dst, mut via, mut link, mut nexthop) = (subnet::net::addr_of(family, 0), None, None, None);
    let (mut metric, mut table) = (0, u32::from(table));
    let mut foreign = kind != RTN_UNICAST;
    for (kind, value) in attributes(&payload[HEADER..]) {
        match kind {
            RTA_DST => dst = address_in(family, value)?,
            RTA_GATEWAY => via = Some(address_in(family, value)?),
            RTA_OIF => link = Some(number(value)?),
            RTA_PRIORITY => metric = number(value)?,
            RTA_TABLE => table = number(value)?,
            RTA_NH_ID => nexthop = NexthopId::new(number(value)?),
            // Answers of the kernel, not properties of the route.
            RTA_CACHEINFO | RTA_PREF | RTA_UID => {}
            _ => foreign = true,
        }
    }
    if table != RT_TABLE_MAIN {
        return None;
    }
    match family {
        Family::V4 => {
            // Where a route leads that shows only its object (`net.ipv4.nexthop_compat_mode=0`) is not known yet.
            let hop = via.is_some() || nexthop.is_some() && link.is_none();
            foreign |= scope != if hop { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
        }
        Family::V6 if metric == NO_METRIC_V6 => metric = 0,
        Family::V6 => {}
    }
    let dst = IpNet::new(dst, prefix_len).ok()?.trunc();
    foreign |= nexthop.is_some_and(|id| !id.is_for(dst));
    let dev = link.and_then(name_of);
    let onlink = flags & RTNH_F_ONLINK != 0;
    let route = Route { dst, via, dev, onlink, nexthop, protocol, metric, foreign };
    let blackhole = match (kind, protocol, metric) {
        (RTN_BLACKHOLE, ROUTE_PROTOCOL, BLACKHOLE_METRIC) => Some(Blackhole::Ours),
        (RTN_BLACKHOLE, PROTOCOL_BOOT, 0) => Some(Blackhole::Go),
        _ => None,
    };
    Some(RouteFacts { route, link, blackhole })
}

#[cfg(test)]
mod tests;
