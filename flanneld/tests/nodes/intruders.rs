//! Datagrams to the ports of tunnels that no peer sent: how many of them reach a pod.

mod packet;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use backends::testing::{Fabric, Namespace, Node, Pod, uninterrupted};
use ipnet::IpNet;
use subnet::Family;
use tempfile::TempDir;

use crate::bed::{LIMIT, Member, flanneld};
use crate::site::config;

use packet::packet;

/// The modes under test: equal in every outcome.
const MODES: [&str; 2] = ["--traffic-manager=nft", "--traffic-manager=iptables"];
/// Where pods listen.
const POD_PORT: u16 = 9999;
/// How often each datagram is sent.
const TIMES: usize = 3;

/// A tunnel under attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tunnel {
    Vxlan,
    Udp,
}

impl Tunnel {
    const BOTH: [Self; 2] = [Self::Vxlan, Self::Udp];

    fn port(self) -> u16 {
        match self {
            Self::Vxlan => 8472,
            Self::Udp => 8285,
        }
    }

    fn backend(self, more: &str) -> String {
        let name = if self == Self::Vxlan { "vxlan" } else { "udp" };
        format!(r#"{{"Type":"{name}"{more}}}"#)
    }
}

/// Nodes with both families whose leases are files in a common directory.
struct Cluster {
    fabric: Fabric,
    store: TempDir,
}

impl Cluster {
    fn new(backend: &str) -> Self {
        let cluster = Self { fabric: Fabric::new().unwrap(), store: tempfile::tempdir().unwrap() };
        cluster.configure(backend);
        cluster
    }

    fn configure(&self, backend: &str) {
        fs::write(self.store.path().join("config.json"), config(&Family::BOTH, backend)).unwrap();
    }

    fn join(&self, mode: &str) -> Member {
        let args = [
            format!("--lease-store=file:{}", self.store.path().display()),
            "--ip-masq".to_owned(),
            mode.to_owned(),
        ];
        let mut member = Member::start_with_env(self.fabric.node().unwrap(), &args, &[]);
        member.agent.wait_ready(LIMIT).unwrap();
        member
    }

    /// Writes a lease, as a node with these addresses would.
    fn lease(&self, tunnel: Tunnel, number: u8, v4: &str, v6: &str) {
        let data = match tunnel {
            Tunnel::Udp => String::new(),
            Tunnel::Vxlan => format!(
                r#","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:04:{number:02x}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"02:00:00:00:06:{number:02x}"}}"#
            ),
        };
        let value = format!(r#"{{"PublicIP":"{v4}","PublicIPv6":"{v6}"{data}}}"#);
        fs::write(self.lease_file(number), value).unwrap();
    }

    fn lease_file(&self, number: u8) -> std::path::PathBuf {
        self.store.path().join("subnets").join(format!("10.244.{number}.0-24&fd00:244:0:{number:x}::-64"))
    }
}

/// The address of this family.
fn of(family: Family, addresses: impl IntoIterator<Item = IpAddr>) -> IpAddr {
    addresses.into_iter().find(|address| Family::of(*address) == family).unwrap()
}

fn at(node: &Node, family: Family) -> IpAddr {
    of(family, [IpAddr::from(node.address()), node.address_v6().into()])
}

fn in_subnet(member: &Member, family: Family, host: u8) -> IpAddr {
    match of(family, member.subnets().iter().map(IpNet::network)) {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() | u32::from(host)).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() | u128::from(host)).into()),
    }
}

/// What goes to the tunnel's port so that `inner` comes out of it.
fn wrapped(tunnel: Tunnel, victim: &Member, family: Family, inner: &[u8]) -> Vec<u8> {
    if tunnel == Tunnel::Udp {
        return inner.to_vec();
    }
    let device = if family == Family::V4 { "flannel.1" } else { "flannel-v6.1" };
    let shown = victim.show(&format!("ip link show {device}"));
    let mac = shown.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let mut frame = vec![0x08, 0, 0, 0, 0, 0, 1, 0];
    frame.extend(mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    frame.extend([2, 0, 0, 0, 0, 99]);
    frame.extend(if family == Family::V4 { [0x08, 0x00] } else { [0x86, 0xdd] });
    frame.extend(inner);
    frame
}

/// Sends from a socket in `from`, bound to `source` if one is given. Whether the kernel takes it makes no difference.
fn send(from: &Namespace, source: Option<IpAddr>, to: SocketAddr, bytes: &[u8]) {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = from.run(|| UdpSocket::bind((source.unwrap_or(any), 0)).unwrap());
    for _ in 0..TIMES {
        let _ = socket.send_to(bytes, to);
    }
}

/// A pod that counts what arrives, by the first words of it.
struct Victim<'a> {
    tunnel: Tunnel,
    member: &'a Member,
    sockets: [UdpSocket; 2],
}

impl<'a> Victim<'a> {
    fn new(tunnel: Tunnel, member: &'a Member, pod: &Pod) -> Self {
        let sockets = Family::BOTH.map(|family| {
            let address = of(family, pod.addresses().iter().map(IpNet::addr));
            let socket = pod.namespace().run(|| UdpSocket::bind((address, POD_PORT)).unwrap());
            socket.set_nonblocking(true).unwrap();
            socket
        });
        Self { tunnel, member, sockets }
    }

    fn socket(&self, family: Family) -> &UdpSocket {
        &self.sockets[usize::from(family == Family::V6)]
    }

    /// A datagram that brings `words` to the pod as if they came from `source`.
    fn datagram(&self, source: IpAddr, words: &str) -> Vec<u8> {
        let family = Family::of(source);
        let target = self.socket(family).local_addr().unwrap().ip();
        wrapped(self.tunnel, self.member, family, &packet(source, target, words.as_bytes()))
    }

    /// What has arrived up to a datagram that `peer` sends now, which has to.
    fn arrived(&self, peer: &Member, family: Family) -> BTreeMap<String, usize> {
        let to = SocketAddr::new(at(&self.member.node, family), self.tunnel.port());
        let own = at(&peer.node, family);
        let bytes = self.datagram(in_subnet(peer, family, 77), "from a peer");
        let (mut found, end) = (BTreeMap::<String, usize>::new(), Instant::now() + LIMIT);
        while !found.contains_key("from a peer") {
            assert!(
                Instant::now() < end,
                "nothing arrives from a peer:\n{}",
                self.member.show("nft list ruleset")
            );
            send(peer.node.namespace(), Some(own), to, &bytes);
            std::thread::sleep(Duration::from_millis(20));
            let mut room = [0; 256];
            while let Ok(len) = uninterrupted(|| self.socket(family).recv(&mut room)) {
                *found.entry(String::from_utf8_lossy(&room[..len]).into_owned()).or_default() += 1;
            }
        }
        found.remove("from a peer");
        found
    }
}

/// Everything that somebody who is no peer may send to the tunnel of `b`, with a peer's words in it.
fn attack(setup: &Setup, victim: &Victim<'_>, family: Family) {
    let Setup { a, b, pod_a, other_pod_b, stranger, .. } = setup;
    let (port, public) = (victim.tunnel.port(), at(&b.node, family));
    let (gateway, device) = (in_subnet(b, family, 1), in_subnet(b, family, 0));
    let second = second_address(family);
    let (peer, third) = (at(&a.node, family), at(&setup.c.node, family));
    let said = in_subnet(a, family, 77);
    let from = |who: &str, namespace: &Namespace, source: Option<IpAddr>, to: IpAddr| {
        let bytes = victim.datagram(said, &format!("{who} to {to}"));
        send(namespace, source, SocketAddr::new(to, port), &bytes);
    };
    for to in [public, second, gateway, device] {
        from("a pod of another node", pod_a.namespace(), None, to);
        from("a pod of the same node", other_pod_b.namespace(), None, to);
        for (pod, node) in [(pod_a, "another"), (other_pod_b, "the same")] {
            for (source, name) in [(peer, "a peer"), (third, "a third node")] {
                let who = format!("a pod of {node} node in the name of {name}");
                from(&who, pod.namespace(), Some(source), to);
            }
        }
    }
    for to in [public, second] {
        from("a stranger on the link", stranger.namespace(), None, to);
    }
}

/// Attacks until a datagram of each of these has arrived: that of the peer, up to which is looked, may overtake others.
fn wait_for_arrival<'a>(
    setup: &Setup,
    victim: &Victim<'_>,
    family: Family,
    who: impl IntoIterator<Item = &'a str>,
) -> BTreeMap<String, usize> {
    let public = at(&setup.b.node, family);
    let (all, mut arrived): (Vec<_>, _) = (who.into_iter().collect(), BTreeMap::new());
    setup.b.wait(&format!("{family}: datagrams of {all:?}"), || {
        attack(setup, victim, family);
        arrived.extend(victim.arrived(&setup.a, family));
        all.iter().all(|who| arrived.contains_key(&format!("{who} to {public}")))
    });
    arrived
}

/// Another address of node `b` on the same link, which its peers don't know.
fn second_address(family: Family) -> IpAddr {
    of(family, ["172.31.0.222".parse().unwrap(), "fd31::222".parse().unwrap()])
}

struct Setup {
    cluster: Cluster,
    a: Member,
    b: Member,
    c: Member,
    pod_a: Pod,
    pod_b: Pod,
    other_pod_b: Pod,
    stranger: Node,
}

impl Setup {
    fn new(tunnel: Tunnel, mode: &str, more: &str) -> Self {
        let cluster = Cluster::new(&tunnel.backend(more));
        let (a, b, c) = (cluster.join(mode), cluster.join(mode), cluster.join(mode));
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        let third = |family, len| IpNet::new(in_subnet(&b, family, 3), len).unwrap();
        let other_pod_b = Pod::wired_with(&b.node, &[third(Family::V4, 24), third(Family::V6, 64)]).unwrap();
        b.ip("addr add 172.31.0.222/24 dev eth0\naddr add fd31::222/64 dev eth0 nodad");
        // What a process needs CAP_NET_RAW for: to send from an address that is not its own.
        for pod in [&pod_a, &other_pod_b] {
            for member in [&a, &c] {
                let (v4, v6) = (member.node.address(), member.node.address_v6());
                let lines =
                    format!("addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad preferred_lft 0");
                pod.namespace().ip(&lines).unwrap();
            }
        }
        for (from, to) in [(&pod_a, &pod_b), (&pod_b, &pod_a)] {
            for address in to.addresses().iter().map(IpNet::addr) {
                a.wait("the first echo", || from.namespace().reaches(address).unwrap());
            }
        }
        let stranger = cluster.fabric.node().unwrap();
        Self { cluster, a, b, c, pod_a, pod_b, other_pod_b, stranger }
    }

    /// Lets the switch and the nodes find each other, so that no datagram waits for an answer to a question.
    fn acquaint(&self) {
        let b = &self.b.node;
        for family in Family::BOTH {
            for address in [at(b, family), second_address(family)] {
                for namespace in [self.stranger.namespace(), self.a.node.namespace(), self.pod_a.namespace()]
                {
                    self.b.wait("an echo", || namespace.reaches(address).unwrap());
                }
            }
        }
    }
}

#[test]
fn nothing_that_a_pod_or_a_stranger_sends_to_a_tunnel_arrives_in_a_pod() {
    for tunnel in Tunnel::BOTH {
        for mode in MODES {
            let setup = Setup::new(tunnel, mode, "");
            setup.acquaint();
            let victim = Victim::new(tunnel, &setup.b, &setup.pod_b);
            for family in Family::BOTH {
                attack(&setup, &victim, family);
                let arrived = victim.arrived(&setup.a, family);
                assert!(arrived.is_empty(), "{tunnel:?} {mode} {family}: {arrived:?}");
            }
        }
    }
}

#[test]
fn once_the_filter_is_out_of_force_the_same_datagrams_arrive() {
    let mut setup = Setup::new(Tunnel::Vxlan, MODES[0], "");
    setup.acquaint();
    for member in [&mut setup.a, &mut setup.b, &mut setup.c] {
        member.agent.kill().unwrap();
        // What happens by itself five minutes after the agent's end.
        member.show("nft delete element ip flannel-tunnel active { 8472 }");
        member.show("nft delete element ip6 flannel-tunnel active { 8472 }");
    }
    let victim = Victim::new(Tunnel::Vxlan, &setup.b, &setup.pod_b);
    for family in Family::BOTH {
        let who = [
            "another node",
            "the same node",
            "another node in the name of a third node",
            "the same node in the name of a peer",
        ];
        let who = who.map(|who| format!("a pod of {who}"));
        wait_for_arrival(
            &setup,
            &victim,
            family,
            who.iter().map(String::as_str).chain(["a stranger on the link"]),
        );
    }
}

#[test]
fn a_node_may_send_as_soon_as_it_has_a_lease_and_no_longer() {
    for tunnel in Tunnel::BOTH {
        let setup = Setup::new(tunnel, MODES[0], "");
        setup.acquaint();
        let victim = Victim::new(tunnel, &setup.b, &setup.pod_b);
        let rules = || {
            let shown = setup.b.show("nft -s -a list table ip flannel-tunnel");
            let handles = shown.lines().filter(|line| line.contains("handle") && !line.contains("elements"));
            handles.map(str::to_owned).collect::<Vec<_>>()
        };
        let before = rules();
        for family in Family::BOTH {
            let stranger = at(&setup.stranger, family);
            let said = match family {
                Family::V4 => "10.244.200.5".parse().unwrap(),
                Family::V6 => "fd00:244:0:c8::5".parse().unwrap(),
            };
            let to = SocketAddr::new(at(&setup.b.node, family), tunnel.port());
            let arrives = || {
                send(setup.stranger.namespace(), None, to, &victim.datagram(said, "new"));
                victim.arrived(&setup.a, family).contains_key("new")
            };
            assert!(!arrives(), "{tunnel:?} {stranger} is nobody's address");
            let (v4, v6) = (at(&setup.stranger, Family::V4), at(&setup.stranger, Family::V6));
            setup.cluster.lease(tunnel, 200, &v4.to_string(), &v6.to_string());
            setup.b.wait("the peer's datagrams", arrives);
            fs::remove_file(setup.cluster.lease_file(200)).unwrap();
            setup.b.wait("their end", || !arrives());
        }
        // Elements came and went, and nothing else.
        assert_eq!(rules(), before);
        assert!(!setup.b.agent.log().contains("flannel-tunnel put right"), "{}", setup.b.agent.log());
    }
}

#[test]
fn check_sources_false_lets_translated_peers_in_and_keeps_pods_out() {
    for tunnel in Tunnel::BOTH {
        let setup = Setup::new(tunnel, MODES[0], r#","CheckSources":false"#);
        setup.acquaint();
        let victim = Victim::new(tunnel, &setup.b, &setup.pod_b);
        for family in Family::BOTH {
            let arrived = wait_for_arrival(&setup, &victim, family, ["a stranger on the link"]);
            let from_pods = arrived.keys().filter(|who| who.starts_with("a pod of another node"));
            let outside = from_pods.filter(|who| !who.contains("10.244.") && !who.contains("fd00:244:"));
            assert_eq!(outside.count(), 0, "{tunnel:?} {family}: {arrived:?}");
        }
        // Live, and back.
        setup.cluster.configure(&tunnel.backend(""));
        let stranger_arrives = || {
            let to = SocketAddr::new(at(&setup.b.node, Family::V4), tunnel.port());
            let bytes = victim.datagram(in_subnet(&setup.a, Family::V4, 77), "a stranger");
            send(setup.stranger.namespace(), None, to, &bytes);
            victim.arrived(&setup.a, Family::V4).contains_key("a stranger")
        };
        setup.b.wait("the filter", || !stranger_arrives());
        setup.cluster.configure(&tunnel.backend(r#","CheckSources":false"#));
        setup.b.wait("no filter", stranger_arrives);
    }
}

#[test]
fn a_filter_that_somebody_removes_comes_back_and_cleanup_takes_it_away() {
    for mode in MODES {
        let mut setup = Setup::new(Tunnel::Vxlan, mode, "");
        let list = |member: &Member| {
            ["ip", "ip6"].map(|family| member.try_show(&format!("nft -s list table {family} flannel-tunnel")))
        };
        // The node that came last may be news to this one.
        setup.b.wait("it in the filter", || {
            let [v4, v6] = list(&setup.b);
            v4.contains("172.31.0.3") && v6.contains("fd31::3")
        });
        let healthy = list(&setup.b);
        assert!(healthy[0].contains("udp dport 8472") && healthy[0].contains("172.31.0.1"), "{healthy:?}");
        assert!(healthy[1].contains("udp dport 8472") && healthy[1].contains("fd31::1"), "{healthy:?}");
        for damage in [
            "nft flush ruleset",
            "nft delete table ip flannel-tunnel",
            "nft flush set ip flannel-tunnel peers",
            "nft add element ip6 flannel-tunnel peers { fd31::99 }",
            "nft flush chain ip flannel-tunnel input",
            "nft insert rule ip6 flannel-tunnel forward accept",
        ] {
            setup.b.show(damage);
            setup.b.wait(&format!("{mode}: repair of {damage}"), || list(&setup.b) == healthy);
        }
        setup.b.agent.kill().unwrap();
        assert_eq!(list(&setup.b), healthy, "{mode}: the filter stays without the agent");
        setup.b.start_again();
        assert!(!setup.b.agent.log().contains("flannel-tunnel"), "{mode}: {}", setup.b.agent.log());
        setup.b.agent.terminate(LIMIT).unwrap();
        let file = format!("--subnet-file={}", setup.b.node.subnet_file().display());
        let cleanup = |more: &[&str]| {
            setup.b.node.namespace().command(flanneld()).args(["cleanup", &file]).args(more).ok().unwrap()
        };
        let told = cleanup(&["--dry-run"]);
        assert!(
            told.contains("table ip flannel-tunnel") && told.contains("table ip6 flannel-tunnel"),
            "{told}"
        );
        assert_eq!(list(&setup.b), healthy, "{mode}: a dry run changes nothing");
        cleanup(&[]);
        assert_eq!(list(&setup.b), [String::new(), String::new()], "{mode}");
    }
}

/// Packets that a device has sent and received.
fn packets(member: &Member, device: &str) -> u64 {
    let count = |way: &str| -> u64 {
        let shown = member.show(&format!("ip -j -s link show {device}"));
        let all: serde_json::Value = serde_json::from_str(&shown).unwrap();
        all[0]["stats64"][way]["packets"].as_u64().unwrap()
    };
    count("rx") + count("tx")
}

#[test]
fn one_ping_to_a_lease_whose_address_is_in_the_network_stays_one_ping() {
    for tunnel in Tunnel::BOTH {
        let cluster = Cluster::new(&tunnel.backend(""));
        let (a, b) = (cluster.join(MODES[0]), cluster.join(MODES[0]));
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        cluster.lease(tunnel, 200, "10.244.200.5", "fd00:244:0:c8::5");
        for address in pod_b.addresses().iter().map(IpNet::addr) {
            a.wait("the first echo", || pod_a.namespace().reaches(address).unwrap());
        }
        let devices: &[&str] =
            if tunnel == Tunnel::Udp { &["flannel0"] } else { &["flannel.1", "flannel-v6.1"] };
        let count = || devices.iter().map(|device| packets(&a, device)).sum::<u64>();
        let before = count();
        for target in ["10.244.200.5", "10.244.200.9", "fd00:244:0:c8::5", "fd00:244:0:c8::9"] {
            pod_a.command("ping").args(["-n", "-c1", "-W1", target]).output().unwrap();
            a.node.namespace().command("ping").args(["-n", "-c1", "-W1", target]).output().unwrap();
        }
        let more = count() - before;
        // Eight requests, errors about them, and what finds neighbours.
        assert!(more < 100, "{tunnel:?}: {more} packets");
        for address in pod_b.addresses().iter().map(IpNet::addr) {
            assert!(pod_a.namespace().reaches(address).unwrap());
        }
    }
}
