//! Random clusters, changes of them, and packets, all of them from a number.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use subnet::policy::{
    Isolation, Labels, NamedPort, NamespaceScope, NetworkPolicy, ObjectName, Operator, Peer, Peers, Pod,
    Port, PortMatch, Ports, Protocol, Requirement, Rule, Selector, Uid,
};

use super::{Packet, World};
use crate::policy::{Cluster, Settings};
use crate::testing::Numbers;

const KEYS: [&str; 4] = ["app", "tier", "role", "env"];
const VALUES: [&str; 3] = ["a", "b", "c"];
const NAMESPACES: [&str; 4] = ["n0", "n1", "n2", "n3"];
const PORT_NAMES: [&str; 3] = ["web", "dns", "pg"];
const PORTS: [u16; 8] = [1, 53, 79, 80, 81, 443, 8080, 65535];

/// A source of random clusters and packets.
#[derive(Clone, Debug)]
pub struct Random(Numbers);

impl Random {
    /// The same decisions for the same number.
    pub fn new(seed: u64) -> Self {
        Self(Numbers(seed))
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.below(end)
    }

    /// A cluster.
    pub fn world(&mut self) -> World {
        let v6 = self.0.one_in(2);
        let mut world = World {
            settings: settings(v6, self.0.one_in(8)),
            namespaces: BTreeMap::new(),
            pods: Vec::new(),
            policies: Vec::new(),
        };
        for name in NAMESPACES {
            // Pods can be known before their namespace is.
            if !self.0.one_in(10) {
                let labels = self.labels();
                world.namespaces.insert(name.to_owned(), labels);
            }
        }
        for _ in 0..self.0.below(14) {
            let pod = self.pod(&world);
            world.pods.push(pod);
        }
        for _ in 0..self.0.below(9) {
            let policy = self.policy();
            put_policy(&mut world, policy);
        }
        world
    }

    /// Changes one thing, in the cluster's value too.
    pub fn change(&mut self, world: &mut World, cluster: &mut Cluster) {
        match self.0.below(8) {
            0 | 1 => {
                let pod = self.pod(world);
                cluster.set_pod(&pod);
                world.pods.push(pod);
            }
            2 | 3 if !world.pods.is_empty() => {
                let gone = world.pods.swap_remove(self.0.below(world.pods.len()));
                cluster.remove_pod(gone.uid);
            }
            4 if !world.pods.is_empty() => {
                let at = self.0.below(world.pods.len());
                let labels = self.labels();
                world.pods[at].labels = labels;
                cluster.set_pod(&world.pods[at]);
            }
            5 => {
                let name = self.0.of(&NAMESPACES);
                if self.0.one_in(4) {
                    world.namespaces.remove(name);
                    cluster.remove_namespace(name);
                } else {
                    let labels = self.labels();
                    cluster.set_namespace(name, &labels);
                    world.namespaces.insert(name.to_owned(), labels);
                }
            }
            6 if !world.policies.is_empty() => {
                let gone = world.policies.swap_remove(self.0.below(world.policies.len()));
                cluster.remove_policy(&gone.name);
            }
            _ => {
                let policy = self.policy();
                cluster.set_policy(policy.clone());
                put_policy(world, policy);
            }
        }
    }

    /// A first packet between addresses that mean something to this cluster, most of the time.
    pub fn packet(&mut self, world: &World) -> Packet {
        let v6 = world.settings.networks.len() > 1 && self.0.one_in(2);
        let (source, destination) = (self.address(world, v6), self.address(world, v6));
        Packet {
            source,
            destination,
            protocol: self.0.of(&[6, 6, 6, 17, 17, 132, if v6 { 58 } else { 1 }, 50]),
            source_port: 40_000,
            destination_port: self.0.of(&PORTS),
        }
    }

    fn address(&mut self, world: &World, v6: bool) -> IpAddr {
        let known: Vec<IpAddr> = world
            .pods
            .iter()
            .flat_map(|pod| &pod.addresses)
            .copied()
            .filter(|one| one.is_ipv6() == v6)
            .collect();
        if !known.is_empty() && !self.0.one_in(5) {
            return self.0.of(&known);
        }
        match self.0.below(3) {
            0 => in_family(self.0.of(&[Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(172, 16, 0, 1)]), v6),
            1 => in_family(Ipv4Addr::new(10, 244, self.0.below(4) as u8, self.0.below(2) as u8), v6),
            _ => self.pod_address(v6),
        }
    }

    fn pod_address(&mut self, v6: bool) -> IpAddr {
        in_family(Ipv4Addr::new(10, 244, self.0.below(3) as u8, 2 + self.0.below(8) as u8), v6)
    }

    fn labels(&mut self) -> Labels {
        let mut labels = Labels::new();
        for key in KEYS {
            if self.0.one_in(2) {
                labels.insert(key.to_owned(), self.0.of(&VALUES).to_owned());
            }
        }
        labels
    }

    fn pod(&mut self, world: &World) -> Pod {
        let uid = Uid(u128::from(self.0.next()));
        let v4 = self.pod_address(false);
        let mut addresses = vec![v4];
        if world.settings.networks.len() > 1 {
            addresses.push(match v4 {
                IpAddr::V4(v4) => in_family(v4, true),
                IpAddr::V6(_) => v4,
            });
            if self.0.one_in(6) {
                addresses.remove(self.0.below(2));
            }
        }
        if self.0.one_in(12) {
            addresses.clear();
        }
        let ports = (0..self.0.below(4)).map(|_| NamedPort {
            name: self.0.of(&PORT_NAMES).into(),
            protocol: self.0.of(&Protocol::ALL),
            port: self.0.of(&PORTS),
        });
        let ports = ports.collect();
        let local = world.settings.subnets.iter().any(|net| net.contains(&v4));
        Pod {
            uid,
            name: ObjectName::new(self.0.of(&NAMESPACES), format!("pod-{}", uid.0)),
            labels: self.labels(),
            addresses,
            ports,
            created: self.0.below(5) as u64,
            local,
        }
    }

    fn policy(&mut self) -> NetworkPolicy {
        let kind = self.0.below(4);
        let mut direction = |yes: bool| match yes {
            true => Isolation::Isolated((0..self.0.below(4)).map(|_| self.rule()).collect()),
            false => Isolation::Unspecified,
        };
        let (ingress, egress) = (direction(kind != 0), direction(kind != 1));
        NetworkPolicy {
            name: ObjectName::new(self.0.of(&NAMESPACES), format!("p{}", self.0.below(4))),
            pods: if self.0.one_in(2) { Selector::everything() } else { self.selector() },
            ingress,
            egress,
        }
    }

    fn rule(&mut self) -> Rule {
        let peers = match self.0.one_in(5) {
            true => Peers::Any,
            false => Peers::Of((0..self.0.below(4)).map(|_| self.peer()).collect()),
        };
        let ports = match self.0.one_in(3) {
            true => Ports::Any,
            false => Ports::Of((0..self.0.below(4)).map(|_| self.port()).collect()),
        };
        Rule { peers, ports }
    }

    fn peer(&mut self) -> Peer {
        if self.0.one_in(3) {
            let v6 = self.0.one_in(2);
            let cidr = self.net(v6);
            return Peer::Block { cidr, except: (0..self.0.below(3)).map(|_| self.net(v6)).collect() };
        }
        let namespaces = match self.0.below(3) {
            0 => NamespaceScope::Own,
            1 => NamespaceScope::Matching(Selector::everything()),
            _ => NamespaceScope::Matching(self.selector()),
        };
        let pods = if self.0.one_in(3) { Selector::everything() } else { self.selector() };
        Peer::Pods { namespaces, pods }
    }

    fn net(&mut self, v6: bool) -> IpNet {
        let address = match self.pod_address(v6) {
            IpAddr::V4(v4) if self.0.one_in(4) => IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() ^ 0x8000_0000)),
            other => other,
        };
        let full = if v6 { 128 } else { 32 };
        let len = full - [0, 1, 3, 8, 16, 20, 31, 32][self.0.below(8)];
        let len = if v6 && self.0.one_in(6) { 0 } else { len };
        IpNet::new_assert(address, len).trunc()
    }

    fn port(&mut self) -> Port {
        let (first, last) = (self.0.of(&PORTS), self.0.of(&PORTS));
        let port = match self.0.below(5) {
            0 => PortMatch::All,
            1 => PortMatch::Named(self.0.of(&PORT_NAMES).into()),
            2 => PortMatch::Range(first.min(last)..=first.max(last)),
            _ => PortMatch::Range(first..=first),
        };
        Port { protocol: self.0.of(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp]), port }
    }

    fn selector(&mut self) -> Selector {
        let requirements = (0..self.0.below(3)).map(|_| Requirement {
            key: self.0.of(&KEYS).into(),
            operator: match self.0.below(5) {
                0 => Operator::Exists,
                1 => Operator::DoesNotExist,
                2 => Operator::NotIn([self.0.of(&VALUES).into()].into()),
                _ => Operator::In((0..=self.0.below(2)).map(|_| self.0.of(&VALUES).into()).collect()),
            },
        });
        let requirements: Vec<_> = requirements.collect();
        Selector::new(requirements)
    }
}

fn put_policy(world: &mut World, policy: NetworkPolicy) {
    world.policies.retain(|known| known.name != policy.name);
    world.policies.push(policy);
}

fn in_family(address: Ipv4Addr, v6: bool) -> IpAddr {
    match v6 {
        false => address.into(),
        true => Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(address.to_bits())).into(),
    }
}

fn settings(v6: bool, log: bool) -> Settings {
    let net = |address: Ipv4Addr, len: u8| {
        let both =
            [IpNet::new_assert(address.into(), len), IpNet::new_assert(in_family(address, true), len + 96)];
        both.into_iter().take(1 + usize::from(v6)).collect::<Vec<_>>()
    };
    let nodes = (0..4).flat_map(|node| (0..2).map(move |last| Ipv4Addr::new(10, 244, node, last)));
    let nodes = nodes.flat_map(|node| [false, true].map(|v6| in_family(node, v6)));
    Settings {
        networks: net(Ipv4Addr::new(10, 244, 0, 0), 16),
        subnets: net(Ipv4Addr::new(10, 244, 1, 0), 24),
        nodes: nodes.filter(|node| v6 || node.is_ipv4()).collect(),
        strict: false,
        ipvs: v6,
        log_group: log.then_some(5),
    }
}
