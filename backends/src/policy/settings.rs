//! What an operator chose for network policies, and what the node is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::Family;

/// What an operator chose, and what the node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's network, one of each family at most.
    pub networks: Vec<IpNet>,
    /// This node's part of it.
    pub subnets: Vec<IpNet>,
    /// Addresses inside the network that are no pod's: of each lease the first one and the gateway.
    pub nodes: BTreeSet<IpAddr>,
    /// Whether addresses of this node that belong to no known pod are cut off.
    pub strict: bool,
    /// Whether the kernel has IPVS, whose packets pass the hook `output` on their way to pods, and not `forward`.
    pub ipvs: bool,
    /// The NFLOG group that is told of refused packets.
    pub log_group: Option<u16>,
}

impl Settings {
    pub(super) fn families(&self) -> impl Iterator<Item = Family> + '_ {
        Family::BOTH.into_iter().filter(|family| self.network(*family).is_some())
    }

    pub(super) fn network(&self, family: Family) -> Option<IpNet> {
        self.networks.iter().copied().find(|net| Family::of(net.addr()) == family)
    }
}

/// How names of sets tell the families apart.
pub(super) fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}
