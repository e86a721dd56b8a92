//! What the kernel should contain, from everything that is known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use backends::backend::Direct;
use backends::{Kernel, KernelError, KernelState, Macs, Outlook, Peers, Scene, Scope};
use ipnet::IpNet;
use subnet::{Family, Lease, LeaseStore, Leases, Subnets};
use tokio::time::Instant;

use super::underlay::node;
use super::{Agent, condition};
use crate::policy::Facts;

/// More nodes with one public address than this are not listed.
const MAX_NAMESAKES: usize = 4;

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Tells those who enforce network policies what leases say, if that may be news.
    pub(super) fn tell_policies(&self) {
        let Some(policies) = self.settings.policies.as_ref().filter(|_| self.plan.is_none()) else { return };
        let known = self.known.borrow();
        let (Some(lease), Some(all)) = (&self.lease, &known.leases) else { return };
        let facts = Some(Facts::of(&self.network, lease.subnets, all));
        policies.send_if_modified(|known| {
            let news = *known != facts;
            *known = facts;
            news
        });
    }

    pub(super) fn scope(&self) -> Scope {
        let own = self.lease.as_ref().map(|lease| lease.subnets).unwrap_or_default();
        let lens = self.network.ranges().map(|range| (Family::of(range.network.addr()), range.subnet_len));
        let old_lens =
            self.previous.subnets.iter().map(|subnet| (Family::of(subnet.addr()), subnet.prefix_len()));
        let networks = self.network.networks().iter().chain(self.previous.networks.iter());
        Scope {
            networks: networks.chain(self.change.former.iter().copied()).collect(),
            subnets: own
                .iter()
                .chain(self.previous.subnets.iter())
                .chain(self.change.left.iter().copied())
                .collect(),
            ranges: self.network.ranges().copied().collect(),
            subnet_lens: lens.chain(old_lens).collect(),
            records: Arc::clone(&self.records),
            underlay: self.external.as_ref().map(|external| external.index),
            devices: self.made.iter().copied().collect(),
        }
    }

    /// What the kernel should contain; `None` while that can't be known.
    pub(super) fn plan(&mut self) -> Option<Arc<KernelState>> {
        if self.expiry.is_some_and(|at| at <= Instant::now()) {
            self.plan = None;
        }
        if let Some(plan) = &self.plan {
            return Some(Arc::clone(plan));
        }
        let (lease, external) = (self.lease.clone()?, self.external.clone()?);
        let all = self.known.borrow().leases.clone()?;
        if !self.records.know(&all) {
            Arc::make_mut(&mut self.records).learn(&all);
        }
        if self.change.find_others(&self.network, &all) {
            self.rules.due();
        }
        self.find_left(&lease, &all);
        if let Some(why) = self
            .reconnecting
            .as_ref()
            .and_then(|_| lease.subnets.iter().find_map(|subnet| self.surroundings.covered(subnet)))
        {
            let why =
                format!("what was saved is not used: this node's subnet {why}; the store has to answer");
            self.health.set(condition::LEASE, Err(why));
            return None;
        }
        self.health.note("public-address", self.namesakes(&lease, &all));
        self.defend_macs(&all);
        self.ways.take_up(announced_by_others(&all, &lease));
        let peers = self.peers(&all);
        self.journal.peers(&peers, usable_nodes(&peers, &all));
        self.rules.admit(&peers);
        self.journal.ways(&self.ways);
        let node = backends::Node { direct: Arc::clone(&self.direct), ..node(&external) };
        let (own, macs) = (lease.subnets, self.macs());
        let scene = Scene { node: &node, own: &own, macs: &macs, peers: &peers.usable, all: &peers.usable };
        let mut state = self.ways.plan(scene);
        // Packets for pods that don't exist end here instead of circling by the default route.
        state.blackholes.extend(lease.subnets.iter().chain(self.change.left.iter().copied()));
        self.plan = Some(Arc::new(state));
        self.plan.clone()
    }

    /// Other nodes' leases with this node's public address: what is sent to their pods arrives here. Subnets that this
    /// node held itself are left out, for their leases may remain until they expire.
    fn namesakes(&self, lease: &Lease, all: &Leases) -> Vec<String> {
        let own = |subnets: &Subnets| subnets.iter().any(|subnet| self.held.contains(&subnet));
        let others = all.leases.values().filter(|other| !own(&other.subnets));
        let shared = |other: &Lease| {
            Family::BOTH.into_iter().find_map(|family| {
                lease.public.get(family).filter(|addr| other.public.get(family) == Some(*addr))
            })
        };
        let sentence = |other: &Lease| {
            let addr = shared(other)?;
            Some(format!(
                "another node, which has {}, announces this node's public address {addr}, so that its pods can't be \
                 reached: give each node its own (--public-ip, --iface, public-ip-overwrite), or delete what is left of a \
                 node that is gone",
                other.subnets
            ))
        };
        others.filter_map(sentence).take(MAX_NAMESAKES).collect()
    }

    /// The peers, each with the way to it. Ways that nobody needs any more are given up.
    fn peers(&mut self, all: &Leases) -> Peers {
        let mut before = Arc::clone(&self.interest().desired);
        if before.is_empty() {
            before = std::mem::take(&mut self.found);
        }
        let now = Instant::now().into_std();
        loop {
            let lease = self.lease.as_ref().expect("there is a plan only with a lease");
            let ask_again = self.ways.hear_ports(all, &lease.subnets, now);
            let mut outlook = Outlook {
                network: &self.network,
                former: &self.change.former,
                own: lease,
                ways: &self.ways,
                before: &before,
                surroundings: &self.surroundings,
                undecided: &BTreeSet::new(),
            };
            let mut peers = Peers::choose(outlook, all);
            let (undecided, decided) = self.disputes.weigh(&peers.disputed);
            if !undecided.is_empty() {
                outlook.undecided = &undecided;
                peers = Peers::choose(outlook, all);
            }
            let (given_up, next) = self.ways.give_up(&peers.usable, now);
            self.expiry = [next, ask_again].into_iter().flatten().map(Instant::from_std).chain(decided).min();
            if !given_up {
                return peers;
            }
            // What is kept for a restart says less from now on.
            self.keeper.stale();
        }
    }

    /// The MAC of each tunnel device of any way.
    pub(super) fn macs(&self) -> Macs {
        let former = self.identity.former(self.hardware());
        let own: Vec<&Lease> = self.lease.iter().chain(former).collect();
        self.identity.macs(&self.ways, &own, |_, _| false)
    }

    /// Has the kernel's notifications compared with what is known of these addresses.
    fn watch_neighbours(&self, addrs: &[IpAddr], direct: &Direct) {
        let watched: BTreeMap<IpAddr, bool> =
            addrs.iter().map(|addr| (*addr, direct.contains_key(addr))).collect();
        self.set_interest(|interest| interest.neighbours = Arc::new(watched));
    }

    /// Finds out which peers are on this node's own links, if the backend wants to know.
    pub(super) async fn find_direct(&mut self) -> Result<(), KernelError> {
        let addrs: Vec<IpAddr> = match self.known.borrow().leases.as_ref() {
            Some(all) if self.ways.ask_for_direct() => {
                let own = self.external.as_ref().map(|external| external.public).unwrap_or_default();
                let publics = all
                    .leases
                    .values()
                    .flat_map(|lease| Family::BOTH.into_iter().filter_map(|family| lease.public.get(family)));
                publics.filter(|addr| own.get(Family::of(*addr)) != Some(*addr)).collect()
            }
            _ => Vec::new(),
        };
        // Before asking: the answer may be there before this is back.
        self.watch_neighbours(&addrs, &self.direct);
        let found = if addrs.is_empty() {
            Direct::default()
        } else {
            let (before, asked) = (Arc::clone(&self.direct), addrs.clone());
            self.with_hands(move |hands| hands.kernel.direct(&asked, &before)).await?
        };
        self.watch_neighbours(&addrs, &found);
        if *found != *self.direct {
            self.journal.direct(&self.direct, &found);
            self.direct = found;
            self.plan = None;
        }
        Ok(())
    }
}

/// How many nodes are reached: one with both families is one.
fn usable_nodes(peers: &Peers, all: &Leases) -> usize {
    let usable: BTreeSet<IpNet> = peers.usable.iter().map(|peer| peer.subnet).collect();
    all.leases.keys().filter(|subnets| subnets.iter().any(|subnet| usable.contains(&subnet))).count()
}

fn announced_by_others<'a>(
    all: &'a Leases,
    own: &'a subnet::Lease,
) -> impl Iterator<Item = &'a subnet::Attachment> {
    all.leases.values().filter(|lease| lease.subnets != own.subnets).map(|lease| &lease.attachment)
}

#[cfg(test)]
mod tests {
    use backends::{BackendId, Peer};

    use super::*;

    #[test]
    fn a_peer_with_both_families_is_one_node() {
        let mut all = Leases::default();
        let both = br#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"host-gw"}"#;
        all.insert_entry("10.5.2.0-24&fd00:2::-64", both, 7);
        all.insert_entry("10.5.3.0-24", br#"{"PublicIP":"192.0.2.3","BackendType":"host-gw"}"#, 7);
        let peer = |subnet: &str, public: &str| Peer {
            subnet: subnet.parse().unwrap(),
            public: public.parse().unwrap(),
            mac: subnet::Mac([2, 0, 0, 0, 0, 1]),
            backend: BackendId::default(),
        };
        let mut peers = Peers {
            usable: vec![peer("10.5.2.0/24", "192.0.2.2"), peer("fd00:2::/64", "2001:db8::2")],
            ..Peers::default()
        };
        assert_eq!(usable_nodes(&peers, &all), 1);
        peers.usable.push(peer("10.5.3.0/24", "192.0.2.3"));
        assert_eq!(usable_nodes(&peers, &all), 2);
    }
}
