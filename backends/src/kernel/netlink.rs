//! The real kernel, over rtnetlink.

mod bridges;
mod decode;
mod encode;
mod entries;
mod listen;
mod lookup;
mod nexthop;
mod objects;
mod pods;
mod port;
mod refusal;
mod route;
mod routes;
mod socket;
mod sysctl;
mod tun;
mod wireguard;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use subnet::net::host;

use super::{Kernel, KernelError, Observed, Scope, is_tunnel};
use crate::datapath::counters::Counters;
use crate::datapath::engine::{Offload, TunnelEngine};
use crate::datapath::tunnels::Tunnels;
use crate::kernel::prerequisites::Sysctls as Values;
use crate::netlink::ethtool::Ethtool;
use crate::state::host::Direct;
use crate::state::host::{HostView, ResolvedRoute};
use crate::state::name::Name;
use crate::state::{KernelChange, KernelState, Link, LinkIdentity, LinkPatch, LinkSettings, Route};
use crate::wg::ledger::SessionReport;
use decode::LinkFacts;
use refusal::{errno, record};
use routes::ReadContext;
use socket::{Request, RouteSocket};
use sysctl::Sysctls;
use tun::TunFacts;
use wireguard::Module;

pub use bridges::BridgeListener;
pub use listen::Listener;
pub use lookup::{Drop, Hop, Routed};
pub use wireguard::wireguard_sessions;

/// The kernel of the network namespace in which it was opened.
pub struct Netlink {
    socket: RouteSocket,
    /// Index of every link by name, as of the last look.
    indexes: BTreeMap<Name, u32>,
    /// The tunnels that live in this process.
    tunnels: Tunnels,
    ethtool: Ethtool,
    /// Something was said about offloads that can't be set.
    complained: bool,
    /// The kernel refused to make a nexthop object although it has them.
    nexthops_refused: bool,
    sysctls: Sysctls,
    wireguard: Module,
}

impl Netlink {
    /// Opens a conversation with the kernel in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when no netlink socket can be had.
    pub fn open() -> Result<Self, KernelError> {
        Self::open_with(Offload(true))
    }

    /// The same, with tunnels that do without offloads where that is said.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(offload: Offload) -> Result<Self, KernelError> {
        let socket = RouteSocket::open().map_err(failed("opening a socket"))?;
        Ok(Self {
            socket,
            indexes: BTreeMap::new(),
            tunnels: Tunnels::new(TunnelEngine::new(offload)),
            ethtool: Ethtool::new(),
            complained: false,
            nexthops_refused: false,
            sysctls: Sysctls::new(),
            wireguard: Module::default(),
        })
    }

    /// The number under which notifications name this conversation as the origin of a change.
    pub(super) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// What the datapaths of its tunnels count.
    pub fn counters(&self) -> Arc<Counters> {
        self.tunnels.engine().counters()
    }

    /// The tunnels that live in this process.
    pub fn tunnels(&self) -> Tunnels {
        self.tunnels.clone()
    }

    fn links(&mut self) -> io::Result<Vec<LinkFacts>> {
        let mut request = LinkMessage::default();
        // Counters would triple the answer.
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        self.socket.dump(&RouteNetlinkMessage::GetLink(request), Vec::new, |links, message| {
            if let RouteNetlinkMessage::NewLink(message) = message {
                links.extend(decode::link(&message));
            }
        })
    }

    fn host(&mut self, links: &[LinkFacts]) -> io::Result<HostView> {
        let mut host = HostView::default();
        host.links.extend(links.iter().map(|link| (link.host.index, link.host.clone())));
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let addresses = self.socket.dump(&request, Vec::new, |addresses, message| {
            if let RouteNetlinkMessage::NewAddress(message) = message {
                addresses.extend(decode::address(&message));
            }
        })?;
        for (index, address) in addresses {
            if let Some(link) = host.links.get_mut(&index) {
                link.addresses.push(address);
            }
        }
        Ok(host)
    }

    /// What is set of a device's offloads. What can't be known or set is not worth a node's readiness: it
    /// counts as being as `wanted`, and is said once.
    fn tx_checksum(&mut self, name: &Name, index: u32, wanted: bool) -> bool {
        self.ethtool.tx_checksum(index).unwrap_or_else(|error| {
            if !self.complained && error.raw_os_error() != Some(errno::ENODEV) {
                self.complained = true;
                tracing::warn!("the checksum offload of {name} can't be read, so it stays as it is: {error}");
            }
            wanted
        })
    }

    fn find(&mut self, name: &Name) -> io::Result<LinkMessage> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.to_string()));
        match self.socket.ask(RouteNetlinkMessage::GetLink(request))? {
            RouteNetlinkMessage::NewLink(message) => Ok(message),
            _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
        }
    }

    /// Makes a TUN device, or takes over one that an agent before this one has left.
    fn add_tun(&mut self, name: &Name) -> io::Result<()> {
        let facts = |message: LinkMessage| TunFacts::of(&message);
        let left = self.find(name).ok().and_then(facts).is_some_and(TunFacts::is_left);
        self.tunnels.engine().open(*name, left)?;
        let queues = self.tunnels.engine().queues(name);
        // Another process has done the same in this moment: one of the two that see it, or both, leave it.
        if left && self.find(name).ok().and_then(facts).is_some_and(|facts| facts.has_more_than(queues)) {
            self.tunnels.engine().close(name);
            return Err(io::Error::from_raw_os_error(errno::EBUSY));
        }
        Ok(())
    }

    /// Makes a device, configures what has to be there before it is up, and sets it up.
    fn add_link(&mut self, name: &Name, link: &Link) -> io::Result<()> {
        let mut patch = LinkPatch { up: link.settings.up.then_some(true), ..LinkPatch::default() };
        if link.identity == LinkIdentity::Tun {
            self.add_tun(name)?;
            patch.mtu = Some(link.settings.mtu);
        } else {
            let change = KernelChange::AddLink(*name, link.clone());
            self.socket.change(encode::request(&change, 0)?)?;
        }
        let index = self.find(name)?.header.index;
        self.indexes.insert(*name, index);
        self.tunnels.engine().is_at(name, index);
        let LinkSettings { accept_ra, accept_local, .. } = link.settings;
        self.sysctls.set(name, &LinkPatch { accept_ra, accept_local, ..LinkPatch::default() });
        if !patch.is_empty() {
            self.socket.change(encode::request(&KernelChange::SetLink(*name, patch), index)?)?;
        }
        // The next round says so if it can't be had.
        let _ = link.settings.tx_checksum.map(|on| self.ethtool.set_tx_checksum(index, on));
        Ok(())
    }

    fn change_link(&mut self, change: &KernelChange) -> io::Result<()> {
        let index = change.device().and_then(|name| self.indexes.get(&name).copied());
        match change {
            KernelChange::AddLink(name, link) => self.add_link(name, link),
            KernelChange::RenameLink(from, to) => {
                let index = index.ok_or_else(|| io::Error::from_raw_os_error(errno::ENODEV))?;
                self.socket.change(encode::request(change, index)?)?;
                self.indexes.remove(from);
                self.indexes.insert(*to, index);
                Ok(())
            }
            KernelChange::SetForwarding(name, forwarding) => self.tunnels.engine().set(name, forwarding),
            KernelChange::DelForwarding(name) => {
                self.tunnels.engine().stop(name);
                Ok(())
            }
            KernelChange::SetWireguard(..) | KernelChange::SetWireguardPeers(..) => {
                self.change_wireguard(change, index)
            }
            KernelChange::SetLink(name, patch) => {
                let index = index.ok_or_else(|| io::Error::from_raw_os_error(errno::ENODEV))?;
                encode::steps(patch).try_for_each(|step| {
                    self.socket.change(encode::request(&KernelChange::SetLink(*name, step), index)?)
                })?;
                self.sysctls.set(name, patch);
                if patch.up == Some(true) {
                    self.wireguard.was_down(index)?;
                }
                patch.tx_checksum.map_or(Ok(()), |on| self.ethtool.set_tx_checksum(index, on))
            }
            _ => {
                let index = index.ok_or_else(|| io::Error::from_raw_os_error(errno::ENODEV))?;
                if let Some(name) = change.device() {
                    self.tunnels.engine().close(&name);
                }
                self.indexes.retain(|_, known| *known != index);
                self.socket.change(encode::request(change, index)?)
            }
        }
    }
}

impl Kernel for Netlink {
    fn observe(&mut self, desired: &KernelState, scope: &Scope) -> Result<Observed, KernelError> {
        let links = self.links().map_err(failed("reading links"))?;
        self.indexes = links.iter().map(|link| (link.host.name, link.host.index)).collect();
        let host = self.host(&links).map_err(failed("reading addresses"))?;

        let mut state = KernelState::default();
        let mut own: BTreeMap<u32, Name> = BTreeMap::new();
        for link in links {
            let (name, index) = (link.host.name, link.host.index);
            let addresses = &host.links[&index].addresses;
            let stale = is_tunnel(&name, &link.tunnel.identity)
                && scope.owns_device_with(addresses.iter().map(|address| address.net));
            if desired.links.contains_key(&name) || scope.devices.contains(&name) || stale {
                let nets = addresses.iter().map(|address| address.net);
                state.addresses.extend(
                    nets.filter(|net| desired.addresses.contains(&(name, *net)) || scope.owns_address(*net))
                        .map(|net| (name, net)),
                );
                let mut tunnel = link.tunnel;
                if let Some(want) = desired.links.get(&name).map(|want| &want.settings) {
                    let have = &mut tunnel.settings;
                    have.tx_checksum = want.tx_checksum.map(|wanted| self.tx_checksum(&name, index, wanted));
                    self.sysctls.read(&name, want, have);
                }
                if tunnel.identity == LinkIdentity::Other("tun".to_owned())
                    && self.tunnels.engine().holds(&name, index)
                {
                    tunnel.identity = LinkIdentity::Tun;
                    state
                        .forwarding
                        .extend(self.tunnels.engine().forwarding(&name).map(|forwarding| (name, forwarding)));
                }
                self.read_wireguard(name, index, &tunnel, desired, &mut state)?;
                state.links.insert(name, tunnel);
                own.insert(index, name);
            }
        }

        let mut host = host;
        self.read_routes(ReadContext { desired, scope, own: &own }, &mut host, &mut state)?;
        self.read_entries(&own, desired, &mut state)?;
        Ok(Observed { state, host })
    }

    fn apply(&mut self, changes: &[KernelChange]) -> Vec<(usize, KernelError)> {
        let mut failures = Vec::new();
        let mut pending: (Vec<usize>, Vec<Request>) = Default::default();
        let mut missing: BTreeSet<Name> = BTreeSet::new();
        let mut rerouted = false;
        for (position, change) in changes.iter().enumerate() {
            // The device could not be made: one of its name is somebody else's.
            if let Some(name) = change.device().filter(|name| missing.contains(name)) {
                failures.push((position, KernelError::NoDevice(name)));
                continue;
            }
            // Such a route may need a second attempt, and what it leaves must not go before.
            if rerouted && change.is_removal() {
                self.send(changes, &mut pending, &mut failures);
                rerouted = false;
            }
            rerouted |=
                matches!(change, KernelChange::SetRoute(route) if route.onlink && route.dst.addr().is_ipv6());
            let is_link = matches!(change.object(), "link" | "forwarding" | "wireguard");
            let index = change.device().map(|name| (name, self.indexes.get(&name).copied()));
            let outcome = match index {
                _ if is_link => {
                    self.send(changes, &mut pending, &mut failures);
                    let outcome = self.change_link(change);
                    if let (KernelChange::AddLink(name, _), Err(_)) = (change, &outcome) {
                        missing.insert(*name);
                    }
                    outcome.map_err(|error| self.named(change, error))
                }
                Some((name, None)) => {
                    missing.insert(name);
                    failures.push((position, KernelError::NoDevice(name)));
                    continue;
                }
                _ => {
                    let index = index.and_then(|(_, index)| index).unwrap_or_default();
                    let object = match change {
                        KernelChange::SetRoute(route) => nexthop::object_of(route, index),
                        _ => None,
                    };
                    const SET: u16 = NLM_F_CREATE | NLM_F_REPLACE;
                    let object = object.map(|object| (object.into(), SET));
                    encode::request(change, index).map(|request| {
                        for request in object.into_iter().chain([request]) {
                            pending.0.push(position);
                            pending.1.push(request);
                        }
                    })
                }
            };
            record(changes, &mut failures, position, outcome);
        }
        self.send(changes, &mut pending, &mut failures);
        failures.sort_by_key(|(position, _)| *position);
        // Without its object a route is refused as well.
        failures.dedup_by_key(|(position, _)| *position);
        failures
    }

    fn route_to(&mut self, addr: IpAddr) -> Result<ResolvedRoute, KernelError> {
        self.route_to(addr)
    }

    fn direct(&mut self, addrs: &[IpAddr], before: &Direct) -> Result<Direct, KernelError> {
        self.beside(addrs, before)
    }

    fn has_wireguard(&mut self) -> bool {
        wireguard::is_known()
    }

    fn wireguard_sessions(&mut self, desired: &KernelState) -> BTreeSet<IpNet> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut with = BTreeSet::new();
        let mut take = |subnets: &[IpNet], report: SessionReport| {
            with.extend(subnets.iter().filter(|_| report.is_fresh(now)));
        };
        self.tunnels.sessions(&mut take);
        if let Err(error) = wireguard_sessions(desired, take) {
            tracing::debug!(%error, "the sessions of WireGuard can't be read");
        }
        with
    }

    fn sysctls(&mut self, keys: &[String]) -> Values {
        sysctl::values(keys)
    }

    fn set_sysctl(&mut self, key: &str, value: &str) -> io::Result<()> {
        sysctl::write(key, value)
    }
}

impl Netlink {
    fn send(
        &mut self,
        changes: &[KernelChange],
        pending: &mut (Vec<usize>, Vec<Request>),
        failures: &mut Vec<(usize, KernelError)>,
    ) {
        let (positions, requests) = std::mem::take(pending);
        let mut enabled: Option<Name> = None;
        for (offset, error) in self.socket.changes(requests) {
            let position = positions[offset];
            let change = &changes[position];
            if let KernelChange::AddAddress(name, net) = change
                && net.addr().is_ipv6()
                && error.raw_os_error() == Some(errno::EACCES)
                && enable_ipv6(name)
            {
                enabled = Some(*name);
            }
            let outcome = match change {
                // What comes after the address was refused for the same reason.
                _ if enabled.is_some() && change.device() == enabled => self.repeat(change),
                KernelChange::SetRoute(route) if may_lack_way_to_hop(route, &error) => {
                    self.set_route_with_way(route)
                }
                KernelChange::SetRoute(route) if route.nexthop.is_some() && nexthop::are_refused(&error) => {
                    self.set_without_object(route, &error)
                }
                _ => Err(error),
            };
            record(changes, failures, position, outcome);
        }
    }

    fn repeat(&mut self, change: &KernelChange) -> io::Result<()> {
        let index = change.device().and_then(|name| self.indexes.get(&name).copied()).unwrap_or_default();
        self.socket.change(encode::request(change, index)?)
    }

    /// Sets a plain route where the kernel refuses nexthop objects. The next look says so, and routes are planned without them.
    fn set_without_object(&mut self, route: &Route, error: &io::Error) -> io::Result<()> {
        if !std::mem::replace(&mut self.nexthops_refused, true) {
            tracing::warn!("the kernel refuses nexthop objects ({error}), so routes to peers are plain ones");
        }
        self.repeat(&KernelChange::SetRoute(Route { nexthop: None, ..*route }))
    }

    /// Sets a route after one to its next hop alone, which goes again: without that, nothing could take
    /// the place of a route by another device in one step.
    fn set_route_with_way(&mut self, route: &Route) -> io::Result<()> {
        let Some(hop) = route.via else { return Err(io::Error::from_raw_os_error(errno::EINVAL)) };
        let way = Route { dev: route.dev, ..Route::ours(host(hop)) };
        self.repeat(&KernelChange::SetRoute(way))?;
        let outcome = self.repeat(&KernelChange::SetRoute(*route));
        self.repeat(&KernelChange::DelRoute(way))?;
        outcome
    }
}

/// Makes a device take IPv6 addresses where the host's default, or somebody later, keeps it from that. Says
/// whether it could.
fn enable_ipv6(name: &Name) -> bool {
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "0").is_ok()
}

/// The kernel takes no next hop of IPv6 to which it knows a way by another device than the route's, except
/// the default route, not even with `onlink` (net/ipv6/route.c, `ip6_route_check_nh_onlink`). Our next hops
/// are in the very subnets to which routes are to be replaced.
fn may_lack_way_to_hop(route: &Route, error: &io::Error) -> bool {
    route.onlink && route.dst.addr().is_ipv6() && error.raw_os_error() == Some(errno::EINVAL)
}

/// What a dump found; nothing where the kernel says that there is no such table (in a namespace
/// whose `lo` was never up), no such device any more, or no such family (`ipv6.disable=1`).
fn or_nothing<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    const NOTHING: [i32; 4] = [errno::ENOENT, errno::ENODEV, errno::EOPNOTSUPP, errno::EAFNOSUPPORT];
    match found {
        Err(error) if error.raw_os_error().is_some_and(|number| NOTHING.contains(&number)) => Ok(None),
        found => found.map(Some),
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> KernelError {
    move |source| KernelError::Netlink { what, source }
}
