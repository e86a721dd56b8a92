//! Entries read from bytes are what `netlink-packet-route` makes of them.

use std::net::Ipv6Addr;

use netlink_packet_core::Parseable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use proptest::prelude::*;

use super::*;
use crate::netlink::wire::Writer;

/// What a message means that `netlink-packet-route` has decoded.
fn typed(message: &NeighbourMessage) -> Option<NeighbourFacts> {
    let header = &message.header;
    let (mut dst, mut mac, mut plain) = (None, None, true);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(addr) => dst = neighbour_ip(addr),
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(Mac);
            }
            NeighbourAttribute::Port(_) | NeighbourAttribute::Vni(_) | NeighbourAttribute::IfIndex(_) => {
                plain = false;
            }
            _ => {}
        }
    }
    let link = header.ifindex;
    let state = u16::from(header.state);
    if header.family == AddressFamily::Bridge {
        let configured = state & u16::from(NeighbourState::Permanent) != 0
            || state & u16::from(NeighbourState::Noarp) != 0;
        let own =
            header.flags.contains(NeighbourFlags::Own) && !header.flags.contains(NeighbourFlags::ExtLearned);
        let mac = mac.filter(|mac| configured && own && mac.is_unicast())?;
        let dst = dst.filter(|_| plain).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        return Some(NeighbourFacts::Fdb { link, mac, dst });
    }
    if header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let permanent = state == u16::from(NeighbourState::Permanent);
    let is = |one: NeighbourState| state & u16::from(one) != 0;
    let answers = match () {
        () if is(NeighbourState::Failed) => Some(false),
        () if state == 0 || is(NeighbourState::Incomplete) => None,
        () => Some(true),
    };
    Some(NeighbourFacts::Neighbour { link, ip: dst?, mac: mac.unwrap_or(Mac([0; 6])), permanent, answers })
}

fn neighbour_ip(addr: &NeighbourAddress) -> Option<IpAddr> {
    match addr {
        NeighbourAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        NeighbourAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        // Entries of a bridge family carry the address as it is.
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(|b| IpAddr::V4(Ipv4Addr::from(b))),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(|b| IpAddr::V6(Ipv6Addr::from(b))),
            _ => None,
        },
        _ => None,
    }
}

fn attribute() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let bytes = |kind: u16, len: usize| (Just(kind), prop::collection::vec(any::<u8>(), len)).boxed();
    prop_oneof![
        4 => bytes(NDA_DST, 4),
        4 => bytes(NDA_DST, 16),
        4 => bytes(NDA_LLADDR, 6),
        1 => bytes(NDA_LLADDR, 5),
        2 => bytes(3, 16),
        1 => bytes(NDA_PORT, 2),
        1 => bytes(NDA_VNI, 4),
        1 => bytes(NDA_IFINDEX, 4),
        1 => bytes(12, 1),
        1 => (prop_oneof![0u16..17, any::<u16>()], prop::collection::vec(any::<u8>(), 0..20)),
    ]
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    let family = prop_oneof![4 => Just(2u8), 4 => Just(10), 4 => Just(7), 1 => any::<u8>()];
    let state = prop_oneof![4 => Just(0x80u16), 4 => prop::sample::select(vec![0, 1, 2, 0x20, 0x40]), 1 => any::<u16>()];
    let flags = prop_oneof![4 => Just(2u8), 4 => prop::sample::select(vec![0, 8, 0x12]), 1 => any::<u8>()];
    let header = (family, 0u32..4, state, flags, any::<u8>());
    (header, prop::collection::vec(attribute(), 0..5)).prop_map(
        |((family, link, state, flags, kind), attributes)| {
            let mut w = Writer::default();
            w.raw(&[family, 0, 0, 0]);
            w.raw(&link.to_ne_bytes());
            w.raw(&state.to_ne_bytes());
            w.raw(&[flags, kind]);
            attributes.iter().for_each(|(kind, value)| w.bytes_attribute(*kind, value));
            w.into_bytes()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn what_is_read_is_what_the_library_reads(payload in payload()) {
        if let Ok(message) = NeighbourMessage::parse(payload.as_slice()) {
            prop_assert_eq!(neighbour(&payload), typed(&message));
        }
    }

    #[test]
    fn hostile_bytes_never_panic(bytes: Vec<u8>, mut payload in payload(), cut: prop::sample::Index, change: (prop::sample::Index, u8)) {
        neighbour(&bytes);
        let at = change.0.index(payload.len());
        payload[at] = change.1;
        neighbour(&payload[..cut.index(payload.len() + 1)]);
    }
}
