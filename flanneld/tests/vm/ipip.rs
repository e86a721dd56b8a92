//! The `ipip` backend on a kernel that has it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;

use backends::kernel::netlink::Netlink;
use backends::state::{IpipIdentity, Link, LinkIdentity, LinkSettings, Route};
use backends::testing::{Fabric, Pinger, Pod};
use backends::{KernelState, Name, Scope};
use ipnet::IpNet;

use crate::bed::{Cluster, LIMIT, Member, VXLAN, flanneld};
use crate::{applied, require_kernel, transfer};

const CONFIG: &str = "/coreos.com/network/config";
const IPIP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipip"}}"#;

/// What there is of the tunnel, without what differs from one device to the next.
fn state(member: &Member) -> String {
    let show = |command: &str| {
        let mut words = command.split(' ');
        let output = member.node.namespace().command(words.next().unwrap()).args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let link = show("ip -d -o link show flannel.ipip");
    let link = link.split_once(':').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    let address = show("ip -o -4 address show dev flannel.ipip");
    let address = address.split_once(':').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    format!("{link}{address}{}", show("ip -4 route show"))
}

struct Setup {
    cluster: Cluster,
    members: [Member; 2],
    pods: [Pod; 2],
}

impl Setup {
    fn new(config: &str) -> Self {
        require_kernel("6.");
        let cluster = Cluster::new(config);
        let members = [cluster.join(), cluster.join()];
        let pods = members.each_ref().map(|member| member.pod());
        let setup = Self { cluster, members, pods };
        setup.members[0].wait("echoes both ways", || setup.echoes());
        setup
    }

    fn echoes(&self) -> bool {
        let [a, b] = &self.pods;
        a.namespace().reaches(b.address()).unwrap() && b.namespace().reaches(a.address()).unwrap()
    }

    fn pings(&self) -> [Pinger; 2] {
        let [a, b] = &self.pods;
        let pingers =
            [(a, b), (b, a)].map(|(from, to)| Pinger::start(from.namespace(), to.address()).unwrap());
        pingers.iter().for_each(|pinger| pinger.wait_for_reply(LIMIT).unwrap());
        pingers
    }

    fn lost(&self, pings: [Pinger; 2]) -> u64 {
        pings.into_iter().map(|pinger| pinger.finish().unwrap().lost).sum()
    }

    fn logs(&self) -> String {
        self.members.iter().map(|member| member.agent.log()).collect::<Vec<_>>().join("\n---\n")
    }
}

#[test]
fn every_damage_to_the_tunnel_heals_and_a_restart_adopts_it_without_a_change() {
    let mut setup = Setup::new(IPIP);
    let [a, b] = &setup.members;
    let healthy = state(a);
    let route = format!("{} via {} dev flannel.ipip proto 70 onlink", b.subnet(), b.node.address());
    assert!(healthy.contains("mtu 1480") && healthy.contains(&route), "{healthy}");
    assert!(healthy.contains(&format!("ipip any remote any local {} ", a.node.address())), "{healthy}");
    // The module makes it in each namespace.
    let fallback = a.show("ip -d -o link show tunl0");
    for damage in [
        format!("route del {}", b.subnet()),
        format!("route replace {} via 172.31.0.254", b.subnet()),
        "link set flannel.ipip down".to_owned(),
        "address flush dev flannel.ipip".to_owned(),
        "link set flannel.ipip mtu 1300".to_owned(),
        "link del flannel.ipip".to_owned(),
        "link change flannel.ipip type ipip local 172.31.0.99 remote any".to_owned(),
    ] {
        a.ip(&damage);
        a.wait(&format!("the repair of: {damage}"), || state(a) == healthy);
        a.wait(&format!("echoes after: {damage}"), || setup.echoes());
    }
    assert_eq!(a.show("ip -d -o link show tunl0"), fallback);
    transfer::tcp(&setup.pods[0], &setup.pods[1], 16);

    let pings = setup.pings();
    let index = a.show("ip -o link show flannel.ipip");
    let [a, _] = &mut setup.members;
    a.agent.kill().unwrap();
    a.start_again();
    let log = a.agent.log();
    for change in ["link add", "link set", "address add", "route replace", "route del"] {
        assert!(!log.contains(change), "{change} in:\n{log}");
    }
    assert_eq!(a.show("ip -o link show flannel.ipip"), index);
    assert_eq!(setup.lost(pings), 0, "{}", setup.logs());
}

#[test]
fn from_vxlan_to_ipip_and_back_no_packet_is_lost() {
    let setup = Setup::new(VXLAN);
    let pings = setup.pings();
    for (config, device) in [(IPIP, "flannel.ipip"), (VXLAN, "flannel.1")] {
        setup.cluster.put(CONFIG, config);
        for (member, peer) in setup.members.iter().zip(setup.members.iter().rev()) {
            let subnet = peer.subnet();
            member.wait(&format!("{subnet} by {device}"), || {
                member.show(&format!("ip route show {subnet}")).contains(&format!("dev {device} "))
            });
        }
        transfer::tcp(&setup.pods[1], &setup.pods[0], 16);
    }
    assert_eq!(setup.lost(pings), 0, "{}", setup.logs());
}

#[test]
fn packets_that_are_too_long_are_answered_with_the_mtu_and_tcp_adapts() {
    let setup = Setup::new(IPIP);
    // As pods have it that were added with another backend.
    for (member, pod) in setup.members.iter().zip(&setup.pods) {
        let ports = member.show("ip -o link show master cni0");
        let name = |line: &str| line.split(": ").nth(1).unwrap().split('@').next().unwrap().to_owned();
        ports.lines().for_each(|line| member.ip(&format!("link set {} mtu 1500", name(line))));
        member.ip("link set cni0 mtu 1500");
        pod.namespace().ip("link set eth0 mtu 1500").unwrap();
    }
    let [from, to] = &setup.pods;
    let ping = |size: &str| {
        let words = ["-M", "do", "-c", "1", "-W", "5", "-s", size, &to.address().to_string()];
        let output = from.command("ping").args(words).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(setup.members[0].agent.subnet_env().unwrap().mtu, Some(1480));
    let (arrived, text) = ping("1452");
    assert!(arrived, "{text}");
    let (arrived, text) = ping("1453");
    assert!(!arrived && text.contains("mtu = 1480"), "{text}");
    transfer::tcp(from, to, 16);
}

#[test]
fn with_direct_routing_only_peers_behind_a_router_are_reached_by_the_tunnel() {
    require_kernel("6.");
    let cluster = Cluster::new(&IPIP.replace("ipip\"", "ipip\",\"DirectRouting\":true"));
    let (a, b) = (cluster.join(), cluster.join());
    let mut c = cluster.start(cluster.fabric.remote_node().unwrap(), &[]);
    c.agent.wait_ready(LIMIT).unwrap();
    for (from, to, device) in
        [(&a, &b, "eth0"), (&b, &a, "eth0"), (&a, &c, "flannel.ipip"), (&c, &b, "flannel.ipip")]
    {
        let way = format!("via {} dev {device} ", to.node.address());
        from.wait(&way, || from.show(&format!("ip route show {}", to.subnet())).contains(&way));
    }
    let pods = [&a, &b, &c].map(Member::pod);
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        transfer::tcp(&pods[from], &pods[to], 4);
    }
}

#[test]
fn a_device_of_another_program_is_left_alone_and_named_until_it_is_gone() {
    require_kernel("6.");
    let cluster = Cluster::new(IPIP);
    let node = cluster.fabric.node().unwrap();
    node.namespace().ip("link add flannel.ipip type bridge").unwrap();
    let mut member = cluster.start(node, &[]);
    member.wait("the reason", || {
        member.agent.get("/readyz").is_ok_and(|(code, text)| {
            code == 503
                && text.contains("device of the kind bridge")
                && text.contains("ip link del flannel.ipip")
        })
    });
    assert!(member.show("ip -d -o link show flannel.ipip").contains("bridge"));
    member.ip("link del flannel.ipip");
    member.agent.wait_ready(LIMIT).unwrap();
    assert!(member.show("ip -d -o link show flannel.ipip").contains("ipip any remote any"));

    // And when it is no more needed, what the module made stays.
    member.agent.terminate(LIMIT).unwrap();
    let file = format!("--subnet-file={}", member.node.subnet_file().display());
    let told = member.node.namespace().command(flanneld()).args(["cleanup", &file]).ok().unwrap();
    assert!(told.contains("removed: link flannel.ipip"), "{told}");
    let links = member.show("ip -o link show");
    assert!(!links.contains("flannel.ipip") && links.contains("tunl0"), "{links}");
}

/// How many echo requests a pod has got.
fn echo_requests(pod: &Pod) -> u64 {
    let snmp = pod.namespace().run(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = snmp.lines().filter(|line| line.starts_with("Icmp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "InEchos").unwrap().1.parse().unwrap()
}

#[test]
fn packets_of_strangers_reach_neither_pods_nor_the_host_unless_sources_are_not_checked() {
    let setup = Setup::new(IPIP);
    let (a, pod) = (&setup.members[0], &setup.pods[0]);
    let stranger = setup.cluster.fabric.node().unwrap();
    let (at, from) = (a.node.address(), stranger.address());
    // With a pod's address, and with one that no network here has.
    stranger
        .namespace()
        .ip(&format!(
            "link add evil type ipip local {from} remote {at}\nlink set evil up\n\
             address add 10.244.200.9/32 dev evil\naddress add 203.0.113.9/32 dev evil\n\
             route add {} dev evil\nroute add 198.51.100.0/24 dev evil",
            a.subnet()
        ))
        .unwrap();
    a.ip("address add 198.51.100.7/32 dev lo");
    let send = |source: &str, to: &str| {
        let words = ["-c", "3", "-i", "0.2", "-W", "1", "-I", source, to];
        let output = stranger.namespace().command("ping").args(words).output().unwrap();
        assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    };
    let dropped = || {
        let table = a.show("nft list table ip flannel-tunnel");
        let chain = |name: &str| {
            let chain = table.split(&format!("chain {name} {{")).nth(1).unwrap().split('}').next().unwrap();
            let last = chain.lines().rfind(|line| line.contains("counter packets")).unwrap().to_owned();
            last.split("packets ").nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap()
        };
        [chain("input-ipip"), chain("inner-ipip")]
    };
    let (before, [arrived, inner]) = (echo_requests(pod), dropped());
    send("10.244.200.9", &pod.address().to_string());
    send("203.0.113.9", "198.51.100.7");
    assert_eq!(echo_requests(pod), before);
    assert_eq!(dropped(), [arrived + 3, inner + 3]);
    assert!(setup.echoes(), "peers are heard");

    // Without the check they arrive, so it is the check that keeps them out.
    setup.cluster.put(CONFIG, &IPIP.replace("ipip\"", "ipip\",\"CheckSources\":false"));
    a.wait("the filter's end", || !a.show("nft list table ip flannel-tunnel").contains("input-ipip"));
    let before = echo_requests(pod);
    send("10.244.200.9", &pod.address().to_string());
    assert_eq!(echo_requests(pod), before + 3);
}

#[test]
fn five_thousand_peers_are_set_and_found_without_a_double() {
    require_kernel("6.");
    const COUNT: u32 = 5_000;
    let fabric = Fabric::new().unwrap();
    let node = fabric.node().unwrap();
    let dev: Name = "flannel.ipip".parse().unwrap();
    let route = |number: u32| {
        let [_, _, high, low] = number.to_be_bytes();
        let subnet: IpNet = format!("10.{}.{low}.0/24", 100 + high).parse().unwrap();
        let via: IpAddr = format!("172.30.{high}.{low}").parse().unwrap();
        (subnet, Route { via: Some(via), dev: Some(dev), onlink: true, ..Route::ours(subnet) })
    };
    let identity = LinkIdentity::Ipip(IpipIdentity { local: node.address(), foreign_modes: false });
    let settings = LinkSettings { accept_local: None, ..LinkSettings::plain(1480) };
    let mut desired = KernelState { routes: (0..COUNT).map(route).collect(), ..KernelState::default() };
    desired.links.insert(dev, Link { identity, settings });
    let networks = vec!["10.64.0.0/10".parse().unwrap()];
    let scope = Scope { devices: [dev].into(), networks, ..Scope::default() };
    node.namespace().run(|| {
        let mut kernel = Netlink::open().unwrap();
        let mut applied = |desired: &KernelState| applied(&mut kernel, desired, &scope);
        assert_eq!(applied(&desired), COUNT as usize + 1, "the device and a route to each peer");
        assert_eq!(applied(&desired), 0, "nothing is found twice, and nothing differs");
        let shown = node.namespace().show("ip -4 route show dev flannel.ipip proto 70").unwrap();
        let subnets: BTreeSet<&str> = shown.lines().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!((shown.lines().count(), subnets.len()), (COUNT as usize, COUNT as usize));

        // One is damaged, and most leave.
        node.namespace().ip("route del 10.100.7.0/24").unwrap();
        assert_eq!(applied(&desired), 1);
        let mut less = desired.clone();
        less.routes = (4_900..COUNT).map(route).collect();
        assert_eq!(applied(&less), 4_900);
        assert_eq!(applied(&less), 0);
    });
    let left = node.namespace().show("ip -4 route show dev flannel.ipip proto 70").unwrap();
    assert_eq!(left.lines().count(), 100);
}
