//! The external interface: chosen, followed while it changes, waited for while it is gone.

use std::sync::Arc;

use backends::backend::Direct;
use backends::kernel::Observed;
use backends::state::LinkIdentity;
use backends::{HostView, Kernel, Node, Underlay};
use subnet::{Family, LeaseStore, NetworkConfig};

use super::{Agent, condition};
use crate::interface::{self, External};

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Chooses the external interface anew and notes what follows from it.
    pub(super) fn choose(&mut self, observed: &Observed) {
        for (family, name) in self.ways.devices_by_family() {
            if let Some(link) = observed.state.links.get(&name)
                && matches!(link.identity, LinkIdentity::Vxlan(_))
                && self.identity.macs.get(family).is_none()
            {
                self.identity.macs.set(family, link.settings.mac);
            }
        }
        let network = self.network.clone();
        let chosen = self.suitable(&observed.host, &network).and_then(|external| {
            self.ways.current().check(&node(&external)).map_err(|error| error.to_string())?;
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

    /// The external interface for a network on a host like this.
    pub(super) fn suitable(&mut self, host: &HostView, network: &NetworkConfig) -> Result<External, String> {
        let families: Vec<Family> = network.ranges().map(|range| Family::of(range.network.addr())).collect();
        let mut hands = self.hands.as_mut();
        let way_to = |addr| match &mut hands {
            Some(hands) => hands.kernel.way_to(addr).map_err(|error| error.to_string()),
            None => Err("the kernel is busy".to_owned()),
        };
        interface::choose(&self.settings.selectors, host, way_to, &families)
            .map_err(|error| error.to_string())
    }

    fn adopt(&mut self, external: External) {
        // Why it was chosen is no property of it.
        let same = |old: &External| External { why: external.why.clone(), ..old.clone() } == external;
        if self.external.as_ref().is_some_and(same) {
            return;
        }
        self.journal.interface(&external, self.ways.current().remark(&node(&external)));
        if self.lease.as_ref().is_some_and(|lease| lease.public != external.public) {
            // Whoever has the old address is no rival any more.
            self.contested = None;
        }
        let outdated = self.claimed.as_ref().is_some_and(|(public, _)| *public != external.public);
        if outdated && self.reconnecting.is_none() && self.claiming.take().is_some() {
            // Nobody knows how far it got.
            self.change.reclaim = self.lease.is_some();
        }
        let local = self.external.as_ref().map(|old| old.addr);
        if self.claimed.is_some() && local != Some(external.addr) {
            self.store.readdressed();
        }
        if self.settings.selectors.public.v6.is_none() {
            self.settings.selectors.stay = external.addr.v6.or(self.settings.selectors.stay);
        }
        self.external = Some(external);
        self.plan = None;
    }
}

/// This node's place in the underlay, as backends see it.
pub(super) fn node(external: &External) -> Node {
    let External { index, name, mtu, addr, public, .. } = *external;
    Node { underlay: Underlay { index, name, mtu }, public, local: addr, direct: Direct::default() }
}
