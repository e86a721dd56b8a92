//! Notifications of the kernel, filtered down to "something of ours is not as it should be".
//!
//! A notification carries no information further: it wakes the reconciler, which looks for itself. So
//! losing some is harmless, and our own changes, which the kernel echoes, wake nothing because they are
//! what is desired.

use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;

use super::Netlink;
use super::decode::{self, NeighbourFacts, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWNEIGH, RTM_NEWROUTE};
use super::nexthop::{self, NexthopEvent, NexthopFacts, RTNLGRP_NEXTHOP};
use super::socket::decode as typed;
use crate::kernel::{KernelError, NotificationFilter, Notifications, Notified};
use crate::netlink::multicast::{MulticastSocket, RTM_DELLINK, RTM_NEWLINK, Received};
use crate::netlink::wire;
use crate::state::PROTOCOL_KERNEL;
use crate::state::host::HostLink;
use crate::state::name::Name;
use crate::state::nexthop::NexthopId;

impl NotificationFilter {
    fn name(&self, index: u32) -> Option<Name> {
        self.host.links.get(&index).map(|link| link.name)
    }

    /// The name of a tunnel device of ours, by its index as last read.
    fn own(&self, index: u32) -> Option<Name> {
        self.name(index).filter(|name| self.desired.links.contains_key(name))
    }

    /// Whether a notification says that something differs from what should be, or from what was read.
    pub(crate) fn concerned_by(&self, message: &wire::Message<'_>) -> bool {
        let payload = message.payload;
        match message.kind {
            RTM_NEWNEIGH => decode::neighbour(payload).is_some_and(|entry| self.new_entry(entry)),
            RTM_DELNEIGH => decode::neighbour(payload).is_some_and(|entry| self.lost_entry(entry)),
            RTM_NEWROUTE => self.route(payload, true),
            RTM_DELROUTE => self.route(payload, false),
            RTM_NEWLINK | RTM_DELLINK if !self.may_concern(payload) => false,
            _ => match nexthop::told(message) {
                Some(told) => self.nexthop(&told),
                None => typed(message).is_some_and(|message| self.concerned_by_device(&message)),
            },
        }
    }

    /// Whether a message about a link can concern anything: the links of pods, which are most, can not, and are not decoded.
    fn may_concern(&self, payload: &[u8]) -> bool {
        let Some(link) = decode::LinkHead::of(payload) else { return false };
        self.choosing
            || self.draining
            || self.refused
            || self.scope.underlay == Some(link.index)
            || link.name().is_some_and(|name| self.desired.links.contains_key(&name))
    }

    /// The same of a message about a link or an address.
    fn concerned_by_device(&self, message: &Message) -> bool {
        match message {
            Message::NewLink(link) => decode::link(link).is_some_and(|facts| self.new_link(&facts)),
            Message::DelLink(link) => decode::link(link).is_some_and(|facts| {
                let underlay = self.scope.underlay == Some(facts.host.index);
                self.draining || self.refused || underlay || self.desired.links.contains_key(&facts.host.name)
            }),
            Message::NewAddress(address) => decode::address(address)
                .is_some_and(|(index, address)| self.address(index, address.net, true)),
            Message::DelAddress(address) => decode::address(address)
                .is_some_and(|(index, address)| self.address(index, address.net, false)),
            _ => false,
        }
    }

    fn new_link(&self, facts: &decode::LinkFacts) -> bool {
        if let Some(want) = self.desired.links.get(&facts.host.name) {
            let have = &facts.tunnel;
            // Notifications don't say what became of offloads, so any of them may be about that.
            return self.own(facts.host.index).is_none()
                || !(want.identity.accepts(&have.identity) || want.identity.takes_over(&have.identity))
                || !have.settings.patch_to(&want.settings).is_empty();
        }
        if self.scope.underlay == Some(facts.host.index) {
            return self.host.links.get(&facts.host.index).is_none_or(|known| {
                let key = |link: &HostLink| (link.name, link.mtu, link.up, link.carrier);
                key(known) != key(&facts.host)
            });
        }
        self.choosing
    }

    fn address(&self, index: u32, net: IpNet, new: bool) -> bool {
        if let Some(name) = self.own(index) {
            let wanted = self.desired.addresses.contains(&(name, net));
            return if new { !wanted && self.scope.owns_address(net) } else { wanted };
        }
        // The kernel's own route, which stood in the way of ours, goes with its address and often without
        // a notification of its own.
        let in_the_way = !new && self.desired.routes.contains_key(&net.trunc());
        let news = || self.has_address(index, net) != new;
        in_the_way
            || self.choosing
            || (self.scope.underlay == Some(index) || self.scope.intrudes_with(net)) && news()
    }

    fn new_entry(&self, entry: NeighbourFacts) -> bool {
        match entry {
            NeighbourFacts::Neighbour { link, ip, mac, permanent, answers } => match self.own(link) {
                Some(name) => match self.desired.neighbours.get(&(name, ip)) {
                    Some(want) => !permanent || *want != mac,
                    None => permanent,
                },
                None => {
                    answers.is_some_and(|now| self.neighbours.get(&ip).is_some_and(|known| *known != now))
                }
            },
            NeighbourFacts::Fdb { link, mac, dst } => {
                self.own(link).is_some_and(|name| self.desired.fdb.get(&(name, mac)) != Some(&dst))
            }
        }
    }

    /// Whether a neighbour or a forwarding entry is missed that is gone.
    fn lost_entry(&self, entry: NeighbourFacts) -> bool {
        match entry {
            NeighbourFacts::Neighbour { link, ip, .. } => {
                self.own(link).is_some_and(|name| self.desired.neighbours.contains_key(&(name, ip)))
            }
            NeighbourFacts::Fdb { link, mac, .. } => {
                self.own(link).is_some_and(|name| self.desired.fdb.contains_key(&(name, mac)))
            }
        }
    }

    /// Whether what is told of a nexthop object differs from what a route of ours needs. Those of a device go with it, and
    /// nothing tells of them or of their routes.
    fn nexthop(&self, told: &NexthopEvent) -> bool {
        let want = |id: NexthopId| {
            let routes = self.scope.subnets_of(id).filter_map(|subnet| self.desired.routes.get(&subnet));
            routes.into_iter().find(|want| want.nexthop == Some(id))
        };
        match told {
            NexthopEvent::Gone(id) => want(*id).is_some(),
            NexthopEvent::There(NexthopFacts { id, marked, hop }) => match want(*id) {
                Some(want) => {
                    let have = (hop.via, hop.link.and_then(|link| self.name(link)), hop.onlink);
                    !marked || hop.foreign || have != (want.via, want.dev, want.onlink)
                }
                None => *marked && self.scope.owns_nexthop(*id),
            },
        }
    }

    fn route(&self, payload: &[u8], new: bool) -> bool {
        let Some(decode::RouteFacts { mut route, link, blackhole }) =
            decode::route(payload, |index| self.name(index))
        else {
            return false;
        };
        // With `net.ipv4.nexthop_compat_mode=0` only the object is told, of which there are notifications of their own.
        if let Some(want) = self.desired.routes.get(&route.dst)
            && link.is_none()
            && route.nexthop.is_some_and(|id| want.nexthop == Some(id))
        {
            (route.via, route.dev, route.onlink) = (want.via, want.dev, want.onlink);
        }
        if blackhole == Some(decode::Blackhole::Ours) {
            return self.desired.blackholes.contains(&route.dst) != new;
        }
        if route.dst.prefix_len() == 0 {
            return true;
        }
        // A way to a peer that somebody else made decides whether it is direct.
        if !self.neighbours.is_empty()
            && !self.scope.networks.iter().any(|network| network.contains(&route.dst))
            && self.neighbours.keys().any(|addr| route.dst.contains(addr))
        {
            return true;
        }
        let own_device = link.is_some_and(|link| self.own(link).is_some());
        match self.desired.routes.get(&route.dst) {
            Some(want) if new => route.metric == 0 && route != *want,
            // Also when the kernel's own route goes that stood in the way of ours.
            Some(want) => route == *want || route.protocol == PROTOCOL_KERNEL,
            None if new && self.scope.owns_route(&route, own_device, link) => true,
            None => {
                self.scope.intrudes(&route, own_device, link) && self.host.intruders.contains(&route) != new
            }
        }
    }

    /// Whether a datagram says that a setting has changed which decides whether packets pass: that of all
    /// devices, of the external interface, or of a device of ours. Other links come and go with pods.
    pub(crate) fn hears_of_settings(&self, datagram: &[u8]) -> bool {
        netconf_indexes(datagram).any(|index| match u32::try_from(index) {
            Ok(index) => self.scope.underlay == Some(index) || self.own(index).is_some(),
            Err(_) => index == NETCONFA_IFINDEX_ALL,
        })
    }

    fn has_address(&self, index: u32, net: IpNet) -> bool {
        self.host
            .links
            .get(&index)
            .is_some_and(|link| link.addresses.iter().any(|address| address.net == net))
    }
}

/// The receiving end of the kernel's notifications.
pub struct Listener {
    socket: MulticastSocket,
}

impl Listener {
    /// Subscribes in the calling thread's network namespace. Needs a running tokio reactor.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when no netlink socket can be had.
    pub fn open() -> Result<Self, KernelError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
        ];
        let mut groups: Vec<u32> = groups.into_iter().map(|group| group as u32).collect();
        groups.extend([RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF]);
        let socket = MulticastSocket::subscribe(NETLINK_ROUTE, &groups, None);
        let mut socket = socket.map_err(super::failed("subscribing to notifications"))?;
        // Kernels before 5.3 have no such group, and no objects.
        let _ = socket.join(RTNLGRP_NEXTHOP);
        socket.leave_out_ports(None).map_err(super::failed("filtering notifications"))?;
        Ok(Self { socket })
    }
}

impl Listener {
    /// Hears nothing of the changes that `kernel` makes. What it is to make is what is desired, and it looks at what came of it.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the kernel takes no filter.
    pub fn without_echo_of(self, kernel: &Netlink) -> Result<Self, KernelError> {
        let filtered = self.socket.leave_out_ports(Some(kernel.port()));
        filtered.map_err(super::failed("filtering notifications"))?;
        Ok(self)
    }
}

impl Notifications for Listener {
    async fn run(&self, notified: &Mutex<Notified>, moved: &Notify) -> KernelError {
        let mut buffer = MulticastSocket::buffer();
        loop {
            let concerned = match self.socket.receive(&mut buffer).await {
                Ok(Received::Datagram(datagram)) => {
                    notified.lock().unwrap_or_else(PoisonError::into_inner).hear(datagram)
                }
                Ok(Received::Lost) => {
                    notified.lock().unwrap_or_else(PoisonError::into_inner).overruns += 1;
                    true
                }
                Err(source) => return KernelError::Netlink { what: "receiving notifications", source },
            };
            if concerned {
                moved.notify_one();
            }
        }
    }
}

const RTNLGRP_IPV4_NETCONF: u32 = 24;
const RTNLGRP_IPV6_NETCONF: u32 = 25;
const RTM_NEWNETCONF: u16 = 80;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_IFINDEX_ALL: i32 = -1;

/// The devices that messages about settings (`RTM_NEWNETCONF`, include/uapi/linux/netconf.h) are about.
fn netconf_indexes(datagram: &[u8]) -> impl Iterator<Item = i32> {
    /// A message's header, and the family with its padding.
    const HEADERS: usize = 16 + 4;
    let mut rest = datagram;
    let bodies = std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
        let (kind, body) = (u16::from_ne_bytes([*rest.get(4)?, *rest.get(5)?]), rest.get(16..length)?);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind == RTM_NEWNETCONF).then_some(body))
    });
    bodies.flatten().filter_map(|body| {
        let mut attributes = body.get(HEADERS - 16..)?;
        loop {
            let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
            let value = attributes.get(4..length)?;
            if u16::from_ne_bytes([*attributes.get(2)?, *attributes.get(3)?]) == NETCONFA_IFINDEX {
                return value.try_into().ok().map(i32::from_ne_bytes);
            }
            attributes = attributes.get(length.next_multiple_of(4)..)?;
        }
    })
}
