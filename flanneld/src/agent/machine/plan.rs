//! What the kernel should contain, from everything that is known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use backends::backend::Direct;
use backends::state::NexthopUse;
use backends::state::nexthop::NexthopSupport;
use backends::{KernelState, Macs, Peer, PeerContext, Peers, PlanInput, Scope, Settled, Surroundings};
use ipnet::IpNet;
use subnet::wireguard::PublicKey;
use subnet::{Family, Lease, Leases, Subnets};
use tokio::time::Instant;

use super::underlay::node;
use super::{Action, Machine, dispute};
use crate::agent::condition;
use crate::fast_path;
use crate::policy::PolicyFacts;
use crate::probe::Targets;

/// More nodes with one public address than this are not listed.
const MAX_NAMESAKES: usize = 4;

impl Machine {
    /// Tells those who enforce network policies what leases say, if that may be news.
    pub(super) fn tell_policies(&self) {
        let Some(policies) = self.settings.policies.as_ref().filter(|_| !self.plan_holds()) else { return };
        let (Some(lease), Some(all)) = (self.own.lease(), &self.view.known.leases) else { return };
        let facts = Some(PolicyFacts::of(&self.force.network, lease.subnets, all));
        policies.send_if_modified(|known| {
            let news = *known != facts;
            *known = facts;
            news
        });
    }

    pub(super) fn scope(&self) -> Scope {
        let own = self.own.lease().map(|lease| lease.subnets).unwrap_or_default();
        let lens =
            self.force.network.ranges().map(|range| (Family::of(range.network.addr()), range.subnet_len));
        let old_lens = self
            .ownership
            .previous
            .subnets
            .iter()
            .map(|subnet| (Family::of(subnet.addr()), subnet.prefix_len()));
        let networks = self.force.network.networks().iter().chain(self.ownership.previous.networks.iter());
        Scope {
            networks: networks.chain(self.change.former.iter().copied()).collect(),
            subnets: own
                .iter()
                .chain(self.ownership.previous.subnets.iter())
                .chain(self.change.left.iter().copied())
                .collect(),
            ranges: self.force.network.ranges().copied().collect(),
            subnet_lens: if self.force.active.leave_routes_to_others() {
                Vec::new()
            } else {
                lens.chain(old_lens).collect()
            },
            records: Arc::clone(&self.ownership.records),
            underlay: self.underlay.external.as_ref().map(|external| external.index),
            devices: self.ownership.made.iter().copied().collect(),
            recalled: self.view.known.recalled,
        }
    }

    /// What the kernel should contain; `None` while that can't be known. It is computed again only if something that
    /// it depends on is another than before.
    pub(super) fn plan(&mut self) -> Option<Arc<KernelState>> {
        if self.plan_holds() {
            return self.planner.current();
        }
        if let Some(plan) = self.plan_of_leases() {
            return Some(plan);
        }
        let all = self.view.known.leases.clone()?;
        if self.own.lease().is_none() || self.underlay.external.is_none() {
            return None;
        }
        let before = self.planner.plan.as_ref().map(|(inputs, _)| &*inputs.leases.0);
        if !self.ownership.records.know(&all, before) {
            Arc::make_mut(&mut self.ownership.records).learn(&all, before);
        }
        self.planner.plan = None;
        if self.change.find_others(&self.force.network, &all) {
            self.rules.due();
        }
        self.find_left(&all);
        if let Some(why) = self.uncovered_recall() {
            self.status.health.set(condition::LEASE, Err(why));
            return None;
        }
        self.status.health.note("public-address", self.namesakes(&all));
        self.compare_keys(&all);
        self.defend_macs(&all);
        let own = self.own.lease()?.subnets;
        self.force.active.take_up(announced_by_others(&all, own));
        let peers = Arc::new(self.peers(&all));
        self.planner.peers = Arc::clone(&peers);
        self.status.journal.peers(&peers);
        self.rules.admit(&peers, self.now().at);
        self.status.journal.active(&self.force.active);
        self.tell_hooks(&peers, &all);
        let external = self.underlay.external.as_ref()?;
        let node = backends::Node { direct: Arc::clone(&self.underlay.direct), ..node(external) };
        let macs = self.macs();
        let usable: Vec<Peer> = peers.usable.values().copied().collect();
        let input = PlanInput { node: &node, own: &own, macs: &macs, peers: &usable, all: &usable };
        let mut state = self.force.active.plan(input);
        drop(usable);
        self.planner.hops = state.use_nexthops(&self.planner.nexthops, &self.view.interest.desired);
        // Packets for pods that don't exist end here instead of circling by the default route.
        state.blackholes.extend(own.iter().chain(self.change.left.iter().copied()));
        self.tell_probes(&peers, &state, external.mtu);
        self.tell_fast_path(external.name, &own);
        let inputs = self.inputs()?;
        self.planner.plan = Some((inputs, Arc::new(state)));
        self.planner.current()
    }

    /// Tells those who probe the peers which there are now.
    pub(super) fn tell_probes(&self, peers: &Peers, plan: &KernelState, underlay: u32) {
        let Some(probes) = &self.settings.probes else { return };
        let active = &self.force.active;
        let targets = Targets::of(&peers.usable, active, &plan.routes, active.mtu(underlay));
        probes.send_if_modified(|known| {
            let news = *known != targets;
            *known = targets;
            news
        });
    }

    /// Tells those who keep the fast path which networks and devices there are now.
    fn tell_fast_path(&self, external: backends::Name, own: &Subnets) {
        let Some(fast_path) = &self.settings.fast_path else { return };
        let network = &self.force.network;
        let others = Family::BOTH.into_iter().flat_map(|family| self.change.others(family));
        let facts = Some(fast_path::FastPathFacts {
            configured: network.fast_path,
            networks: network.networks().iter().chain(others.map(|(network, _)| network)).collect(),
            subnets: own.iter().chain(self.change.left.iter().copied()).collect(),
            outer: self.force.active.devices().chain([external]).collect(),
        });
        fast_path.facts.send_if_modified(|known| {
            let news = *known != facts;
            *known = facts;
            news
        });
    }

    /// Whether the plan is still what everything that is known asks for.
    pub(super) fn plan_holds(&self) -> bool {
        let expired = self.planner.expiry.is_some_and(|at| at <= self.now().at);
        let planned = self.planner.plan.as_ref().map(|(inputs, _)| inputs);
        !expired && planned.is_some() && planned == self.inputs().as_ref()
    }

    pub(super) fn inputs(&self) -> Option<Inputs> {
        let leases = Snapshot(self.view.known.leases.clone()?);
        let besides = Besides {
            lease: self.own.lease()?.clone(),
            recalled: self.own.is_recalled(),
            in_force: self.force.revision,
            macs: self.macs(),
            node: node(self.underlay.external.as_ref()?),
            direct: Arc::clone(&self.underlay.direct),
            surroundings: self.underlay.surroundings.clone(),
            left: self.change.left.clone(),
            nexthops: self.planner.nexthops.clone(),
        };
        Some(Inputs { leases, besides })
    }

    /// Has the kernel brought into the state of the plan.
    pub(super) fn converge(&mut self) {
        let Some(plan) = self.planner.current() else { return };
        let scope = self.scope();
        self.planner.repairs = Arc::ptr_eq(&self.view.interest.desired, &plan);
        let (held, wait) = self.status.journal.held(self.now().at.into_std());
        self.hold_back(wait);
        // Before the changes: their notifications have to be recognised as the desired state.
        self.view.interest.desired = Arc::clone(&plan);
        self.view.interest.scope = scope.clone();
        let since = self.known_since();
        if since.is_none() {
            self.planner.looked = Some(self.now().at);
        }
        self.act(Action::Converge { plan, scope, held, since });
    }

    /// The kernel as it was last known to be, if nothing but leases has changed since, and that is not too long ago. What the
    /// kernel tells wakes the loop for another reason.
    fn known_since(&mut self) -> Option<Arc<Settled>> {
        let recent = self.has_looked_lately(self.now());
        let since = self.planner.settled.take();
        since.filter(|_| recent && self.turn.knows_kernel && self.turn.rounds == 1)
    }

    /// Why what was saved can't be used, if it can't: the host has other addresses now.
    fn uncovered_recall(&self) -> Option<String> {
        let mut own = self.own.lease().filter(|_| self.own.is_recalled())?.subnets.iter();
        let why = own.find_map(|subnet| self.underlay.surroundings.covered(subnet))?;
        Some(format!("what was saved is not used: this node's subnet {why}; the store has to answer"))
    }

    /// Other nodes' leases with this node's public address: what is sent to their pods arrives here. Subnets that this
    /// node held itself are left out, for their leases may remain until they expire.
    fn namesakes(&self, all: &Leases) -> Vec<String> {
        let Some(lease) = self.own.lease() else { return Vec::new() };
        let own = |subnets: &Subnets| subnets.iter().any(|subnet| self.ownership.held.contains(&subnet));
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

    /// Says so where another node announces this node's WireGuard key: each peer has one of the two, and none has both. The
    /// younger of the two takes another key if it may.
    fn compare_keys(&mut self, all: &Leases) {
        let keys: BTreeSet<PublicKey> = self.force.active.identities().collect();
        let Some(lease) = self.own.lease().filter(|_| !keys.is_empty()) else {
            return self.status.health.forget(condition::WIREGUARD_KEY);
        };
        let other = |other: &&Lease| {
            let same =
                |family| other.attachment.wireguard(family).is_some_and(|data| keys.contains(&data.key));
            !other.public.same_node(&lease.public)
                && !other.subnets.iter().any(|subnet| self.ownership.held.contains(&subnet))
                && Family::BOTH.into_iter().any(same)
        };
        let other = all.leases.values().find(other);
        let why = other.map(|other| {
            format!(
                "the node {other} announces this node's WireGuard key: two nodes have the same key file (a copied \
                 disk?); remove it on one of them (wgkey in /run/flannel and /var/lib/flannel, or \
                 WIREGUARD_KEY_FILE) and restart flanneld there, or give it --wireguard-new-key"
            )
        });
        let give_way = other.is_some_and(|other| dispute::answer(lease, other) == dispute::Answer::Renounce);
        self.status.health.set(condition::WIREGUARD_KEY, why.map_or(Ok(()), Err));
        if give_way && self.settings.new_key {
            keys.into_iter().for_each(|key| self.act(Action::RenewKey(key)));
        }
    }

    /// The peers, each with the way to it. ActiveBackends that no peer needs any more are given up.
    fn peers(&mut self, all: &Leases) -> Peers {
        let mut before = Arc::clone(&self.view.interest.desired);
        if before.is_empty() {
            before = std::mem::take(&mut self.planner.found);
        }
        let (now, at) = (self.now().at.into_std(), self.now().at);
        let lease = self.own.lease().expect("there is a plan only with a lease").clone();
        loop {
            let ports = self.force.active.hear_ports(all, &lease.subnets, now);
            let keys = self.hear_keys(all, &lease);
            let mut context = PeerContext {
                network: &self.force.network,
                former: &self.change.former,
                own: &lease,
                active: &self.force.active,
                before: &before,
                surroundings: &self.underlay.surroundings,
                undecided: &BTreeSet::new(),
            };
            let mut peers = Peers::choose(context, all);
            let (undecided, decided) = self.own.disputes.weigh_at(&peers.disputed, at);
            if !undecided.is_empty() {
                context.undecided = &undecided;
                peers = Peers::choose(context, all);
            }
            let (given_up, next) = self.force.active.drop_unused(peers.usable.values(), now);
            let next = [next, ports].into_iter().flatten().map(Instant::from_std);
            self.planner.expiry = next.chain(decided).chain(keys).min();
            if !given_up {
                return peers;
            }
            // What is kept for a restart says less from now on.
            self.keeper.stale();
        }
    }

    /// The MAC of each tunnel device of any way.
    pub(super) fn macs(&self) -> Macs {
        let former = self.own.identity.former(self.hardware());
        let own: Vec<&Lease> = self.own.lease().into_iter().chain(former).collect();
        self.own.identity.macs(&self.force.active, &own, |_, _| false)
    }

    /// Has the kernel's notifications compared with what is known of these addresses.
    pub(super) fn watch_neighbours(&mut self, addrs: &[IpAddr]) {
        let direct = &self.underlay.direct;
        let watched: BTreeMap<IpAddr, bool> =
            addrs.iter().map(|addr| (*addr, direct.contains_key(addr))).collect();
        if *self.view.interest.neighbours != watched {
            self.view.interest.neighbours = Arc::new(watched);
        }
    }

    /// The peers that may be on this node's own links, if the backend wants to know.
    pub(super) fn peers_to_find(&self) -> Vec<IpAddr> {
        let Some(all) = self.view.known.leases.as_ref().filter(|_| self.force.active.ask_for_direct()) else {
            return Vec::new();
        };
        let own = self.underlay.external.as_ref().map(|external| external.public).unwrap_or_default();
        let of_lease =
            |lease: &Lease| Family::BOTH.into_iter().filter_map(|family| lease.public.get(family)).collect();
        let publics = all.leases.values().flat_map(|lease| -> Vec<IpAddr> { of_lease(lease) });
        publics.filter(|addr| own.get(Family::of(*addr)) != Some(*addr)).collect()
    }

    /// Takes note of the peers that are on this node's own links.
    pub(super) fn direct_is(&mut self, found: Direct) {
        if *found != *self.underlay.direct {
            self.status.journal.direct(&self.underlay.direct, &found);
            self.underlay.direct = found;
        }
        let asked: Vec<IpAddr> = self.view.interest.neighbours.keys().copied().collect();
        self.watch_neighbours(&asked);
    }
}

/// What was planned, and from what.
#[derive(Default)]
pub(super) struct Planner {
    pub(super) plan: Option<(Inputs, Arc<KernelState>)>,
    /// The peers that it reaches, and the leases that it can't use.
    pub(super) peers: Arc<Peers>,
    /// When the plan is another although nothing else is: the next way that no peer uses any more is given up then.
    pub(super) expiry: Option<Instant>,
    /// What an earlier run left in the kernel, until there is a plan.
    pub(super) found: Arc<KernelState>,
    /// The kernel as it is known to be, if it is, and when it was last read as a whole.
    pub(super) settled: Option<Arc<Settled>>,
    pub(super) looked: Option<Instant>,
    /// Whether routes can lead through nexthop objects, as last seen.
    pub(super) nexthops: NexthopSupport,
    /// How the plan's routes do.
    pub(super) hops: NexthopUse,
    /// How many plans followed from the one before by leases alone.
    #[cfg(test)]
    pub(super) followed: usize,
    /// The plan is the same as with the last look at the kernel: what is changed was undone by somebody.
    pub(super) repairs: bool,
}

impl Planner {
    pub(super) fn current(&self) -> Option<Arc<KernelState>> {
        self.plan.as_ref().map(|(_, plan)| Arc::clone(plan))
    }
}

/// Everything that a plan depends on, but for time.
#[derive(PartialEq)]
pub(super) struct Inputs {
    pub(super) leases: Snapshot,
    pub(super) besides: Besides,
}

/// What that is besides the leases.
#[derive(PartialEq)]
pub(super) struct Besides {
    lease: Lease,
    recalled: bool,
    in_force: u64,
    macs: Macs,
    node: backends::Node,
    direct: Direct,
    surroundings: Surroundings,
    left: Vec<IpNet>,
    nexthops: NexthopSupport,
}

/// All leases at one moment. Stores publish none that equals the one before, so that comparing 5,000 leases is not
/// necessary.
pub(super) struct Snapshot(pub(super) Arc<Leases>);

impl PartialEq for Snapshot {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// How many nodes are reached: one with both families is one.
pub(super) fn usable_nodes<'a>(usable: impl Iterator<Item = &'a Peer>, all: &Leases) -> usize {
    let usable: Vec<IpNet> = usable.map(|peer| peer.subnet).collect();
    let of = |family| usable.iter().filter(|subnet| Family::of(subnet.addr()) == family).count();
    // Of one family, each is a node of its own.
    if let [0, nodes] | [nodes, 0] = Family::BOTH.map(of) {
        return nodes;
    }
    let usable: BTreeSet<IpNet> = usable.into_iter().collect();
    all.leases.keys().filter(|subnets| subnets.iter().any(|subnet| usable.contains(&subnet))).count()
}

fn announced_by_others(all: &Leases, own: Subnets) -> impl Iterator<Item = &subnet::Attachment> {
    all.leases.values().filter(move |lease| lease.subnets != own).map(|lease| &lease.attachment)
}

#[cfg(test)]
mod tests {
    use backends::BackendId;

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
            wireguard: None,
            backend: BackendId::default(),
        };
        let mut peers = Peers {
            usable: [peer("10.5.2.0/24", "192.0.2.2"), peer("fd00:2::/64", "2001:db8::2")]
                .map(|peer| (peer.subnet, peer))
                .into(),
            ..Peers::default()
        };
        assert_eq!(usable_nodes(peers.usable.values(), &all), 1);
        let third = peer("10.5.3.0/24", "192.0.2.3");
        peers.usable.insert(third.subnet, third);
        assert_eq!(usable_nodes(peers.usable.values(), &all), 2);
    }
}
