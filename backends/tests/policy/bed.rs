//! Two nodes and the pods of the table of cases, each a namespace, with servers on all ports of the table and service
//! addresses in front of them.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use backends::nft::{Nft, NftError};
use backends::policy::{Converged, Enforcer, Engine, SteerMode, Steering, bridged_packets_are_seen};
use backends::testing::policy::{Cases, Cell, Step, World, in_family, settings};
use backends::testing::{Fabric, Namespace, Node, Pod, uninterrupted};
use ipnet::IpNet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol as SocketProtocol, SockAddr, Socket, Type};
use subnet::Family;
use subnet::policy::Protocol;

use crate::SHIFT;

pub(crate) const NODES: [&str; 2] = ["node1", "node2"];
/// The port that nodes of the table listen on.
const NODE_PORT: u16 = 18090;
/// Every expected answer has to come within this time, on however busy a machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How packets between two pods of one node are to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SameNode {
    /// By steering: `br_netfilter` doesn't look.
    Steered,
    /// By `br_netfilter`.
    Netfilter,
    /// Not at all.
    Unseen,
}

pub(crate) struct Bed {
    pub(crate) cases: Cases,
    pub(crate) nodes: Vec<BedNode>,
    pub(crate) pods: BTreeMap<String, Pod>,
    families: Vec<Family>,
    now: Instant,
    _fabric: Fabric,
}

pub(crate) struct BedNode {
    pub(crate) name: &'static str,
    pub(crate) node: Node,
    pub(crate) enforcer: Enforcer,
}

/// A connection that is tried.
struct Probe {
    cell: Cell,
    service: bool,
    family: Family,
    socket: Socket,
}

impl Bed {
    pub(crate) fn new(same_node: SameNode) -> Self {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
        let cases = crate::cases();
        let families = Family::BOTH.to_vec();
        let fabric = Fabric::new().unwrap();
        let nodes: Vec<Node> = NODES.iter().map(|_| fabric.node().unwrap()).collect();
        let mut pods = BTreeMap::new();
        for (name, node) in NODES.iter().zip(&nodes) {
            for (key, address) in cases.pods_of(name) {
                let addresses = families.iter().map(|family| {
                    let len = if *family == Family::V4 { 24 } else { 120 };
                    IpNet::new(in_family(address, *family), len).unwrap()
                });
                let pod = Pod::wired_with(node, &addresses.collect::<Vec<_>>()).unwrap();
                serve(pod.namespace(), &[80, 81]);
                pods.insert(key.to_owned(), pod);
            }
        }
        for (number, node) in nodes.iter().enumerate() {
            wire(&cases, number, node, &nodes[1 - number], same_node);
            serve(node.namespace(), &[NODE_PORT]);
        }
        let nodes = NODES.iter().zip(nodes).map(|(name, node)| {
            let enforcer = open(name, &node, &families);
            BedNode { name, node, enforcer }
        });
        let mut bed =
            Self { cases, nodes: nodes.collect(), pods, families, now: Instant::now(), _fabric: fabric };
        if same_node == SameNode::Steered {
            bed.nodes.iter_mut().for_each(BedNode::steer);
        }
        bed
    }

    /// What a node knows at a step.
    pub(crate) fn world(&self, step: &Step, node: &str) -> World {
        self.cases.world(step, node, &self.families)
    }

    /// Tells both nodes what is so now, and lets them make their tables.
    pub(crate) fn enforce(&mut self, step: &Step) -> Vec<Converged> {
        // As if the last step had been a while ago, so that no generation has to wait.
        self.now += Duration::from_secs(2);
        let worlds: Vec<World> = self.nodes.iter().map(|node| self.world(step, node.name)).collect();
        let now = self.now;
        let nodes = self.nodes.iter_mut().zip(worlds);
        nodes
            .map(|(node, world)| {
                world.tell(&mut node.enforcer.engine.cluster);
                node.enforcer.converge(now).unwrap()
            })
            .collect()
    }

    /// Tries all connections of the table, and gives those that are not as they should be.
    pub(crate) fn wrong(&self, step: &Step) -> Vec<String> {
        let mut cells = self.cases.cells(step);
        // What should not pass is sent first: by the time that all that should is answered, it would be, too.
        cells.sort_by_key(|cell| cell.allowed);
        let mut probes = Vec::new();
        for service in [true, false] {
            for from in self.pods.keys() {
                let of_pod = cells.iter().filter(|cell| cell.from == *from);
                // A node has no service in front of it.
                let of_pod: Vec<&Cell> =
                    of_pod.filter(|cell| !(service && NODES.contains(&cell.to.as_str()))).collect();
                let started = self.pods[from].namespace().run(|| {
                    let each = of_pod
                        .iter()
                        .flat_map(|cell| self.families.iter().map(move |family| (cell, *family)));
                    each.map(|(cell, family)| {
                        let socket = ask(self.target(cell, family, service), cell.protocol);
                        Probe { cell: (*cell).clone(), service, family, socket }
                    })
                    .collect::<Vec<_>>()
                });
                probes.extend(started);
            }
        }
        let answered = answers(&probes);
        let probes = probes.iter().zip(answered).filter(|(probe, answered)| probe.cell.allowed != *answered);
        probes
            .map(|(probe, _)| {
                let Probe { cell, service, family, .. } = probe;
                let Cell { from, to, protocol, port, allowed } = cell;
                let (way, is) = (
                    if *service { "service of " } else { "" },
                    if *allowed { "refused" } else { "let through" },
                );
                format!("{family} {from} -> {way}{to} {protocol:?} {port} was {is}")
            })
            .collect()
    }

    fn target(&self, cell: &Cell, family: Family, service: bool) -> SocketAddr {
        let address = match (service, self.cases.address(&cell.to, Family::V4)) {
            (true, IpAddr::V4(v4)) => in_family(service_address(v4), family),
            _ => self.cases.address(&cell.to, family),
        };
        SocketAddr::new(address, cell.port)
    }
}

impl BedNode {
    /// Another run of the agent, which finds what the former left.
    pub(crate) fn restart(&mut self, world: &World, now: Instant) -> Result<Converged, NftError> {
        self.enforcer = open(self.name, &self.node, &Family::BOTH);
        world.tell(&mut self.enforcer.engine.cluster);
        self.enforcer.converge(now)
    }

    pub(crate) fn steer(&mut self) {
        let steering = self.steering();
        self.enforcer.steer(steering.as_ref()).unwrap();
    }

    /// What has to be steered here.
    pub(crate) fn steering(&self) -> Option<Steering> {
        let text =
            self.node.namespace().run(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
        assert!(text.contains("cni0"));
        let shown = self.node.namespace().command("ip").args(["-o", "link", "show", "cni0"]).ok().unwrap();
        let mac = shown.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let mac: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let subnets = settings(self.name, &Family::BOTH).subnets;
        let namespace = self.node.namespace();
        let seen = |family| namespace.run(|| bridged_packets_are_seen(family));
        Steering::wanted(SteerMode::Auto, "cni0", mac.try_into().unwrap(), &subnets, seen)
    }

    /// What `nft` prints of everything.
    pub(crate) fn ruleset(&self) -> String {
        self.node.namespace().command("nft").args(["list", "ruleset"]).ok().unwrap()
    }

    /// Has `nft` read what it prints, and the kernel check it, in a namespace without tables.
    pub(crate) fn read_back(&self, empty: &Namespace) {
        empty.command("nft").args(["-c", "-f", "-"]).input(self.ruleset()).ok().unwrap();
    }

    pub(crate) fn nft(&self) -> Nft {
        self.node.namespace().run(|| Nft::open().unwrap())
    }
}

fn open(name: &str, node: &Node, families: &[Family]) -> Enforcer {
    let engine = Engine::new(settings(name, families), SHIFT, 42);
    node.namespace().run(|| Enforcer::open(engine).unwrap())
}

fn service_address(pod: Ipv4Addr) -> Ipv4Addr {
    let [_, _, third, fourth] = pod.octets();
    Ipv4Addr::new(10, 96, third, fourth)
}

/// The node's own address of the table, ways to the other node's pods, services, and who sees bridged packets.
fn wire(cases: &Cases, number: usize, node: &Node, other: &Node, same_node: SameNode) {
    let namespace = node.namespace();
    let (own, far) = (NODES[number], NODES[1 - number]);
    let far_subnets = settings(far, &Family::BOTH).subnets;
    let mut lines = String::new();
    for family in Family::BOTH {
        let via: IpAddr = match family {
            Family::V4 => other.address().into(),
            Family::V6 => other.address_v6().into(),
        };
        let full = if family == Family::V4 { 32 } else { 128 };
        let subnet = far_subnets.iter().find(|net| Family::of(net.addr()) == family).unwrap();
        lines += &format!("addr add {}/{full} dev lo\n", cases.address(own, family));
        lines += &format!(
            "route add {subnet} via {via}\nroute add {}/{full} via {via}\n",
            cases.address(far, family)
        );
    }
    namespace.ip(&lines).unwrap();
    let seen = if same_node == SameNode::Netfilter { "1" } else { "0" };
    for key in ["bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"] {
        namespace.sysctl(key, seen).unwrap();
    }
    for device in ["all", "cni0"] {
        namespace.sysctl(&format!("ipv4/conf/{device}/send_redirects"), "0").unwrap();
    }
    // As the CNI plugins leave it: br_netfilter bridges what a pod sends to itself through a service.
    let ports = namespace.command("ip").args(["-o", "link", "show", "master", "cni0"]).ok().unwrap();
    let ports = ports.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
    let hairpin: String =
        ports.map(|port| format!("link set {port} type bridge_slave hairpin on\n")).collect();
    namespace.ip(&hairpin).unwrap();
    namespace.command("nft").args(["-f", "-"]).input(services(cases).as_str()).ok().unwrap();
}

/// Services as kube-proxy makes them: the destination is rewritten before policies see it, and where a pod reaches
/// itself, the source after.
fn services(cases: &Cases) -> String {
    let mut script = String::new();
    for (family, table, kind) in [(Family::V4, "ip", "ipv4_addr"), (Family::V6, "ip6", "ipv6_addr")] {
        let (mut to, mut own) = (Vec::new(), String::new());
        for (_, pod) in NODES.iter().flat_map(|node| cases.pods_of(node)) {
            let (service, pod) = (in_family(service_address(pod), family), in_family(pod, family));
            to.push(format!("{service} : {pod}"));
            own += &format!("{table} saddr {pod} {table} daddr {pod} masquerade\n");
        }
        script += &format!(
            "table {table} services {{
                map to {{ type {kind} : {kind}; elements = {{ {} }}; }}
                chain prerouting {{ type nat hook prerouting priority dstnat; dnat to {table} daddr map @to; }}
                chain postrouting {{ type nat hook postrouting priority srcnat; {own} }}
            }}\n",
            to.join(", ")
        );
    }
    script
}

/// Answers on these ports of TCP and UDP, for as long as the process lives.
fn serve(namespace: &Namespace, ports: &[u16]) {
    let (listeners, sockets) = namespace.run(|| {
        let any = |port: u16| SocketAddr::from(([0u16; 8], port));
        let listeners = ports.iter().map(|port| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&any(*port).into()).unwrap();
            socket.listen(1024).unwrap();
            socket.set_nonblocking(true).unwrap();
            TcpListener::from(socket)
        });
        let sockets = ports.iter().map(|port| {
            let socket = UdpSocket::bind(any(*port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        });
        (listeners.collect::<Vec<_>>(), sockets.collect::<Vec<_>>())
    });
    thread::spawn(move || {
        let mut streams = Vec::new();
        loop {
            let fds = listeners.iter().map(|one| one.as_fd()).chain(sockets.iter().map(|one| one.as_fd()));
            let fds = fds.chain(streams.iter().map(|one: &std::net::TcpStream| one.as_fd()));
            let mut fds: Vec<PollFd<'_>> =
                fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            poll(&mut fds, None).unwrap();
            for listener in &listeners {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).unwrap();
                    streams.push(stream);
                }
            }
            let mut buffer = [0; 64];
            for socket in &sockets {
                while let Ok((len, from)) = uninterrupted(|| socket.recv_from(&mut buffer)) {
                    drop(socket.send_to(&buffer[..len], from));
                }
            }
            // What comes on a connection goes back; one that is closed goes.
            streams.retain_mut(|stream| match stream.read(&mut buffer) {
                Ok(0) => false,
                Ok(len) => stream.write_all(&buffer[..len]).is_ok(),
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            });
        }
    });
}

/// Begins a connection, or sends a datagram, in the calling thread's namespace.
fn ask(target: SocketAddr, protocol: Protocol) -> Socket {
    let (kind, number) = match protocol {
        Protocol::Tcp => (Type::STREAM, SocketProtocol::TCP),
        _ => (Type::DGRAM, SocketProtocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(target), kind, Some(number)).unwrap();
    socket.set_nonblocking(true).unwrap();
    if kind == Type::STREAM {
        // No connection is left behind for the next step.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
    match socket.connect(&SockAddr::from(target)) {
        Err(error) if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
            panic!("{target}: {error}")
        }
        _ => {}
    }
    if kind == Type::DGRAM {
        socket.send(b"?").unwrap();
    }
    socket
}

/// Which probes were answered by the time that all were which had to be, or by the deadline.
fn answers(probes: &[Probe]) -> Vec<bool> {
    let start = Instant::now();
    let mut answered = vec![false; probes.len()];
    loop {
        for (probe, answered) in probes.iter().zip(&mut answered) {
            *answered = *answered || probe.is_answered();
        }
        let waiting: Vec<usize> =
            (0..probes.len()).filter(|i| probes[*i].cell.allowed && !answered[*i]).collect();
        if waiting.is_empty() || start.elapsed() > TIMEOUT {
            return answered;
        }
        let mut fds: Vec<PollFd<'_>> = waiting.iter().map(|i| probes[*i].poll()).collect();
        let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
        poll(&mut fds, Some(&limit)).unwrap();
    }
}

impl Probe {
    fn poll(&self) -> PollFd<'_> {
        let flags = if self.cell.protocol == Protocol::Tcp { PollFlags::OUT } else { PollFlags::IN };
        PollFd::new(&self.socket, flags)
    }

    fn is_answered(&self) -> bool {
        let mut fds = [self.poll()];
        let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0;
        if !ready {
            return false;
        }
        match self.cell.protocol {
            Protocol::Tcp => self.socket.take_error().unwrap().is_none() && self.socket.peer_addr().is_ok(),
            _ => {
                let got: io::Result<usize> = uninterrupted(|| (&self.socket).read(&mut [0; 8]));
                got.is_ok()
            }
        }
    }
}
