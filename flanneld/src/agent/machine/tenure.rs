//! The lease over time: obtained, held, moved, lost.

use backends::host::StaleBridge;
use backends::{KernelChange, KernelError, Observed, Report};
use ipnet::IpNet;
use subnet::net::overlap;
use subnet::{Family, Lease, Loss, Subnets};

use super::lease::{Claiming, LeaseState};
use super::standing::{Standing, StoreTrouble};
use super::{Action, Machine, Ownership};
use crate::agent::{claim, condition};

impl Machine {
    /// Starts to obtain a lease, if there is none and none is being obtained.
    pub(super) fn claim(&mut self) {
        if self.own.claiming.is_running() || self.own.is_recalled() {
            return;
        }
        let due = self.own.contest.wait_at(self.now().at).is_some_and(|left| left.is_zero());
        if due || self.own.lease().is_none() && self.own.contest.loss().is_none() {
            self.start_claim();
        }
    }

    pub(super) fn start_claim(&mut self) {
        let Some(external) = &self.underlay.external else { return };
        let before = self.own.identity.former(self.hardware()).filter(|_| self.own.lost.is_empty()).cloned();
        let saved = self.ownership.previous.subnets;
        let previous = match self.own.lease() {
            Some(lease) => lease.subnets,
            None if !self.own.lost.is_empty() => Subnets::default(),
            None if saved.is_empty() => before.as_ref().map(|lease| lease.subnets).unwrap_or_default(),
            None => saved,
        };
        let facts = claim::ClaimFacts {
            network: self.force.network.clone(),
            identity: self.own.identity.clone(),
            active: self.force.active.clone(),
            public: external.public,
            previous,
            before,
            reserved: self.underlay.surroundings.reserved(),
            lans: self.underlay.surroundings.lans(),
            left: self.change.left.clone(),
            first: !self.own.followed,
            hooks: self.settings.hooks.clone(),
        };
        self.own.claiming = Claiming::Running((external.public, self.force.active.attachment(&self.macs())));
        self.act(Action::Claim(Box::new(facts)));
    }

    pub(super) fn leased(&mut self, lease: Lease) {
        let old = self.own.lease().map(|old| old.subnets).or(self.own.lost.last().copied());
        self.status.journal.leased(&lease, old);
        for family in Family::BOTH {
            if let Some(vtep) = lease.attachment.vtep(family) {
                self.own.identity.macs.set(family, vtep.mac);
            }
        }
        self.ownership.held.extend(lease.subnets.iter());
        if let Some(before) = self.own.hold(lease) {
            self.leave(before.subnets);
        }
        self.change.leased();
        self.own.contest.claimed_at(self.now().at);
        self.rules.due();
        self.status.health.note("store", Vec::new());
        self.status.health.set(condition::STORE, Ok(()));
        // After a loss the kernel decides when the node is ready again: see `judge`.
        if self.own.lost.is_empty() {
            self.status.health.set(condition::LEASE, Ok(()));
        }
        self.own.followed = true;
        self.act(Action::Follow);
        self.act(Action::Hold);
    }

    pub(super) fn lost(&mut self, loss: Loss) {
        self.status.health.set(condition::LEASE, Err(loss.to_string()));
        match &loss {
            // Pods use the subnet still, so the local routes to them stay; a new one is needed for others.
            Loss::Taken { subnets, .. } | Loss::Changed { subnets } => {
                self.status.journal.lost(&loss);
                self.own.lost.push(*subnets);
                self.ownership.held.extend(subnets.iter());
                self.own.state = LeaseState::Unclaimed;
            }
            Loss::Contested { .. } | Loss::Rewritten { .. } => {
                self.own.contest.lost_at(loss, self.now().at);
                let reason = self.own.contest.reason().unwrap_or_default();
                self.status.journal.contested(&reason);
                self.status.health.set(condition::LEASE, Err(reason));
            }
        }
    }

    /// What the host's addresses say about lost subnets, and so whether this node is ready with its lease.
    pub(super) fn judge_lease(&mut self, report: &Report) {
        let all = self.view.known.leases.clone();
        let own = self.own.lease().map(|lease| lease.subnets);
        let taken = |subnet| {
            let mut held = all.iter().flat_map(|all| all.leases.keys()).filter(|held| Some(**held) != own);
            held.any(|held| held.iter().any(|held| overlap(held, subnet)))
        };
        let stranded: Vec<String> =
            self.own.lost.iter().filter_map(|subnets| stranded(subnets, report, taken)).collect();
        if stranded.is_empty() {
            self.own.lost.clear();
        }
        let state = match (self.own.contest.reason(), stranded.is_empty()) {
            (Some(reason), _) => Err(reason),
            (None, false) => Err(stranded.join("; ")),
            (None, true) => Ok(()),
        };
        self.status.health.set(condition::LEASE, state);
    }

    /// The gateway addresses of earlier subnets on bridges, which would keep the bridge plugin from adding pods, and
    /// which have to be removed. A bridge with pods on it is only named, since they use the address, and so is an
    /// address that came back: somebody wants it.
    pub(super) fn stale_bridges(&mut self, observed: &Observed) -> Option<Vec<KernelChange>> {
        let own = self.own.lease().map(|lease| lease.subnets)?;
        let Ownership { held, records, freed, .. } = &self.ownership;
        let network = &self.force.network;
        let peers = |subnet| records.has_subnet(subnet) && network.ranges().any(|range| range.allows(subnet));
        let stale = observed.host.stale_bridges(own, |subnet| held.contains(&subnet) || peers(subnet));
        let (back, stale): (Vec<_>, Vec<_>) =
            stale.into_iter().partition(|bridge| freed.contains(&(bridge.name, bridge.net)));
        let (idle, busy): (Vec<StaleBridge>, Vec<StaleBridge>) =
            stale.into_iter().partition(|bridge| bridge.ports == 0);
        self.ownership.draining = !busy.is_empty();
        self.status.health.note("bridges", self.status.journal.busy_bridges(&busy, &back, &own));
        let changes: Vec<KernelChange> =
            idle.iter().map(|bridge| KernelChange::DelAddress(bridge.name, bridge.net)).collect();
        self.turn.freeing = idle;
        (!changes.is_empty()).then_some(changes)
    }

    /// Takes the addresses that were removed from bridges out of what was observed.
    pub(super) fn note_freed(&mut self, failures: &[(usize, KernelError)], observed: &mut Observed) {
        let idle = std::mem::take(&mut self.turn.freeing);
        let made: Vec<KernelChange> =
            idle.iter().map(|bridge| KernelChange::DelAddress(bridge.name, bridge.net)).collect();
        self.status.journal.mended_bridges(&made, failures);
        for (index, StaleBridge { name, net, .. }) in idle.into_iter().enumerate() {
            if failures.iter().all(|(failed, _)| *failed != index) {
                self.ownership.freed.insert((name, net));
                observed.host.forget_address(&name, net);
            }
        }
    }

    /// Takes note of what the store says.
    pub(super) fn hear(&mut self) {
        let known = self.view.known.clone();
        self.status.journal.store(known.trouble.as_deref(), known.refused);
        self.stand(known.trouble.as_ref().map(|why| (why.clone(), known.refused)));
        let state = match (known.leases, known.trouble) {
            (Some(_), _) => Ok(()),
            (None, Some(trouble)) => Err(trouble),
            (None, None) => Err("the leases of the other nodes were not read yet".to_owned()),
        };
        self.status.health.set(condition::PEERS, state);
    }

    /// Tells how this node stands with its store, which may be in trouble.
    fn stand(&mut self, trouble: Option<(String, bool)>) {
        // What is wrong at a start without the store is told by those who wait for it.
        if !self.own.followed || self.own.lease().is_none() || self.own.contest.loss().is_some() {
            return;
        }
        let now = self.now().wall;
        self.own.trouble = trouble.map(|(why, refused)| {
            // A store that comes back and refuses this node has done so since then.
            let before = self.own.trouble.as_ref().filter(|before| before.refused == refused);
            StoreTrouble { since: before.map_or(now, |before| before.since), why, refused }
        });
        let standing = Standing::at(now, self.own.trouble.as_ref(), &self.own.tenure);
        self.status.health.note("store", standing.notes);
        match standing.unready {
            Some(why) => {
                if !std::mem::replace(&mut self.own.lapsed, true) {
                    tracing::error!("{why}");
                }
                self.status.health.set(condition::STORE, Err(why));
            }
            None => {
                self.own.lapsed = false;
                self.status.health.set(condition::STORE, Ok(()));
            }
        }
    }
}

/// Why a lost subnet is still in use on this host, if it is. `taken`: another node holds it now.
pub(super) fn stranded(subnets: &Subnets, report: &Report, taken: impl Fn(IpNet) -> bool) -> Option<String> {
    let links = report.observed.host.links.values();
    let on = |subnet: IpNet| {
        links.clone().find(|link| {
            link.addresses.iter().any(|address| subnet.contains(&address.net.addr()))
                && !report.observed.state.links.contains_key(&link.name)
        })
    };
    let (subnet, link) = subnets.iter().find_map(|subnet| Some((subnet, on(subnet)?)))?;
    let whose = if taken(subnet) { "now belongs to another node" } else { "is no longer this node's" };
    Some(format!(
        "{subnet} {whose}, but {} still has an address in it: drain this node's pods, and the address is removed \
         from a bridge that has none any more",
        link.name
    ))
}
