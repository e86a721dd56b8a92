//! Network policies on this node: what is known of the cluster, brought into the kernel.
//!
//! ```text
//! watches ── news ──► Known ──► Cluster ┐
//! socket ── ADD, DEL ──► Kept ──────────┤ Engine ──► Enforcer ──► one transaction
//! agent ── leases ──► Facts ────────────┘    ▲
//! kernel ── nftables, bridges ───────────────┘ forget, and look
//! ```

mod adding;
pub(crate) mod announce;
mod clean;
pub(crate) mod client;
mod denied;
mod exchange;
mod explain;
mod figures;
mod kept;
mod known;
mod readings;
mod request;
pub(crate) mod socket;
pub(crate) mod sole;
mod steering;
mod task;
#[cfg(test)]
mod tests;
mod watches;

use std::collections::BTreeSet;
use std::net::IpAddr;

use backends::policy::{Settings, SteerMode};
use ipnet::IpNet;
use subnet::{Leases, NetworkConfig, Subnets};

use crate::{fast_path, ipvs};
pub(crate) use clean::clean;
use figures::Figures;
pub(crate) use task::Policies;

/// Whether policies are enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum PolicyMode {
    /// Not at all, and nothing of them is left.
    #[default]
    Off,
    /// For pods that are known.
    On,
    /// Also, addresses of this node that belong to no known pod are cut off.
    Strict,
}

/// What the operator says about policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PolicyOptions {
    /// Whether they are enforced.
    pub(crate) mode: PolicyMode,
    /// Whether frames between pods of this node are routed.
    pub(crate) steer: SteerMode,
    /// The lowest of the eight bits of connection marks that are ours.
    pub(crate) mark_shift: u32,
    /// The NFLOG group that is told of refused packets.
    pub(crate) log_group: Option<u16>,
    /// Whether flows of pods may skip the rules of policies once they were judged.
    pub(crate) fast_path: fast_path::FastPathMode,
}

impl PolicyOptions {
    /// The settings of the compiler.
    fn settings(&self, facts: &PolicyFacts) -> Settings {
        Settings {
            networks: facts.networks.clone(),
            subnets: facts.subnets.clone(),
            nodes: facts.nodes.clone(),
            strict: self.mode == PolicyMode::Strict,
            ipvs: ipvs::is_there(),
            log_group: self.log_group,
        }
    }
}

/// What leases say that policies depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PolicyFacts {
    /// The cluster's networks.
    pub(crate) networks: Vec<IpNet>,
    /// This node's part of them.
    pub(crate) subnets: Vec<IpNet>,
    /// Addresses inside the networks that are nodes'.
    pub(crate) nodes: BTreeSet<IpAddr>,
}

impl PolicyFacts {
    /// What these leases say.
    pub(crate) fn of(network: &NetworkConfig, own: Subnets, all: &Leases) -> Self {
        let subnets = all.leases.keys().flat_map(Subnets::iter).chain(own.iter());
        let nodes = subnets.flat_map(|net| [net.network(), subnet::env_file::gateway(net)]);
        Self {
            networks: network.networks().iter().collect(),
            subnets: own.iter().collect(),
            nodes: nodes.collect(),
        }
    }
}
