//! Notifications of the kernel, filtered down to "something of ours is not as it should be".
//!
//! A notification carries no information further: it wakes the reconciler, which looks for itself. So
//! losing some is harmless, and our own changes, which the kernel echoes, wake nobody because they are
//! what is desired.

use std::io;
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;

use super::decode::{self, NeighbourFacts};
use super::socket::messages;
use crate::kernel::{Interest, KernelError, Notices};
use crate::name::Name;
use crate::state::PROTOCOL_KERNEL;

impl Interest {
    fn name(&self, index: u32) -> Option<Name> {
        self.host.links.get(&index).map(|link| link.name)
    }

    /// The name of a tunnel device of ours, by its index as last read.
    fn own(&self, index: u32) -> Option<Name> {
        self.name(index).filter(|name| self.desired.links.contains_key(name))
    }

    /// Whether a notification says that something differs from what should be, or from what was read.
    fn concerned_by(&self, message: &Message) -> bool {
        match message {
            Message::NewLink(link) => decode::link(link).is_some_and(|facts| self.new_link(&facts)),
            Message::DelLink(link) => decode::link(link).is_some_and(|facts| {
                let underlay = self.scope.underlay == Some(facts.host.index);
                self.draining || underlay || self.desired.links.contains_key(&facts.host.name)
            }),
            Message::NewAddress(address) => decode::address(address)
                .is_some_and(|(index, address)| self.address(index, address.net, true)),
            Message::DelAddress(address) => decode::address(address)
                .is_some_and(|(index, address)| self.address(index, address.net, false)),
            Message::NewNeighbour(entry) => {
                decode::neighbour(entry).is_some_and(|entry| self.new_entry(entry))
            }
            Message::DelNeighbour(entry) => decode::neighbour(entry).is_some_and(|entry| match entry {
                NeighbourFacts::Neighbour { link, ip, .. } => {
                    self.own(link).is_some_and(|name| self.desired.neighbours.contains_key(&(name, ip)))
                }
                NeighbourFacts::Fdb { link, mac, .. } => {
                    self.own(link).is_some_and(|name| self.desired.fdb.contains_key(&(name, mac)))
                }
            }),
            Message::NewRoute(route) => self.route(route, true),
            Message::DelRoute(route) => self.route(route, false),
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
                (known.name, known.mtu, known.up) != (facts.host.name, facts.host.mtu, facts.host.up)
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
        let outside = self.choosing || self.scope.underlay == Some(index);
        in_the_way || (outside && (self.choosing || self.has_address(index, net) != new))
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

    fn route(&self, message: &netlink_packet_route::route::RouteMessage, new: bool) -> bool {
        let Some(decode::RouteFacts { route, link, blackhole }) =
            decode::route(message, |index| self.name(index))
        else {
            return false;
        };
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
            None => new && self.scope.owns_route(&route, own_device, link),
        }
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
    socket: TokioSocket,
}

impl Listener {
    /// Subscribes in the calling thread's network namespace. Needs a running tokio reactor.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when no netlink socket can be had.
    pub fn open() -> Result<Self, KernelError> {
        Self::subscribe().map_err(super::failed("subscribing to notifications"))
    }

    fn subscribe() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        for group in [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv6Route,
        ] {
            socket.socket_mut().add_membership(group as u32)?;
        }
        Ok(Self { socket })
    }
}

impl Notices for Listener {
    async fn run(&self, interest: &Mutex<Interest>, moved: &Notify) -> KernelError {
        let mut buffer = Vec::with_capacity(32 * 1024);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer).await {
                Ok(()) => {
                    let interest = interest.lock().unwrap_or_else(PoisonError::into_inner);
                    let concerned = messages(&buffer).any(|message| match message.payload {
                        NetlinkPayload::InnerMessage(inner) => interest.concerned_by(&inner),
                        _ => false,
                    });
                    if concerned {
                        moved.notify_one();
                    }
                }
                // Notifications were lost, so anything may have moved.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => moved.notify_one(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return KernelError::Netlink { what: "receiving notifications", source },
            }
        }
    }
}

const ENOBUFS: i32 = 105;
