//! Two nodes on one wire for each way, with agents and pods, all of them there at once.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backends::testing::{Agent, Etcd, Fabric, Namespace, Node, Pod, Process, wait_for};
use clap::ValueEnum;
use ipnet::IpNet;
use serde_json::json;
use subnet::Family;
use tempfile::TempDir;

use super::Job;
use super::plan::Place;

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
        match self {
            Self::Bare | Self::HostGw | Self::Vxlan | Self::Udp | Self::GoUdp => true,
            Self::Wireguard | Self::WireguardGo => false,
        }
    }

    /// Its `Type` in `net-conf.json`.
    fn backend(self) -> Option<&'static str> {
        match self {
            Self::Bare => None,
            Self::HostGw => Some("host-gw"),
            Self::Vxlan => Some("vxlan"),
            Self::Udp | Self::GoUdp => Some("udp"),
            Self::Wireguard => Some("wireguard"),
            // The agent gives the pods their addresses and MTU; longer prefixes lead past its device.
            Self::WireguardGo => Some("vxlan"),
        }
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
        f.write_str(match self {
            Self::Bare => "bare",
            Self::HostGw => "host-gw",
            Self::Vxlan => "vxlan",
            Self::Udp => "udp",
            Self::GoUdp => "go-udp",
            Self::Wireguard => "wireguard",
            Self::WireguardGo => "wireguard-go",
        })
    }
}

/// Two nodes of a cluster of their own; traffic goes from the first to the second.
pub(crate) struct Pair {
    pub(crate) way: PacketPath,
    pub(crate) near: Side,
    pub(crate) far: Side,
    _stores: (Option<TempDir>, Option<Etcd>),
    _fabric: Fabric,
}

/// A node and what is on it; what depends on another thing is dropped before it.
pub(crate) struct Side {
    pub(crate) pods: Vec<Pod>,
    pub(crate) agent: Option<Agent>,
    /// Another program that moves packets.
    pub(crate) helper: Option<Process>,
    pub(crate) node: Node,
    own: IpAddr,
}

/// Where a measurement begins or ends.
#[derive(Clone, Copy)]
pub(crate) struct End<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) address: IpAddr,
}

impl Pair {
    /// A pair whose ends reach each other.
    pub(crate) fn new(way: PacketPath, job: &Job) -> anyhow::Result<Self> {
        let fabric = Fabric::new()?;
        let [near, far] = [fabric.node()?, fabric.node()?];
        connect(&near, &far, way, job.mtu)?;
        let Some(backend) = way.backend() else {
            let [near, far] = [near, far].map(|node| Side::bare(node, job.family));
            return Ok(Self { way, near, far, _stores: (None, None), _fabric: fabric });
        };
        let mut config = match job.family {
            Family::V4 => json!({ "Network": "10.244.0.0/16" }),
            Family::V6 => {
                json!({ "EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48" })
            }
        };
        config["Backend"] = json!({ "Type": backend });
        if matches!(way, PacketPath::Udp | PacketPath::Wireguard) {
            config["Backend"]["Workers"] = job.workers.into();
        }
        match way {
            PacketPath::Wireguard => config["Backend"]["Userspace"] = "always".into(),
            // Of this, VXLAN takes 50 or 70.
            PacketPath::WireguardGo => {
                let vxlan = if job.family == Family::V6 { 70 } else { 50 };
                config["Backend"]["MTU"] = (job.mtu - GO_OVERHEAD + vxlan).into();
            }
            _ => {}
        }
        let config = config.to_string();
        let (directory, etcd, store) = match way {
            // Go flannel has no store in a directory.
            PacketPath::GoUdp => {
                fabric.switch().ip("route add 172.31.1.0/24 dev br0")?;
                let etcd = Etcd::on(&fabric)?;
                let endpoints = format!("--etcd-endpoints={}", etcd.endpoint());
                etcd.ctl(&["put", "/coreos.com/network/config", &config], "")?;
                (None, Some(etcd), endpoints)
            }
            _ => {
                let directory = tempfile::Builder::new().prefix("flannel-net-").tempdir();
                let directory = directory.context("no temporary directory for leases")?;
                fs::write(directory.path().join("config.json"), config).context("can't write config.json")?;
                let store = format!("--lease-store=file:{}", directory.path().display());
                (Some(directory), None, store)
            }
        };
        let mut near = Side::start(near, way, job, &store)?;
        let mut far = Side::start(far, way, job, &store)?;
        if way == PacketPath::WireguardGo {
            wireguard_go(&mut near, &mut far, job)?;
        }
        let pair = Self { way, near, far, _stores: (directory, etcd), _fabric: fabric };
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
        [&self.near, &self.far].map(|side| side.end(place))
    }

    /// Others than these two on the same nodes.
    pub(crate) fn neighbours(&self) -> [End<'_>; 2] {
        [&self.near, &self.far].map(|side| pod_end(&side.pods[1]))
    }

    /// The nodes' addresses in the underlay.
    pub(crate) fn underlay(&self) -> [IpAddr; 2] {
        [&self.near, &self.far].map(|side| Side::bare_address(&side.node, self.family()))
    }

    /// The family of all that is sent.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.near.own)
    }

    /// The agents' process ids.
    pub(crate) fn agents(&mut self) -> Vec<u32> {
        let of = |side: &mut Side| {
            let agent = side.agent.as_mut().map(|agent| agent.process().id());
            agent.into_iter().chain(side.helper.as_ref().map(Process::id)).collect::<Vec<_>>()
        };
        [&mut self.near, &mut self.far].into_iter().flat_map(of).collect()
    }

    /// Bytes that the way's device sent at the near end and received at the far end.
    pub(crate) fn carried(&self) -> anyhow::Result<[u64; 2]> {
        let device = self.way.device(self.family());
        let [near, far] = [&self.near, &self.far].map(|side| counters(&side.node, device));
        Ok([near?.sent_bytes, far?.received_bytes])
    }
}

impl Side {
    fn bare_address(node: &Node, family: Family) -> IpAddr {
        match family {
            Family::V4 => node.address().into(),
            Family::V6 => node.address_v6().into(),
        }
    }

    fn bare(node: Node, family: Family) -> Self {
        let own = Self::bare_address(&node, family);
        Self { pods: Vec::new(), agent: None, helper: None, node, own }
    }

    /// An agent that is ready, and two pods.
    fn start(node: Node, way: PacketPath, job: &Job, store: &str) -> anyhow::Result<Self> {
        let ours = job.programs.join("flanneld");
        let program =
            if way == PacketPath::GoUdp { job.go.as_deref().context("no Go flanneld")? } else { &ours };
        let mut agent = Agent::spawn(&node, program, [store, "--iface=eth0"])?;
        if way == PacketPath::GoUdp {
            wait_for_subnet_file(&mut agent)?;
        } else {
            agent.wait_ready(TIMEOUT)?;
        }
        let subnet = agent.subnet_env()?.subnets.iter().next().context("subnet.env has no subnet")?;
        let plugin = job.programs.join("flannel");
        let pods = [Pod::cni(&node, &plugin)?, Pod::cni(&node, &plugin)?].into();
        // The bridge of the pods has the first address of the subnet, and so the node has.
        // With IPv6, the address of the network is one of the hosts'.
        let first = usize::from(job.family == Family::V6);
        let own = subnet.hosts().nth(first).context("a subnet without room")?;
        let held = node.namespace().command("ip").args(["-o", "addr", "show", "dev", "cni0"]).ok()?;
        let expected = IpNet::new(own, subnet.prefix_len())?.to_string();
        ensure!(held.contains(&expected), "cni0 has not the address {expected}: {held}");
        Ok(Self { pods, agent: Some(agent), helper: None, node, own })
    }

    fn end(&self, place: Place) -> End<'_> {
        match place {
            Place::Pod => pod_end(&self.pods[0]),
            Place::Host => End { namespace: self.node.namespace(), address: self.own },
        }
    }
}

fn pod_end(pod: &Pod) -> End<'_> {
    End { namespace: pod.namespace(), address: pod.address() }
}

/// A wire between the nodes in place of the switch, which would cost something of its own.
fn connect(near: &Node, far: &Node, way: PacketPath, mtu: u32) -> anyhow::Result<()> {
    for node in [near, far] {
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
        let (namespace, dir) = (side.node.namespace(), side.node.dir());
        // Its control socket is in a directory that all namespaces share, under the name of the device.
        let device = format!("{GO_DEVICE}{number}x{}", std::process::id() % 100_000);
        let process = namespace.command("wireguard-go").args(["-f", &device]).env("LOG_LEVEL", "silent");
        side.helper = Some(process.stderr(std::process::Stdio::null()).spawn()?);
        wait_for("the device of wireguard-go", TIMEOUT, || {
            namespace.ip(&format!("link show {device}")).is_ok()
        })?;
        let private = namespace.command("wg").arg("genkey").ok()?;
        fs::write(dir.join("wg-go"), &private).context("can't write a key")?;
        keys.push((device, namespace.command("wg").arg("pubkey").input(private).ok()?.trim().to_owned()));
    }
    for (me, other) in [(0, 1), (1, 0)] {
        let (side, peer) = if me == 0 { (&*near, &*far) } else { (&*far, &*near) };
        let device = &keys[me].0;
        let subnet = |side: &Side| -> anyhow::Result<IpNet> {
            let env = side.agent.as_ref().context("no agent")?.subnet_env()?;
            env.subnets.iter().next().context("subnet.env has no subnet")
        };
        let (own, theirs) = (subnet(side)?, subnet(peer)?);
        let at = Side::bare_address(&peer.node, job.family);
        let endpoint = std::net::SocketAddr::new(at, 51_820).to_string();
        let file = side.node.dir().join("wg-go").display().to_string();
        let args = [
            "set",
            device,
            "private-key",
            &file,
            "listen-port",
            "51820",
            "peer",
            &keys[other].1,
            "endpoint",
            &endpoint,
            "allowed-ips",
            &theirs.to_string(),
        ];
        side.node.namespace().command("wg").args(args).ok()?;
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

/// Go flannel has no `/readyz`.
fn wait_for_subnet_file(agent: &mut Agent) -> anyhow::Result<()> {
    let start = Instant::now();
    while agent.subnet_env().is_err() {
        let ended = agent.process().ended()?;
        ensure!(ended.is_none() && start.elapsed() < TIMEOUT, "no subnet.env; its log:\n{}", agent.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What a device counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) received_bytes: u64,
    pub(crate) received_packets: u64,
    pub(crate) sent_bytes: u64,
}

/// The counters of one of a node's devices.
pub(crate) fn counters(node: &Node, device: &str) -> anyhow::Result<Counters> {
    let text = node.namespace().run(|| fs::read_to_string("/proc/thread-self/net/dev"));
    parse(&text.context("can't read /proc/net/dev")?, device)
        .with_context(|| format!("no counters of {device} on {}", node.name()))
}

fn parse(text: &str, device: &str) -> Option<Counters> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [received_bytes, received_packets, .., sent_bytes, _, _, _, _, _, _, _] = fields[..] else {
        return None;
    };
    Some(Counters { received_bytes, received_packets, sent_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_those_of_the_device_of_that_very_name() {
        let text = "Inter-|   Receive          |  Transmit\n\
            flannel.10: 9 9 9 0 0 0 0 0 9 9 0 0 0 0 0 0\n\
             flannel.1: 1000 10 0 0 0 0 0 0 2000 20 0 0 0 0 0 0\n";
        let expected = Counters { received_bytes: 1000, received_packets: 10, sent_bytes: 2000 };
        assert_eq!(parse(text, "flannel.1"), Some(expected));
        assert_eq!(parse(text, "flannel"), None);
    }
}
