//! The lease over time: obtained, held, moved, lost.

use std::sync::Arc;
use std::time::SystemTime;

use backends::host::StaleBridge;
use backends::{Change, Kernel, Observed, Report};
use ipnet::IpNet;
use subnet::{Family, Lease, LeaseStore, Loss, Subnets};
use tokio::task::JoinHandle;

use super::standing::{Standing, Trouble};
use super::{Agent, BULK, claim, condition};

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Starts to obtain a lease, if there is none and none is being obtained.
    pub(super) fn claim(&mut self) {
        if self.claiming.is_some() || self.reconnecting.is_some() {
            return;
        }
        let due = self.contest.wait().is_some_and(|left| left.is_zero());
        if due || self.lease.is_none() && self.contest.loss().is_none() {
            self.start_claim();
        }
    }

    pub(super) fn start_claim(&mut self) {
        let Some(external) = &self.external else { return };
        let before = self.identity.former(self.hardware()).filter(|_| self.lost.is_empty()).cloned();
        let previous = match &self.lease {
            Some(lease) => lease.subnets,
            None if !self.lost.is_empty() => Subnets::default(),
            None if self.previous.subnets.is_empty() => {
                before.as_ref().map(|lease| lease.subnets).unwrap_or_default()
            }
            None => self.previous.subnets,
        };
        let facts = claim::Facts {
            network: self.network.clone(),
            identity: self.identity.clone(),
            ways: self.ways.clone(),
            public: external.public,
            previous,
            before,
            reserved: self.surroundings.reserved(),
            lans: self.surroundings.lans(),
            left: self.change.left.clone(),
            first: self.following.is_none(),
        };
        self.claimed = Some((external.public, self.ways.attachment(&self.macs())));
        self.claiming = Some(Task::spawn(claim::obtain(Arc::clone(&self.store), facts, self.health.clone())));
    }

    pub(super) fn leased(&mut self, lease: Lease) {
        let old = self.lease.as_ref().map(|old| old.subnets).or(self.lost.last().copied());
        self.journal.leased(&lease, old);
        for family in Family::BOTH {
            if let Some(vtep) = lease.attachment.vtep(family) {
                self.identity.macs.set(family, vtep.mac);
            }
        }
        self.held.extend(lease.subnets.iter());
        if let Some(before) = self.lease.replace(lease) {
            self.leave(before.subnets);
        }
        self.change.leased();
        self.contest.claimed();
        self.plan = None;
        self.rules.due();
        self.health.note("store", Vec::new());
        self.health.set(condition::STORE, Ok(()));
        // After a loss the kernel decides when the node is ready again: see `judge`.
        if self.lost.is_empty() {
            self.health.set(condition::LEASE, Ok(()));
        }
        if self.following.is_none() {
            let (store, feed) = (Arc::clone(&self.store), self.feed.clone());
            self.following = Some(Task::spawn(async move { store.follow(&feed).await }));
        }
        if self.holding.is_none() {
            let store = Arc::clone(&self.store);
            self.holding = Some(Task::spawn(async move { store.hold().await }));
        }
    }

    pub(super) fn lost(&mut self, loss: Loss) {
        self.health.set(condition::LEASE, Err(loss.to_string()));
        match &loss {
            // Pods use the subnet still, so the local routes to them stay; a new one is needed for others.
            Loss::Taken { subnets, .. } | Loss::Changed { subnets } => {
                self.journal.lost(&loss);
                self.lost.push(*subnets);
                self.held.extend(subnets.iter());
                self.lease = None;
                self.plan = None;
            }
            Loss::Contested { .. } | Loss::Rewritten { .. } => {
                self.contest.lost(loss);
                let reason = self.contest.reason().unwrap_or_default();
                self.journal.contested(&reason);
                self.health.set(condition::LEASE, Err(reason));
            }
        }
    }

    /// Frees bridges of the gateway addresses of earlier subnets, which would keep the bridge plugin from
    /// adding pods, and takes them out of what was observed. A bridge with pods on it is only named, since
    /// they use the address, and so is an address that came back: somebody wants it.
    pub(super) async fn mend_bridges(&mut self, observed: &mut Observed) {
        let Some(own) = self.lease.as_ref().map(|lease| lease.subnets) else { return };
        let peers = |subnet| {
            self.records.has_subnet(subnet) && self.network.ranges().any(|range| range.allows(subnet))
        };
        let stale = observed.host.stale_bridges(own, |subnet| self.held.contains(&subnet) || peers(subnet));
        let (back, stale): (Vec<_>, Vec<_>) =
            stale.into_iter().partition(|bridge| self.freed.contains(&(bridge.name, bridge.net)));
        let (idle, busy): (Vec<StaleBridge>, Vec<StaleBridge>) =
            stale.into_iter().partition(|bridge| bridge.ports == 0);
        self.draining = !busy.is_empty();
        self.health.note("bridges", self.journal.busy_bridges(&busy, &back, &own));
        let changes: Vec<Change> =
            idle.iter().map(|bridge| Change::DelAddress(bridge.name, bridge.net)).collect();
        if changes.is_empty() {
            return;
        }
        let made = changes.clone();
        let failures = self.with_hands(move |hands| hands.kernel.apply(&changes)).await;
        self.journal.mended_bridges(&made, &failures);
        for (index, StaleBridge { name, net, .. }) in idle.into_iter().enumerate() {
            if failures.iter().all(|(failed, _)| *failed != index) {
                self.freed.insert((name, net));
                observed.host.forget_address(&name, net);
            }
        }
    }

    /// Takes note of what the store says.
    pub(super) fn hear(&mut self) {
        let known = self.known.borrow_and_update();
        // Whatever ended the pause: a snapshot that came meanwhile is seen here for the only time.
        if known.has_changed() {
            self.plan = None;
            // Many leases in place of as many: what held the old ones lies about in pieces.
            self.bulky |= known.leases.as_ref().is_some_and(|all| all.leases.len() >= BULK);
        }
        let known = {
            let shared = known;
            shared.clone()
        };
        self.journal.store(known.trouble.as_deref(), known.refused);
        self.stand(known.trouble.as_ref().map(|why| (why.clone(), known.refused)));
        let state = match (known.leases, known.trouble) {
            (Some(_), _) => Ok(()),
            (None, Some(trouble)) => Err(trouble),
            (None, None) => Err("the leases of the other nodes were not read yet".to_owned()),
        };
        self.health.set(condition::PEERS, state);
    }
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Tells how this node stands with its store, which may be in trouble.
    fn stand(&mut self, trouble: Option<(String, bool)>) {
        // What is wrong at a start without the store is told by those who wait for it.
        if self.following.is_none() || self.lease.is_none() || self.contest.loss().is_some() {
            return;
        }
        let now = SystemTime::now();
        self.trouble = trouble.map(|(why, refused)| {
            // A store that comes back and refuses this node has done so since then.
            let before = self.trouble.as_ref().filter(|before| before.refused == refused);
            Trouble { since: before.map_or(now, |before| before.since), why, refused }
        });
        let standing = Standing::at(now, self.trouble.as_ref(), &self.store.tenure());
        self.health.note("store", standing.notes);
        match standing.unready {
            Some(why) => {
                if !std::mem::replace(&mut self.lapsed, true) {
                    tracing::error!("{why}");
                }
                self.health.set(condition::STORE, Err(why));
            }
            None => {
                self.lapsed = false;
                self.health.set(condition::STORE, Ok(()));
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

/// A task that ends with its handle.
pub(super) struct Task<T>(JoinHandle<T>);

impl<T: Send + 'static> Task<T> {
    pub(super) fn spawn(future: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }

    /// The result; never there without a task. A task ends early only with the process.
    pub(super) async fn of(task: &mut Option<Self>) -> T {
        loop {
            let Some(running) = task else { return std::future::pending().await };
            let result = (&mut running.0).await;
            *task = None;
            if let Ok(result) = result {
                return result;
            }
        }
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
