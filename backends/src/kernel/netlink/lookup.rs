//! Questions about one packet or one entry: what the kernel would do, without doing it.

use std::fmt;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::RouteMessageBuilder;
use subnet::{Family, Mac};

use super::decode::{self, NeighbourFacts};
use super::refusal::errno;
use super::{Netlink, failed};
use crate::kernel::KernelError;
use crate::state::ROUTE_PROTOCOL;
use crate::state::name::Name;

/// What becomes of a packet that is looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Routed {
    /// It goes on.
    Forward(Hop),
    /// It is for this host.
    Local,
    /// It is dropped, for this reason.
    Dropped(Drop),
}

/// The route that a packet takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The destination of the route.
    pub route: IpNet,
    /// The device that it leaves by.
    pub device: Name,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The source address that a packet of this host gets.
    pub source: Option<IpAddr>,
    /// The route is one of ours.
    pub ours: bool,
    /// The number of its table; 254 is the main table.
    pub table: u32,
}

/// Why routing drops a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// There is no route.
    NoRoute,
    /// A blackhole route.
    Blackhole,
    /// A route that says unreachable.
    Unreachable,
    /// A route that prohibits it.
    Prohibited,
    /// The source is not behind the device that it came in by (`rp_filter`), or it can't be a source.
    Source,
}

impl fmt::Display for Drop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoRoute => "there is no route",
            Self::Blackhole => "it ends in a blackhole route",
            Self::Unreachable => "a route says that it is unreachable",
            Self::Prohibited => "a route prohibits it",
            Self::Source => {
                "the source address does not belong behind the device that the packet comes in by: rp_filter is strict, or \
                 the address is this host's"
            }
        })
    }
}

impl Netlink {
    /// What becomes of a packet to `to`: one of this host, or one from an address that came in by a device. The devices are
    /// those of the last look at the kernel.
    ///
    /// # Errors
    /// [`KernelError`] when the kernel can't be asked.
    pub fn look_up(&mut self, to: IpAddr, from: Option<(IpAddr, Name)>) -> Result<Routed, KernelError> {
        let what = "route lookup";
        let invalid = |error: &dyn fmt::Display| failed(what)(io::Error::other(error.to_string()));
        let bits = Family::of(to).bits();
        let builder = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, bits);
        let mut request = builder.map_err(|error| invalid(&error))?.build();
        // A strict kernel wants everything but addresses unset.
        let flags = RouteFlags::FibMatch;
        request.header = RouteHeader {
            table: 0,
            protocol: 0.into(),
            kind: 0.into(),
            scope: 0.into(),
            flags,
            ..request.header
        };
        if let Some((source, device)) = from {
            let index = *self.indexes.get(&device).ok_or(KernelError::NoDevice(device))?;
            request.header.source_prefix_length = bits;
            request.attributes.push(RouteAttribute::Source(source.into()));
            request.attributes.push(RouteAttribute::Iif(index));
        }
        let answer = match self.socket.ask(RouteNetlinkMessage::GetRoute(request)) {
            Ok(RouteNetlinkMessage::NewRoute(answer)) => answer,
            Ok(_) => return Err(failed(what)(io::Error::from(io::ErrorKind::InvalidData))),
            Err(error) => return refused(&error).map(Routed::Dropped).ok_or_else(|| failed(what)(error)),
        };
        self.routed(to, &answer).ok_or_else(|| failed(what)(io::Error::from(io::ErrorKind::InvalidData)))
    }

    fn routed(&self, to: IpAddr, answer: &RouteMessage) -> Option<Routed> {
        let header = &answer.header;
        match header.kind {
            RouteType::Unicast => {}
            RouteType::Local | RouteType::Broadcast | RouteType::Anycast => return Some(Routed::Local),
            RouteType::BlackHole => return Some(Routed::Dropped(Drop::Blackhole)),
            RouteType::Unreachable => return Some(Routed::Dropped(Drop::Unreachable)),
            RouteType::Prohibit => return Some(Routed::Dropped(Drop::Prohibited)),
            _ => return Some(Routed::Dropped(Drop::NoRoute)),
        }
        let (mut link, mut source, mut gateway, mut dst) = (None, None, None, None);
        let mut table = u32::from(header.table);
        for attribute in &answer.attributes {
            match attribute {
                RouteAttribute::Oif(index) => link = Some(*index),
                RouteAttribute::PrefSource(addr) => source = decode::ip(addr),
                RouteAttribute::Gateway(addr) => gateway = decode::ip(addr),
                RouteAttribute::Destination(addr) => dst = decode::ip(addr),
                RouteAttribute::Table(number) => table = *number,
                _ => {}
            }
        }
        let any = subnet::net::addr_of(Family::of(to), 0);
        let route = IpNet::new(dst.unwrap_or(any), header.destination_prefix_length).ok()?;
        let device = self.indexes.iter().find(|(_, index)| Some(**index) == link).map(|(name, _)| *name)?;
        let ours = u8::from(header.protocol) == ROUTE_PROTOCOL;
        Some(Routed::Forward(Hop { route, device, gateway, source, ours, table }))
    }

    /// The hardware address of a neighbour behind a device, and whether it answers; nothing if the kernel does not know it.
    ///
    /// # Errors
    /// [`KernelError`] when the kernel can't be asked.
    pub fn neighbour(&mut self, device: Name, ip: IpAddr) -> Result<Option<(Mac, bool)>, KernelError> {
        let index = *self.indexes.get(&device).ok_or(KernelError::NoDevice(device))?;
        let entries = self.entries(index).map_err(failed("reading neighbours"))?;
        Ok(entries.into_iter().find_map(|entry| match entry {
            NeighbourFacts::Neighbour { link, ip: known, mac, answers, .. }
                if known == ip && link == index =>
            {
                Some((mac, answers != Some(false)))
            }
            _ => None,
        }))
    }

    /// Where a tunnel device sends frames to a hardware address.
    ///
    /// # Errors
    /// [`KernelError`] when the kernel can't be asked.
    pub fn tunnel_end(&mut self, device: Name, mac: Mac) -> Result<Option<IpAddr>, KernelError> {
        let index = *self.indexes.get(&device).ok_or(KernelError::NoDevice(device))?;
        let entries = self.entries(index).map_err(failed("reading forwarding entries"))?;
        Ok(entries.into_iter().find_map(|entry| match entry {
            NeighbourFacts::Fdb { link, mac: known, dst } if known == mac && link == index => Some(dst),
            _ => None,
        }))
    }

    /// The port of a bridge behind which a hardware address is.
    ///
    /// # Errors
    /// [`KernelError`] when the kernel can't be asked.
    pub fn bridge_port(&mut self, bridge: Name, mac: Mac) -> Result<Option<Name>, KernelError> {
        let index = *self.indexes.get(&bridge).ok_or(KernelError::NoDevice(bridge))?;
        let mut request = NeighbourMessage::default();
        request.header.family = AddressFamily::Bridge;
        request.attributes.push(NeighbourAttribute::Controller(index));
        let request = RouteNetlinkMessage::GetNeighbour(request);
        let found = self.socket.dump(
            &request,
            || None,
            |found, message| {
                if let RouteNetlinkMessage::NewNeighbour(message) = message
                    && message.attributes.contains(&NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()))
                    && message.header.ifindex != index
                {
                    *found = Some(message.header.ifindex);
                }
            },
        );
        let found = found.map_err(failed("reading a bridge's forwarding entries"))?;
        Ok(self.indexes.iter().find(|(_, known)| Some(**known) == found).map(|(name, _)| *name))
    }
}

/// What a refused lookup says about the packet.
fn refused(error: &io::Error) -> Option<Drop> {
    const EXDEV: i32 = 18;
    const EACCES: i32 = 13;
    const EHOSTUNREACH: i32 = 113;
    Some(match error.raw_os_error()? {
        errno::ENETUNREACH => Drop::NoRoute,
        errno::EINVAL => Drop::Blackhole,
        EHOSTUNREACH => Drop::Unreachable,
        EACCES => Drop::Prohibited,
        EXDEV => Drop::Source,
        _ => return None,
    })
}
