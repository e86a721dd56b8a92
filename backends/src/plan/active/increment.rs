//! The plan for a few peers more or less, without planning for all others.

use ipnet::IpNet;
use subnet::{Family, Lease, SharedMap};

use super::ActiveBackends;
use crate::plan::backend::{Peer, PlanInput};
use crate::state::KernelState;

impl ActiveBackends {
    /// Whether each peer is reached by what its lease says alone: there is one backend, which knows no keys and no change of ports.
    pub fn are_plain(&self) -> bool {
        self.all.len() == 1
            && self.fallback_for.is_none()
            && !self.ports.said
            && self.identities().next().is_none()
    }

    /// Whether a lease is of that kind, so that no other backend has to be taken up for it.
    pub(crate) fn plainly_reach(&self, lease: &Lease) -> bool {
        let says_port = |family| lease.attachment.vtep(family).is_some_and(|vtep| vtep.port.is_some());
        self.are_plain()
            && self.current().reaches(&lease.attachment)
            && !Family::BOTH.into_iter().any(says_port)
    }

    /// What [`plan`](Self::plan) gives for the peers `now`, made of `planned`, which is the plan for those `before` with the same
    /// input; nothing else in it is changed. The peers of `input` are not looked at. `None` where a plan is not the sum of what
    /// each peer needs.
    pub fn plan_since(
        &self,
        input: PlanInput<'_>,
        planned: &KernelState,
        before: &SharedMap<IpNet, Peer>,
        now: &SharedMap<IpNet, Peer>,
    ) -> Option<KernelState> {
        let [only] = self.all.as_slice() else { return None };
        // Peers with one MAC have one entry together.
        let apart = only.backend.plans_peers_apart() && planned.fdb.len() == planned.neighbours.len();
        if !apart {
            return None;
        }
        let (mut gone, mut came) = (Vec::new(), Vec::new());
        for (_, was, now) in now.changes(before) {
            gone.extend(was.copied());
            came.extend(now.copied());
        }
        let of = |peers: &[Peer]| only.backend.plan(PlanInput { peers, all: peers, ..input });
        let (gone, came) = (of(&gone), of(&came));
        let mut state = planned.clone();
        for key in gone.fdb.keys() {
            state.fdb.remove(key);
        }
        for key in gone.neighbours.keys() {
            state.neighbours.remove(key);
        }
        for key in gone.routes.keys() {
            state.routes.remove(key);
        }
        state.fdb.extend(came.fdb);
        state.neighbours.extend(came.neighbours);
        state.routes.extend(came.routes);
        Some(state)
    }
}
