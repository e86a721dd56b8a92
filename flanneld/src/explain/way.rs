//! A packet's way as a value, from what the host has and what its kernel answers.

use std::fmt;
use std::net::IpAddr;

use backends::host::HostLink;
use backends::kernel::netlink::{Hop, Routed};
use backends::state::{LinkIdentity, VxlanIdentity};
use backends::{HostView, KernelError, KernelState, Name};
use ipnet::IpNet;
use serde::Serialize;
use subnet::{Family, Mac, Subnets};

use super::confined::Confined;
use super::holder::AddressHolder;

/// What is known of the host.
pub(super) struct HostFacts<'a> {
    /// The pod networks.
    pub(super) networks: Vec<IpNet>,
    /// This node's subnets.
    pub(super) subnets: Subnets,
    /// Pods' packets to addresses outside the networks get this node's address.
    pub(super) masquerade: bool,
    pub(super) host: &'a HostView,
    /// Tunnel devices.
    pub(super) tunnels: &'a KernelState,
}

/// What is said of a pod that the host has not talked to.
const NO_NEIGHBOUR: &str =
    " (this host has no neighbour entry for it: it has not talked lately, or no pod has this address)";
/// Why a packet is not delivered.
const NO_LEASE: &str = "no node has leased a subnet with it";

/// Questions to the kernel and to the agent.
pub(super) trait Lookups {
    fn route(&mut self, to: IpAddr, from: Option<(IpAddr, Name)>) -> Result<Routed, KernelError>;
    fn neighbour(&mut self, device: Name, ip: IpAddr) -> Result<Option<(Mac, bool)>, KernelError>;
    fn tunnel_end(&mut self, device: Name, mac: Mac) -> Result<Option<IpAddr>, KernelError>;
    fn bridge_port(&mut self, bridge: Name, mac: Mac) -> Result<Option<Name>, KernelError>;
    /// The node that has an address, by the agent of this node.
    fn holder(&mut self, destination: IpAddr) -> AddressHolder;
}

/// A packet's way.
#[derive(Debug, Default, Serialize)]
pub(super) struct Way {
    /// What it passes, in its order.
    pub(super) steps: Vec<PathStep>,
    /// Why it does not arrive.
    pub(super) trouble: Option<String>,
    /// What network policies say.
    pub(super) policy: Option<String>,
}

/// A part of a packet's way.
#[derive(Debug, Serialize)]
pub(super) struct PathStep {
    /// The object: `pod`, `route`, `neighbour`, `fdb`, `underlay`, `source`, `delivery`, `note`.
    pub(super) object: &'static str,
    /// What it says.
    pub(super) text: String,
}

/// Where an address is, from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AddressPlace {
    /// In this node's subnet, behind this bridge or device.
    Pod(Name),
    /// This host's own.
    Host,
    /// In the pod networks, but not on this node.
    Elsewhere,
    /// Outside the pod networks.
    Outside,
}

impl Way {
    /// The way of a packet through this node.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub(super) fn of(
        facts: &HostFacts<'_>,
        kernel: &mut dyn Lookups,
        source: IpAddr,
        destination: IpAddr,
    ) -> Result<Self, KernelError> {
        if let Some(way) = Self::confined(source, destination) {
            return Ok(way);
        }
        let mut way = Self::default();
        let from = facts.place(kernel, source)?;
        let incoming = way.begin(facts, kernel, source, from)?;
        let routed = kernel.route(destination, incoming.map(|device| (source, device)))?;
        match routed {
            Routed::Dropped(why) => {
                way.trouble = Some(format!("{destination}: {why} (ip route get {destination})"))
            }
            Routed::Local => way.step("delivery", format!("{destination} is an address of this host")),
            Routed::Forward(hop) => way.forward(facts, kernel, &hop, destination)?,
        }
        way.source(facts, from, source, destination);
        Ok(way)
    }

    /// That of a packet that passes no route, because one of its addresses never leaves a node.
    fn confined(source: IpAddr, destination: IpAddr) -> Option<Self> {
        let (from, to) = (Confined::of(source), Confined::of(destination));
        let mut way = Self::default();
        if let Some(from) = from {
            way.step("pod", format!("{source} is {from}"));
        }
        if let Some(to) = to {
            way.step("delivery", format!("{destination} is {to}"));
        }
        match (from, to) {
            (None, None) => return None,
            (Some(Confined::LimitedBroadcast), _) => way.fail(format!("no packet comes from {source}")),
            (Some(Confined::Loopback), None) => {
                way.fail(format!("the kernel drops what has {source} as its source and another destination"))
            }
            (_, Some(_)) => {}
        }
        Some(way)
    }

    fn step(&mut self, object: &'static str, text: String) {
        self.steps.push(PathStep { object, text });
    }

    fn fail(&mut self, trouble: String) {
        self.trouble.get_or_insert(trouble);
    }

    /// Where the packet comes from; gives the device that it comes in by.
    fn begin(
        &mut self,
        facts: &HostFacts<'_>,
        kernel: &mut dyn Lookups,
        source: IpAddr,
        from: AddressPlace,
    ) -> Result<Option<Name>, KernelError> {
        Ok(match from {
            AddressPlace::Pod(device) => {
                let (port, remark) = self.port(kernel, device, source)?;
                let port = port.map_or_else(String::new, |port| format!("{port} → "));
                self.step("pod", format!("pod {source}: {port}{device}{remark}"));
                Some(device)
            }
            AddressPlace::Host => {
                self.step("pod", format!("{source} is an address of this host"));
                None
            }
            AddressPlace::Elsewhere => {
                let Routed::Forward(hop) = kernel.route(source, None)? else { return Ok(None) };
                self.step(
                    "pod",
                    format!("{source} is on another node: its packets come in by {}", hop.device),
                );
                Some(hop.device)
            }
            AddressPlace::Outside => {
                let Routed::Forward(hop) = kernel.route(source, None)? else { return Ok(None) };
                let device = hop.device;
                self.step(
                    "pod",
                    format!(
                        "{source} is outside the pod networks ({}): it comes in by {device}",
                        facts.shown()
                    ),
                );
                Some(device)
            }
        })
    }

    /// The port of a bridge behind which a pod is, and a remark where the host knows nothing of the pod.
    fn port(
        &mut self,
        kernel: &mut dyn Lookups,
        device: Name,
        pod: IpAddr,
    ) -> Result<(Option<Name>, &'static str), KernelError> {
        match kernel.neighbour(device, pod)? {
            Some((mac, true)) => Ok((kernel.bridge_port(device, mac)?, "")),
            Some((_, false)) => {
                self.step(
                    "note",
                    format!(
                        "{pod} does not answer on {device}: no pod has this address, or its network is broken"
                    ),
                );
                Ok((None, ""))
            }
            None => Ok((None, NO_NEIGHBOUR)),
        }
    }

    /// From a route on.
    fn forward(
        &mut self,
        facts: &HostFacts<'_>,
        kernel: &mut dyn Lookups,
        hop: &Hop,
        destination: IpAddr,
    ) -> Result<(), KernelError> {
        let ours = if hop.ours { " (flannel's)" } else { "" };
        let via = hop.gateway.map_or_else(String::new, |via| format!(" via {via}"));
        let table = if hop.table == 254 { String::new() } else { format!(" of table {}", hop.table) };
        self.step("route", format!("route {}{via} dev {}{table}{ours}", hop.route, hop.device));
        let Some(link) = facts.host.link(hop.device.as_str()) else { return Ok(()) };
        if !link.up {
            self.fail(format!("{} is down: ip link set {} up", hop.device, hop.device));
        }
        let to_pod = facts.subnets.iter().any(|subnet| subnet.contains(&destination));
        let inside = facts.networks.iter().any(|network| network.contains(&destination));
        let tunnel = facts.tunnels.links.get(&hop.device).map(|link| &link.identity);
        match tunnel {
            _ if to_pod => {
                let (port, remark) = self.port(kernel, hop.device, destination)?;
                let port = port.map_or_else(String::new, |port| format!(" → {port}"));
                self.step("delivery", format!("pod {destination}: {}{port}{remark}", hop.device));
            }
            Some(LinkIdentity::Vxlan(vxlan)) => self.vxlan(facts, kernel, hop, *vxlan, destination)?,
            Some(LinkIdentity::Tun) => self.by_peer(kernel, "the agent's own datapath", hop, destination),
            Some(LinkIdentity::Other(kind)) if kind == "tun" => {
                self.by_peer(kernel, "the agent's own datapath", hop, destination);
            }
            Some(LinkIdentity::Wireguard) => self.by_peer(kernel, "the kernel's WireGuard", hop, destination),
            _ if inside && !hop.ours => self.fail(format!(
                "{destination} is in the pod networks, but no route of flannel leads there: {NO_LEASE}, or its lease can't be used \
                 (flanneld status --peers)"
            )),
            _ => self.plain(kernel, hop, link, destination)?,
        }
        Ok(())
    }

    /// Through a device that knows its peers by the leases, while one route leads to all of them.
    fn by_peer(&mut self, kernel: &mut dyn Lookups, carrier: &str, hop: &Hop, destination: IpAddr) {
        let device = hop.device;
        match kernel.holder(destination) {
            AddressHolder::Node { public, way } => {
                self.step("underlay", format!("{device}: {carrier} sends it to {public} in UDP ({way})"));
            }
            AddressHolder::Skipped { subnet, why } => {
                self.fail(format!("{device} does not carry it: the lease of {subnet} can't be used: {why}"));
            }
            AddressHolder::Nobody => self.fail(format!("{device} does not carry it: {NO_LEASE}")),
            AddressHolder::Unknown(why) => {
                self.step("underlay", format!("{device}: {carrier} sends it on in UDP"));
                self.step(
                    "note",
                    format!("to which node is not known, because the agent does not say: {why}"),
                );
            }
        }
    }

    /// Without a tunnel.
    fn plain(
        &mut self,
        kernel: &mut dyn Lookups,
        hop: &Hop,
        link: &HostLink,
        destination: IpAddr,
    ) -> Result<(), KernelError> {
        let next = hop.gateway.unwrap_or(destination);
        let answers = kernel.neighbour(hop.device, next)?;
        if let Some((_, false)) = answers {
            self.fail(format!(
                "{next} does not answer on {}: the node is down, or not on this link",
                hop.device
            ));
        }
        let mac = answers.map_or_else(String::new, |(mac, _)| format!(" = {mac}"));
        self.step("underlay", format!("{next}{mac} on {}, mtu {}", hop.device, link.mtu));
        Ok(())
    }

    /// Through a VXLAN device.
    fn vxlan(
        &mut self,
        facts: &HostFacts<'_>,
        kernel: &mut dyn Lookups,
        hop: &Hop,
        vxlan: VxlanIdentity,
        destination: IpAddr,
    ) -> Result<(), KernelError> {
        let (device, next) = (hop.device, hop.gateway.unwrap_or(destination));
        let Some((mac, _)) = kernel.neighbour(device, next)? else {
            self.fail(format!(
                "{device} has no neighbour entry for {next}: flanneld makes one for each peer; see its log"
            ));
            return Ok(());
        };
        self.step("neighbour", format!("neighbour {next} = {mac}"));
        let Some(end) = kernel.tunnel_end(device, mac)? else {
            self.fail(format!(
                "{device} has no forwarding entry for {mac}: flanneld makes one for each peer; see its log"
            ));
            return Ok(());
        };
        self.step("fdb", format!("fdb {mac} dst {end}"));
        let port = vxlan.port.unwrap_or(8472);
        match kernel.route(end, None)? {
            Routed::Forward(outer) => {
                let via = outer.gateway.map_or_else(String::new, |via| format!(" via {via}"));
                let mtu = facts.host.link(device.as_str()).map_or(0, |link| link.mtu);
                self.step(
                    "underlay",
                    format!(
                        "{}{via} to {end}, UDP {port}, VNI {}, mtu {mtu} inside",
                        outer.device, vxlan.vni
                    ),
                );
            }
            Routed::Local => {
                self.fail(format!("{end} is this host's own address: two nodes have announced it"))
            }
            Routed::Dropped(why) => self.fail(format!("the other node {end} can't be reached: {why}")),
        }
        Ok(())
    }

    /// What becomes of the source address.
    fn source(&mut self, facts: &HostFacts<'_>, from: AddressPlace, source: IpAddr, destination: IpAddr) {
        let inside = |addr: IpAddr| facts.networks.iter().any(|network| network.contains(&addr));
        let local = |addr: IpAddr| {
            facts.host.links.values().any(|link| link.addresses.iter().any(|known| known.net.addr() == addr))
        };
        if self.trouble.is_some() || local(destination) {
            return;
        }
        let text = match from {
            AddressPlace::Pod(_) if inside(destination) => format!("source stays {source}: from pod to pod"),
            AddressPlace::Pod(_) if facts.masquerade => {
                format!("source {source} becomes this node's address: it leaves the pod networks")
            }
            AddressPlace::Pod(_) => {
                format!(
                    "source stays {source}, since flanneld runs without --ip-masq: another program may replace it"
                )
            }
            AddressPlace::Outside if inside(destination) && facts.masquerade => {
                format!(
                    "source {source} becomes this node's address, unless the destination is a pod of this node"
                )
            }
            AddressPlace::Host | AddressPlace::Elsewhere | AddressPlace::Outside => return,
        };
        self.step("source", text);
    }
}

impl HostFacts<'_> {
    fn place(&self, kernel: &mut dyn Lookups, addr: IpAddr) -> Result<AddressPlace, KernelError> {
        if let Routed::Local = kernel.route(addr, None)? {
            return Ok(AddressPlace::Host);
        }
        let own = self.subnets.get(Family::of(addr)).filter(|subnet| subnet.contains(&addr));
        if own.is_some()
            && let Routed::Forward(hop) = kernel.route(addr, None)?
        {
            return Ok(AddressPlace::Pod(hop.device));
        }
        let inside = self.networks.iter().any(|network| network.contains(&addr));
        Ok(if inside { AddressPlace::Elsewhere } else { AddressPlace::Outside })
    }

    fn shown(&self) -> String {
        let all: Vec<String> = self.networks.iter().map(ToString::to_string).collect();
        all.join(", ")
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, PathStep { text, .. }) in self.steps.iter().enumerate() {
            let arrow = if number == 0 { "" } else { "→ " };
            writeln!(f, "{arrow}{text}")?;
        }
        if let Some(trouble) = &self.trouble {
            writeln!(f, "✘ {trouble}")?;
        }
        for line in self.policy.iter().flat_map(|policy| policy.lines()) {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_of_loopback_and_to_the_limited_broadcast_pass_no_route_and_are_named_so() {
        let way = |source: &str, destination: &str| {
            Way::confined(source.parse().unwrap(), destination.parse().unwrap())
        };
        for (source, destination, words, arrives) in [
            ("10.244.1.2", "127.0.0.1", "127.0.0.1 is a loopback address: its packets never leave", true),
            ("fd00::2", "::1", "::1 is a loopback address", true),
            ("127.0.0.1", "127.0.0.1", "127.0.0.1 is a loopback address", true),
            ("127.0.0.1", "10.244.2.2", "the kernel drops what has 127.0.0.1 as its source", false),
            ("10.244.1.2", "255.255.255.255", "255.255.255.255 is the limited broadcast address", true),
            ("255.255.255.255", "10.244.2.2", "no packet comes from 255.255.255.255", false),
        ] {
            let way = way(source, destination).unwrap();
            assert!(way.to_string().contains(words), "{source} → {destination}: {way}");
            assert_eq!(way.trouble.is_none(), arrives, "{source} → {destination}: {way}");
        }
        assert!(way("10.244.1.2", "10.244.2.2").is_none());
    }
}
