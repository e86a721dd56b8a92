//! Two nodes on one wire for each way, with agents and pods, all of them there at once.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use backends::testing::{Agent, Node, Pod, Process, wait_for};
use bench::bed::{Cluster, Member};
use bench::iperf::End;
use bench::process::counters;
use clap::ValueEnum;
use ipnet::IpNet;
use serde_json::json;
use subnet::Family;

use super::Job;
use super::plan::Place;
use crate::Stage;

/// How long anything may take before it is given up.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// How packets get from node to node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum PacketPath {
    /// The underlay alone, without an agent.
    Bare,
    /// Routes.
    HostGw,
    /// The kernel's VXLAN.
    Vxlan,
    /// Our userspace datapath.
    Udp,
    /// That of the Go flanneld which FLANNELD_GO names.
    GoUdp,
    /// WireGuard in our process.
    Wireguard,
    /// WireGuard by Debian's wireguard-go, below pods that our agent connects.
    WireguardGo,
}

impl PacketPath {
    /// Whether it is measured where no paths are named; a Go flanneld only where there is one.
    pub(super) fn is_usual(self) -> bool {
        !matches!(self, Self::Wireguard | Self::WireguardGo)
    }

    /// The network configuration of its agents.
    fn config(self, job: &Job) -> String {
        let backend = match self {
            Self::Bare | Self::HostGw => json!({ "Type": "host-gw" }),
            Self::Vxlan => json!({ "Type": "vxlan" }),
            Self::Udp => json!({ "Type": "udp", "Workers": job.workers }),
            Self::GoUdp => json!({ "Type": "udp" }),
            Self::Wireguard => json!({ "Type": "wireguard", "Workers": job.workers, "Userspace": "always" }),
            // The agent gives the pods their addresses and MTU, of which VXLAN takes 50 or 70; longer prefixes lead past its device.
            Self::WireguardGo => {
                let vxlan = if job.family == Family::V6 { 70 } else { 50 };
                json!({ "Type": "vxlan", "MTU": job.mtu - GO_OVERHEAD + vxlan })
            }
        };
        let config = match job.family {
            Family::V4 => json!({ "Network": "10.244.0.0/16", "Backend": backend }),
            Family::V6 => json!({
                "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "Backend": backend,
            }),
        };
        config.to_string()
    }

    /// The device by which packets leave for other nodes.
    pub(crate) fn device(self, family: Family) -> &'static str {
        match self {
            Self::Bare | Self::HostGw => "eth0",
            Self::Vxlan if family == Family::V6 => "flannel-v6.1",
            Self::Vxlan => "flannel.1",
            Self::Udp | Self::GoUdp => "flannel0",
            Self::Wireguard if family == Family::V6 => "flannel-wg-v6",
            Self::Wireguard => "flannel-wg",
            Self::WireguardGo => GO_DEVICE,
        }
    }
}

impl fmt::Display for PacketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
}

/// Two nodes of a cluster of their own; traffic goes from the first to the second.
pub(crate) struct Pair {
    pub(crate) way: PacketPath,
    pub(crate) near: Side,
    pub(crate) far: Side,
    /// The processes that move packets.
    pub(crate) agents: Vec<u32>,
    _cluster: Cluster,
}

/// A node and what is on it; what depends on another thing is dropped before it.
pub(crate) struct Side {
    pub(crate) pods: Vec<Pod>,
    pub(crate) agent: Option<Agent>,
    /// Another program that moves packets.
    helper: Option<Process>,
    pub(crate) node: Node,
    own: IpAddr,
}

impl Pair {
    /// A pair whose ends reach each other.
    pub(crate) fn new(way: PacketPath, stage: &Stage, job: &Job) -> anyhow::Result<Self> {
        let (config, args) = (way.config(job), ["--iface=eth0"]);
        let cluster = match way {
            // Go flannel has no store in a directory.
            PacketPath::GoUdp => Cluster::new(job.go.clone().context("no Go flanneld")?, &config, &args)?,
            _ => Cluster::in_files(stage.flanneld(), &config, &args)?,
        };
        let [near, far] = [cluster.fabric.node()?, cluster.fabric.node()?];
        connect(&near, &far, way, job.mtu)?;
        if way == PacketPath::Bare {
            let [near, far] = [near, far].map(|node| Side::bare(node, job.family));
            return Ok(Self { way, near, far, agents: Vec::new(), _cluster: cluster });
        }
        if way == PacketPath::GoUdp {
            cluster.fabric.switch().ip("route add 172.31.1.0/24 dev br0")?;
        }
        let mut near = Side::start(&cluster, near, way, stage)?;
        let mut far = Side::start(&cluster, far, way, stage)?;
        if way == PacketPath::WireguardGo {
            wireguard_go(&mut near, &mut far, job)?;
        }
        let agents = [&mut near, &mut far].into_iter().flat_map(Side::processes).collect();
        let pair = Self { way, near, far, agents, _cluster: cluster };
        for place in [Place::Host, Place::Pod] {
            let [from, to] = pair.ends(place);
            wait_for(&format!("an echo over {way}"), TIMEOUT, || {
                from.namespace.reaches(to.address).unwrap_or(false)
            })?;
        }
        Ok(pair)
    }

    /// Sender and receiver.
    pub(crate) fn ends(&self, place: Place) -> [End<'_>; 2] {
        [&self.near, &self.far].map(|side| match place {
            Place::Pod => End::of(&side.pods[0]),
            Place::Host => End { namespace: side.node.namespace(), address: side.own },
        })
    }

    /// Others than these two on the same nodes.
    pub(crate) fn neighbours(&self) -> [End<'_>; 2] {
        [&self.near, &self.far].map(|side| End::of(&side.pods[1]))
    }

    /// The nodes' addresses in the underlay.
    pub(crate) fn underlay(&self) -> [IpAddr; 2] {
        [&self.near, &self.far].map(|side| underlay(&side.node, self.family()))
    }

    /// The family of all that is sent.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.near.own)
    }

    /// Bytes that the way's device sent at the near end and received at the far end.
    pub(crate) fn carried(&self) -> anyhow::Result<[u64; 2]> {
        let device = self.way.device(self.family());
        let [near, far] = [&self.near, &self.far].map(|side| counters(side.node.namespace(), device));
        Ok([near?.sent_bytes, far?.received_bytes])
    }
}

fn underlay(node: &Node, family: Family) -> IpAddr {
    match family {
        Family::V4 => node.address().into(),
        Family::V6 => node.address_v6().into(),
    }
}

impl Side {
    fn bare(node: Node, family: Family) -> Self {
        Self { pods: Vec::new(), agent: None, helper: None, own: underlay(&node, family), node }
    }

    /// An agent that is ready, and two pods.
    fn start(cluster: &Cluster, node: Node, way: PacketPath, stage: &Stage) -> anyhow::Result<Self> {
        let mut member = cluster.start_on(node)?;
        if way == PacketPath::GoUdp {
            // Go flannel has no `/readyz`.
            member.time_to_subnet_file()?;
        } else {
            member.agent.wait_ready(TIMEOUT)?;
        }
        let subnet = member.subnet()?;
        let plugin = stage.plugin();
        let pods = [Pod::cni(&member.node, &plugin)?, Pod::cni(&member.node, &plugin)?].into();
        // The bridge of the pods has the first address of the subnet, and so the node has.
        // With IPv6, the address of the network is one of the hosts'.
        let first = usize::from(Family::of(subnet.addr()) == Family::V6);
        let own = subnet.hosts().nth(first).context("a subnet without room")?;
        let held = member.show("ip -o addr show dev cni0")?;
        let expected = IpNet::new(own, subnet.prefix_len())?.to_string();
        ensure!(held.contains(&expected), "cni0 has not the address {expected}: {held}");
        let Member { agent, node, .. } = member;
        Ok(Self { pods, agent: Some(agent), helper: None, node, own })
    }

    fn processes(&mut self) -> Vec<u32> {
        let agent = self.agent.as_mut().map(|agent| agent.process().id());
        agent.into_iter().chain(self.helper.as_ref().map(Process::id)).collect()
    }

    fn subnet(&self) -> anyhow::Result<IpNet> {
        let env = self.agent.as_ref().context("no agent")?.subnet_env()?;
        env.subnets.iter().next().context("subnet.env has no subnet")
    }
}

/// A wire between the nodes in place of the switch, which would cost something of its own.
fn connect(near: &Node, far: &Node, way: PacketPath, mtu: u32) -> anyhow::Result<()> {
    for node in [near, far] {
        // Its port on the switch is not to be waited for.
        node.unplug()?;
        if way == PacketPath::GoUdp {
            // Its agents still need etcd, which is on the switch.
            node.namespace().ip("link set eth0 down\nlink set eth0 name mgmt\naddr flush dev mgmt")?;
        } else {
            node.namespace().ip("link del eth0")?;
        }
    }
    near.namespace().ip(&format!(
        "link add eth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
        far.namespace().path().display()
    ))?;
    for (node, host) in [(near, 1), (far, 2)] {
        node.link_up()?;
        if way == PacketPath::GoUdp {
            let own = Ipv4Addr::new(172, 31, 1, host);
            node.namespace().ip(&format!(
                "addr add {own}/32 dev mgmt\nlink set mgmt up\nroute add 172.31.0.254 dev mgmt src {own}"
            ))?;
            node.plug()?;
        }
    }
    Ok(())
}

/// The device of `wireguard-go` on each node.
const GO_DEVICE: &str = "wg-go";
/// What WireGuard takes of the MTU, in bytes.
const GO_OVERHEAD: u32 = 80;

/// Has `wireguard-go` carry what goes between the nodes' subnets.
fn wireguard_go(near: &mut Side, far: &mut Side, job: &Job) -> anyhow::Result<()> {
    let mut keys = Vec::new();
    for (side, number) in [(&mut *near, 1), (&mut *far, 2)] {
        let namespace = side.node.namespace();
        // Its control socket is in a directory that all namespaces share, under the name of the device.
        let device = format!("{GO_DEVICE}{number}x{}", std::process::id() % 100_000);
        let process = namespace.command("wireguard-go").args(["-f", &device]).env("LOG_LEVEL", "silent");
        side.helper = Some(process.stderr(Stdio::null()).spawn()?);
        // `wg` removes a socket that does not listen yet, and then asks the kernel's module.
        let socket = Path::new("/var/run/wireguard").join(format!("{device}.sock"));
        wait_for("the socket of wireguard-go", TIMEOUT, || UnixStream::connect(&socket).is_ok())?;
        let private = namespace.show("wg genkey")?;
        fs::write(side.node.dir().join("wg-go"), &private).context("can't write a key")?;
        keys.push((device, namespace.command("wg").arg("pubkey").input(private).ok()?.trim().to_owned()));
    }
    for (side, peer, (device, _), (_, key)) in
        [(&*near, &*far, &keys[0], &keys[1]), (&*far, &*near, &keys[1], &keys[0])]
    {
        let (own, theirs) = (side.subnet()?, peer.subnet()?);
        let endpoint = SocketAddr::new(underlay(&peer.node, job.family), 51_820);
        side.node.namespace().show(&format!(
            "wg set {device} private-key {} listen-port 51820 peer {key} endpoint {endpoint} allowed-ips {theirs}",
            side.node.dir().join("wg-go").display()
        ))?;
        let mut lines = format!(
            "link set {device} name {GO_DEVICE}\naddr add {} dev {GO_DEVICE}\nlink set {GO_DEVICE} mtu {} up\n",
            IpNet::new(own.network(), own.max_prefix_len())?,
            job.mtu - GO_OVERHEAD
        );
        for half in theirs.subnets(theirs.prefix_len() + 1)? {
            lines += &format!("route add {half} dev {GO_DEVICE}\n");
        }
        side.node.namespace().ip(&lines)?;
    }
    Ok(())
}
