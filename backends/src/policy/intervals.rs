//! Sets of addresses as intervals: blocks without their exceptions, and several of them together.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use subnet::Family;

/// Addresses of one family, as intervals that neither overlap nor touch, in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Intervals {
    /// The family.
    pub(super) family: Family,
    parts: Vec<(u128, u128)>,
}

impl Intervals {
    /// Those of a block without its exceptions; exceptions outside of it mean nothing.
    pub(super) fn block(cidr: IpNet, except: &[IpNet]) -> Self {
        let family = Family::of(cidr.addr());
        let mut parts = vec![bounds(cidr)];
        for hole in except.iter().filter(|hole| Family::of(hole.addr()) == family) {
            let (from, to) = bounds(*hole);
            parts = parts
                .into_iter()
                .flat_map(|(first, last)| {
                    let before = from.checked_sub(1).map(|end| (first, last.min(end)));
                    let behind = to.checked_add(1).map(|start| (first.max(start), last));
                    [before, behind].into_iter().flatten()
                })
                .filter(|(first, last)| first <= last)
                .collect();
        }
        Self { family, parts: joined(parts) }
    }

    /// What is in any of these; all of them must be of `family`.
    pub(super) fn union<'a>(family: Family, all: impl IntoIterator<Item = &'a Self>) -> Self {
        let parts = all.into_iter().flat_map(|one| one.parts.iter().copied()).collect();
        Self { family, parts: joined(parts) }
    }

    /// Whether there is no address.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The block that this is, if it is one.
    pub(super) fn as_net(&self) -> Option<IpNet> {
        let [(first, last)] = *self.parts.as_slice() else { return None };
        let width = if self.family == Family::V4 { 32 } else { 128 };
        let free = u128::BITS - (first ^ last).leading_zeros();
        let net = net(self.family, first, (width - free) as u8)?;
        (bounds(net) == (first, last)).then_some(net)
    }

    /// First and last address of each.
    pub(super) fn bounds(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
        self.parts.iter().map(|(first, last)| (address(self.family, *first), address(self.family, *last)))
    }
}

fn joined(mut parts: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    parts.sort_unstable();
    let mut joined: Vec<(u128, u128)> = Vec::with_capacity(parts.len());
    for (first, last) in parts {
        match joined.last_mut() {
            Some(before) if before.1.checked_add(1).is_none_or(|next| first <= next) => {
                before.1 = before.1.max(last);
            }
            _ => joined.push((first, last)),
        }
    }
    joined
}

fn bounds(net: IpNet) -> (u128, u128) {
    (number(net.network()), number(net.broadcast()))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

fn net(family: Family, first: u128, prefix: u8) -> Option<IpNet> {
    match address(family, first) {
        IpAddr::V4(v4) => Ipv4Net::new(v4, prefix).ok().map(IpNet::from),
        IpAddr::V6(v6) => Ipv6Net::new(v6, prefix).ok().map(IpNet::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(cidr: &str, except: &[&str]) -> String {
        let except: Vec<IpNet> = except.iter().map(|net| net.parse().unwrap()).collect();
        let intervals = Intervals::block(cidr.parse().unwrap(), &except);
        intervals.bounds().map(|(from, to)| format!("{from}-{to} ")).collect()
    }

    #[test]
    fn exceptions_are_cut_out() {
        assert_eq!(words("10.0.0.0/24", &[]), "10.0.0.0-10.0.0.255 ");
        assert_eq!(words("10.0.0.0/24", &["10.0.0.0/25"]), "10.0.0.128-10.0.0.255 ");
        assert_eq!(words("10.0.0.0/24", &["10.0.0.64/26"]), "10.0.0.0-10.0.0.63 10.0.0.128-10.0.0.255 ");
        assert_eq!(words("10.0.0.0/24", &["10.0.0.0/24"]), "");
        assert_eq!(words("10.0.0.0/24", &["10.0.0.0/8", "11.0.0.0/8", "::/0"]), "");
        assert_eq!(words("0.0.0.0/0", &["255.255.255.255/32", "0.0.0.0/32"]), "0.0.0.1-255.255.255.254 ");
        assert_eq!(words("::/0", &["8000::/1"]), "::-7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ");
    }

    #[test]
    fn what_is_a_block_is_known_as_one() {
        let block = |cidr: &str, except: &[&str]| {
            let except: Vec<IpNet> = except.iter().map(|net| net.parse().unwrap()).collect();
            Intervals::block(cidr.parse().unwrap(), &except).as_net().map(|net| net.to_string())
        };
        for net in ["0.0.0.0/0", "::/0", "10.1.2.3/32", "10.0.0.0/7", "fd00::/48"] {
            assert_eq!(block(net, &[]).as_deref(), Some(net));
        }
        assert_eq!(block("10.0.0.0/8", &["10.128.0.0/9"]).as_deref(), Some("10.0.0.0/9"));
        assert_eq!(block("10.0.0.0/8", &["10.128.0.0/10"]), None);
        let halves = ["10.0.0.0/9", "10.128.0.0/9"].map(|net| Intervals::block(net.parse().unwrap(), &[]));
        assert_eq!(Intervals::union(Family::V4, &halves).as_net(), Some("10.0.0.0/8".parse().unwrap()));
    }
}
