//! The reconciler on the real kernel: what it makes, what it repairs, and what it leaves alone.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

#[path = "kernel/bridges.rs"]
mod bridges;
#[path = "kernel/nexthops.rs"]
mod nexthops;
#[path = "kernel/notifications.rs"]
mod notifications;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use backends::kernel::netlink::{Listener, Netlink};
use backends::kernel::{NotificationFilter, Notifications, Notified, Records};
use backends::testing::{Fabric, Node as Machine, Pod};
use backends::{
    ActiveBackends, Kernel, KernelChange, KernelState, Macs, Node, PeerContext, Peers, PlanInput, Report,
    Scope, Underlay, converge,
};
use subnet::lease::parse_key;
use subnet::{Family, Leases, Mac, NetworkConfig, PublicAddrs, Subnets};

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// A machine that does something else takes this long for something that takes a moment.
const TIMEOUT: Duration = Duration::from_secs(30);

const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// One node's end of the reconciler: everything that an agent would hold.
struct Agent<'m> {
    machine: &'m Machine,
    kernel: Netlink,
    network: NetworkConfig,
    active: ActiveBackends,
    node: Node,
    own: Subnets,
    macs: Macs,
}

fn key(number: u8) -> String {
    format!("10.244.{number}.0-24")
}

fn macs(number: u8) -> Macs {
    let mut macs = Macs::default();
    macs.set(Family::V4, Mac([2, 0, 0, 0, 0, number]));
    macs
}

/// The leases of nodes 1 to `count`.
fn leases(network: &NetworkConfig, count: u8) -> Leases {
    let active = ActiveBackends::new(&network.backend, network).unwrap();
    let mut all = Leases::default();
    for number in 1..=count {
        let public = PublicAddrs { v4: Some([172, 31, 0, number].into()), v6: None };
        let value = subnet::lease::encode_value(&public, &active.current().attachment(&macs(number)));
        all.insert_entry(&key(number), value.as_bytes(), u64::from(number));
    }
    all
}

/// What the leases of these nodes leave in memory.
fn records(network: &NetworkConfig, numbers: &[u8]) -> Arc<Records> {
    let mut all = leases(network, 89);
    let ours = |number: &u8| parse_key(&key(*number)).unwrap();
    let numbers: Vec<Subnets> = numbers.iter().map(ours).collect();
    all.leases.retain(|subnets, _| numbers.contains(subnets));
    let mut records = Records::default();
    records.learn(&all, None);
    Arc::new(records)
}

impl<'m> Agent<'m> {
    fn new(machine: &'m Machine, config: &str) -> Self {
        let network = NetworkConfig::parse(config).unwrap();
        let number = machine.address().octets()[3];
        let mut kernel = machine.namespace().run(|| Netlink::open().unwrap());
        let host = kernel.observe(&KernelState::default(), &Scope::default()).unwrap().host;
        let eth0 = host.link("eth0").unwrap();
        let public = PublicAddrs { v4: Some(machine.address()), v6: None };
        Self {
            machine,
            kernel,
            active: ActiveBackends::new(&network.backend, &network).unwrap(),
            network,
            node: Node {
                underlay: Underlay { index: eth0.index, name: eth0.name, mtu: eth0.mtu },
                public,
                local: public,
                source: public,
                direct: Arc::default(),
            },
            own: parse_key(&key(number)).unwrap(),
            macs: macs(number),
        }
    }

    fn scope(&self) -> Scope {
        Scope {
            networks: self.network.networks().iter().collect(),
            subnets: self.own.iter().collect(),
            ranges: self.network.ranges().copied().collect(),
            subnet_lens: vec![(Family::V4, 24)],
            // Node 89 is gone.
            records: records(&self.network, &[1, 2, 89]),
            underlay: Some(self.node.underlay.index),
            devices: self.active.devices().collect(),
            recalled: false,
        }
    }

    fn desired(&self, all: &Leases) -> KernelState {
        let Self { network, active, node, own, macs, .. } = self;
        let before = KernelState::default();
        let context = PeerContext {
            network,
            former: &[],
            own: &all.leases[own],
            active,
            before: &before,
            surroundings: &backends::Surroundings::default(),
            undecided: &Default::default(),
        };
        let peers: Vec<_> = Peers::choose(context, all).usable.values().copied().collect();
        active.plan(PlanInput { node, own, macs, peers: &peers, all: &peers })
    }

    /// Converges as the agent does: on any thread, with the sockets opened inside the namespace.
    fn converge(&mut self, desired: &KernelState) -> Report {
        let scope = self.scope();
        let namespace = self.machine.namespace();
        let kernel = &mut self.kernel;
        let report = namespace.run(|| converge(kernel, desired, &scope).unwrap());
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        assert!(report.settled, "{:?}", report.applied);
        report
    }

    fn show(&self, program: &str, args: &str) -> String {
        self.machine.namespace().command(program).args(args.split(' ')).ok().unwrap()
    }
}

fn words(changes: &[KernelChange]) -> Vec<String> {
    changes.iter().map(ToString::to_string).collect()
}

fn pod(machine: &Machine) -> Pod {
    let number = machine.address().octets()[3];
    Pod::wired(machine, format!("10.244.{number}.2/24").parse().unwrap()).unwrap()
}

#[test]
fn two_nodes_with_nothing_but_leases_carry_their_pods_packets() {
    for config in [VXLAN, HOST_GW] {
        let fabric = Fabric::new().unwrap();
        let (a, b) = (fabric.node().unwrap(), fabric.node().unwrap());
        for machine in [&a, &b] {
            let mut agent = Agent::new(machine, config);
            let desired = agent.desired(&leases(&agent.network, 2));
            agent.converge(&desired);
            let again = agent.converge(&desired);
            assert_eq!(words(&again.applied), Vec::<String>::new(), "what is right is left alone");
        }
        let (pod_a, pod_b) = (pod(&a), pod(&b));
        assert!(pod_a.namespace().reaches(pod_b.address()).unwrap(), "{config}");
        assert!(pod_b.namespace().reaches(pod_a.address()).unwrap(), "{config}");
        assert!(a.namespace().reaches(pod_b.address()).unwrap(), "{config}");
    }
}

#[test]
fn the_device_and_its_entries_are_those_that_a_go_peer_expects() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let desired = agent.desired(&leases(&agent.network, 2));
    agent.converge(&desired);
    let link = agent.show("ip", "-d link show flannel.1");
    for part in [
        "vxlan id 1 local 172.31.0.1 dev eth0",
        "dstport 8472",
        "nolearning",
        "udpcsum",
        "mtu 1450",
        "02:00:00:00:00:01",
    ] {
        assert!(link.contains(part), "{part} not in {link}");
    }
    assert!(agent.show("ip", "address show flannel.1").contains("inet 10.244.1.0/32"));
    let route = agent.show("ip", "route show 10.244.2.0/24");
    assert_eq!(route.trim(), "10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto 70 onlink");
    let neighbour = agent.show("ip", "neigh show dev flannel.1");
    assert_eq!(neighbour.trim(), "10.244.2.0 lladdr 02:00:00:00:00:02 PERMANENT");
    let fdb = agent.show("bridge", "fdb show dev flannel.1");
    assert_eq!(fdb.trim(), "02:00:00:00:00:02 dst 172.31.0.2 self permanent");
    let accept_ra =
        machine.namespace().run(|| std::fs::read_to_string("/proc/sys/net/ipv6/conf/flannel.1/accept_ra"));
    assert_eq!(accept_ra.unwrap().trim(), "0");
}

#[test]
fn every_kind_of_damage_is_repaired_and_leads_to_the_same_state() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let desired = agent.desired(&leases(&agent.network, 40));
    agent.converge(&desired);
    let state = |agent: &Agent<'_>| {
        let fdb = agent.show("bridge", "fdb show dev flannel.1");
        let mut fdb: Vec<&str> = fdb.lines().collect();
        fdb.sort_unstable();
        let neighbours = agent.show("ip", "neigh show dev flannel.1");
        let mut neighbours: Vec<&str> = neighbours.lines().collect();
        neighbours.sort_unstable();
        format!("{}\n{}\n{}", agent.show("ip", "route show"), neighbours.join("\n"), fdb.join("\n"))
    };
    let healthy = state(&agent);
    for damage in [
        "route del 10.244.7.0/24",
        "route replace 10.244.7.0/24 via 172.31.0.254",
        "route replace blackhole 10.244.7.0/24",
        "route prepend 10.244.7.0/24 via 172.31.0.254",
        "route append 10.244.7.0/24 via 172.31.0.254 proto 70",
        "route add 10.244.7.0/24 via 172.31.0.254 metric 50 proto 70",
        "route replace 10.244.7.0/24 proto 70 nexthop via 172.31.0.3 nexthop via 172.31.0.4",
        "neigh del 10.244.7.0 dev flannel.1",
        "neigh replace 10.244.7.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
        "neigh replace 10.244.7.0 lladdr 02:00:00:00:00:07 dev flannel.1 nud reachable",
        "neigh add 10.244.99.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
        "address flush dev flannel.1",
        "address add 10.244.77.1/24 dev flannel.1",
        "link set flannel.1 down",
        "link set flannel.1 address 02:00:00:00:00:77",
        "link set flannel.1 mtu 1280",
        "link set flannel.1 type vxlan id 1 local 172.31.0.99",
        "link set flannel.1 type vxlan id 1 learning",
        "link del flannel.1",
        "link del flannel.1\nlink add flannel.1 type vxlan id 1 dev eth0 dstport 4789 local 172.31.0.1",
        "link del flannel.1\nlink add flannel.1 type bridge",
        "route flush dev flannel.1\nneigh flush dev flannel.1 nud permanent",
    ] {
        machine.namespace().ip(damage).unwrap();
        assert_ne!(agent.converge(&desired).applied.len(), 0, "not noticed: {damage}");
        assert_eq!(state(&agent), healthy, "after: {damage}");
    }
    for damage in [
        "fdb del 02:00:00:00:00:07 dev flannel.1 dst 172.31.0.7 self",
        "fdb replace 02:00:00:00:00:07 dev flannel.1 dst 172.31.0.99 self",
        "fdb replace 02:00:00:00:00:07 dev flannel.1 dst 172.31.0.7 port 4789 self",
        "fdb add 02:00:00:00:00:99 dev flannel.1 dst 172.31.0.99 self",
    ] {
        agent.show("bridge", damage);
        assert_eq!(agent.converge(&desired).applied.len(), 1, "not one change for: {damage}");
        assert_eq!(state(&agent), healthy, "after: {damage}");
    }
}

#[test]
fn a_moved_underlay_is_followed_without_losing_an_entry() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let all = leases(&agent.network, 5);
    let desired = agent.desired(&all);
    agent.converge(&desired);
    machine.namespace().ip("link set eth0 mtu 1400\naddr add 172.31.0.201/24 dev eth0").unwrap();
    agent.node.underlay.mtu = 1400;
    (agent.node.public.v4, agent.node.source.v4) =
        (Some([172, 31, 0, 201].into()), Some([172, 31, 0, 201].into()));
    let report = agent.converge(&agent.desired(&all));
    assert_eq!(words(&report.applied), ["link set flannel.1 mtu 1350 local 172.31.0.201"]);
    machine.namespace().ip("link set eth0 mtu 1500").unwrap();
    agent.node.underlay.mtu = 1500;
    assert_eq!(words(&agent.converge(&agent.desired(&all)).applied), ["link set flannel.1 mtu 1450"]);
}

/// What a Go flannel and nodes that are gone have left behind, and what belongs to others.
const LEFTOVERS: &str = "\
    route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink\n\
    route add 10.244.88.0/24 via 10.244.88.0 dev flannel.1 onlink\n\
    route add 10.244.89.0/24 via 172.31.0.89\n\
    route add 10.244.90.0/24 via 172.31.0.90 proto 70\n\
    neigh add 10.244.88.0 lladdr 02:00:00:00:00:88 dev flannel.1 nud permanent";
const STRANGERS: &str = "\
    route add 10.244.91.0/25 via 172.31.0.91\n\
    route add 10.244.95.0/24 via 172.31.0.254\n\
    route add 10.244.92.0/24 via 172.31.0.92 proto static\n\
    route add 10.244.93.0/24 via 172.31.0.93 metric 7\n\
    route add 10.244.94.0/24 dev other0\n\
    route add 192.168.7.0/24 via 172.31.0.94 proto 70\n\
    route add 10.244.2.0/24 via 172.31.0.95 table 99\n\
    route add 10.98.1.0/24 via 10.98.1.0 dev flannel.7 onlink proto 70\n\
    neigh add 10.98.0.9 lladdr 02:00:00:00:00:09 dev flannel.7 nud permanent";

/// What is in the kernel of the two other agents and of the programs that are none.
fn state_of_strangers(agent: &Agent<'_>) -> String {
    let all = agent.show("ip", "route show table all");
    let kept = |line: &&str| {
        ["91.0", "92.0", "93.0", "94.0", "95.0", "192.168.7", "table 99", "10.98.1", "10.77.0"]
            .iter()
            .any(|part| line.contains(part))
    };
    let routes: Vec<&str> = all.lines().filter(kept).collect();
    assert!(routes.len() >= 8, "{all}");
    format!(
        "{routes:?}{}{}",
        agent.show("ip", "neigh show dev flannel.7"),
        agent.show("ip", "-d link show flannel.7")
    )
}

#[test]
fn leftovers_are_adopted_or_swept_and_strangers_keep_everything() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let ip = |lines: &str| machine.namespace().ip(lines).unwrap();
    // A device that a Go flannel left, of another agent with its own network, and of an unknown program.
    ip("link add flannel.1 type vxlan id 1 dev eth0 local 172.31.0.1 dstport 8472 nolearning\n\
        link set flannel.1 address 02:00:00:00:00:01 mtu 1450 up\naddr add 10.244.1.0/32 dev flannel.1");
    ip("link add flannel.7 type vxlan id 7 dev eth0 local 172.31.0.1 dstport 8477 nolearning\n\
        link set flannel.7 up\naddr add 10.98.0.0/32 dev flannel.7");
    ip("link add other0 type bridge\nlink set other0 up\naddr add 10.77.0.1/24 dev other0");
    ip(LEFTOVERS);
    ip(STRANGERS);
    // Devices of earlier configurations of ours: they carry our own subnet's address.
    ip("link add flannel.3 type vxlan id 3 dev eth0 local 172.31.0.1 dstport 8473 nolearning\n\
        addr add 10.244.1.0/32 dev flannel.3\n\
        tuntap add flannel0 mode tun\naddr add 10.244.1.0/32 dev flannel0\n\
        route add blackhole 10.244.1.0/24");
    let before = state_of_strangers(&agent);
    let device = agent.show("ip", "link show flannel.1");

    let desired = agent.desired(&leases(&agent.network, 2));
    let report = agent.converge(&desired);
    assert_eq!(
        words(&report.applied),
        [
            "link set flannel.1 accept_ra 0",
            "fdb replace 02:00:00:00:00:02 dst 172.31.0.2 dev flannel.1",
            "neigh replace 10.244.2.0 lladdr 02:00:00:00:00:02 dev flannel.1",
            "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto 70",
            "route del 10.244.1.0/24 proto boot",
            "route del 10.244.88.0/24 via 10.244.88.0 dev flannel.1 onlink proto boot",
            "route del 10.244.89.0/24 via 172.31.0.89 dev eth0 proto boot",
            "route del 10.244.90.0/24 via 172.31.0.90 dev eth0 proto 70",
            "neigh del 10.244.88.0 dev flannel.1",
            "link del flannel.3",
            "link del flannel0",
        ]
    );
    assert_eq!(agent.show("ip", "link show flannel.1"), device, "the living device is the same one");
    assert_eq!(state_of_strangers(&agent), before);

    // Uninstalling is converging to nothing.
    let report = agent.converge(&KernelState::default());
    assert!(words(&report.applied).contains(&"link del flannel.1".to_owned()));
    assert_eq!(state_of_strangers(&agent), before);
}

#[test]
fn one_refused_change_does_not_keep_the_others_from_being_made() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, HOST_GW);
    let mut all = leases(&agent.network, 200);
    let stray = PublicAddrs { v4: Some([192, 0, 2, 7].into()), v6: None };
    all.insert_entry(
        &key(7),
        subnet::lease::encode_value(&stray, &agent.active.current().attachment(&macs(7))).as_bytes(),
        7,
    );
    let desired = agent.desired(&all);
    let scope = agent.scope();
    let report = converge(&mut agent.kernel, &desired, &scope).unwrap();
    let refused: Vec<String> = report.failed.iter().map(ToString::to_string).collect();
    assert_eq!(refused.len(), 1);
    assert!(
        refused[0].starts_with(
            "route replace 10.244.7.0/24 via 192.0.2.7 dev eth0 proto 70: Network is unreachable"
        ),
        "{refused:?}"
    );
    assert_eq!(report.applied.len(), 198);
}

#[test]
fn the_kernel_says_which_way_packets_take() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, HOST_GW);
    let way = agent.kernel.route_to("192.0.2.1".parse().unwrap()).unwrap();
    assert_eq!((way.link, way.source), (agent.node.underlay.index, Some(machine.address().into())));
    let way = agent.kernel.route_to("fd31::99".parse().unwrap()).unwrap();
    assert_eq!(way.link, agent.node.underlay.index);
    machine.namespace().ip("route del default").unwrap();
    assert!(agent.kernel.route_to("192.0.2.1".parse().unwrap()).is_err());
}
