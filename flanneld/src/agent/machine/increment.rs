//! The plan after a change of leases that says nothing of this node: made of the one before by what is different.
//!
//! docs/adr/031-what-leases-share.md has the figures. Whenever anything else has changed, or leases have to be looked at together,
//! all is computed again (`plan`).

use std::collections::BTreeSet;
use std::sync::Arc;

use backends::{KernelState, PeerContext, PlanInput};
use subnet::{Family, Lease, Leases};

use super::Machine;
use super::underlay::node;

impl Machine {
    /// The plan, if it follows from the last one by leases alone, each of which counts for itself. What `plan` finds out about
    /// leases besides is then as it was.
    pub(super) fn plan_of_leases(&mut self) -> Option<Arc<KernelState>> {
        let inputs = self.inputs()?;
        let (last, planned) = self.planner.plan.as_ref()?;
        let (before, planned) = (Arc::clone(&last.leases.0), Arc::clone(planned));
        let leases_alone = last.besides == inputs.besides
            && self.planner.expiry.is_none()
            && !self.own.is_recalled()
            && self.change.leaves_nothing(&self.force.network)
            && Arc::ptr_eq(&self.view.interest.desired, &planned);
        let all = Arc::clone(&inputs.leases.0);
        if !leases_alone || self.concern_this_node(&before, &all) {
            return None;
        }
        let (own, external) = (self.own.lease()?, self.underlay.external.as_ref()?);
        let context = PeerContext {
            network: &self.force.network,
            former: &self.change.former,
            own,
            active: &self.force.active,
            before: &planned,
            surroundings: &self.underlay.surroundings,
            undecided: &BTreeSet::new(),
        };
        let known = Arc::clone(&self.planner.peers);
        let peers = known.follow(context, &before, &all)?;
        let node = backends::Node { direct: Arc::clone(&self.underlay.direct), ..node(external) };
        let macs = self.macs();
        let input = PlanInput { node: &node, own: &own.subnets, macs: &macs, peers: &[], all: &[] };
        let mut state = self.force.active.plan_since(input, &planned, &known.usable, &peers.usable)?;
        let hops = state.use_nexthops_since(&self.planner.nexthops, &planned, &self.planner.hops)?;
        let underlay = external.mtu;
        #[cfg(test)]
        tests::is_as_if_all_were_computed(
            context,
            input,
            (&self.planner.nexthops, &planned),
            (&all, &peers, &state),
        );

        if !self.ownership.records.know(&all, Some(&before)) {
            Arc::make_mut(&mut self.ownership.records).learn(&all, Some(&before));
        }
        self.planner.hops = hops;
        self.planner.peers = Arc::new(peers);
        let peers = Arc::clone(&self.planner.peers);
        self.status.journal.peers(&peers);
        self.rules.admit(&peers, self.now().at);
        self.tell_hooks(&peers, &all);
        self.tell_probes(&peers, &state, underlay);
        self.planner.plan = Some((inputs, Arc::new(state)));
        #[cfg(test)]
        {
            self.planner.followed += 1;
        }
        self.planner.current()
    }

    /// Whether a lease that came, changed or went is this node's, has been, or says of itself what this node says.
    fn concern_this_node(&self, before: &Leases, all: &Leases) -> bool {
        let Some(own) = self.own.lease() else { return true };
        let macs = self.macs();
        let concerns = |lease: &Lease| {
            let same = |family| {
                let public = lease.public.get(family).filter(|addr| own.public.get(family) == Some(*addr));
                let vtep = lease.attachment.vtep(family);
                public.is_some() || vtep.is_some_and(|vtep| macs.get(family) == Some(vtep.mac))
            };
            lease.subnets.overlaps(&own.subnets)
                || lease.subnets.iter().any(|subnet| self.ownership.held.contains(&subnet))
                || Family::BOTH.into_iter().any(same)
        };
        all.leases.changes(&before.leases).any(|(_, was, now)| was.into_iter().chain(now).any(concerns))
    }
}

#[cfg(test)]
mod tests {
    use backends::state::nexthop::NexthopSupport;
    use backends::{Peer, Peers};

    use super::*;

    /// Asked for each plan in all tests of the agent.
    pub(super) fn is_as_if_all_were_computed(
        context: PeerContext<'_>,
        input: PlanInput<'_>,
        (support, planned): (&NexthopSupport, &KernelState),
        (all, peers, state): (&Leases, &Peers, &KernelState),
    ) {
        assert_eq!(peers, &Peers::choose(context, all));
        let usable: Vec<Peer> = peers.usable.values().copied().collect();
        let mut whole = context.active.plan(PlanInput { peers: &usable, all: &usable, ..input });
        whole.use_nexthops(support, planned);
        whole.blackholes.clone_from(&planned.blackholes);
        assert_eq!(state, &whole);
    }
}
