//! Which node has an address of the pod networks, by the leases that the agent knows; pure.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::status::PeerEntry;

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AddressHolder {
    /// A node that is reached at this address by this backend.
    Node { public: IpAddr, way: String },
    /// A node whose lease can't be used, and why.
    Skipped { subnet: String, why: String },
    /// No node has leased a subnet with it.
    Nobody,
    /// The agent does not answer, and why.
    Unknown(String),
}

impl AddressHolder {
    /// The node among these that has this address.
    pub(super) fn among(peers: Vec<PeerEntry>, address: IpAddr) -> Self {
        let has = |peer: &PeerEntry| peer.subnet.parse().is_ok_and(|net: IpNet| net.contains(&address));
        // Two leases may overlap: then one of them is skipped.
        let (skipped, usable): (Vec<PeerEntry>, Vec<PeerEntry>) =
            peers.into_iter().filter(has).partition(|peer| peer.state == "skipped");
        match usable.into_iter().chain(skipped).next() {
            None => Self::Nobody,
            Some(PeerEntry { state, public: Some(public), way, .. }) if state != "skipped" => {
                Self::Node { public, way: way.unwrap_or_default() }
            }
            Some(PeerEntry { subnet, why, .. }) => {
                Self::Skipped { subnet, why: why.unwrap_or_else(|| "it has no public address".to_owned()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usable_lease_with_the_address_counts() {
        let peer = |subnet: &str, state: &str| PeerEntry {
            subnet: subnet.into(),
            public: Some([192, 0, 2, 9].into()),
            way: Some("udp port 8285".into()),
            state: state.into(),
            why: Some("it overlaps".into()),
            ..PeerEntry::default()
        };
        let holder = |peers: Vec<PeerEntry>| AddressHolder::among(peers, [10, 244, 7, 3].into());
        let node = AddressHolder::Node { public: [192, 0, 2, 9].into(), way: "udp port 8285".into() };
        assert_eq!(holder(vec![peer("10.244.8.0/24", "reachable")]), AddressHolder::Nobody);
        assert_eq!(holder(vec![peer("10.244.7.0/24", "skipped"), peer("10.244.7.0/24", "reachable")]), node);
        let skipped = AddressHolder::Skipped { subnet: "10.244.7.0/24".into(), why: "it overlaps".into() };
        assert_eq!(holder(vec![peer("10.244.7.0/24", "skipped")]), skipped);
        assert_eq!(
            holder(vec![peer("fd00::/64", "reachable"), peer("x", "reachable")]),
            AddressHolder::Nobody
        );
    }
}
