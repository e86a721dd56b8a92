//! Routes read from bytes are what `netlink-packet-route` makes of them.

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteScope, RouteType,
};
use proptest::prelude::*;

use super::super::ip;
use super::*;
use crate::netlink::wire::Writer;

/// What a message means that `netlink-packet-route` has decoded.
fn typed(message: &RouteMessage, name_of: impl Fn(u32) -> Option<Name>) -> Option<RouteFacts> {
    let header = &message.header;
    let family = match header.address_family {
        AddressFamily::Inet => Family::V4,
        AddressFamily::Inet6 => Family::V6,
        _ => return None,
    };
    if header.tos != 0 || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let (mut dst, mut via, mut link, mut nexthop) = (subnet::net::addr_of(family, 0), None, None, None);
    let (mut metric, mut table) = (0, u32::from(header.table));
    let mut foreign = header.kind != RouteType::Unicast;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(addr) => dst = ip(addr)?,
            RouteAttribute::Gateway(addr) => via = ip(addr),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::NhId(number) => nexthop = NexthopId::new(*number),
            // Answers of the kernel, not properties of the route.
            RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) | RouteAttribute::Uid(_) => {}
            _ => foreign = true,
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    match family {
        Family::V4 => {
            // Where a route leads that shows only its object (`net.ipv4.nexthop_compat_mode=0`) is not known yet.
            let hop = via.is_some() || nexthop.is_some() && link.is_none();
            let usual = if hop { RouteScope::Universe } else { RouteScope::Link };
            foreign |= header.scope != usual;
        }
        // The kernel turns "no metric" into IP6_RT_PRIO_USER (net/ipv6/route.c).
        Family::V6 if metric == 1024 => metric = 0,
        Family::V6 => {}
    }
    let dst = IpNet::new(dst, header.destination_prefix_length).ok()?.trunc();
    foreign |= nexthop.is_some_and(|id: NexthopId| !id.is_for(dst));
    let route = Route {
        dst,
        via,
        dev: link.and_then(name_of),
        onlink: header.flags.contains(RouteFlags::Onlink),
        nexthop,
        protocol: header.protocol.into(),
        metric,
        foreign,
    };
    let blackhole = match (header.kind, route.protocol, route.metric) {
        (RouteType::BlackHole, ROUTE_PROTOCOL, BLACKHOLE_METRIC) => Some(Blackhole::Ours),
        (RouteType::BlackHole, PROTOCOL_BOOT, 0) => Some(Blackhole::Go),
        _ => None,
    };
    Some(RouteFacts { route, link, blackhole })
}

/// An attribute with a kind that routes have, or any, and mostly a value of a length that it may have.
fn attribute() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let number = |kinds: Vec<u16>| {
        let value = prop_oneof![Just(254u32), Just(u32::MAX), Just(1024), 0u32..4, any::<u32>()];
        (prop::sample::select(kinds), value.prop_map(|value| value.to_ne_bytes().to_vec())).boxed()
    };
    let address = |len: usize| {
        let bytes = prop_oneof![Just(vec![10; len]), prop::collection::vec(any::<u8>(), len)];
        (prop::sample::select(vec![RTA_DST, RTA_GATEWAY, 2, 7]), bytes).boxed()
    };
    prop_oneof![
        4 => address(4),
        4 => address(16),
        4 => number(vec![RTA_OIF, RTA_PRIORITY, RTA_TABLE, RTA_NH_ID]),
        1 => number(vec![RTA_UID, 3, 11, 16, 23]),
        1 => (Just(RTA_PREF), prop::collection::vec(any::<u8>(), 1)),
        1 => (Just(RTA_CACHEINFO), prop::collection::vec(any::<u8>(), 32)),
        1 => (prop_oneof![0u16..34, any::<u16>()], prop::collection::vec(any::<u8>(), 0..20)),
    ]
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    let family = prop_oneof![4 => Just(2u8), 4 => Just(10), 1 => any::<u8>()];
    let tos = prop_oneof![9 => Just(0u8), 1 => any::<u8>()];
    let table = prop_oneof![4 => Just(254u8), 1 => any::<u8>()];
    let protocol = prop_oneof![Just(70u8), Just(3), Just(2), any::<u8>()];
    let scope = prop_oneof![Just(0u8), Just(253), any::<u8>()];
    let kind = prop_oneof![4 => Just(1u8), 2 => Just(6), 1 => any::<u8>()];
    let flags = prop_oneof![4 => Just(0u32), 4 => Just(4), 1 => Just(0x200), 1 => any::<u32>()];
    let header = (family, 0u8..130, 0u8..2, tos, table, protocol, scope, kind, flags);
    (header, prop::collection::vec(attribute(), 0..7)).prop_map(|(header, attributes)| {
        let (family, len, source, tos, table, protocol, scope, kind, flags) = header;
        let mut w = Writer::default();
        w.raw(&[family, len, source, tos, table, protocol, scope, kind]);
        w.raw(&flags.to_ne_bytes());
        attributes.iter().for_each(|(kind, value)| w.bytes_attribute(*kind, value));
        w.into_bytes()
    })
}

fn name_of(index: u32) -> Option<Name> {
    (index < 3).then(|| format!("eth{index}").parse().unwrap())
}

#[test]
fn a_route_of_ours_is_read() {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: 24,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: ROUTE_PROTOCOL.into(),
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        flags: RouteFlags::Onlink,
        ..RouteHeader::default()
    };
    let dst: std::net::Ipv4Addr = "10.1.2.0".parse().unwrap();
    message.attributes = vec![
        RouteAttribute::Table(254),
        RouteAttribute::Destination(dst.into()),
        RouteAttribute::NhId(0x460a_0102),
        RouteAttribute::Gateway(dst.into()),
        RouteAttribute::Oif(2),
    ];
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    let read = route(&bytes, name_of).unwrap();
    let want = Route {
        via: Some(dst.into()),
        dev: name_of(2),
        onlink: true,
        nexthop: NexthopId::new(0x460a_0102),
        ..Route::ours("10.1.2.0/24".parse().unwrap())
    };
    assert_eq!(read, RouteFacts { route: want, link: Some(2), blackhole: None });
    assert_eq!(typed(&message, name_of), Some(read));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn what_is_read_is_what_the_library_reads(payload in payload()) {
        if let Ok(message) = RouteMessage::parse(payload.as_slice()) {
            prop_assert_eq!(route(&payload, name_of), typed(&message, name_of));
        }
    }

    #[test]
    fn hostile_bytes_never_panic(bytes: Vec<u8>, mut payload in payload(), cut: prop::sample::Index, change: (prop::sample::Index, u8)) {
        route(&bytes, name_of);
        let at = change.0.index(payload.len());
        payload[at] = change.1;
        route(&payload[..cut.index(payload.len() + 1)], name_of);
    }
}
