//! Networks and subnets that the cluster or this node is leaving: they stay leased and routed while pods are in them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use backends::host::HostLink;
use backends::kernel::Observed;
use ipnet::IpNet;
use subnet::env_file::gateway;
use subnet::net::overlap;
use subnet::store::LEASE_TTL;
use subnet::{Attachment, Family, Lease, Leases, NetworkConfig, Subnets};

use super::Change;
use crate::agent::machine::Machine;

/// How often leases of subnets that the network has moved away from are renewed while pods are in them.
const RENEW_LEFT: Duration = LEASE_TTL.checked_div(2).expect("not by zero");

impl Machine {
    /// This node has other subnets than `before`: pods stay in those for a while.
    pub(in crate::agent::machine) fn leave(&mut self, before: Subnets) {
        let now = self.own.lease().map(|lease| lease.subnets).unwrap_or_default();
        let gone: Vec<IpNet> = before.iter().filter(|subnet| !now.iter().any(|now| now == *subnet)).collect();
        for subnet in &gone {
            tracing::info!("{subnet} stays leased and routed until no pod of this node is in it");
        }
        self.change.left.retain(|subnet| !now.iter().any(|now| now == *subnet) && !gone.contains(subnet));
        self.change.left.extend(gone);
    }

    /// Finds this node's leases in networks that the cluster is leaving, also those from before a restart: a bridge
    /// that still serves one tells that pods are in it.
    pub(in crate::agent::machine) fn find_left(&mut self, all: &Leases) {
        let Some(own) = self.own.lease() else { return };
        let beside = self.change.beside(own, all);
        let gone = self.change.beside.iter().any(|subnets| !all.leases.contains_key(subnets));
        if gone && *own.attachment.announced() != Attachment::HostGw {
            // A Go node that forgets a lease forgets the MAC too that the other one has.
            self.change.reclaim = true;
        }
        let host = Arc::clone(&self.view.interest.host);
        let serves = |subnet: &IpNet| {
            let gateway = gateway(*subnet);
            let addresses = |link: &HostLink| link.addresses.iter().any(|own| own.net.addr() == gateway);
            host.links.values().any(|link| link.bridge && addresses(link))
        };
        for subnet in beside.iter().flat_map(Subnets::iter).filter(serves) {
            let is_own = own.subnets.iter().any(|own| own == subnet);
            if !is_own && !self.change.left.contains(&subnet) {
                self.change.left.push(subnet);
            }
        }
        self.change.beside = beside;
    }

    /// Forgets the subnets of earlier networks in which there are no pods any more, and names the others.
    pub(in crate::agent::machine) fn judge_left(&mut self, observed: &Observed) {
        let used = |subnet: &IpNet| {
            observed.host.links.values().find(|link| {
                !observed.state.links.contains_key(&link.name)
                    && link.addresses.iter().any(|address| subnet.contains(&address.net.addr()))
            })
        };
        let mut notes = Vec::new();
        let before = self.change.left.len();
        self.change.left.retain(|subnet| match used(subnet) {
            Some(link) => {
                notes.push(format!(
                    "{subnet} is of an earlier network and its pods keep it: new pods can only be added once {} is \
                     empty, so drain this node",
                    link.name
                ));
                true
            }
            None => false,
        });
        let now = self.now().at;
        let renewed = self.change.renewed.is_some_and(|at| now - at < RENEW_LEFT);
        if self.change.left.is_empty() {
            self.change.renewed = None;
        } else if !renewed {
            self.change.renewed = Some(now);
            self.change.reclaim = true;
        }
        let draining = !self.change.left.is_empty() || !self.own.lost.is_empty() || self.ownership.draining;
        self.view.interest.draining = draining;
        if self.change.left.len() < before {
            self.rules.due();
        }
        self.status.health.note("network", notes);
    }
}

impl Change {
    /// Finds out in which former networks there still are leases. Says whether that is news.
    pub(in crate::agent::machine) fn find_others(&mut self, network: &NetworkConfig, all: &Leases) -> bool {
        let outside = |former: &IpNet| network.ranges().all(|range| !overlap(range.network, *former));
        let inhabited = |former: &IpNet| {
            all.leases.keys().any(|subnets| subnets.iter().any(|subnet| former.contains(&subnet)))
        };
        let others = if self.former.is_empty() {
            Vec::new()
        } else {
            self.former.iter().copied().filter(|former| outside(former) && inhabited(former)).collect()
        };
        let news = self.others != others;
        self.others = others;
        news
    }

    /// Whether no lease can be in a network that the cluster is leaving.
    pub(in crate::agent::machine) fn leaves_nothing(&self, network: &NetworkConfig) -> bool {
        let inside = |former: &IpNet| network.ranges().any(|range| overlap(range.network, *former));
        self.others.is_empty() && self.beside.is_empty() && self.former.iter().all(inside)
    }

    /// The networks that the cluster is leaving.
    pub(in crate::agent::machine) fn inhabited(&self) -> Vec<IpNet> {
        self.others.clone()
    }

    /// Which leases in those are this node's.
    fn beside(&self, own: &Lease, all: &Leases) -> BTreeSet<Subnets> {
        if self.others.is_empty() {
            return BTreeSet::new();
        }
        let left = |subnet: IpNet| self.others.iter().any(|network| network.contains(&subnet));
        let beside = all.by_public(&own.public).map(|lease| lease.subnets);
        beside.filter(|subnets| *subnets != own.subnets && subnets.iter().any(left)).collect()
    }

    /// The networks that the cluster is leaving, with this node's subnet in each.
    pub(in crate::agent::machine) fn others(&self, family: Family) -> Vec<(IpNet, Option<IpNet>)> {
        let of_family = self.others.iter().filter(|network| Family::of(network.addr()) == family);
        let own = |network: &IpNet| self.left.iter().copied().find(|subnet| network.contains(subnet));
        of_family.map(|network| (*network, own(network))).collect()
    }
}
