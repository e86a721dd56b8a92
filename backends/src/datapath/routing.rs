//! Which peer a packet goes to, and which packets are taken from whom.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::{Family, PublicAddrs};

use super::counters::Counter;
use super::seal::handle;
use crate::state::forwarding::Forwarding;

/// A [`Forwarding`] made ready for lookups.
#[derive(Debug)]
pub struct Routing {
    /// See [`Forwarding::local`].
    pub local: PublicAddrs,
    /// See [`Forwarding::addresses`].
    pub addresses: PublicAddrs,
    /// See [`Forwarding::mtu`].
    pub mtu: u16,
    /// The port of all peers.
    pub port: u16,
    /// See [`Forwarding::check_sources`].
    pub check_sources: bool,
    v4: FamilyTable<u32>,
    v6: FamilyTable<u128>,
}

/// The peers of one family, whose addresses are such numbers.
#[derive(Debug)]
struct FamilyTable<Bits> {
    ranges: Vec<Range<Bits>>,
    /// The public addresses of all peers, sorted.
    publics: Vec<Bits>,
    /// What each of them sends and gets; empty where something else counts that.
    bytes: Vec<Arc<PeerBytes>>,
}

/// What was carried for a peer, in bytes of packets without outer headers.
#[derive(Debug, Default)]
pub(super) struct PeerBytes {
    pub(super) received: Counter,
    pub(super) sent: Counter,
}

/// The addresses of one peer.
#[derive(Clone, Copy, Debug)]
struct Range<Bits> {
    first: Bits,
    last: Bits,
    public: Bits,
}

impl<Bits: Ord + Copy> FamilyTable<Bits> {
    fn new(ranges: impl Iterator<Item = Range<Bits>>) -> Self {
        let mut ranges: Vec<Range<Bits>> = ranges.collect();
        ranges.sort_unstable_by_key(|range| range.first);
        let mut publics: Vec<Bits> = ranges.iter().map(|range| range.public).collect();
        publics.sort_unstable();
        publics.dedup();
        Self { ranges, publics, bytes: Vec::new() }
    }

    /// Counts bytes of each peer, for those that were there `before` on top of what they had.
    fn counting(mut self, before: Option<&Self>) -> Self {
        let of =
            |public: &Bits| before.and_then(|before| before.bytes_of(*public)).cloned().unwrap_or_default();
        self.bytes = self.publics.iter().map(of).collect();
        self
    }

    #[inline]
    fn bytes_of(&self, public: Bits) -> Option<&Arc<PeerBytes>> {
        self.bytes.get(self.publics.binary_search(&public).ok()?)
    }

    #[inline]
    fn peer_of(&self, address: Bits) -> Option<Bits> {
        let after = self.ranges.partition_point(|range| range.first <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (address <= range.last).then_some(range.public)
    }

    #[inline]
    fn knows(&self, sender: Bits) -> bool {
        self.publics.binary_search(&sender).is_ok()
    }
}

impl Routing {
    /// The lookup tables of `forwarding`.
    #[cfg(any(test, feature = "testing"))]
    pub fn new(forwarding: &Forwarding) -> Self {
        Self::following(forwarding, None)
    }

    /// The lookup tables of `forwarding`, which go on counting where those `before` them were.
    pub(super) fn following(forwarding: &Forwarding, before: Option<&Self>) -> Self {
        let this = Self::with_peers(forwarding, &forwarding.peers);
        let (v4, v6) = (before.map(|before| &before.v4), before.map(|before| &before.v6));
        Self { v4: this.v4.counting(v4), v6: this.v6.counting(v6), ..this }
    }

    /// What is counted for the peer with this public address.
    #[inline]
    pub(super) fn bytes(&self, public: IpAddr) -> Option<&PeerBytes> {
        match public {
            IpAddr::V4(v4) => self.v4.bytes_of(v4.to_bits()).map(Arc::as_ref),
            IpAddr::V6(v6) => self.v6.bytes_of(v6.to_bits()).map(Arc::as_ref),
        }
    }

    /// The lookup tables of one that encrypts: of the peers, in their order, these are the numbers.
    pub(super) fn sealed(forwarding: &Forwarding, numbers: &[u32]) -> Self {
        let peers = forwarding.wireguard.iter().flat_map(|settings| &settings.peers).zip(numbers);
        let ranges = peers.flat_map(|(peer, number)| {
            peer.allowed.iter().map(|net| (*net, handle(*number, Family::of(net.addr()))))
        });
        Self::with_peers(forwarding, &Vec::from_iter(ranges))
    }

    fn with_peers(forwarding: &Forwarding, peers: &[(IpNet, IpAddr)]) -> Self {
        let v4 = |(subnet, public): &(IpNet, IpAddr)| match (subnet, public) {
            (IpNet::V4(subnet), IpAddr::V4(public)) => Some(Range {
                first: subnet.network().to_bits(),
                last: subnet.broadcast().to_bits(),
                public: public.to_bits(),
            }),
            _ => None,
        };
        let v6 = |(subnet, public): &(IpNet, IpAddr)| match (subnet, public) {
            (IpNet::V6(subnet), IpAddr::V6(public)) => Some(Range {
                first: subnet.network().to_bits(),
                last: subnet.broadcast().to_bits(),
                public: public.to_bits(),
            }),
            _ => None,
        };
        let Forwarding { local, port, addresses, mtu, check_sources, .. } = *forwarding;
        Self {
            local,
            addresses,
            mtu,
            port,
            check_sources,
            v4: FamilyTable::new(peers.iter().filter_map(v4)),
            v6: FamilyTable::new(peers.iter().filter_map(v6)),
        }
    }

    /// The peer that has this address, by its public address of the same family.
    #[inline]
    pub fn peer_of(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(v4) => self.v4.peer_of(v4.to_bits()).map(|bits| IpAddr::V4(bits.into())),
            IpAddr::V6(v6) => self.v6.peer_of(v6.to_bits()).map(|bits| IpAddr::V6(bits.into())),
        }
    }

    /// Whether datagrams from this address are taken.
    #[inline]
    pub(crate) fn knows(&self, sender: IpAddr) -> bool {
        !self.check_sources
            || match sender {
                IpAddr::V4(v4) => self.v4.knows(v4.to_bits()),
                IpAddr::V6(v6) => self.v6.knows(v6.to_bits()),
            }
    }

    /// Whether `sender` may send packets from `source`.
    #[inline]
    pub(crate) fn owns(&self, sender: IpAddr, source: IpAddr) -> bool {
        !self.check_sources || source == sender || self.peer_of(source) == Some(sender)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;
    use subnet::net::{addr_of, bits_of};

    fn forwarding(peers: Vec<(IpNet, IpAddr)>) -> Forwarding {
        let addresses = |all: [&str; 2]| all.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect();
        Forwarding {
            local: addresses(["192.0.2.1", "2001:db8::1"]),
            port: 8285,
            addresses: addresses(["10.244.1.0", "fd00:0:0:1::"]),
            mtu: 1472,
            check_sources: true,
            workers: 1,
            peers,
            wireguard: None,
        }
    }

    #[test]
    fn a_peer_may_send_from_its_subnet_and_from_its_address_only() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let peers = [
            ("10.244.2.0/24", "192.0.2.2"),
            ("fd00:0:0:2::/64", "2001:db8::2"),
            ("10.244.3.0/24", "192.0.2.3"),
            ("fd00:0:0:3::/64", "2001:db8::3"),
        ];
        let peers = peers.map(|(subnet, public)| (subnet.parse().unwrap(), address(public)));
        let mut forwarding = forwarding(peers.to_vec());
        assert_eq!(forwarding.to_string(), "local 192.0.2.1:8285 and [2001:db8::1]:8285 mtu 1472 peers 4");
        let routing = Routing::new(&forwarding);
        for (family, sources) in [
            (0, [("10.244.2.7", true), ("192.0.2.2", true), ("10.244.3.7", false), ("fd00:0:0:2::7", false)]),
            (
                1,
                [
                    ("fd00:0:0:2::7", true),
                    ("2001:db8::2", true),
                    ("fd00:0:0:3::7", false),
                    ("10.244.2.7", false),
                ],
            ),
            (0, [("192.0.2.3", false), ("1.1.1.1", false), ("2001:db8::2", false), ("::", false)]),
            (
                1,
                [
                    ("2001:db8::3", false),
                    ("2001::1", false),
                    ("192.0.2.2", false),
                    ("::ffff:192.0.2.2", false),
                ],
            ),
        ] {
            let (peer, stranger) = [("192.0.2.2", "192.0.2.4"), ("2001:db8::2", "2001:db8::4")][family];
            assert!(routing.knows(address(peer)) && !routing.knows(address(stranger)));
            for (source, allowed) in sources {
                assert_eq!(routing.owns(address(peer), address(source)), allowed, "{source} from {peer}");
            }
        }
        forwarding.check_sources = false;
        let routing = Routing::new(&forwarding);
        assert!(routing.knows(address("192.0.2.4")) && routing.knows(address("2001:db8::4")));
        assert!(routing.owns(address("192.0.2.2"), address("1.1.1.1")));
    }

    #[test]
    fn bytes_are_counted_by_public_address_and_go_on_when_other_peers_come_and_go() {
        let peer = |third: u8, public: &str| {
            (format!("10.244.{third}.0/24").parse().unwrap(), public.parse::<IpAddr>().unwrap())
        };
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let first = Routing::new(&forwarding(vec![peer(2, "192.0.2.2"), peer(3, "192.0.2.3")]));
        first.bytes(address("192.0.2.2")).unwrap().sent.add(7);
        first.bytes(address("192.0.2.3")).unwrap().received.add(9);
        assert!(first.bytes(address("192.0.2.4")).is_none() && first.bytes(address("2001:db8::2")).is_none());
        // One goes, one comes, one has another subnet.
        let next = forwarding(vec![peer(1, "192.0.2.1"), peer(9, "192.0.2.2")]);
        let next = Routing::following(&next, Some(&first));
        assert_eq!(next.bytes(address("192.0.2.2")).unwrap().sent.get(), 7);
        assert_eq!(next.bytes(address("192.0.2.1")).unwrap().sent.get(), 0);
        assert!(next.bytes(address("192.0.2.3")).is_none());
        let back = Routing::following(&forwarding(vec![peer(3, "192.0.2.3")]), Some(&next));
        assert_eq!(back.bytes(address("192.0.2.3")).unwrap().received.get(), 0, "it was gone");
    }

    proptest! {
        #[test]
        fn a_lookup_is_a_search_of_the_whole_list(
            subnets in prop::collection::btree_map(0u32..64, (20u8..=30, 1u8..9), 0..40),
            addresses in prop::collection::vec(0u32..(70 << 12), 100), v6 in any::<bool>(),
        ) {
            // The same numbers in either family, at the end of the address that counts.
            let family = if v6 { Family::V6 } else { Family::V4 };
            let base = match family {
                Family::V4 => u128::from(Ipv4Addr::new(10, 244, 0, 0).to_bits()),
                Family::V6 => 0xfd00 << 112,
            };
            let shift = if v6 { 64 } else { 0 };
            let unused = family.bits() - 32 - shift;
            let peers: Vec<(IpNet, IpAddr)> = subnets
                .into_iter()
                .rev()
                .map(|(number, (len, public))| {
                    let first = addr_of(family, base + (u128::from(number) << (12 + shift)));
                    let public = addr_of(family, (0x2001 << (family.bits() - 16)) + u128::from(public));
                    (IpNet::new(first, len + unused).unwrap(), public)
                })
                .collect();
            let routing = Routing::new(&forwarding(peers.clone()));
            let edges = peers.iter().flat_map(|(net, _)| {
                let (first, last) = (bits_of(net.network()), bits_of(net.broadcast()));
                [first - 1, first, last, last + 1]
            });
            for bits in addresses.iter().map(|offset| base + (u128::from(*offset) << shift)).chain(edges) {
                let address = addr_of(family, bits);
                let slow = peers.iter().find(|(net, _)| net.contains(&address)).map(|(_, public)| *public);
                prop_assert_eq!(routing.peer_of(address), slow);
            }
        }
    }
}
