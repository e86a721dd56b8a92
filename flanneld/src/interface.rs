//! Which interface carries the traffic between nodes: a pure choice from what the host looks like.
//!
//! The rules are Flannel's (contract §1.5). What a selector does not fix is ranked: global addresses before
//! link-local ones, lasting before expiring ones, and never a loopback address. What is in use is kept while
//! interface and address are there, and what serves pods is no candidate ([`candidates`]).

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;

use backends::host::{HostAddr, HostLink, HostView, ResolvedRoute};
use backends::name::Name;
use regex_lite::Regex;
use subnet::{Family, PublicAddrs};

mod candidates;
#[cfg(test)]
mod tests;

use candidates::Candidates;
pub(crate) use candidates::PodPrefixes;

/// What the kernel lets a device with IPv6 addresses have at least.
const MIN_MTU_V6: u32 = 1280;

/// What the operator says about the interface. With none of the first three, the public address decides,
/// and without one the default route.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selectors {
    /// Names or addresses, tried in order; an empty one stands for the default route.
    pub(crate) iface: Vec<String>,
    /// Patterns for addresses, then for names, tried in order.
    pub(crate) regex: Vec<Regex>,
    /// An address that is reached by the interface.
    pub(crate) can_reach: Option<IpAddr>,
    /// The addresses to announce instead of the interface's.
    pub(crate) public: PublicAddrs,
    /// The addresses that were announced last, by this run or the one before. Without any of the first three
    /// and without a public address, an interface that has them wins over the default route; otherwise they
    /// decide between addresses of equal scope.
    pub(crate) prefer: PublicAddrs,
}

/// The interface that carries the traffic between nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct External {
    /// The kernel's number for it.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: Name,
    /// Its MTU in bytes.
    pub(crate) mtu: u32,
    /// Its own address of each enabled family.
    pub(crate) addr: PublicAddrs,
    /// The address of each enabled family to announce to other nodes.
    pub(crate) public: PublicAddrs,
    /// The address of each enabled family that tunnels send from: the announced one if this host has it, as
    /// in Go flannel, or else the interface's own, which address translation replaces.
    pub(crate) source: PublicAddrs,
    /// Why this one, for the log.
    pub(crate) why: String,
}

/// No interface fits. The text says what was tried and what there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) struct NoInterface {
    tried: Vec<String>,
    available: Vec<String>,
}

impl fmt::Display for NoInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 16;
        write!(f, "no interface for the traffic between nodes: {}; ", self.tried.join("; "))?;
        let Some(shown) = self.available.get(..self.available.len().min(SHOWN)).filter(|all| !all.is_empty())
        else {
            return f.write_str("no interface of this host has a usable address: configure one");
        };
        write!(f, "this host has {}", shown.join(", "))?;
        match self.available.len() - shown.len() {
            0 => {}
            more => write!(f, " and {more} more")?,
        }
        f.write_str(": name one of them with --iface")
    }
}

/// Chooses the interface for `families`, and its address of each of them. What is `in_use` is kept while it is
/// there. Otherwise the first selector that leads to an interface with all that is needed decides; `route_to`
/// is asked for `--iface-can-reach` alone.
///
/// # Errors
/// [`NoInterface`] with the reason of every selector.
pub(crate) fn choose(
    selectors: &Selectors,
    pods: &PodPrefixes,
    host: &HostView,
    in_use: Option<&External>,
    mut route_to: impl FnMut(IpAddr) -> Result<ResolvedRoute, String>,
    families: &[Family],
) -> Result<External, NoInterface> {
    let candidates = Candidates::of(host, pods);
    let choice = Choice { candidates: &candidates, host, families, selectors };
    if let Some(kept) = in_use.and_then(|in_use| choice.keep(in_use)) {
        return Ok(kept);
    }
    let mut tried = Vec::new();
    for attempt in attempts(selectors, in_use, families) {
        let found = match attempt {
            Attempt::Before => choice.by_preference(),
            Attempt::Same(in_use) => choice.by_interface(in_use),
            Attempt::DefaultRoute => choice.by_default_route(),
            Attempt::Public(addr) => choice.by_public(addr),
            Attempt::Named(text) => choice.by_name_or_address(text),
            Attempt::Matching(regex) => choice.by_regex(regex),
            Attempt::Reaching(addr) => route_to(addr).and_then(|way| choice.by_way(addr, way)),
        };
        match (found, &attempt) {
            (Ok(external), _) => return Ok(external),
            // The operator asked for neither.
            (Err(_), Attempt::Before | Attempt::Same(_)) => {}
            (Err(why), _) => tried.push(format!("{attempt}: {why}")),
        }
    }
    Err(NoInterface { tried, available: available(&candidates.host) })
}

/// One selector.
enum Attempt<'a> {
    /// The addresses that were announced last.
    Before,
    /// The interface in use, with another address.
    Same(&'a External),
    DefaultRoute,
    Public(IpAddr),
    Named(&'a str),
    Matching(&'a Regex),
    Reaching(IpAddr),
}

impl fmt::Display for Attempt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Before => f.write_str("as before"),
            Self::Same(in_use) => write!(f, "{}", in_use.name),
            Self::DefaultRoute => f.write_str("default route"),
            Self::Public(IpAddr::V4(addr)) => write!(f, "--public-ip={addr}"),
            Self::Public(IpAddr::V6(addr)) => write!(f, "--public-ipv6={addr}"),
            Self::Named(text) => write!(f, "--iface={}", subnet::gojson::shortened(text)),
            Self::Matching(regex) => write!(f, "--iface-regex={}", regex.as_str()),
            Self::Reaching(addr) => write!(f, "--iface-can-reach={addr}"),
        }
    }
}

fn attempts<'a>(
    selectors: &'a Selectors,
    in_use: Option<&'a External>,
    families: &[Family],
) -> Vec<Attempt<'a>> {
    let named = selectors.iface.iter().map(|text| match text.as_str() {
        "" => Attempt::DefaultRoute,
        text => Attempt::Named(text),
    });
    let all: Vec<_> = named
        .chain(selectors.regex.iter().map(Attempt::Matching))
        .chain(selectors.can_reach.map(Attempt::Reaching))
        .collect();
    if !all.is_empty() {
        return all;
    }
    let enabled = Family::BOTH.into_iter().filter(|family| families.contains(family));
    let public = enabled.filter_map(|family| selectors.public.get(family)).next();
    match public {
        Some(public) => vec![Attempt::Public(public)],
        None => {
            let same = in_use.map(Attempt::Same);
            [Attempt::Before].into_iter().chain(same).chain([Attempt::DefaultRoute]).collect()
        }
    }
}

/// What all selectors choose from.
#[derive(Clone, Copy)]
struct Choice<'a> {
    candidates: &'a Candidates,
    /// The whole host, with what is no candidate.
    host: &'a HostView,
    families: &'a [Family],
    selectors: &'a Selectors,
}

impl Choice<'_> {
    /// What is in use, if it may go on: its interface and address are there and serve no pods. A default route
    /// of another program, a second address, a new lifetime are no reason to move a working node. Only a
    /// link-local address gives way to a global one, which more nodes can reach.
    fn keep(self, in_use: &External) -> Option<External> {
        let link = in_use.link_on(&self.candidates.host).filter(|link| link.up)?;
        let mut fixed = Vec::new();
        for &family in self.families {
            let Some(addr) = in_use.addr.get(family) else { continue };
            let ranked = ranked(link, family);
            let own = ranked.iter().find(|own| own.net.addr() == addr)?;
            if scope_of(own) == scope_of(ranked.first()?) {
                fixed.push(addr);
            }
        }
        self.complete(link, &fixed, in_use.why.clone()).ok()
    }

    /// The interface in use with another address, after it has lost the one that it had.
    fn by_interface(self, in_use: &External) -> Result<External, String> {
        let link = in_use.link_on(&self.candidates.host).filter(|link| link.up).ok_or("it is gone")?;
        let still = |addr: &IpAddr| usable(link, Family::of(*addr)).contains(addr);
        let fixed: Vec<IpAddr> =
            self.families.iter().filter_map(|family| in_use.addr.get(*family)).filter(still).collect();
        self.complete(link, &fixed, format!("{} is in use", in_use.name))
    }

    /// The interface that has the addresses that were announced last.
    fn by_preference(self) -> Result<External, String> {
        let prefer = &self.selectors.prefer;
        let family = self.families.iter().copied().find(|family| prefer.get(*family).is_some());
        let addr = family.and_then(|family| prefer.get(family)).ok_or("nothing was announced before")?;
        let why = format!("it has {addr}, which this node announced before");
        let link = self.having(addr).filter(|link| link.up).ok_or("no interface has it")?;
        let kept = self.complete(link, &[addr], why)?;
        // Half of what was announced is another place.
        let stays =
            |family: &Family| prefer.get(*family).is_none_or(|addr| kept.addr.get(*family) == Some(addr));
        if self.families.iter().all(stays) { Ok(kept) } else { Err("it has another address too".into()) }
    }

    fn by_default_route(self) -> Result<External, String> {
        let mut leaves_by: Option<(Family, u32)> = None;
        for &family in self.families {
            // Routes that a DHCP client gave to a device of ours lead nowhere.
            let excluded = |index: Option<u32>| index.and_then(|index| self.candidates.why_not(index));
            let all = || self.host.defaults.iter().filter(|route| route.family == family);
            let routes = all().filter(|route| excluded(route.link).is_none());
            let Some(route) = routes.min_by_key(|route| route.metric) else {
                let other = all().find_map(|route| excluded(route.link));
                let other =
                    other.map_or_else(String::new, |why| format!(" but by what can't be used: {why}"));
                // With its addresses an interface loses its routes.
                let before = leaves_by.and_then(|(_, index)| self.host.links.get(&index));
                let removed = before.and_then(|link| removed_by_mtu(link, family)).unwrap_or_default();
                return Err(format!("there is no {family} default route{other}{removed}"));
            };
            let Some(link) = route.link else {
                return Err(format!("the {family} default route has several next hops"));
            };
            match leaves_by {
                Some((other, before)) if before != link => {
                    let (before, link) = (self.shown(before), self.shown(link));
                    return Err(format!(
                        "the {other} default route leaves by {before}, but that of {family} by {link}"
                    ));
                }
                _ => leaves_by = Some((family, link)),
            }
        }
        let (_, index) = leaves_by.ok_or("neither IPv4 nor IPv6 is enabled")?;
        self.complete(self.link(index)?, &[], "the default route leaves by it".into())
    }

    fn by_public(self, addr: IpAddr) -> Result<External, String> {
        self.by_address(addr, format!("{} is its address", Attempt::Public(addr))).unwrap_or_else(|| {
            let excluded = self.candidates.why_not_address(self.host, addr);
            Err(excluded.map(str::to_owned).unwrap_or_else(|| {
                "no interface of this host has it; if it is an address that others see behind NAT, \
                 give the interface too, with --iface=NAME"
                    .to_owned()
            }))
        })
    }

    fn by_name_or_address(self, text: &str) -> Result<External, String> {
        if let Ok(addr) = text.parse::<IpAddr>() {
            let found = self.by_address(addr, format!("--iface={addr} is its address"));
            let excluded = || self.candidates.why_not_address(self.host, addr);
            let why = || excluded().unwrap_or("no interface of this host has this address").to_owned();
            return found.unwrap_or_else(|| Err(why()));
        }
        let link = self.host.link(text).ok_or("this host has no such interface")?;
        self.complete(self.link(link.index)?, &[], format!("--iface={text} names it"))
    }

    fn having(&self, addr: IpAddr) -> Option<&HostLink> {
        self.candidates.host.links.values().find(|link| has(link, addr))
    }

    /// The interface that has `addr`; `None` if there is none.
    fn by_address(self, addr: IpAddr, why: String) -> Option<Result<External, String>> {
        let link = self.having(addr)?;
        // Flannel's rule: an IPv4 address decides for both families, so that a public IPv6 address has to
        // be on the same interface, where it then is the interface's address too.
        let other = match (addr, self.selectors.public.v6) {
            (IpAddr::V4(_), Some(v6)) if self.families == Family::BOTH => Some(IpAddr::V6(v6)),
            _ => None,
        };
        Some(match other {
            Some(v6) if !has(link, v6) => Err(format!(
                "it is an address of {name}, which does not have --public-ipv6={v6}: \
                 choose the interface by name, --iface={name}, to announce an address that it does not have",
                name = link.name
            )),
            Some(v6) => self.complete(link, &[addr, v6], why),
            None => self.complete(link, &[addr], why),
        })
    }

    fn by_regex(self, regex: &Regex) -> Result<External, String> {
        let matches = |text: &str| regex.is_match(text);
        let mut incomplete = None;
        let links = &self.candidates.host.links;
        let by_address = links.values().filter_map(|link| {
            let fixed: Vec<IpAddr> = self
                .families
                .iter()
                .filter_map(|&family| {
                    usable(link, family).into_iter().find(|addr| matches(&addr.to_string()))
                })
                .collect();
            // One address of each family, all on this link; half a match is none.
            (!fixed.is_empty() && fixed.len() == self.families.len()).then(|| {
                let addrs: Vec<String> = fixed.iter().map(ToString::to_string).collect();
                let why =
                    format!("--iface-regex={} matches its address {}", regex.as_str(), addrs.join(" and "));
                (link, fixed, why)
            })
        });
        let by_name = links
            .values()
            .filter(|link| matches(link.name.as_str()))
            .map(|link| (link, Vec::new(), format!("--iface-regex={} matches its name", regex.as_str())));
        for (link, fixed, why) in by_address.chain(by_name) {
            match self.complete(link, &fixed, why) {
                Ok(external) => return Ok(external),
                Err(why) => incomplete = incomplete.or(Some(why)),
            }
        }
        let named = || self.host.links.values().filter(|link| matches(link.name.as_str()));
        let excluded = || named().find_map(|link| self.candidates.why_not(link.index)).map(str::to_owned);
        Err(incomplete
            .or_else(excluded)
            .unwrap_or_else(|| "it matches neither the addresses nor the name of any interface".into()))
    }

    fn by_way(self, to: IpAddr, way: ResolvedRoute) -> Result<External, String> {
        if self.host.links.values().any(|link| link.addresses.iter().any(|own| own.net.addr() == to)) {
            return Err(format!("it is an address of this host: use --iface={to} instead"));
        }
        // An IPv6 source may be a privacy address, which expires; the best address of the link does not.
        let source = way.source.filter(|source| source.is_ipv4() && !source.is_unspecified());
        let fixed: Vec<IpAddr> = source.into_iter().collect();
        self.complete(self.link(way.link)?, &fixed, format!("{to} is reached by it (--iface-can-reach)"))
    }

    /// The interface with one address of each family: the fixed one, else its best.
    fn complete(self, link: &HostLink, fixed: &[IpAddr], why: String) -> Result<External, String> {
        let name = link.name;
        if link.mtu == 0 {
            return Err(format!("the MTU of {name} is 0"));
        }
        let mut addrs = Vec::new();
        for &family in self.families {
            let fixed = fixed.iter().copied().find(|addr| Family::of(*addr) == family);
            let best = || self.best(link, family);
            let lost = || match removed_by_mtu(link, family) {
                Some(why) => why,
                None => self.candidates.lost_by(link.index),
            };
            let addr = fixed
                .or_else(best)
                .ok_or_else(|| format!("{name} has no usable {family} address{}", lost()))?;
            addrs.push(addr);
        }
        let announced = |addr: &IpAddr| self.selectors.public.get(Family::of(*addr)).unwrap_or(*addr);
        let source = |addr: &IpAddr| {
            let announced = announced(addr);
            let local = self.host.links.values().any(|link| has(link, announced));
            if local { announced } else { *addr }
        };
        Ok(External {
            index: link.index,
            name,
            mtu: link.mtu,
            public: addrs.iter().map(announced).collect(),
            source: addrs.iter().map(source).collect(),
            addr: addrs.into_iter().collect(),
            why,
        })
    }

    /// The best address of a family; of those with the same scope the one that was announced before.
    fn best(self, link: &HostLink, family: Family) -> Option<IpAddr> {
        let all = ranked(link, family);
        let first = *all.first()?;
        let before = self.selectors.prefer.get(family);
        let stays = |own: &&&HostAddr| Some(own.net.addr()) == before && scope_of(own) == scope_of(first);
        Some(all.iter().find(stays).map_or(first, |own| *own).net.addr())
    }

    /// A link that may be chosen.
    fn link(&self, index: u32) -> Result<&HostLink, String> {
        if let Some(why) = self.candidates.why_not(index) {
            return Err(why.to_owned());
        }
        self.candidates.host.links.get(&index).ok_or_else(|| format!("{} is gone", self.shown(index)))
    }

    fn shown(&self, index: u32) -> String {
        self.host.links.get(&index).map_or_else(|| format!("interface {index}"), |link| link.name.to_string())
    }
}

impl External {
    /// This interface on a host, if it is still there under its name.
    pub(crate) fn link_on<'a>(&self, host: &'a HostView) -> Option<&'a HostLink> {
        host.links.get(&self.index).filter(|link| link.name == self.name)
    }
}

/// Why an interface has no IPv6 address, if that is because of its MTU, and what to do.
fn removed_by_mtu(link: &HostLink, family: Family) -> Option<String> {
    (family == Family::V6 && link.mtu < MIN_MTU_V6).then(|| {
        format!(
            " (the kernel removes IPv6 addresses where the MTU is below {MIN_MTU_V6}, and that of {name} is {mtu}: raise \
             it with \"ip link set {name} mtu 1500\", or what its network carries, and add the addresses again)",
            name = link.name,
            mtu = link.mtu
        )
    })
}

fn has(link: &HostLink, addr: IpAddr) -> bool {
    link.addresses.iter().any(|own| own.net.addr() == addr)
}

/// The addresses of one family that other nodes may send to, best first. Equals keep the kernel's order.
fn usable(link: &HostLink, family: Family) -> Vec<IpAddr> {
    ranked(link, family).into_iter().map(|own| own.net.addr()).collect()
}

fn ranked(link: &HostLink, family: Family) -> Vec<&HostAddr> {
    let mut found: Vec<&HostAddr> = link
        .addresses
        .iter()
        .filter(|own| Family::of(own.net.addr()) == family && !own.deprecated && is_unicast(own.net.addr()))
        .collect();
    found.sort_by(|a, b| rank(a, b));
    found
}

fn rank(a: &HostAddr, b: &HostAddr) -> Ordering {
    let key = |own: &HostAddr| (is_link_local(own.net.addr()), !own.permanent, own.temporary);
    key(a).cmp(&key(b))
}

/// Whether an address is link-local: the part of the rank for which a node in use moves.
fn scope_of(own: &HostAddr) -> bool {
    is_link_local(own.net.addr())
}

/// Go's "global or link-local unicast": not loopback, multicast, broadcast or unspecified.
fn is_unicast(addr: IpAddr) -> bool {
    let broadcast = matches!(addr, IpAddr::V4(v4) if v4.is_broadcast());
    !addr.is_loopback() && !addr.is_multicast() && !addr.is_unspecified() && !broadcast
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// The interfaces with usable addresses, as an error lists them.
fn available(host: &HostView) -> Vec<String> {
    let shown = |link: &HostLink| {
        let addrs = Family::BOTH.into_iter().flat_map(|family| usable(link, family));
        let addrs: Vec<String> = addrs.map(|addr| addr.to_string()).collect();
        (!addrs.is_empty()).then(|| format!("{} ({})", link.name, addrs.join(", ")))
    };
    host.links.values().filter_map(shown).collect()
}
