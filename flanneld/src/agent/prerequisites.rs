//! What the host has to do for pods' packets: forwarding is switched on at start, the rest is looked at,
//! and named with its remedy.

use std::mem;
use std::time::Duration;

use backends::kernel::Observed;
use backends::prerequisites::{Passage, accept_ra, forwarding};
use backends::{Kernel, Name};
use subnet::{Family, LeaseStore};
use tokio::time::Instant;

use super::{Agent, RESYNC, condition};

/// When the host's settings were looked at last, and for what.
#[derive(Debug, Default)]
pub(super) struct Prerequisites {
    looked: Option<(Instant, Passage)>,
    forwarding_done: bool,
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Looks at the host, if the kernel said that something moved, packets pass elsewhere, or the last look
    /// is old.
    pub(super) fn look_at_prerequisites(&mut self, observed: &Observed) {
        // A little less than the pause of the loop, so that no turn comes just too early.
        const AGE: Duration = RESYNC.saturating_sub(Duration::from_secs(10));
        let moved = mem::take(&mut self.interest().sysctls_moved);
        let passage = self.passage(observed);
        if !self.prerequisites.forwarding_done && passage.underlay.is_some() {
            self.prerequisites.forwarding_done = true;
            if self.settings.ip_forward {
                self.switch_forwarding_on(&passage, observed);
            }
        }
        let fresh = |(at, known): &(Instant, Passage)| at.elapsed() < AGE && *known == passage;
        if !moved && self.prerequisites.looked.as_ref().is_some_and(fresh) {
            return;
        }
        let Some(hands) = &mut self.hands else { return };
        let sysctls = hands.kernel.sysctls(&passage.keys());
        let notes = passage.judge(&sysctls);
        self.journal.prerequisites(&notes);
        self.health.note("prerequisites", notes);
        self.prerequisites.looked = Some((Instant::now(), passage));
    }

    /// An interface that an operator set down is no interface; one without carrier may get it back at any
    /// moment, and what to do is outside of this host.
    pub(super) fn judge_underlay(&mut self, observed: &Observed) {
        let Some(external) = &self.external else { return };
        let Some(link) = observed.host.links.get(&external.index) else { return };
        let name = link.name;
        let mut notes = Vec::new();
        if !link.up {
            let why = format!("{name} is set down, so no other node can be reached: ip link set {name} up");
            self.journal.no_interface(&why);
            self.health.set(condition::INTERFACE, Err(why));
        } else if !link.carrier {
            notes.push(format!(
                "{name} has no carrier, so no other node can be reached: look at its cable, its switch port or its peer"
            ));
        }
        self.journal.carrier(&notes);
        self.health.note("carrier", notes);
    }

    fn passage(&self, observed: &Observed) -> Passage {
        let own = self.lease.as_ref().map(|lease| lease.subnets).unwrap_or_default();
        let links = observed.host.links.values();
        let bridges = links.filter(|link| {
            let mut addresses = link.addresses.iter().map(|address| address.net.addr());
            link.bridge && addresses.any(|addr| own.iter().any(|subnet| subnet.contains(&addr)))
        });
        let tunnels = self.ways.own_devices().into_iter();
        Passage {
            families: self.network.ranges().map(|range| Family::of(range.network.addr())).collect(),
            underlay: self.external.as_ref().map(|external| external.name),
            tunnels: tunnels.filter(|name| observed.host.link(name.as_str()).is_some()).collect(),
            bridges: bridges.map(|link| link.name).collect(),
            services: self.settings.services,
        }
    }

    /// Switches on forwarding of the enabled families where it is off. Somebody who switches it off later
    /// means it: that is named and not fought over.
    fn switch_forwarding_on(&mut self, passage: &Passage, observed: &Observed) {
        let Some(hands) = &mut self.hands else { return };
        let defaults = observed.host.defaults.iter().filter(|route| route.family == Family::V6);
        let by_default = defaults.filter_map(|route| Some(observed.host.links.get(&route.link?)?.name));
        let outer: Vec<Name> = passage.underlay.into_iter().chain(by_default).collect();
        for family in &passage.families {
            let key = forwarding(*family);
            if hands.kernel.sysctls(&[key.to_owned()]).get(key).is_none_or(|value| value != "0") {
                continue;
            }
            if *family == Family::V6 {
                // Otherwise the kernel drops the default routes that it learned from routers.
                for key in outer.iter().map(accept_ra) {
                    let found = hands.kernel.sysctls(std::slice::from_ref(&key));
                    if found.get(&key).is_some_and(|value| value == "1")
                        && hands.kernel.set_sysctl(&key, "2").is_ok()
                    {
                        tracing::info!(
                            "net/{key} was 1 and is 2 now, so that routers are heard while forwarding is on"
                        );
                    }
                }
            }
            match hands.kernel.set_sysctl(key, "1") {
                Ok(()) => {
                    tracing::info!("net/{key} was 0 and is 1 now: pods' packets need it (--ip-forward)")
                }
                Err(error) => tracing::warn!("net/{key} is 0 and can't be set: {error}"),
            }
        }
    }
}
