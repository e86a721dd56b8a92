//! Which peer a packet goes to, and which packets are taken from whom.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;

/// What a datapath is to do: a value that the reconciler compares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarding {
    /// Where datagrams come in and go out. Peers have the same port.
    pub local: SocketAddrV4,
    /// Source of ICMP errors: the address of the device.
    pub address: Ipv4Addr,
    /// The longest packet in bytes.
    pub mtu: u16,
    /// Takes datagrams from peers only, and packets only from the sender's own subnet or address.
    pub check_sources: bool,
    /// Threads for each direction.
    pub workers: u8,
    /// Subnet and public address of each peer; no two subnets overlap.
    pub peers: Vec<(Ipv4Net, Ipv4Addr)>,
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "local {} mtu {} peers {}", self.local, self.mtu, self.peers.len())
    }
}

/// A [`Forwarding`] made ready for lookups.
#[derive(Debug)]
pub struct Routing {
    /// See [`Forwarding::address`].
    pub address: Ipv4Addr,
    /// See [`Forwarding::mtu`].
    pub mtu: u16,
    /// The port of all peers.
    pub port: u16,
    /// See [`Forwarding::check_sources`].
    pub check_sources: bool,
    ranges: Vec<Range>,
    /// The public addresses of all peers, sorted.
    publics: Vec<u32>,
}

/// The addresses of one peer.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: u32,
    last: u32,
    public: Ipv4Addr,
}

impl Routing {
    /// The lookup tables of `forwarding`.
    pub fn new(forwarding: &Forwarding) -> Self {
        let range = |&(subnet, public): &(Ipv4Net, Ipv4Addr)| Range {
            first: subnet.network().to_bits(),
            last: subnet.broadcast().to_bits(),
            public,
        };
        let mut ranges: Vec<Range> = forwarding.peers.iter().map(range).collect();
        ranges.sort_unstable_by_key(|range| range.first);
        let mut publics: Vec<u32> = ranges.iter().map(|range| range.public.to_bits()).collect();
        publics.sort_unstable();
        publics.dedup();
        let Forwarding { local, address, mtu, check_sources, .. } = *forwarding;
        Self { address, mtu, port: local.port(), check_sources, ranges, publics }
    }

    /// The peer that has this address.
    #[inline]
    pub fn peer_of(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let bits = address.to_bits();
        let after = self.ranges.partition_point(|range| range.first <= bits);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (bits <= range.last).then_some(range.public)
    }

    /// Whether datagrams from this address are taken.
    #[inline]
    pub fn knows(&self, sender: Ipv4Addr) -> bool {
        !self.check_sources || self.publics.binary_search(&sender.to_bits()).is_ok()
    }

    /// Whether `sender` may send packets from `source`.
    #[inline]
    pub fn owns(&self, sender: Ipv4Addr, source: Ipv4Addr) -> bool {
        !self.check_sources || source == sender || self.peer_of(source) == Some(sender)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn forwarding(peers: Vec<(Ipv4Net, Ipv4Addr)>) -> Forwarding {
        Forwarding {
            local: "192.0.2.1:8285".parse().unwrap(),
            address: "10.244.1.0".parse().unwrap(),
            mtu: 1472,
            check_sources: true,
            workers: 1,
            peers,
        }
    }

    #[test]
    fn a_peer_may_send_from_its_subnet_and_from_its_address_only() {
        let (peer, other): (Ipv4Addr, Ipv4Addr) =
            ("192.0.2.2".parse().unwrap(), "192.0.2.3".parse().unwrap());
        let peers = vec![("10.244.2.0/24".parse().unwrap(), peer), ("10.244.3.0/24".parse().unwrap(), other)];
        let mut forwarding = forwarding(peers);
        let routing = Routing::new(&forwarding);
        assert!(routing.knows(peer) && !routing.knows("192.0.2.4".parse().unwrap()));
        for (source, allowed) in [
            ("10.244.2.7", true),
            ("192.0.2.2", true),
            ("10.244.3.7", false),
            ("192.0.2.3", false),
            ("1.1.1.1", false),
        ] {
            assert_eq!(routing.owns(peer, source.parse().unwrap()), allowed, "{source}");
        }
        forwarding.check_sources = false;
        let routing = Routing::new(&forwarding);
        assert!(routing.knows("192.0.2.4".parse().unwrap()));
        assert!(routing.owns(peer, "1.1.1.1".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn a_lookup_is_a_search_of_the_whole_list(
            subnets in prop::collection::btree_map(0u32..64, (20u8..=30, 1u8..9), 0..40),
            addresses in prop::collection::vec(0u32..(70 << 12), 100),
        ) {
            let base = Ipv4Addr::new(10, 244, 0, 0).to_bits();
            let peers: Vec<(Ipv4Net, Ipv4Addr)> = subnets
                .into_iter()
                .rev()
                .map(|(number, (len, public))| {
                    let net = Ipv4Net::new((base + (number << 12)).into(), len).unwrap();
                    (net, Ipv4Addr::new(192, 0, 2, public))
                })
                .collect();
            let routing = Routing::new(&forwarding(peers.clone()));
            let edges = peers.iter().flat_map(|(net, _)| {
                let (first, last) = (net.network().to_bits(), net.broadcast().to_bits());
                [first - 1, first, last, last + 1]
            });
            for bits in addresses.iter().map(|offset| base + offset).chain(edges) {
                let address = Ipv4Addr::from(bits);
                let slow = peers.iter().find(|(net, _)| net.contains(&address)).map(|(_, public)| *public);
                prop_assert_eq!(routing.peer_of(address), slow);
            }
        }
    }
}
