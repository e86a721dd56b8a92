//! WireGuard by the kernel's module, which this machine's own kernel doesn't have.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use backends::kernel::netlink::Netlink;
use backends::state::wireguard::{WireguardDevice, WireguardEntry};
use backends::state::{Link, LinkIdentity, LinkSettings};
use backends::testing::{Fabric, Namespace, Node, PingOptions, Pinger, Pod, Process, Signal};
use backends::wg::identity::Identity;
use backends::{KernelState, Name, Scope};
use subnet::wireguard::PublicKey;

use crate::bed::{Cluster, LIMIT, Member, VXLAN};
use crate::evidence::Evidence;
use crate::exchange::Exchange;
use crate::{applied, require_kernel, transfer};

const KERNEL: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard","Userspace":"never","PSK":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="}}"#;
/// With the default of `Userspace`.
const AUTO: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard"}}"#;
const PROCESS: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"wireguard","Userspace":"always"}}"#;

fn wg(member: &Member, what: &str) -> String {
    member.show(&format!("wg show flannel-wg {what}"))
}

/// Everything that WireGuard says but counters, the time of the last handshake and the private key, and the device's addresses. The
/// device's index is left out: a device that is created again has another one. Nothing without a device.
fn setup(member: &Member) -> String {
    let namespace = member.node.namespace();
    let Ok(all) = namespace.show("wg show flannel-wg dump") else { return String::new() };
    let addresses = namespace.show("ip -o -4 address show dev flannel-wg").unwrap_or_default();
    let addresses = addresses.split_once(": ").map_or("", |(_, rest)| rest);
    let parts = |line: &str| {
        let words: Vec<&str> = line.split('\t').collect();
        match words[..] {
            [_private, public, port, mark] => [public, port, mark].join(" "),
            [key, psk, endpoint, allowed, _handshake, _received, _sent, keepalive] => {
                [key, psk, endpoint, allowed, keepalive].join(" ")
            }
            _ => panic!("{line}"),
        }
    };
    all.lines().map(parts).collect::<Vec<_>>().join("\n") + addresses
}

/// When the last handshake with the only peer was, in seconds since 1970; 0: there was none since it was set.
fn last_handshake(member: &Member) -> u64 {
    let text = wg(member, "latest-handshakes");
    text.split_whitespace().nth(1).map_or(0, |at| at.parse().unwrap())
}

/// The same, in a later second: the module tells whole ones.
fn earlier_handshake(member: &Member) -> u64 {
    let at = last_handshake(member);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    member.wait("another second", || now() > at);
    at
}

fn kind(member: &Member) -> String {
    member.show("ip -o -d link show flannel-wg")
}

fn reaches(from: &Pod, to: &Pod) -> bool {
    from.namespace().reaches(to.address()).unwrap()
}

#[test]
fn the_module_carries_pods_heals_and_stays_over_restarts() {
    require_kernel("6.");
    let cluster = Cluster::new(KERNEL);
    // Without packets of the agents.
    let quiet = || cluster.join_with(&["--probe-interval=0"]);
    let mut members = [quiet(), quiet()];
    let pods = members.each_ref().map(Member::pod);
    members[0].wait("the first echo", || reaches(&pods[0], &pods[1]));
    assert!(kind(&members[0]).contains("wireguard") && kind(&members[0]).contains("mtu 1420"));
    transfer::tcp(&pods[0], &pods[1], 16);
    let healthy = setup(&members[0]);
    let peer = wg(&members[0], "peers").trim().to_owned();
    for damage in [
        format!("wg set flannel-wg peer {peer} remove"),
        "wg set flannel-wg listen-port 999".to_owned(),
        format!("wg set flannel-wg peer {peer} allowed-ips 10.9.9.0/24"),
        format!("wg set flannel-wg peer {peer} persistent-keepalive 7"),
        "ip link del flannel-wg".to_owned(),
        "ip link set flannel-wg down".to_owned(),
        "ip route del 10.244.0.0/16".to_owned(),
    ] {
        let before = earlier_handshake(&members[0]);
        members[0].show(&damage);
        // The module sends no notification about its settings: another look at the host is asked for.
        members[0].agent.process().signal(Signal::HUP).unwrap();
        members[0].wait(&format!("the repair of: {damage}"), || setup(&members[0]) == healthy);
        // Without a packet: a device or a peer that was made again asks for a session itself, and so does a link that was down, which
        // forgets sessions, too.
        if damage.contains("remove") || damage.contains("flannel-wg d") || damage.contains("del flannel-wg") {
            members[0]
                .wait(&format!("another session after: {damage}"), || last_handshake(&members[0]) > before);
        }
        // The other one has a session from before and would try no other for 15 s.
        members[0].wait(&format!("echoes after: {damage}"), || reaches(&pods[1], &pods[0]));
        assert!(reaches(&pods[0], &pods[1]), "{damage}");
    }
    another_key_has_a_session(&mut members);
    let healthy = setup(&members[0]);
    let pinger = Pinger::start(pods[0].namespace(), pods[1].address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    for kill in [false, true] {
        if kill {
            members[0].agent.kill().unwrap();
        } else {
            assert!(members[0].agent.terminate(LIMIT).unwrap().success());
        }
        assert_eq!(setup(&members[0]), healthy, "the device stays");
        members[0].start_again();
        let log = members[0].agent.log();
        assert!(
            !log.contains("wireguard set") && !log.contains("wireguard peers"),
            "adopted as it is:\n{log}"
        );
    }
    let pings = pinger.finish().unwrap();
    assert_eq!(pings.lost, 0, "{pings:?}");
    let private = fs::read_to_string(members[0].node.dir().join("wgkey")).unwrap();
    assert!(!members[0].agent.log().contains(&private));
}

/// Another key, while no packet is sent: the peer begins the handshake when it has read the key.
fn another_key_has_a_session(members: &mut [Member; 2]) {
    fs::remove_file(members[0].node.dir().join("wgkey")).unwrap();
    let key = wg(&members[1], "peers");
    members[0].agent.process().signal(Signal::HUP).unwrap();
    members[1].wait("the other key", || wg(&members[1], "peers") != key);
    members[1].wait("a session by the other key", || last_handshake(&members[1]) > 0);
}

/// Has this private key in a node's file. The result is its public key.
fn have_key(node: &Node, private: &str) -> String {
    let file = node.dir().join("wgkey");
    drop(fs::remove_file(&file));
    fs::write(&file, private.trim()).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o400)).unwrap();
    node.namespace().command("wg").arg("pubkey").input(private).ok().unwrap().trim().to_owned()
}

/// The packets on a device that a filter selects, into a file beside the agent's.
fn capture(member: &Member, device: &str, filter: &str) -> (Process, PathBuf) {
    let file = member.node.dir().join(format!("{device}.pcap"));
    let arguments = format!("-i {device} -n -U --immediate-mode -s 64 -w {} {filter}", file.display());
    let command = member.node.namespace().command("tcpdump").args(arguments.split(' '));
    let process = command.stderr(Stdio::null()).spawn().unwrap();
    member.wait("tcpdump", || size(&file) >= PCAP_HEADER);
    (process, file)
}

/// Has it write what it has.
fn end(capture: &mut Process) {
    capture.signal(Signal::TERM).unwrap();
    capture.wait(LIMIT).unwrap();
}

/// Packets of pods, readable.
const PODS: &str = "net 10.244.0.0/16";

/// The length of a capture without packets.
const PCAP_HEADER: u64 = 24;

fn size(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |file| file.len())
}

#[test]
fn keys_change_at_a_hangup_and_of_two_nodes_with_one_while_connections_go_on_and_nothing_is_sent_in_clear() {
    require_kernel("6.");
    let cluster = Cluster::new(KERNEL);
    let mut members = [cluster.join(), cluster.join()];
    let pods = members.each_ref().map(Member::pod);
    members[0].wait("the first echo", || reaches(&pods[0], &pods[1]));
    let index = |member: &Member| kind(member).split(':').next().unwrap().to_owned();
    let before = members.each_ref().map(index);
    let at = SocketAddr::new(pods[1].address(), 7090);
    let exchange = Exchange::start(pods[0].namespace(), pods[1].namespace(), at, 7090);
    let (mut outside, clear) = capture(&members[0], "eth0", PODS);
    let (mut inside, readable) = capture(&members[0], "flannel-wg", PODS);
    exchange.goes_on(&members[0], "its start");
    members[0].wait("such packets where they are readable", || size(&readable) > PCAP_HEADER);
    end(&mut inside);

    // Another file, and none: then the agent makes a key.
    let first = members[0].node.namespace().show("wg genkey").unwrap();
    let mut privates = vec![first.trim().to_owned()];
    let mut known = wg(&members[1], "peers");
    for told in [have_key(&members[0].node, &first), String::new()] {
        if told.is_empty() {
            fs::remove_file(members[0].node.dir().join("wgkey")).unwrap();
        }
        members[0].agent.process().signal(Signal::HUP).unwrap();
        members[1].wait("the other key in place of the one before", || {
            let now = wg(&members[1], "peers");
            now != known && now.lines().count() == 1
        });
        known = wg(&members[1], "peers");
        assert!(told.is_empty() || known.trim() == told, "{known}");
        assert_eq!(wg(&members[0], "public-key"), known);
        exchange.goes_on(&members[0], "another key");
        let handshakes = wg(&members[1], "latest-handshakes");
        assert!(handshakes.starts_with(known.trim()) && !handshakes.trim().ends_with("\t0"), "{handshakes}");
    }
    assert_eq!(members.each_ref().map(index), before, "the devices stay");

    // A copied disk, with a later lease.
    privates.push(fs::read_to_string(members[0].node.dir().join("wgkey")).unwrap());
    let node = cluster.fabric.node().unwrap();
    have_key(&node, &privates[1]);
    let mut young = cluster.start(node, &["--wireguard-new-key"]);
    young.agent.wait_ready(LIMIT).unwrap();
    young.wait_for_log("this node takes another WireGuard key");
    // It is on the device a moment after it was said.
    young.wait("another key on its device", || wg(&young, "public-key") != wg(&members[0], "public-key"));
    assert_eq!(wg(&members[0], "public-key"), known, "the older one keeps its own");
    let pod = young.pod();
    young.wait("echoes to both", || reaches(&pod, &pods[0]) && reaches(&pod, &pods[1]));
    exchange.goes_on(&members[0], "a node with the same key");

    exchange.finish();
    end(&mut outside);
    assert_eq!(size(&clear), PCAP_HEADER, "packets of pods on the underlay, readable");
    for member in members.iter().chain([&young]) {
        let log = member.agent.log();
        assert!(privates.iter().all(|private| !log.contains(private)), "a private key is in the log");
    }
}

/// When the packets of a capture were on the wire.
fn times(file: &Path) -> Vec<SystemTime> {
    let bytes = fs::read(file).unwrap();
    let mut rest = &bytes[PCAP_HEADER as usize..];
    let mut times = Vec::new();
    // Seconds, microseconds, and the length of what was kept.
    while let Some(header) = rest.first_chunk::<16>() {
        let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        times.push(UNIX_EPOCH + Duration::new(number(0).into(), number(4) * 1000));
        rest = rest.get(16 + number(8) as usize..).unwrap_or_default();
    }
    times
}

#[test]
fn over_a_slow_network_a_cluster_goes_from_vxlan_to_the_module_readable_no_longer_than_announced_and_loses_nothing()
 {
    require_kernel("6.");
    let cluster = Cluster::new(VXLAN);
    let members = [cluster.join_with(&["--v=4"]), cluster.join_with(&["--v=4"])];
    let _evidence = Evidence(&cluster, &members);
    let pods = members.each_ref().map(Member::pod);
    members[0].wait("the first echo", || reaches(&pods[0], &pods[1]));
    // Longer than the third of a second by which the module varies its repetitions: handshakes that cross once cross for ever.
    for member in &members {
        member.show("tc qdisc replace dev eth0 root netem delay 400ms limit 10000");
    }
    let mut captures = members.each_ref().map(|member| capture(member, "eth0", "udp port 8472"));
    // Packets both ways: each module begins a handshake as soon as it has to send one without a session.
    let options = PingOptions { interval: Duration::from_millis(50), ..PingOptions::default() };
    let pingers = [(0, 1), (1, 0)].map(|(from, to)| {
        let pinger = Pinger::start_with(pods[from].namespace(), pods[to].address(), options).unwrap();
        pinger.wait_for_reply(LIMIT).unwrap();
        pinger
    });
    cluster.put("/coreos.com/network/config", AUTO);
    let announces = |value: &str| value.contains(r#""BackendType":"wireguard""#);
    members[0].wait("both announcements", || cluster.leases().iter().all(|(_, value)| announces(value)));
    let announced = SystemTime::now();
    for (me, other) in [(0, 1), (1, 0)] {
        let target = pods[other].address().to_string();
        assert!(members[me].show(&format!("ip route get {target}")).contains("dev flannel-wg"));
        assert!(kind(&members[me]).contains("wireguard"));
        // The module waits five seconds after handshakes that crossed: both nodes have a session instead.
        let log = members[me].agent.log();
        assert!(log.contains("wireguard is announced: there are sessions with all peers"), "{log}");
    }
    for pinger in pingers {
        let before = pinger.received();
        members[0].wait("answers", || pinger.received() > before + 50);
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{pings:?}");
    }
    for (capture, file) in &mut captures {
        end(capture);
        let readable = times(file);
        assert!(readable.len() > 50, "packets of pods before the change");
        let late = readable.iter().filter(|at| **at > announced).count();
        assert_eq!(late, 0, "readable after both announcements, of {}", readable.len());
    }
    members.iter().for_each(|member| drop(member.show("tc qdisc del dev eth0 root")));
    // The other engine takes the device's place; that interrupts traffic for a moment.
    cluster.put("/coreos.com/network/config", PROCESS);
    for member in &members {
        member.wait("a TUN device", || {
            let shown = member.node.namespace().command("ip").args(["-d", "link", "show", "flannel-wg"]).ok();
            shown.is_ok_and(|shown| shown.contains("tun type tun") || shown.contains("tun "))
        });
    }
    members[0].wait("echoes in process", || reaches(&pods[0], &pods[1]));
}

#[test]
fn the_module_and_this_process_are_peers_in_both_roles_over_a_lossy_network() {
    require_kernel("6.");
    for first in [0, 1] {
        let cluster = Cluster::new(PROCESS);
        let member = cluster.join();
        let pod = member.pod();
        let (node, far) = by_hand(&cluster, &member);
        let pods = [&pod, &far];
        member.wait("the first echo", || reaches(pods[first], pods[1 - first]));
        assert!(reaches(pods[1 - first], pods[first]));
        for namespace in [member.node.namespace(), node.namespace()] {
            let netem = "tc qdisc replace dev eth0 root netem delay 5ms 2ms loss 1% duplicate 2%";
            let words: Vec<&str> = netem.split(' ').collect();
            namespace.command(words[0]).args(&words[1..]).ok().unwrap();
        }
        transfer::both_ways(&pod, &far, 16);
    }
}

/// A node whose kernel encrypts, set up with `wg` and `ip` alone, as a Go flannel would have it.
fn by_hand(cluster: &Cluster, member: &Member) -> (Node, Pod) {
    let node = cluster.fabric.node().unwrap();
    let run = |namespace: &Namespace, line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        namespace.command(words[0]).args(&words[1..]).ok().unwrap()
    };
    let namespace = node.namespace();
    let private = run(namespace, "wg genkey");
    let file = node.dir().join("private");
    fs::write(&file, &private).unwrap();
    let public = namespace.command("wg").arg("pubkey").input(private).ok().unwrap();
    let (at, theirs) = (node.address(), wg_key(cluster, member));
    let value = format!(
        r#"{{"PublicIP":"{at}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{}","Port":51820}}}}"#,
        public.trim()
    );
    cluster.put("/coreos.com/network/subnets/10.244.200.0-24", &value);
    namespace.ip("link add flannel-wg mtu 1420 type wireguard").unwrap();
    run(
        namespace,
        &format!(
            "wg set flannel-wg private-key {} listen-port 51820 peer {theirs} endpoint {}:51820 allowed-ips {}",
            file.display(),
            member.node.address(),
            member.subnet()
        ),
    );
    let lines = "addr add 10.244.200.0/32 dev flannel-wg\nlink set flannel-wg up\nroute add 10.244.0.0/16 dev flannel-wg";
    namespace.ip(lines).unwrap();
    let pod = Pod::wired(&node, "10.244.200.2/24".parse().unwrap()).unwrap();
    (node, pod)
}

fn wg_key(cluster: &Cluster, member: &Member) -> String {
    let own = format!("\"PublicIP\":\"{}\"", member.node.address());
    let (_, value) = cluster.leases().into_iter().find(|(_, value)| value.contains(&own)).unwrap();
    value.split("\"PublicKey\":\"").nth(1).unwrap()[..44].to_owned()
}

#[test]
fn five_thousand_peers_are_set_and_found_without_a_double() {
    require_kernel("6.");
    const COUNT: u32 = 5_000;
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let dev: Name = "flannel-wg".parse().unwrap();
    let peer = |number: u32| {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        let [_, _, high, low] = number.to_be_bytes();
        let net = |first: u8| format!("{first}.{high}.{low}.0/24").parse().unwrap();
        let entry = WireguardEntry {
            endpoint: SocketAddr::from(([172, 30, high, low], 51_820)),
            // Two of each, so that some peers go on in the next message of a dump.
            allowed: [net(10), net(11)].into(),
            psk: Some([9; 32].into()),
            keepalive: 0,
        };
        (PublicKey::new(key).unwrap(), entry)
    };
    let peers: BTreeMap<_, _> = (0..COUNT).map(peer).collect();
    let identity = Some(Arc::new(Identity::generate().unwrap()));
    let mut desired = KernelState::default();
    let settings = LinkSettings { accept_local: None, ..LinkSettings::plain(1420) };
    desired.links.insert(dev, Link { identity: LinkIdentity::Wireguard, settings });
    let device = WireguardDevice { port: 51_820, identity, peers };
    desired.wireguard.insert(dev, Arc::new(device.clone()));
    let scope = Scope { devices: [dev].into(), ..Scope::default() };
    node.namespace().run(|| {
        let mut kernel = Netlink::open().unwrap();
        let mut applied = |desired: &KernelState| applied(&mut kernel, desired, &scope);
        assert_eq!(applied(&desired), 3, "the device, its key, its peers");
        assert_eq!(applied(&desired), 0, "nothing is found twice, and nothing differs");
        let (begun, mut told) = (Instant::now(), 0);
        backends::wireguard_sessions(&desired, |_, _| told += 1).unwrap();
        println!("the sessions of {told} peers in {:?}", begun.elapsed());
        assert_eq!(told, COUNT);
        let fewer = device.peers.iter().skip(4_900).map(|(key, peer)| (*key, peer.clone())).collect();
        let mut less = desired.clone();
        less.wireguard.insert(dev, Arc::new(WireguardDevice { peers: fewer, ..device.clone() }));
        assert_eq!(applied(&less), 1);
        assert_eq!(applied(&less), 0);
    });
    let shown = node.namespace().command("wg").args(["show", "flannel-wg", "peers"]).ok().unwrap();
    assert_eq!(shown.lines().count(), 100);
}
