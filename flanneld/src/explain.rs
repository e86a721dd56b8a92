//! `flanneld explain`: the way that a packet should take, by what the kernel has; it changes nothing and sends nothing.

mod confined;
mod holder;
mod way;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use backends::kernel::netlink::{Netlink, Routed};
use backends::state::is_tunnel_name;
use backends::{HostView, Kernel, KernelError, KernelState, Name, Scope};
use serde_json::json;
use subnet::Mac;
use subnet::env_file::Reading;

use crate::ask;
use crate::policy::client;
use crate::status::PeerList;
use crate::text::with_causes;
use holder::AddressHolder;
use way::{HostFacts, Lookups, Way};

/// Which packet is explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExplainOptions {
    /// Who sends it.
    pub(crate) source: IpAddr,
    /// Who receives it.
    pub(crate) destination: IpAddr,
    /// The port, for network policies, and the protocol.
    pub(crate) port: Option<(u16, String)>,
    /// The file of the agent.
    pub(crate) subnet_file: PathBuf,
    /// Where the agent of this node serves health.
    pub(crate) at: SocketAddr,
    /// A JSON object instead of text.
    pub(crate) json: bool,
}

/// Prints the way of a packet.
///
/// # Errors
/// When the kernel can't be asked, or the packet does not arrive.
pub(crate) fn run(options: &ExplainOptions) -> anyhow::Result<()> {
    let shown = options.subnet_file.display();
    let text = subnet::regular::read_to_string(&options.subnet_file).with_context(|| {
        format!("{shown} can't be read: flanneld writes it when this node has a subnet; --subnet-file names another one")
    })?;
    let reading = Reading::parse(&text).with_context(|| shown.to_string())?;
    let mut kernel = Netlink::open()?;
    let Observed { host, tunnels } = observe(&mut kernel)?;
    let facts = HostFacts {
        networks: reading.networks_v4.iter().chain(&reading.networks_v6).copied().collect(),
        subnets: reading.subnets,
        masquerade: reading.ip_masq == Some(true),
        host: &host,
        tunnels: &tunnels,
    };
    let mut way = Way::of(
        &facts,
        &mut Asked { kernel: &mut kernel, agent: options.at },
        options.source,
        options.destination,
    )?;
    way.policy = policies(options, reading.policy_socket.is_some());
    let mut out = crate::output::stdout();
    match options.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&json!({ "schema": 1, "way": way }))?)?,
        false => out.write_all(way.to_string().as_bytes())?,
    }
    way.trouble.map_or(Ok(()), |trouble| Err(anyhow::anyhow!("the packet does not arrive: {trouble}")))
}

/// What the agent of this node says about network policies.
fn policies(options: &ExplainOptions, enforced: bool) -> Option<String> {
    if !enforced {
        return Some("network policies are not enforced by this node's flanneld".to_owned());
    }
    let Some((port, protocol)) = &options.port else {
        return Some("network policies are enforced: give DESTINATION:PORT to have them judged".to_owned());
    };
    let destination = match options.destination {
        IpAddr::V4(v4) => format!("{v4}:{port}"),
        IpAddr::V6(v6) => format!("[{v6}]:{port}"),
    };
    let asked = client::explain(&options.subnet_file, &options.source.to_string(), &destination, protocol);
    Some(asked.unwrap_or_else(|error| format!("network policies can't be judged: {}", with_causes(&error))))
}

/// The host, and the tunnels of its devices.
struct Observed {
    host: HostView,
    tunnels: KernelState,
}

/// Reads the host, with all devices that have the name of a tunnel.
fn observe(kernel: &mut Netlink) -> Result<Observed, KernelError> {
    let host = kernel.observe(&KernelState::default(), &Scope::default())?.host;
    let devices = host.links.values().map(|link| link.name).filter(is_tunnel_name).collect();
    let scope = Scope { devices, ..Scope::default() };
    let tunnels = kernel.observe(&KernelState::default(), &scope)?.state;
    Ok(Observed { host, tunnels })
}

/// The kernel, asked for single entries, and the agent.
struct Asked<'a> {
    kernel: &'a mut Netlink,
    agent: SocketAddr,
}

impl Lookups for Asked<'_> {
    fn route(&mut self, to: IpAddr, from: Option<(IpAddr, Name)>) -> Result<Routed, KernelError> {
        self.kernel.look_up(to, from)
    }

    fn neighbour(&mut self, device: Name, ip: IpAddr) -> Result<Option<(Mac, bool)>, KernelError> {
        self.kernel.neighbour(device, ip)
    }

    fn tunnel_end(&mut self, device: Name, mac: Mac) -> Result<Option<IpAddr>, KernelError> {
        self.kernel.tunnel_end(device, mac)
    }

    fn bridge_port(&mut self, bridge: Name, mac: Mac) -> Result<Option<Name>, KernelError> {
        self.kernel.bridge_port(bridge, mac)
    }

    fn holder(&mut self, destination: IpAddr) -> AddressHolder {
        match ask::value::<PeerList>(self.agent, "/peers") {
            Err(why) => AddressHolder::Unknown(why),
            Ok(list) => AddressHolder::among(list.peers, destination),
        }
    }
}
