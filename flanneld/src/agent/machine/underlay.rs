//! The external interface: chosen, followed while it changes, waited for while it is gone.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use backends::backend::Direct;
use backends::host::ResolvedRoute;
use backends::kernel::Observed;
use backends::state::LinkIdentity;
use backends::surroundings::Ours;
use backends::{HostView, Name, Node, Surroundings};
use ipnet::IpNet;
use subnet::net::overlap;
use subnet::{Family, Leases, Mac, NetworkConfig, PublicAddrs, Subnets};
use tokio::time::Instant;

use super::contest::Contest;
use super::prerequisites::Prerequisites;
use super::{Action, Machine};
use crate::agent::condition;
use crate::interface::{self, External, PodPrefixes};

/// For this long an interface that is there without its address, or down, is waited for before another one
/// is taken: a DHCP client or `netplan apply` takes an address away and puts it back.
const ADDRESS_GRACE: Duration = Duration::from_secs(5);

/// A node that gets another address while the one before is still there goes on sending from that for this long: peers
/// take datagrams from the new one once they have heard of it.
const SOURCE_LINGERS: Duration = Duration::from_secs(2);

/// This node's place in the network of the nodes.
#[derive(Default)]
pub(super) struct Underlay {
    pub(super) external: Option<External>,
    pub(super) choosing: Choosing,
    /// The public addresses of the operator's flags.
    pub(super) given: PublicAddrs,
    /// Where the store answers.
    pub(super) stores: Vec<IpAddr>,
    /// What of the host's own network no subnet may cover.
    pub(super) surroundings: Surroundings,
    /// The peers on this node's own links, where somebody wants to know.
    pub(super) direct: Direct,
    /// The way to the address of `--iface-can-reach` as the kernel said last.
    pub(super) reach: Option<Result<ResolvedRoute, String>>,
    pub(super) prerequisites: Prerequisites,
    pub(super) sysctls_moved: bool,
}

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
    /// When another interface may be taken.
    pub(super) fn again(&self) -> Option<Instant> {
        let lost = self.lost.map(|lost| lost + ADDRESS_GRACE);
        let moving = self.moving.map(|moving| moving + SOURCE_LINGERS);
        lost.into_iter().chain(moving).min()
    }
}

impl Machine {
    /// Chooses the external interface, or keeps the one in use, and notes what follows from it.
    pub(super) fn choose(&mut self, observed: &Observed) {
        for (family, name) in self.force.active.devices_by_family() {
            if let Some(link) = observed.state.links.get(&name)
                && matches!(link.identity, LinkIdentity::Vxlan(_))
                && self.own.identity.macs.get(family).is_none()
            {
                self.own.identity.macs.set(family, link.settings.mac);
            }
        }
        let network = self.force.network.clone();
        let chosen = self.suitable(&observed.host, &network).and_then(|external| {
            self.force.active.current().check(&node(&external)).map_err(|error| error.to_string())?;
            self.allow_move(&external, &observed.host)?;
            Ok(external)
        });
        let chosen = chosen.map(|external| {
            self.underlay.choosing =
                Choosing { moving: self.underlay.choosing.moving, ..Choosing::default() };
            self.linger(external, &observed.host)
        });
        self.view.interest.choosing = chosen.is_err();
        self.view.interest.host = Arc::new(observed.host.clone());
        match chosen {
            Ok(external) => {
                self.status.health.set(condition::INTERFACE, Ok(()));
                self.adopt(external);
            }
            Err(why) => {
                self.status.journal.no_interface(&why);
                self.status.health.set(condition::INTERFACE, Err(why));
                // As long as the device is there, what runs over it may go on.
                let there = |external: &External| observed.host.links.contains_key(&external.index);
                if self.underlay.external.as_ref().is_some_and(|external| !there(external)) {
                    self.underlay.external = None;
                }
            }
        }
        self.survey(observed);
    }

    /// Takes note of what of the host's own network no subnet may cover.
    fn survey(&mut self, observed: &Observed) {
        let own = self.own.lease().into_iter().map(|lease| lease.subnets);
        let former = self.own.identity.former(self.hardware_of(&observed.host)).map(|lease| lease.subnets);
        let held =
            own.chain(former).chain([self.ownership.previous.subnets]).chain(self.own.lost.iter().copied());
        let subnets: Vec<IpNet> =
            held.flat_map(|subnets| subnets.iter()).chain(self.change.left.iter().copied()).collect();
        let devices: Vec<Name> =
            self.force.active.devices().chain(observed.state.links.keys().copied()).collect();
        let public = self.underlay.external.as_ref().map(|external| external.public).unwrap_or_default();
        let ours = Ours {
            network: &self.force.network,
            subnets: &subnets,
            devices: &devices,
            underlay: self.underlay.external.as_ref().map(|external| external.index),
        };
        let now = Surroundings::of(&observed.host, ours, &self.underlay.stores, public);
        let mut notes = now.overlaps(&self.force.network);
        notes.extend(now.unusable());
        let own = self.own.lease().into_iter().flat_map(|lease| lease.subnets.iter());
        notes.extend(own.filter_map(|subnet| now.covered(subnet)).map(|why| {
            format!(
                "this node's subnet {why}: drain this node and restart flanneld, which then takes another one"
            )
        }));
        notes.extend(self.intrusions(&now));
        self.status.journal.surroundings(&notes);
        self.status.health.note("surroundings", notes);
        self.underlay.surroundings = now;
    }

    /// What of this host takes packets that are for pods.
    fn intrusions(&self, now: &Surroundings) -> Vec<String> {
        let (Some(lease), Some(all)) = (self.own.lease(), &self.view.known.leases) else { return Vec::new() };
        let network = self.force.network.networks();
        let inside = |net: &IpNet| network.iter().any(|network| overlap(network, *net));
        let mut addresses = now.addresses.iter().map(|(_, net)| IpNet::from(net.addr()));
        let own: Vec<IpNet> = lease.subnets.iter().collect();
        let any = !now.intruders.is_empty() || addresses.any(|net| inside(&net));
        let none = Leases::default();
        let all = if any { &**all } else { &none };
        let others = all.leases.values().filter(|other| !other.public.same_node(&lease.public));
        let peers: Vec<(IpNet, IpAddr)> = others
            .flat_map(|other| {
                other.subnets.iter().filter_map(|subnet| {
                    Some((subnet, other.public.get(Family::of(subnet.addr()))?)).filter(|_| inside(&subnet))
                })
            })
            .collect();
        let planned = Arc::clone(&self.view.interest.desired);
        now.intrusions(&own, &peers, &planned)
    }

    /// The hardware address of the external interface.
    pub(super) fn hardware(&self) -> Option<Mac> {
        self.hardware_of(&self.view.interest.host)
    }

    fn hardware_of(&self, host: &HostView) -> Option<Mac> {
        let link = host.links.get(&self.underlay.external.as_ref()?.index)?;
        Some(link.mac).filter(|mac| *mac != Mac([0; 6]))
    }

    /// Lets another interface be taken only if the one in use is gone, or has been without its address for a
    /// while.
    fn allow_move(&mut self, next: &External, host: &HostView) -> Result<(), String> {
        let Some(in_use) = self.underlay.external.as_ref().filter(|_| !self.underlay.choosing.anew) else {
            return Ok(());
        };
        if in_use.index == next.index || in_use.link_on(host).is_none() {
            return Ok(());
        }
        let now = self.now().at;
        let since = *self.underlay.choosing.lost.get_or_insert(now);
        if now - since >= ADDRESS_GRACE {
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
        let before = self.underlay.external.as_ref().filter(|before| before.index == next.index);
        let has = |addr: IpAddr| {
            let link = host.links.get(&next.index);
            link.is_some_and(|link| link.addresses.iter().any(|own| own.net.addr() == addr))
        };
        let old = |family| before.and_then(|before| before.source.get(family)).filter(|addr| has(*addr));
        let (source, now) = (next.source, self.now().at);
        let lingering: PublicAddrs = Family::BOTH
            .into_iter()
            .filter_map(|family| Some(old(family).unwrap_or(source.get(family)?)))
            .collect();
        if lingering == source {
            self.underlay.choosing.moving = None;
        } else if now - *self.underlay.choosing.moving.get_or_insert(now) < SOURCE_LINGERS {
            next.source = lingering;
        } else {
            self.underlay.choosing.moving = None;
        }
        next
    }

    /// Other public addresses were given to this node by the store: the interface is chosen again. A family without one
    /// keeps or gets back the address that it had by itself.
    pub(super) fn give_public(&mut self, public: PublicAddrs) {
        self.settings.selectors.public = public;
        self.underlay.choosing.anew = true;
        self.act(Action::Wake);
    }

    /// The prefixes of pods, if this were the network.
    fn pods(&self, network: &NetworkConfig) -> PodPrefixes {
        let lost = self.own.lost.iter().flat_map(Subnets::iter);
        let own = self.own.lease().into_iter().flat_map(|lease| lease.subnets.iter());
        let before = self.ownership.previous.subnets.iter().chain(self.change.left.iter().copied());
        PodPrefixes {
            networks: network.networks().iter().collect(),
            own: own.chain(before).chain(lost).collect(),
        }
    }

    /// The external interface for a network on a host like this.
    pub(super) fn suitable(&self, host: &HostView, network: &NetworkConfig) -> Result<External, String> {
        let families: Vec<Family> = network.ranges().map(|range| Family::of(range.network.addr())).collect();
        let pods = self.pods(network);
        let in_use = self.underlay.external.as_ref().filter(|_| !self.underlay.choosing.anew);
        let route_to =
            |_| self.underlay.reach.clone().unwrap_or_else(|| Err("the kernel was not asked yet".to_owned()));
        interface::choose(&self.settings.selectors, &pods, host, in_use, route_to, &families)
            .map_err(|error| error.to_string())
    }

    fn adopt(&mut self, external: External) {
        // Why it was chosen is no property of it.
        let same = |old: &External| External { why: external.why.clone(), ..old.clone() } == external;
        if self.underlay.external.as_ref().is_some_and(same) {
            return;
        }
        let seen =
            |old: &External| External { source: external.source, why: external.why.clone(), ..old.clone() };
        if self.underlay.external.as_ref().map(seen).as_ref() != Some(&external) {
            self.status.journal.interface(&external, self.force.active.current().remark(&node(&external)));
        }
        if self.own.lease().is_some_and(|lease| lease.public != external.public) {
            // A node with the old address is no rival any more.
            self.own.contest = Contest::None;
        }
        let announced = self.own.claiming.announced();
        let outdated = announced.is_some_and(|(public, _)| *public != external.public);
        let announces = announced.is_some();
        if outdated && !self.own.is_recalled() && self.own.claiming.is_running() {
            // How far it got is unknown.
            self.own.claiming.end();
            self.act(Action::StopClaiming);
            self.change.reclaim = self.own.lease().is_some();
        }
        let local = self.underlay.external.as_ref().map(|old| old.addr);
        if announces && local != Some(external.addr) {
            self.act(Action::Readdressed);
        }
        let selectors = &mut self.settings.selectors;
        // What the operator chooses for a while is not this node's own choice.
        let own =
            |family: Family| external.addr.get(family).filter(|_| selectors.public.get(family).is_none());
        let prefer = |family: Family| own(family).or(selectors.prefer.get(family));
        selectors.prefer = Family::BOTH.into_iter().filter_map(prefer).collect();
        self.underlay.external = Some(external);
    }
}

/// This node's place in the underlay, as backends see it.
pub(super) fn node(external: &External) -> Node {
    let External { index, name, mtu, addr, public, source, .. } = *external;
    let underlay = backends::Underlay { index, name, mtu };
    Node { underlay, public, local: addr, source, direct: Direct::default() }
}
