//! The external interface: chosen, followed while it changes, waited for while it is gone.

use std::sync::Arc;

use backends::kernel::Observed;
use backends::state::LinkIdentity;
use backends::{Kernel, Node, Underlay};
use subnet::{Family, LeaseStore};

use super::{Agent, condition};
use crate::interface::{self, External};

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Chooses the external interface anew and notes what follows from it.
    pub(super) fn choose(&mut self, observed: &Observed) {
        if let Some(link) = self.identity.backend.device().and_then(|name| observed.state.links.get(&name))
            && matches!(link.identity, LinkIdentity::Vxlan(_))
            && self.identity.living.is_none()
        {
            self.identity.living = Some(link.settings.mac);
        }
        let families: Vec<Family> =
            self.network.ranges().map(|range| Family::of(range.network.addr())).collect();
        let mut hands = self.hands.as_mut();
        let way_to = |addr| match &mut hands {
            Some(hands) => hands.kernel.way_to(addr).map_err(|error| error.to_string()),
            None => Err("the kernel is busy".to_owned()),
        };
        let chosen = interface::choose(&self.settings.selectors, &observed.host, way_to, &families);
        let chosen = chosen.map_err(|error| error.to_string()).and_then(|external| {
            self.identity.backend.check(&node(&external)).map_err(|error| error.to_string())?;
            Ok(external)
        });
        self.set_interest(|interest| {
            interest.choosing = chosen.is_err();
            interest.host = Arc::new(observed.host.clone());
        });
        match chosen {
            Ok(external) => {
                self.health.set(condition::INTERFACE, Ok(()));
                self.adopt(external);
            }
            Err(why) => {
                self.journal.no_interface(&why);
                self.health.set(condition::INTERFACE, Err(why));
                // As long as the device is there, what runs over it may go on.
                let there = |external: &External| observed.host.links.contains_key(&external.index);
                if self.external.as_ref().is_some_and(|external| !there(external)) {
                    self.external = None;
                    self.plan = None;
                }
            }
        }
    }

    fn adopt(&mut self, external: External) {
        // Why it was chosen is no property of it.
        let same = |old: &External| External { why: external.why.clone(), ..old.clone() } == external;
        if self.external.as_ref().is_some_and(same) {
            return;
        }
        self.journal.interface(&external, self.identity.backend.remark(&node(&external)));
        self.external = Some(external);
        self.plan = None;
        self.reclaim_if_moved();
    }

    /// Publishes the lease again if the node's public address is another one than it says.
    fn reclaim_if_moved(&mut self) {
        let public = self.external.as_ref().map(|external| external.public);
        // Without the store the claim follows when it answers.
        let moved = self.lease.as_ref().is_some_and(|lease| Some(lease.public) != public);
        if moved && self.reconnecting.is_none() {
            self.claiming = None;
            self.contested = None;
            self.start_claim();
        }
    }
}

/// This node's place in the underlay, as backends see it.
pub(super) fn node(external: &External) -> Node {
    let External { index, name, mtu, addr, public, .. } = *external;
    Node { underlay: Underlay { index, name, mtu }, public, local: addr }
}
