//! The ids of nexthop objects (`RTM_NEWNEXTHOP`, Linux 5.3), and whether this kernel has such objects.

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net};

/// The first byte of an id: our route protocol number, 70, or one of those that follow if another program has the id.
const REGIONS: RangeInclusive<u8> = 70..=73;

/// The id of a nexthop object.
///
/// In those of flannel-rs the last three bytes are the number of the subnet that is reached through the object: the address
/// without its host part, so for 10.1.2.0/24 the id is 0x460a0102. Agents of different networks have different ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NexthopId(NonZeroU32);

impl NexthopId {
    /// The number as the kernel has it.
    pub(crate) fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number).map(Self)
    }

    /// Whether it is of the range from which agents of flannel-rs take ids.
    pub(crate) fn is_of_range(self) -> bool {
        REGIONS.contains(&self.get().to_be_bytes()[0])
    }

    /// The number.
    pub(crate) fn get(self) -> u32 {
        self.0.get()
    }

    fn subnet_number(self) -> u32 {
        self.get() & 0x00ff_ffff
    }

    /// Whether it is one of those that a route of ours to `dst` may have.
    pub(crate) fn is_for(self, dst: IpNet) -> bool {
        matches!(dst, IpNet::V4(dst) if self.is_of_range() && subnet_number(dst) == self.subnet_number())
    }

    /// The subnets in `network` that it may be for, where subnets have this length.
    pub(crate) fn subnet_in(self, network: Ipv4Net, len: u8) -> Option<Ipv4Net> {
        let shift = 32 - u32::from(len);
        let number = self.subnet_number();
        if len < network.prefix_len() || !(8..=30).contains(&len) {
            return None;
        }
        // Longer subnets have more bits than an id: the network has the others.
        let base = u32::from(network.network()) >> shift;
        let candidate = (base & !0x00ff_ffff) | number;
        let candidate = if candidate < base { candidate.checked_add(0x0100_0000)? } else { candidate };
        let subnet = Ipv4Net::new(candidate.checked_shl(shift)?.into(), len).ok()?;
        (network.contains(&subnet) && subnet_number(subnet) == number).then_some(subnet)
    }
}

impl fmt::Display for NexthopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The ids that the object of a route to `dst` may have: the first that no other program has.
pub(super) fn candidates(dst: Ipv4Net) -> impl Iterator<Item = NexthopId> {
    let number = subnet_number(dst);
    REGIONS.filter_map(move |region| NexthopId::new(u32::from(region) << 24 | number))
}

pub(super) fn subnet_number(subnet: Ipv4Net) -> u32 {
    u32::from(subnet.network()).checked_shr(32 - u32::from(subnet.prefix_len())).unwrap_or_default()
        & 0x00ff_ffff
}

/// Whether this kernel has nexthop objects for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NexthopSupport {
    /// It has them. `taken` are the ids of our range that other programs have.
    Usable {
        /// Those ids.
        taken: BTreeSet<NexthopId>,
    },
    /// It does not know them (before Linux 5.3), or refuses them: routes are plain.
    Refused,
}

impl Default for NexthopSupport {
    fn default() -> Self {
        Self::Usable { taken: BTreeSet::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subnet_of_an_id_is_found_in_its_network_and_in_no_other() {
        for (subnet, network) in [
            ("10.1.2.0/24", "10.1.0.0/16"),
            ("10.0.0.0/24", "10.0.0.0/8"),
            ("255.255.255.0/24", "255.0.0.0/8"),
            ("10.1.2.192/26", "10.1.0.0/16"),
            ("10.255.255.252/30", "10.0.0.0/8"),
            ("172.16.0.0/20", "172.16.0.0/12"),
        ] {
            let (subnet, network): (Ipv4Net, Ipv4Net) = (subnet.parse().unwrap(), network.parse().unwrap());
            for id in candidates(subnet) {
                assert_eq!(id.subnet_in(network, subnet.prefix_len()), Some(subnet));
                assert_eq!(id.subnet_in("192.168.0.0/16".parse().unwrap(), subnet.prefix_len()), None);
            }
        }
    }
}
