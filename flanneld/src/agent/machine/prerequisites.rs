//! What the host has to do for pods' packets: forwarding is switched on at start, the rest is looked at,
//! and named with its remedy.

use std::mem;
use std::time::Duration;

use backends::Name;
use backends::kernel::Observed;
use backends::prerequisites::{Passage, Sysctls};
use subnet::Family;
use tokio::time::Instant;

use super::{Action, Machine};
use crate::agent::{RESYNC, condition};

/// When the host's settings were looked at last, and for what.
#[derive(Debug, Default)]
pub(super) struct Prerequisites {
    looked: Option<(Instant, Passage)>,
    forwarding_done: bool,
}

impl Machine {
    /// Which of the host's settings to look at: if the kernel said that something moved, packets pass elsewhere, or the
    /// last look is old.
    pub(super) fn due_sysctls(&mut self, observed: &Observed) -> Option<Vec<String>> {
        // A little less than the pause of the loop, so that no turn comes just too early.
        const AGE: Duration = RESYNC.saturating_sub(Duration::from_secs(10));
        let moved = mem::take(&mut self.underlay.sysctls_moved);
        let passage = self.passage(observed);
        let now = self.now().at;
        if !self.underlay.prerequisites.forwarding_done && passage.underlay.is_some() {
            self.underlay.prerequisites.forwarding_done = true;
            if self.settings.ip_forward {
                self.switch_forwarding_on(&passage, observed);
            }
        }
        let fresh = |(at, known): &(Instant, Passage)| now - *at < AGE && *known == passage;
        if !moved && self.underlay.prerequisites.looked.as_ref().is_some_and(fresh) {
            return None;
        }
        let keys = passage.keys();
        self.underlay.prerequisites.looked = Some((now, passage));
        Some(keys)
    }

    /// Names what of that keeps pods' packets from passing.
    pub(super) fn judge_prerequisites(&mut self, sysctls: &Sysctls) {
        let Some((_, passage)) = &self.underlay.prerequisites.looked else { return };
        let notes: Vec<String> = passage.judge(sysctls).iter().map(ToString::to_string).collect();
        self.status.journal.prerequisites(&notes);
        self.status.health.note("prerequisites", notes);
    }

    /// An interface that an operator set down is no interface; one without carrier may get it back at any
    /// moment, and what to do is outside of this host.
    pub(super) fn judge_underlay(&mut self, observed: &Observed) {
        let Some(external) = &self.underlay.external else { return };
        let Some(link) = observed.host.links.get(&external.index) else { return };
        let name = link.name;
        let mut notes = Vec::new();
        if !link.up {
            let why = format!("{name} is set down, so no other node can be reached: ip link set {name} up");
            self.status.journal.no_interface(&why);
            self.status.health.set(condition::INTERFACE, Err(why));
        } else if !link.carrier {
            notes.push(format!(
                "{name} has no carrier, so no other node can be reached: look at its cable, its switch port or its peer"
            ));
        }
        self.status.journal.carrier(&notes);
        self.status.health.note("carrier", notes);
    }

    fn passage(&self, observed: &Observed) -> Passage {
        let own = self.own.lease().map(|lease| lease.subnets).unwrap_or_default();
        let links = observed.host.links.values();
        let bridges = links.filter(|link| {
            let mut addresses = link.addresses.iter().map(|address| address.net.addr());
            link.bridge && addresses.any(|addr| own.iter().any(|subnet| subnet.contains(&addr)))
        });
        let tunnels = self.force.active.own_devices().into_iter();
        Passage {
            families: self.force.network.ranges().map(|range| Family::of(range.network.addr())).collect(),
            underlay: self.underlay.external.as_ref().map(|external| external.name),
            tunnels: tunnels.filter(|name| observed.host.link(name.as_str()).is_some()).collect(),
            bridges: bridges.map(|link| link.name).collect(),
            services: self.settings.services,
        }
    }

    /// Has forwarding of the enabled families switched on where it is off. Somebody who switches it off later means it:
    /// that is named and not fought over.
    fn switch_forwarding_on(&mut self, passage: &Passage, observed: &Observed) {
        let defaults = observed.host.defaults.iter().filter(|route| route.family == Family::V6);
        let by_default = defaults.filter_map(|route| Some(observed.host.links.get(&route.link?)?.name));
        let outer: Vec<Name> = passage.underlay.into_iter().chain(by_default).collect();
        self.act(Action::SwitchForwardingOn { families: passage.families.clone(), outer });
    }
}
