//! WireGuard in this process, against itself and against `wireguard-go` with the `wg` of Debian, or against another program of
//! the same interface that `WIREGUARD_PEER` names, such as `boringtun-cli`.

mod hostile;
mod restarts;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backends::datapath::counters::Counters;
use backends::datapath::engine::Offload;
use backends::kernel::netlink::Netlink;
use backends::state::forwarding::Forwarding;
use backends::state::{Link, LinkIdentity, LinkSettings, Route};
use backends::testing::{Fabric, Node as Machine, Numbers, Pinger, Pod, Process, wait_for};
use backends::wg::identity::Identity;
use backends::wg::{Opening, PeerSettings, WireguardSettings};
use backends::{KernelState, Name, Scope, converge};
use ipnet::IpNet;
use subnet::net::host;
use subnet::wireguard::{PresharedKey, encode};
use subnet::{Family, PublicAddrs};

use crate::bed::LIMIT;
use crate::flows::exchange;

const PORT: u16 = 51_820;
const DEVICE: &str = "flannel-wg";
const NETWORKS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/48"];

fn subnets(number: u8) -> [IpNet; 2] {
    [format!("10.244.{number}.0/24"), format!("fd00:244:0:{number}::/64")].map(|text| text.parse().unwrap())
}

fn pod(machine: &Machine, number: u8) -> Pod {
    let second = |net: IpNet| {
        let at = subnet::net::addr_of(Family::of(net.addr()), subnet::net::bits_of(net.network()) + 2);
        IpNet::new(at, net.prefix_len()).unwrap()
    };
    let pod = Pod::wired_with(machine, &subnets(number).map(second)).unwrap();
    let up = || pod.addresses().iter().all(|net| machine.namespace().reaches(net.addr()).unwrap());
    wait_for("the pod on its bridge", LIMIT, up).unwrap();
    pod
}

fn outer(machine: &Machine, family: Family) -> IpAddr {
    match family {
        Family::V4 => machine.address().into(),
        Family::V6 => machine.address_v6().into(),
    }
}

fn number(machine: &Machine) -> u8 {
    machine.address().octets()[3]
}

/// A private key as text, and its identity.
fn key() -> (String, Arc<Identity>) {
    let mut bytes = [0; 32];
    Numbers(
        Instant::now().elapsed().as_nanos() as u64 ^ u64::from(backends::random::byte()) << 40
            | u64::from(backends::random::byte()),
    )
    .fill(&mut bytes);
    let text = encode(&bytes);
    let identity = Identity::from_text(&text).unwrap();
    (text, Arc::new(identity))
}

/// A node whose packets this process encrypts.
struct Ours {
    kernel: Netlink,
    machine: Arc<Machine>,
    /// Decides on its subnets, also after it got another address.
    number: u8,
    family: Family,
    settings: WireguardSettings,
    workers: u8,
}

impl Ours {
    fn new(fabric: &Fabric, family: Family, psk: Option<PresharedKey>) -> Self {
        Self::on(Arc::new(fabric.node().unwrap()), family, psk, key().1)
    }

    fn on(machine: Arc<Machine>, family: Family, psk: Option<PresharedKey>, identity: Arc<Identity>) -> Self {
        let kernel = machine.namespace().run(|| Netlink::open().unwrap());
        let settings = WireguardSettings { identity, psk, keepalive: 0, peers: Vec::new() };
        let number = number(&machine);
        Self { kernel, machine, number, family, settings, workers: 1 }
    }

    fn knows(&mut self, peer: &Machine, key: &Identity) {
        let endpoint = SocketAddr::new(outer(peer, self.family), PORT);
        let allowed = subnets(number(peer)).to_vec();
        let (key, opening) = (*key.public(), Opening::Either);
        self.settings.peers.push(PeerSettings { key, endpoint, allowed, opening });
    }

    fn desired(&self) -> KernelState {
        let mut state = KernelState::default();
        let dev: Name = DEVICE.parse().unwrap();
        let own = subnets(self.number);
        for (net, network) in own.iter().zip(NETWORKS) {
            let network: IpNet = network.parse().unwrap();
            state.addresses.insert((dev, host(net.network())));
            state.routes.insert(network, Route { dev: Some(dev), ..Route::ours(network) });
        }
        state.links.insert(dev, Link { identity: LinkIdentity::Tun, settings: LinkSettings::plain(1420) });
        let forwarding = Forwarding {
            local: [outer(&self.machine, self.family)].into_iter().collect::<PublicAddrs>(),
            port: PORT,
            addresses: own.iter().map(IpNet::network).collect(),
            mtu: 1420,
            check_sources: true,
            workers: self.workers,
            peers: Vec::new(),
            wireguard: Some(Arc::new(self.settings.clone())),
        };
        state.forwarding.insert(dev, Arc::new(forwarding));
        state
    }

    fn converge(&mut self) {
        let desired = self.desired();
        let scope = Scope {
            networks: NETWORKS.iter().map(|text| text.parse().unwrap()).collect(),
            subnets: subnets(self.number).to_vec(),
            subnet_lens: vec![(Family::V4, 24), (Family::V6, 64)],
            devices: [DEVICE.parse().unwrap()].into(),
            ..Scope::default()
        };
        let (machine, kernel) = (Arc::clone(&self.machine), &mut self.kernel);
        let start = Instant::now();
        loop {
            let report = machine.namespace().run(|| converge(kernel, &desired, &scope).unwrap());
            if report.failed.is_empty() {
                break assert!(report.settled, "{:?}", report.applied);
            }
            // A program that another test starts may have the port of a moment ago open.
            assert!(start.elapsed() < LIMIT, "{:?}", report.failed);
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// As if the process had ended and begun again.
    fn restart(&mut self) {
        self.restart_with(Offload(true));
    }

    /// The same; the next process lets the kernel do its part of the work, or not.
    fn restart_with(&mut self, offload: Offload) {
        self.kernel = self.machine.namespace().run(|| Netlink::open_with(offload).unwrap());
        self.converge();
    }

    fn counters(&self) -> Arc<Counters> {
        self.kernel.counters()
    }
}

/// A node with `wireguard-go`.
struct Go {
    machine: Arc<Machine>,
    name: String,
    _process: Process,
}

impl Go {
    fn new(
        fabric: &Fabric,
        family: Family,
        psk: Option<&PresharedKey>,
        peer: &Ours,
    ) -> (Self, Arc<Identity>) {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        // Its socket is in a directory that all namespaces share.
        let name = format!("wg{}x{}", std::process::id() % 1_000_000, NUMBER.fetch_add(1, Ordering::Relaxed));
        let machine = Arc::new(fabric.node().unwrap());
        let program = std::env::var("WIREGUARD_PEER").unwrap_or_else(|_| "wireguard-go".to_owned());
        let process = machine.namespace().command(&program).args(["-f", &name]);
        // The latter keeps boringtun's privileges, which it would drop otherwise.
        let process = process.env("LOG_LEVEL", "error").env("WG_SUDO", "true").stderr(Stdio::null());
        let process = process.spawn().unwrap();
        let go = Self { machine, name, _process: process };
        let up = || go.machine.namespace().ip(&format!("link show {}", go.name)).is_ok();
        wait_for("the device of wireguard-go", LIMIT, up).unwrap();
        // It is configured by a socket, which may come after the device. A socket that is there and does not listen yet
        // is removed by `wg`, which then asks the kernel's module ("Protocol not supported").
        let socket = Path::new("/var/run/wireguard").join(format!("{}.sock", go.name));
        wait_for("the socket of wireguard-go", LIMIT, || UnixStream::connect(&socket).is_ok()).unwrap();

        let (private, identity) = key();
        let write = |name: &str, text: &str| {
            let path = go.machine.dir().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (key_file, psk_file) =
            (write("key", &private), write("psk", &psk.map_or(String::new(), |psk| encode(psk.bytes()))));
        let allowed = subnets(number(&peer.machine)).map(|net| net.to_string()).join(",");
        let endpoint = SocketAddr::new(outer(&peer.machine, family), PORT).to_string();
        let (port, peer_key) = (PORT.to_string(), peer.settings.identity.public().to_string());
        let device = go.name.clone();
        go.wg(&["set", &device, "private-key", &key_file, "listen-port", &port]);
        let mut peer =
            vec!["set", &device, "peer", &peer_key, "endpoint", &endpoint, "allowed-ips", &allowed];
        // All at once: boringtun changes no peer that it has.
        peer.extend(psk.iter().flat_map(|_| ["preshared-key", psk_file.as_str()]));
        go.wg(&peer);
        let [v4, v6] = subnets(number(&go.machine)).map(|net| host(net.network()));
        let lines = format!(
            "addr add {v4} dev {device}\naddr add {v6} dev {device} nodad\nlink set {device} mtu 1420 up\n\
             route add {} dev {device}\nroute add {} dev {device}",
            NETWORKS[0], NETWORKS[1]
        );
        go.machine.namespace().ip(&lines).unwrap();
        (go, identity)
    }

    fn wg(&self, args: &[&str]) -> String {
        self.machine.namespace().command("wg").args(args).ok().unwrap()
    }

    /// When the last handshake was, in seconds since 1970; 0: there was none.
    fn handshake(&self) -> u64 {
        let text = self.wg(&["show", &self.name, "latest-handshakes"]);
        text.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// A node of ours and one of wireguard-go, with a pod each.
struct Pair {
    ours: Ours,
    go: Go,
    pods: [Pod; 2],
    _fabric: Fabric,
}

impl Pair {
    fn new(family: Family, secrets: [Option<PresharedKey>; 2]) -> Self {
        let fabric = Fabric::new().unwrap();
        let [mine, theirs] = secrets;
        let mut ours = Ours::new(&fabric, family, mine);
        let (go, identity) = Go::new(&fabric, family, theirs.as_ref(), &ours);
        ours.knows(&go.machine, &identity);
        ours.converge();
        let pods = [pod(&ours.machine, number(&ours.machine)), pod(&go.machine, number(&go.machine))];
        Self { ours, go, pods, _fabric: fabric }
    }

    fn assert_reaches(&self, from: usize) {
        for net in self.pods[1 - from].addresses() {
            let reaches = || self.pods[from].namespace().reaches(net.addr()).unwrap();
            wait_for(&format!("an echo of {net}"), LIMIT, reaches)
                .unwrap_or_else(|error| panic!("{error}: {}", self.ours.counters()));
        }
    }

    fn wait_for_echo(&self, what: &str) {
        let to = self.pods[1].address();
        if let Err(error) = wait_for(what, LIMIT, || self.pods[0].namespace().reaches(to).unwrap()) {
            panic!("{error}: {}\n{}", self.ours.counters(), self.go.wg(&["show", &self.go.name]));
        }
    }
}

fn secret(byte: u8) -> Option<PresharedKey> {
    Some(PresharedKey::from([byte; 32]))
}

/// Two nodes of ours, with a pod each.
struct Twins {
    nodes: [Ours; 2],
    pods: [Pod; 2],
    fabric: Fabric,
}

impl Twins {
    fn new(family: Family, workers: u8) -> Self {
        let fabric = Fabric::new().unwrap();
        let mut nodes = [0, 1].map(|_| Ours::new(&fabric, family, secret(7)));
        for (me, other) in [(0, 1), (1, 0)] {
            let (machine, key) =
                (Arc::clone(&nodes[other].machine), Arc::clone(&nodes[other].settings.identity));
            nodes[me].knows(&machine, &key);
            nodes[me].workers = workers;
            nodes[me].converge();
        }
        let pods = nodes.each_ref().map(|node| pod(&node.machine, number(&node.machine)));
        Self { nodes, pods, fabric }
    }

    fn to(&self, index: usize) -> IpAddr {
        self.pods[index].address()
    }
}

#[test]
fn wireguard_go_is_reached_in_both_roles_of_the_handshake_with_and_without_a_secret() {
    thread::scope(|scope| {
        for (family, psk) in [(Family::V4, None), (Family::V6, secret(3))] {
            for first in [0, 1] {
                let psk = psk.clone();
                scope.spawn(move || {
                    let pair = Pair::new(family, [psk.clone(), psk]);
                    // The node with the first packet begins.
                    pair.assert_reaches(first);
                    pair.assert_reaches(1 - first);
                    assert!(pair.go.handshake() > 0);
                    assert_eq!(pair.ours.counters().handshakes.get(), 1, "{}", pair.ours.counters());
                    // Of more than usual one pair for each outer family has its share, and one inner family.
                    let much = first == usize::from(family == Family::V6);
                    for net in pair.pods[1].addresses() {
                        let inner = Family::of(net.addr());
                        let bytes = if much && inner == family { bytes() } else { USUAL };
                        exchange(pair.pods[0].namespace(), pair.pods[1].namespace(), net.addr(), bytes);
                    }
                    let counters = pair.ours.counters();
                    for counter in [
                        &counters.refused_forged,
                        &counters.refused_malformed,
                        &counters.refused_source,
                        &counters.received_unsound,
                    ] {
                        assert_eq!(counter.get(), 0, "{counters}");
                    }
                });
            }
        }
    });
}

/// Bytes that are compared in each direction, without further ado.
const USUAL: usize = 16 << 20;

/// So many, or those that `WIREGUARD_BYTES` asks for, as `make test-peers` does.
fn bytes() -> usize {
    std::env::var("WIREGUARD_BYTES").map_or(USUAL, |text| text.parse().expect("WIREGUARD_BYTES is a number"))
}

#[test]
fn nodes_with_different_secrets_never_have_a_session() {
    thread::scope(|scope| {
        for secrets in [[secret(1), secret(2)], [secret(1), None], [None, secret(2)]] {
            scope.spawn(move || {
                let pair = Pair::new(Family::V4, secrets);
                for from in [0, 1] {
                    let to = pair.pods[1 - from].address();
                    assert!(!pair.pods[from].namespace().reaches(to).unwrap());
                }
                assert_eq!(pair.go.handshake(), 0);
                let counters = pair.ours.counters();
                assert_eq!(counters.received_packets.get(), 0, "{counters}");
            });
        }
    });
}

#[test]
fn a_peer_that_gets_another_address_is_followed_under_traffic_and_stays_so() {
    let mut pair = Pair::new(Family::V4, [None, None]);
    pair.wait_for_echo("the first echo");
    let [near, far] = &pair.pods;
    let pinger = Pinger::start(far.namespace(), near.address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    let machine = &pair.go.machine;
    let moved: std::net::Ipv4Addr = [172, 31, 0, 200 + number(machine)].into();
    machine.readdress(moved, machine.address_v6()).unwrap();
    let before = pinger.received();
    wait_for("answers at the new address", LIMIT, || pinger.received() > before + 50).unwrap();
    // And the other way round, with nothing but what was heard.
    assert!(near.namespace().reaches(far.address()).unwrap());
    let endpoint = |ours: &Ours| {
        let mut found = None;
        ours.kernel.tunnels().sessions(|_, session| found = session.endpoint);
        found.map(|at| at.ip())
    };
    assert_eq!(endpoint(&pair.ours), Some(moved.into()));
    // The lease still has the old address: the reconciler leaves the peer where it was heard.
    for _ in 0..5 {
        pair.ours.converge();
        assert_eq!(endpoint(&pair.ours), Some(moved.into()));
    }
    let before = pinger.received();
    wait_for("further answers", LIMIT, || pinger.received() > before + 50).unwrap();
    assert_eq!(endpoint(&pair.ours), Some(moved.into()));
}

#[test]
fn a_node_that_gets_another_address_keeps_its_session_and_is_followed() {
    let mut pair = Pair::new(Family::V4, [secret(4), secret(4)]);
    pair.wait_for_echo("the first echo");
    let [near, far] = &pair.pods;
    let pinger = Pinger::start(near.namespace(), far.address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    let handshakes = pair.ours.counters().handshakes.get();
    let machine = Arc::clone(&pair.ours.machine);
    let moved: std::net::Ipv4Addr = [172, 31, 0, 200 + number(&machine)].into();
    machine.readdress(moved, machine.address_v6()).unwrap();
    pair.ours.converge();
    let received = pinger.received();
    wait_for("answers from the new address", LIMIT, || pinger.received() > received + 50).unwrap();
    let endpoints = pair.go.wg(&["show", &pair.go.name, "endpoints"]);
    assert!(endpoints.contains(&format!("{moved}:{PORT}")), "{endpoints}");
    assert_eq!(pair.ours.counters().handshakes.get(), handshakes, "{}", pair.ours.counters());
}

#[test]
fn a_session_is_replaced_after_two_minutes_without_a_loss() {
    let pair = Pair::new(Family::V4, [secret(5), secret(5)]);
    // This node has the first packet and begins, so it has to begin again.
    pair.assert_reaches(0);
    let (first, handshakes) = (pair.go.handshake(), &pair.ours.counters().handshakes);
    assert!(first > 0 && handshakes.get() == 1);
    let [near, far] = &pair.pods;
    let pinger = Pinger::start(near.namespace(), far.address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    for round in 2..=4 {
        // wireguard-go has seconds of its own, and its `wg show` no parts of one.
        thread::sleep(Duration::from_millis(1_100));
        pair.ours.kernel.tunnels().let_pass(121_000);
        wait_for("another handshake", LIMIT, || handshakes.get() == round).unwrap();
        let before = pinger.received();
        wait_for("answers by the new session", LIMIT, || pinger.received() > before + 20).unwrap();
    }
    assert!(pair.go.handshake() > first, "wireguard-go has taken part");
    let pings = pinger.finish().unwrap();
    assert_eq!(pings.lost, 0, "{pings:?}");
    exchange(far.namespace(), near.namespace(), near.address(), 1 << 20);
    let counters = pair.ours.counters();
    assert_eq!((counters.refused_session.get(), counters.refused_forged.get()), (0, 0), "{counters}");
}

#[test]
fn two_nodes_of_this_process_carry_both_families_by_either_and_with_several_workers() {
    thread::scope(|scope| {
        for (family, workers) in [(Family::V4, 1), (Family::V6, 1), (Family::V4, 3)] {
            scope.spawn(move || {
                let twins = Twins::new(family, workers);
                for net in twins.pods[1].addresses() {
                    let (near, far) = (twins.pods[0].namespace(), twins.pods[1].namespace());
                    wait_for("an echo", LIMIT, || near.reaches(net.addr()).unwrap()).unwrap();
                    exchange(near, far, net.addr(), bytes());
                }
                for node in &twins.nodes {
                    let counters = node.counters();
                    assert_eq!(counters.refused_forged.get(), 0, "{counters}");
                    assert!(counters.handshakes.get() <= 2, "{counters}");
                }
            });
        }
    });
}

#[test]
fn nothing_that_a_pod_says_can_be_read_on_the_underlay() {
    let twins = Twins::new(Family::V4, 1);
    let near = twins.pods[0].namespace();
    wait_for("an echo", LIMIT, || near.reaches(twins.to(1)).unwrap()).unwrap();
    let seen = twins.nodes[0].machine.dir().join("seen.pcap");
    let mut capture = twins.nodes[0]
        .machine
        .namespace()
        .command("tcpdump")
        .args(["-i", "eth0", "-U", "-w", &seen.display().to_string()])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let there = || fs::metadata(&seen).is_ok_and(|file| file.len() > 0);
    wait_for("tcpdump", LIMIT, there).unwrap();
    // A pattern that is easy to find, in packets of all lengths.
    for size in ["56", "1000", "1392"] {
        let target = twins.to(1).to_string();
        let args = ["-n", "-c", "5", "-i", "0.01", "-s", size, "-p", "feedc0de", &target];
        near.command("ping").args(args).ok().unwrap();
    }
    let enough = || fs::metadata(&seen).unwrap().len() > 30 * 100 + 20 * 1000;
    wait_for("what was sent", LIMIT, enough).unwrap();
    capture.signal(backends::testing::Signal::TERM).unwrap();
    capture.wait(LIMIT).unwrap();
    let bytes = fs::read(&seen).unwrap();
    let contains = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    assert!(!contains(&[0xfe, 0xed, 0xc0, 0xde, 0xfe, 0xed]), "the payload");
    let IpAddr::V4(to) = twins.to(1) else { panic!() };
    assert!(!contains(&to.octets()), "the address of the pod");
    assert!(contains(&twins.nodes[1].machine.address().octets()), "that of the node, so it was looked at");
}
