//! Which way packets to an address take, and whether somebody answers at the end of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteType};
use rtnetlink::RouteMessageBuilder;
use subnet::Family;

use super::decode::{self, NeighbourFacts};
use super::refusal::errno;
use super::{Netlink, encode, failed};
use crate::kernel::KernelError;
use crate::state::host::Direct;
use crate::state::host::ResolvedRoute;
use crate::state::name::Name;

impl Netlink {
    pub(super) fn route_to(&mut self, addr: IpAddr) -> Result<ResolvedRoute, KernelError> {
        let what = "route lookup";
        let mut request = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(addr, Family::of(addr).bits())
            .map_err(|error| failed(what)(io::Error::other(error.to_string())))?
            .build();
        // A strict kernel wants everything but the destination unset.
        request.header = RouteHeader { table: 0, protocol: 0.into(), kind: 0.into(), ..request.header };
        let answer = self.socket.ask(RouteNetlinkMessage::GetRoute(request)).map_err(failed(what))?;
        let RouteNetlinkMessage::NewRoute(answer) = answer else {
            return Err(failed(what)(io::Error::from(io::ErrorKind::InvalidData)));
        };
        let (mut link, mut source, mut gateway) = (None, None, None);
        for attribute in &answer.attributes {
            match attribute {
                RouteAttribute::Oif(index) => link = Some(*index),
                RouteAttribute::PrefSource(addr) => source = decode::ip(addr),
                RouteAttribute::Gateway(addr) => gateway = decode::ip(addr),
                // A next hop of the other family is a router too.
                RouteAttribute::Via(_) => gateway = Some(addr),
                _ => {}
            }
        }
        let unicast = answer.header.kind == RouteType::Unicast;
        let link = link.filter(|_| unicast);
        let link = link.ok_or_else(|| failed(what)(io::Error::from_raw_os_error(errno::ENETUNREACH)))?;
        Ok(ResolvedRoute { link, source, gateway })
    }

    pub(super) fn beside(&mut self, addrs: &[IpAddr], before: &Direct) -> Result<Direct, KernelError> {
        let names: BTreeMap<u32, Name> = self.indexes.iter().map(|(name, index)| (*index, *name)).collect();
        let mut beside: Vec<(IpAddr, u32)> = Vec::new();
        for addr in addrs {
            // Otherwise there is a router, or no way at all.
            if let Ok(ResolvedRoute { link, gateway: None, .. }) = self.route_to(*addr) {
                beside.push((*addr, link));
            }
        }
        let links: BTreeSet<u32> = beside.iter().map(|(_, link)| *link).collect();
        let mut known: BTreeMap<(u32, IpAddr), Option<bool>> = BTreeMap::new();
        for link in links {
            for entry in self.entries(link).map_err(failed("reading neighbours"))? {
                if let NeighbourFacts::Neighbour { link, ip, answers, .. } = entry {
                    known.insert((link, ip), answers);
                }
            }
        }
        let mut direct = BTreeMap::new();
        let mut asked = Vec::new();
        for (addr, link) in beside {
            let Some(name) = names.get(&link) else { continue };
            let answers = known.get(&(link, addr)).copied().flatten();
            if answers != Some(true) {
                asked.push(encode::solicitation(link, addr));
            }
            if answers.unwrap_or_else(|| before.get(&addr) == Some(name)) {
                direct.insert(addr, *name);
            }
        }
        // A refused question is asked again with the next look.
        let _ = self.socket.changes(asked);
        Ok(Arc::new(direct))
    }
}
