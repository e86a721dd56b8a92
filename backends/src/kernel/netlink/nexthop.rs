//! Messages about nexthop objects (include/uapi/linux/nexthop.h), which `netlink-packet-route` does not have.

use std::io;
use std::net::IpAddr;

use subnet::Family;

use super::refusal::errno;
use crate::netlink::wire::{Message, Writer, attributes, find, native_u32};
use crate::state::nexthop::NexthopId;
use crate::state::{ROUTE_PROTOCOL, Route};

/// The multicast group that tells of them.
pub(super) const RTNLGRP_NEXTHOP: u32 = 32;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;
/// `struct nhmsg`.
const HEADER: usize = 8;
const RTNH_F_ONLINK: u32 = 4;
const NHA_ID: u16 = 1;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;

/// A request about objects.
#[derive(Clone)]
pub(super) struct NexthopMessage {
    kind: u16,
    bytes: Vec<u8>,
}

impl NexthopMessage {
    fn new(kind: u16, family: u8, protocol: u8, flags: u32, body: impl FnOnce(&mut Writer)) -> Self {
        let mut w = Writer::default();
        w.raw(&[family, 0, protocol, 0]);
        w.raw(&flags.to_ne_bytes());
        body(&mut w);
        Self { kind, bytes: w.into_bytes() }
    }

    pub(super) fn kind(&self) -> u16 {
        self.kind
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn family_of(addr: IpAddr) -> u8 {
    (if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// Makes the object of a route whose device has this index, or replaces what has its id.
pub(super) fn object_of(route: &Route, index: u32) -> Option<NexthopMessage> {
    let (id, via) = (route.nexthop?, route.via?);
    let flags = if route.onlink { RTNH_F_ONLINK } else { 0 };
    Some(NexthopMessage::new(RTM_NEWNEXTHOP, family_of(via), route.protocol, flags, |w| {
        w.bytes_attribute(NHA_ID, &id.get().to_ne_bytes());
        w.bytes_attribute(NHA_OIF, &index.to_ne_bytes());
        match via {
            IpAddr::V4(v4) => w.bytes_attribute(NHA_GATEWAY, &v4.octets()),
            IpAddr::V6(v6) => w.bytes_attribute(NHA_GATEWAY, &v6.octets()),
        }
    }))
}

/// Removes an object.
pub(super) fn removal(id: NexthopId) -> NexthopMessage {
    let body = |w: &mut Writer| w.bytes_attribute(NHA_ID, &id.get().to_ne_bytes());
    NexthopMessage::new(RTM_DELNEXTHOP, 0, 0, 0, body)
}

/// Asks for all objects.
pub(super) fn all() -> NexthopMessage {
    NexthopMessage::new(RTM_GETNEXTHOP, 0, 0, 0, |_| {})
}

/// Whether a refusal says that this kernel has no objects for us, rather than that one of them is wrong.
pub(super) fn are_refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(errno::EOPNOTSUPP | errno::EPERM | errno::EACCES | errno::ENOSYS))
}

/// What a message says about an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NexthopFacts {
    /// One that may be ours.
    pub(super) id: NexthopId,
    /// Whether its maker says that it is an agent of flannel-rs.
    pub(super) marked: bool,
    pub(super) hop: Target,
}

/// What an object leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) via: Option<IpAddr>,
    pub(super) link: Option<u32>,
    pub(super) onlink: bool,
    /// It has attributes that ours never have: it is a group, a blackhole or encapsulates.
    pub(super) foreign: bool,
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NexthopEvent {
    There(NexthopFacts),
    Gone(NexthopId),
}

/// What a message tells of an object with an id of our range.
pub(super) fn told(message: &Message<'_>) -> Option<NexthopEvent> {
    if !matches!(message.kind, RTM_NEWNEXTHOP | RTM_DELNEXTHOP) {
        return None;
    }
    let head = message.payload.get(..HEADER)?;
    let body = &message.payload[HEADER..];
    let id = NexthopId::new(native_u32(find(body, NHA_ID)?, 0)?).filter(|id| id.is_of_range())?;
    if message.kind == RTM_DELNEXTHOP {
        return Some(NexthopEvent::Gone(id));
    }
    let mut hop =
        Target { via: None, link: None, onlink: native_u32(head, 4)? & RTNH_F_ONLINK != 0, foreign: false };
    for (kind, value) in attributes(body) {
        match kind {
            NHA_ID => {}
            NHA_OIF => hop.link = native_u32(value, 0),
            NHA_GATEWAY => hop.via = gateway(value),
            _ => hop.foreign = true,
        }
    }
    Some(NexthopEvent::There(NexthopFacts { id, marked: head[2] == ROUTE_PROTOCOL, hop }))
}

fn gateway(bytes: &[u8]) -> Option<IpAddr> {
    let family = if bytes.len() == 4 { Family::V4 } else { Family::V6 };
    match family {
        Family::V4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        Family::V6 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, payload: &[u8]) -> Message<'_> {
        Message { kind, flags: 0, sequence: 0, port: 0, payload }
    }

    #[test]
    fn what_is_asked_for_is_what_is_told() {
        let route = Route {
            via: Some("10.1.2.0".parse().unwrap()),
            onlink: true,
            nexthop: NexthopId::new(0x460a_0102),
            ..Route::ours("10.1.2.0/24".parse().unwrap())
        };
        let made = object_of(&route, 7).unwrap();
        let hop = Target { via: route.via, link: Some(7), onlink: true, foreign: false };
        let facts = NexthopFacts { id: route.nexthop.unwrap(), marked: true, hop };
        assert_eq!(told(&message(made.kind(), made.bytes())), Some(NexthopEvent::There(facts)));
        let gone = removal(facts.id);
        assert_eq!(told(&message(gone.kind(), gone.bytes())), Some(NexthopEvent::Gone(facts.id)));
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(kind in 103u16..107, payload: Vec<u8>) {
            told(&message(kind, &payload));
        }
    }
}
