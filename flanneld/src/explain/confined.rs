//! Addresses whose packets never leave a node, whatever routes and leases say; pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

/// What such an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Confined {
    /// Of the loopback device: each pod and each host has its own.
    Loopback,
    /// To all on one link.
    LimitedBroadcast,
}

impl Confined {
    pub(super) fn of(address: IpAddr) -> Option<Self> {
        let address = address.to_canonical();
        let loopback = address.is_loopback().then_some(Self::Loopback);
        loopback.or_else(|| (address == Ipv4Addr::BROADCAST).then_some(Self::LimitedBroadcast))
    }
}

/// After "ADDRESS is".
impl fmt::Display for Confined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => {
                "a loopback address: its packets never leave the pod, or the node outside of pods, that sends them"
            }
            Self::LimitedBroadcast => {
                "the limited broadcast address: its packets reach those on the sender's own link and never leave the node"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_addresses_and_the_limited_broadcast_are_confined_and_no_others() {
        for (address, confined) in [
            ("127.0.0.1", Some(Confined::Loopback)),
            ("127.200.0.1", Some(Confined::Loopback)),
            ("::1", Some(Confined::Loopback)),
            ("::ffff:127.0.0.1", Some(Confined::Loopback)),
            ("255.255.255.255", Some(Confined::LimitedBroadcast)),
            ("255.255.255.254", None),
            ("10.244.1.255", None),
            ("128.0.0.1", None),
            ("::2", None),
        ] {
            assert_eq!(Confined::of(address.parse().unwrap()), confined, "{address}");
        }
    }
}
