//! Addresses and prefixes of one or both IP families, so that nothing above has to be written twice.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which Flannel writes them.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of `addr`.
    pub fn of(addr: IpAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The length of an address in bits: 32 or 128.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The pod subnets of one node: at most one of each family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subnets {
    /// The IPv4 subnet, without host bits.
    pub v4: Option<Ipv4Net>,
    /// The IPv6 subnet, without host bits.
    pub v6: Option<Ipv6Net>,
}

impl Subnets {
    /// The subnet of one family.
    pub fn get(&self, family: Family) -> Option<IpNet> {
        match family {
            Family::V4 => self.v4.map(IpNet::V4),
            Family::V6 => self.v6.map(IpNet::V6),
        }
    }

    /// Sets the subnet of `net`'s family, cutting its host bits off.
    pub fn set(&mut self, net: IpNet) {
        match net.trunc() {
            IpNet::V4(v4) => self.v4 = Some(v4),
            IpNet::V6(v6) => self.v6 = Some(v6),
        }
    }

    /// All subnets, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + use<> {
        let copy = *self;
        Family::BOTH.into_iter().filter_map(move |family| copy.get(family))
    }

    /// Whether there is no subnet at all.
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }

    /// Whether any subnet of `self` shares an address with any of `other`.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.iter().any(|a| other.iter().any(|b| overlap(a, b)))
    }
}

impl FromIterator<IpNet> for Subnets {
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        let mut subnets = Self::default();
        nets.into_iter().for_each(|net| subnets.set(net));
        subnets
    }
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.v4, self.v6) {
            (Some(v4), Some(v6)) => write!(f, "{v4} and {v6}"),
            (Some(v4), None) => v4.fmt(f),
            (None, Some(v6)) => v6.fmt(f),
            (None, None) => f.write_str("no subnet"),
        }
    }
}

/// The addresses that other nodes send a node's encapsulated packets to (Flannel's public IP).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublicAddrs {
    /// The IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// The IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

impl PublicAddrs {
    /// The address of one family.
    pub fn get(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::V4),
            Family::V6 => self.v6.map(IpAddr::V6),
        }
    }
}

impl PublicAddrs {
    /// Whether these are of the same node: by IPv4, as Flannel recognises nodes (contract K8), and by IPv6
    /// where not both have IPv4.
    pub fn same_node(&self, other: &Self) -> bool {
        match (self.v4, other.v4) {
            (Some(one), Some(other)) => one == other,
            _ => self.v6.is_some() && self.v6 == other.v6,
        }
    }
}

impl FromIterator<IpAddr> for PublicAddrs {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addrs: I) -> Self {
        let mut public = Self::default();
        for addr in addrs {
            match addr {
                IpAddr::V4(v4) => public.v4 = Some(v4),
                IpAddr::V6(v6) => public.v6 = Some(v6),
            }
        }
        public
    }
}

impl fmt::Display for PublicAddrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.v4, self.v6) {
            (Some(v4), Some(v6)) => write!(f, "{v4} and {v6}"),
            (Some(v4), None) => v4.fmt(f),
            (None, Some(v6)) => v6.fmt(f),
            (None, None) => f.write_str("no public address"),
        }
    }
}

/// Whether two prefixes share an address. Prefixes of different families never do.
pub fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// Whether a host can have this address and be sent packets there from another.
pub fn is_of_a_node(addr: IpAddr) -> bool {
    let never = addr.is_unspecified() || addr.is_loopback() || addr.is_multicast();
    !never
        && match addr {
            // 240.0.0.0/4, broadcast included, and 0.0.0.0/8.
            IpAddr::V4(v4) => v4.octets()[0] < 240 && v4.octets()[0] != 0,
            // Link-local addresses mean nothing without the name of a device.
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && v6.to_ipv4_mapped().is_none(),
        }
}

/// An address as a number; the inverse of [`addr_of`].
pub fn bits_of(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The address of `family` with the number `bits`; IPv4 takes the low 32 bits.
pub fn addr_of(family: Family, bits: u128) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits((bits & u128::from(u32::MAX)) as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(bits)),
    }
}

/// The prefix that holds exactly `addr`: `/32` or `/128`.
pub fn host(addr: IpAddr) -> IpNet {
    IpNet::from(addr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_sees_containment_in_both_directions_and_keeps_families_apart() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        assert!(overlap(net("10.0.0.0/8"), net("10.1.2.0/24")));
        assert!(overlap(net("10.1.2.0/24"), net("10.0.0.0/8")));
        assert!(!overlap(net("10.1.2.0/24"), net("10.1.3.0/24")));
        assert!(!overlap(net("0.0.0.0/0"), net("fd00::/8")));
        assert!(overlap(net("0.0.0.0/0"), net("10.1.3.0/24")));
    }

    #[test]
    fn nodes_are_told_apart_by_ipv4_and_without_it_by_ipv6() {
        let public =
            |text: &str| text.split_whitespace().map(|addr| addr.parse::<IpAddr>().unwrap()).collect();
        let same = |one: &str, other: &str| PublicAddrs::same_node(&public(one), &public(other));
        assert!(same("192.0.2.1 2001:db8::1", "192.0.2.1 2001:db8::2"));
        assert!(!same("192.0.2.1 2001:db8::1", "192.0.2.2 2001:db8::1"));
        assert!(same("2001:db8::1", "192.0.2.2 2001:db8::1") && same("2001:db8::1", "2001:db8::1"));
        assert!(!same("2001:db8::1", "2001:db8::2") && !same("192.0.2.1", "2001:db8::1") && !same("", ""));
    }

    #[test]
    fn numbers_and_addresses_are_inverse() {
        for text in ["10.244.3.0", "255.255.255.255", "fd00::1", "::"] {
            let addr: IpAddr = text.parse().unwrap();
            assert_eq!(addr_of(Family::of(addr), bits_of(addr)), addr);
        }
    }
}
