//! The external interface: chosen, followed while it changes, waited for while it is gone.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use backends::backend::Direct;
use backends::kernel::Observed;
use backends::state::LinkIdentity;
use backends::surroundings::Ours;
use backends::{HostView, Kernel, Name, Node, Surroundings, Underlay};
use ipnet::IpNet;
use subnet::net::overlap;
use subnet::{Family, LeaseStore, Mac, NetworkConfig, PublicAddrs, Subnets};
use tokio::time::Instant;

use super::contest::Contest;
use super::{Agent, condition};
use crate::interface::{self, External, PodPrefixes};

/// For this long an interface that is there without its address, or down, is waited for before another one
/// is taken: a DHCP client or `netplan apply` takes an address away and puts it back.
const ADDRESS_GRACE: Duration = Duration::from_secs(5);

/// A node that gets another address while the one before is still there goes on sending from that for this long: peers
/// take datagrams from the new one once they have heard of it.
const SOURCE_LINGERS: Duration = Duration::from_secs(2);

/// How the choice of the external interface goes on.
#[derive(Debug, Default)]
pub(super) struct Choosing {
    /// What the operator says has changed: what is in use does not count.
    anew: bool,
    /// Since when another interface would be taken, were the one in use not waited for.
    lost: Option<Instant>,
    /// Since when the tunnels would send from another address.
    moving: Option<Instant>,
}

impl Choosing {
    /// After how long another interface may be taken.
    pub(super) fn again(&self) -> Option<Duration> {
        let lost = self.lost.map(|lost| lost + ADDRESS_GRACE);
        let moving = self.moving.map(|moving| moving + SOURCE_LINGERS);
        let next = lost.into_iter().chain(moving).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }
}

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Chooses the external interface, or keeps the one in use, and notes what follows from it.
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
            self.allow_move(&external, &observed.host)?;
            Ok(external)
        });
        let chosen = chosen.map(|external| {
            self.choosing = Choosing { moving: self.choosing.moving, ..Choosing::default() };
            self.linger(external, &observed.host)
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
        self.survey(observed);
    }

    /// Takes note of what of the host's own network no subnet may cover.
    fn survey(&mut self, observed: &Observed) {
        let own = self.lease.iter().map(|lease| lease.subnets);
        let former = self.identity.former(self.hardware_of(&observed.host)).map(|lease| lease.subnets);
        let held = own.chain(former).chain([self.previous.subnets]).chain(self.lost.iter().copied());
        let subnets: Vec<IpNet> =
            held.flat_map(|subnets| subnets.iter()).chain(self.change.left.iter().copied()).collect();
        let devices: Vec<Name> = self.ways.devices().chain(observed.state.links.keys().copied()).collect();
        let public = self.external.as_ref().map(|external| external.public).unwrap_or_default();
        let ours = Ours {
            network: &self.network,
            subnets: &subnets,
            devices: &devices,
            underlay: self.external.as_ref().map(|external| external.index),
        };
        let now = Surroundings::of(&observed.host, ours, &self.stores, public);
        let mut notes = now.overlaps(&self.network);
        let own = self.lease.iter().flat_map(|lease| lease.subnets.iter());
        notes.extend(own.filter_map(|subnet| now.covered(subnet)).map(|why| {
            format!(
                "this node's subnet {why}: drain this node and restart flanneld, which then takes another one"
            )
        }));
        notes.extend(self.intrusions(&now));
        self.journal.surroundings(&notes);
        self.health.note("surroundings", notes);
        if now != self.surroundings {
            self.surroundings = now;
            self.plan = None;
        }
    }

    /// What of this host takes packets that are for pods.
    fn intrusions(&self, now: &Surroundings) -> Vec<String> {
        let (Some(lease), Some(all)) = (&self.lease, &self.known.borrow().leases) else { return Vec::new() };
        let network = self.network.networks();
        let inside = |net: &IpNet| network.iter().any(|network| overlap(network, *net));
        let mut addresses = now.addresses.iter().map(|(_, net)| IpNet::from(net.addr()));
        let own: Vec<IpNet> = lease.subnets.iter().collect();
        let any = !now.intruders.is_empty() || addresses.any(|net| inside(&net));
        let others = all.leases.values().filter(|other| any && !other.public.same_node(&lease.public));
        let peers: Vec<(IpNet, IpAddr)> = others
            .flat_map(|other| {
                other.subnets.iter().filter_map(|subnet| {
                    Some((subnet, other.public.get(Family::of(subnet.addr()))?)).filter(|_| inside(&subnet))
                })
            })
            .collect();
        let planned = Arc::clone(&self.interest().desired);
        now.intrusions(&own, &peers, &planned)
    }

    /// The hardware address of the external interface.
    pub(super) fn hardware(&self) -> Option<Mac> {
        self.hardware_of(&self.interest().host)
    }

    fn hardware_of(&self, host: &HostView) -> Option<Mac> {
        let link = host.links.get(&self.external.as_ref()?.index)?;
        Some(link.mac).filter(|mac| *mac != Mac([0; 6]))
    }

    /// Lets another interface be taken only if the one in use is gone, or has been without its address for a
    /// while.
    fn allow_move(&mut self, next: &External, host: &HostView) -> Result<(), String> {
        let Some(in_use) = self.external.as_ref().filter(|_| !self.choosing.anew) else { return Ok(()) };
        if in_use.index == next.index || in_use.link_on(host).is_none() {
            return Ok(());
        }
        let since = *self.choosing.lost.get_or_insert_with(Instant::now);
        if since.elapsed() >= ADDRESS_GRACE {
            return Ok(());
        }
        Err(format!(
            "{} is down or has lost {}; {} is taken if that stays so for {} s",
            in_use.name,
            in_use.addr,
            next.name,
            ADDRESS_GRACE.as_secs()
        ))
    }

    /// Has the tunnels send from the address before for a moment, if this host still has it.
    fn linger(&mut self, mut next: External, host: &HostView) -> External {
        let before = self.external.as_ref().filter(|before| before.index == next.index);
        let has = |addr: IpAddr| {
            let link = host.links.get(&next.index);
            link.is_some_and(|link| link.addresses.iter().any(|own| own.net.addr() == addr))
        };
        let old = |family| before.and_then(|before| before.source.get(family)).filter(|addr| has(*addr));
        let source = next.source;
        let lingering: PublicAddrs = Family::BOTH
            .into_iter()
            .filter_map(|family| Some(old(family).unwrap_or(source.get(family)?)))
            .collect();
        if lingering == source {
            self.choosing.moving = None;
        } else if self.choosing.moving.get_or_insert_with(Instant::now).elapsed() < SOURCE_LINGERS {
            next.source = lingering;
        } else {
            self.choosing.moving = None;
        }
        next
    }

    /// Other public addresses were given to this node by the store: the interface is chosen again. A family without one
    /// keeps or gets back the address that it had by itself.
    pub(super) fn give_public(&mut self, public: PublicAddrs) {
        self.settings.selectors.public = public;
        self.choosing.anew = true;
        self.moved.notify_one();
    }

    /// The prefixes of pods, if this were the network.
    fn pods(&self, network: &NetworkConfig) -> PodPrefixes {
        let lost = self.lost.iter().flat_map(Subnets::iter);
        let own = self.lease.iter().flat_map(|lease| lease.subnets.iter());
        let before = self.previous.subnets.iter().chain(self.change.left.iter().copied());
        PodPrefixes {
            networks: network.networks().iter().collect(),
            own: own.chain(before).chain(lost).collect(),
        }
    }

    /// The external interface for a network on a host like this.
    pub(super) fn suitable(&mut self, host: &HostView, network: &NetworkConfig) -> Result<External, String> {
        let families: Vec<Family> = network.ranges().map(|range| Family::of(range.network.addr())).collect();
        let pods = self.pods(network);
        let in_use = self.external.as_ref().filter(|_| !self.choosing.anew);
        let mut hands = self.hands.as_mut();
        let way_to = |addr| match &mut hands {
            Some(hands) => hands.kernel.way_to(addr).map_err(|error| error.to_string()),
            None => Err("the kernel is busy".to_owned()),
        };
        interface::choose(&self.settings.selectors, &pods, host, in_use, way_to, &families)
            .map_err(|error| error.to_string())
    }

    fn adopt(&mut self, external: External) {
        // Why it was chosen is no property of it.
        let same = |old: &External| External { why: external.why.clone(), ..old.clone() } == external;
        if self.external.as_ref().is_some_and(same) {
            return;
        }
        let seen =
            |old: &External| External { source: external.source, why: external.why.clone(), ..old.clone() };
        if self.external.as_ref().map(seen).as_ref() != Some(&external) {
            self.journal.interface(&external, self.ways.current().remark(&node(&external)));
        }
        if self.lease.as_ref().is_some_and(|lease| lease.public != external.public) {
            // Whoever has the old address is no rival any more.
            self.contest = Contest::None;
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
        let selectors = &mut self.settings.selectors;
        // What the operator chooses for a while is not this node's own choice.
        let own =
            |family: Family| external.addr.get(family).filter(|_| selectors.public.get(family).is_none());
        let prefer = |family: Family| own(family).or(selectors.prefer.get(family));
        selectors.prefer = Family::BOTH.into_iter().filter_map(prefer).collect();
        self.external = Some(external);
        self.plan = None;
    }
}

/// This node's place in the underlay, as backends see it.
pub(super) fn node(external: &External) -> Node {
    let External { index, name, mtu, addr, public, source, .. } = *external;
    let underlay = Underlay { index, name, mtu };
    Node { underlay, public, local: addr, source, direct: Direct::default() }
}
