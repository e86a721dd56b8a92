//! Nodes with a tunnel each, made by the reconciler from leases, and what the kernel says about them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use backends::datapath::counters::{Counter, Counters};
use backends::datapath::engine::Offload;
use backends::kernel::netlink::Netlink;
pub(crate) use backends::testing::ChecksumErrors;
use backends::testing::{Fabric, Namespace, Node as Machine, Pod, wait_for};
use backends::{
    ActiveBackends, Kernel, KernelError, KernelState, Macs, Node, PeerContext, Peers, PlanInput, Report,
    Scope, Underlay, converge,
};
use ipnet::IpNet;
use subnet::lease::{encode_value, format_key};
use subnet::net::{addr_of, bits_of};
use subnet::{Family, Leases, NetworkConfig, PublicAddrs, Range, Subnets};

/// Long enough for a machine that does something else; no test waits for it when all is well.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const UDP: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;
pub(crate) const UDP_V6: &str =
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"udp"}}"#;
pub(crate) const UDP_BOTH: &str =
    r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"udp"}}"#;
pub(crate) const TRUSTING: &str =
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","CheckSources":false}}"#;

/// A node with its end of the tunnel.
pub(crate) struct Site {
    kernel: Netlink,
    network: NetworkConfig,
    active: ActiveBackends,
    pub(crate) node: Node,
    own: Subnets,
    /// The number of each peer, which its subnet has, and where it is reached.
    pub(crate) peers: Vec<(u8, Ipv4Addr)>,
    pub(crate) machine: Arc<Machine>,
}

/// The subnets of the node with this number.
fn subnets(network: &NetworkConfig, number: u8) -> Subnets {
    let subnet = |range: &Range| match range.network.addr() {
        IpAddr::V4(address) => {
            let [a, b, ..] = address.octets();
            IpNet::new([a, b, number, 0].into(), 24).unwrap()
        }
        IpAddr::V6(address) => {
            let [a, b, c, ..] = address.segments();
            IpNet::new([a, b, c, number.into(), 0, 0, 0, 0].into(), 64).unwrap()
        }
    };
    network.ranges().map(subnet).collect()
}

fn key(network: &NetworkConfig, number: u8) -> String {
    format_key(&subnets(network, number)).unwrap()
}

/// Both addresses of a node, as far as the network has their families.
fn public(network: &NetworkConfig, v4: Ipv4Addr) -> PublicAddrs {
    let v6 = [0xfd31, 0, 0, 0, 0, 0, 0, v4.octets()[3].into()].into();
    let has = |family| network.range(family).is_some();
    PublicAddrs { v4: has(Family::V4).then_some(v4), v6: has(Family::V6).then_some(v6) }
}

impl Site {
    /// The next node of the fabric, without a tunnel as yet.
    pub(crate) fn new(fabric: &Fabric, config: &str, offload: Offload) -> Self {
        Self::on(Arc::new(fabric.node().unwrap()), config, offload)
    }

    /// One more on a machine, as another process would be.
    pub(crate) fn on(machine: Arc<Machine>, config: &str, offload: Offload) -> Self {
        let network = NetworkConfig::parse(config).unwrap();
        let mut kernel = machine.namespace().run(|| Netlink::open_with(offload).unwrap());
        let host = kernel.observe(&KernelState::default(), &Scope::default()).unwrap().host;
        let eth0 = host.link("eth0").unwrap();
        let underlay = Underlay { index: eth0.index, name: eth0.name, mtu: eth0.mtu };
        let public = public(&network, machine.address());
        let own = subnets(&network, machine.address().octets()[3]);
        Self {
            kernel,
            active: ActiveBackends::new(&network.backend, &network).unwrap(),
            network,
            node: Node { underlay, public, local: public, source: public, direct: Arc::default() },
            own,
            peers: Vec::new(),
            machine,
        }
    }

    /// The kernel state that all leases ask for.
    pub(crate) fn desired(&self) -> KernelState {
        let mut all = Leases::default();
        let mine = (self.number(), self.machine.address());
        for (revision, (number, address)) in (1..).zip([mine].iter().chain(&self.peers)) {
            let value = encode_value(
                &public(&self.network, *address),
                &self.active.current().attachment(&Macs::default()),
            );
            all.insert_entry(&key(&self.network, *number), value.as_bytes(), revision);
        }
        let Self { network, active, node, own, .. } = self;
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
        let peers: Vec<_> = Peers::choose(context, &all).usable.values().copied().collect();
        assert_eq!(peers.len(), self.peers.len() * network.ranges().count(), "every peer's lease is good");
        active.plan(PlanInput { node, own, macs: &Macs::default(), peers: &peers, all: &peers })
    }

    /// Takes another configuration, and makes the kernel agree.
    pub(crate) fn configure(&mut self, config: &str) {
        self.network = NetworkConfig::parse(config).unwrap();
        self.active = ActiveBackends::new(&self.network.backend, &self.network).unwrap();
        self.converge();
    }

    /// Makes the kernel agree; failures are in the report.
    pub(crate) fn try_converge(&mut self) -> Report {
        let desired = self.desired();
        let scope = Scope {
            networks: self.network.networks().iter().collect(),
            subnets: self.own.iter().collect(),
            subnet_lens: vec![(Family::V4, 24), (Family::V6, 64)],
            underlay: Some(self.node.underlay.index),
            devices: self.active.devices().collect(),
            ..Scope::default()
        };
        let (namespace, kernel) = (self.machine.namespace(), &mut self.kernel);
        namespace.run(|| converge(kernel, &desired, &scope).unwrap())
    }

    /// Makes the kernel agree, and gives the words of what that took.
    ///
    /// Between fork and exec, a program that another test starts has all sockets of this process open, so that a
    /// port that was given up a moment ago is still held. The agent tries again, and so does this.
    pub(crate) fn converge(&mut self) -> Vec<String> {
        let (mut applied, start) = (Vec::new(), Instant::now());
        let report = loop {
            let report = self.try_converge();
            applied.extend(report.applied.iter().map(ToString::to_string));
            if !report.failed.iter().any(port_is_held) || start.elapsed() > LIMIT {
                break report;
            }
            thread::sleep(Duration::from_millis(10));
        };
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        assert!(report.settled, "{:?}", report.applied);
        applied
    }

    pub(crate) fn counters(&self) -> Arc<Counters> {
        self.kernel.counters()
    }

    pub(crate) fn number(&self) -> u8 {
        self.machine.address().octets()[3]
    }

    /// A pod with the address of each family that ends in 2.
    pub(crate) fn pod(&self) -> Pod {
        let second = |subnet: IpNet| {
            let address = addr_of(Family::of(subnet.addr()), bits_of(subnet.network()) + 2);
            IpNet::new(address, subnet.prefix_len()).unwrap()
        };
        let addresses: Vec<IpNet> = self.own.iter().map(second).collect();
        let pod = Pod::wired_with(&self.machine, &addresses).unwrap();
        // A bridge takes a moment to let a new port in. Packets that wait for the pod's MAC meanwhile are lost
        // when they are many.
        let reached =
            || pod.addresses().iter().all(|net| self.machine.namespace().reaches(net.addr()).unwrap());
        wait_for("the pod on its bridge", LIMIT, reached).unwrap();
        pod
    }

    pub(crate) fn ip(&self, lines: &str) {
        self.machine.namespace().ip(lines).unwrap();
    }

    pub(crate) fn show(&self, command: &str) -> String {
        show(self.machine.namespace(), command)
    }

    pub(crate) fn wait_for(&self, what: &str, mut condition: impl FnMut(&Counters) -> bool) {
        let counters = self.counters();
        if let Err(error) = wait_for(what, LIMIT, || condition(&counters)) {
            panic!("{error}; {counters}");
        }
    }
}

/// Output of a program in a namespace.
pub(crate) fn show(namespace: &Namespace, command: &str) -> String {
    namespace.show(command).unwrap()
}

/// Sites that all know each other, on one fabric, with a pod each.
pub(crate) struct Cluster {
    pub(crate) sites: Vec<Site>,
    pub(crate) pods: Vec<Pod>,
    _fabric: Fabric,
}

impl Cluster {
    pub(crate) fn new(count: usize, config: &str, offload: Offload) -> Self {
        let fabric = Fabric::new().unwrap();
        let mut sites: Vec<Site> = (0..count).map(|_| Site::new(&fabric, config, offload)).collect();
        let all: Vec<_> = sites.iter().map(|site| (site.number(), site.machine.address())).collect();
        for site in &mut sites {
            site.peers = all.iter().filter(|(number, _)| *number != site.number()).copied().collect();
            site.converge();
            assert_eq!(site.converge(), Vec::<String>::new(), "what is right is left alone");
        }
        let pods = sites.iter().map(Site::pod).collect();
        Self { sites, pods, _fabric: fabric }
    }

    /// Both pods of a cluster of two reach each other.
    pub(crate) fn assert_reaches(&self, when: &str) {
        let (a, b) = (&self.pods[0], &self.pods[1]);
        for (from, to) in [(a, b), (b, a)] {
            for net in to.addresses() {
                assert!(from.namespace().reaches(net.addr()).unwrap(), "{when}: {from:?} → {net}");
            }
        }
    }

    /// No kernel found a wrong checksum, nor did a datapath.
    pub(crate) fn assert_sound(&self) {
        let nodes = self.sites.iter().map(|site| site.machine.namespace());
        for namespace in nodes.chain(self.pods.iter().map(Pod::namespace)) {
            assert_eq!(checksum_errors(namespace), ChecksumErrors::default());
        }
        for site in &self.sites {
            let counters = site.counters();
            for counter in
                [&counters.received_unsound, &counters.refused_malformed, &counters.dropped_malformed]
            {
                assert_eq!(counter.get(), 0, "{counters}");
            }
        }
    }
}

/// The sum of a counter over sites.
pub(crate) fn total<'a>(
    sites: impl IntoIterator<Item = &'a Site>,
    counter: impl Fn(&Counters) -> &Counter,
) -> u64 {
    sites.into_iter().map(|site| counter(&site.counters()).get()).sum()
}

pub(crate) fn checksum_errors(namespace: &Namespace) -> ChecksumErrors {
    namespace.checksum_errors().unwrap()
}

fn port_is_held(error: &KernelError) -> bool {
    matches!(error, KernelError::Refused { object: "forwarding", source, .. } if source.kind() == io::ErrorKind::AddrInUse)
}
