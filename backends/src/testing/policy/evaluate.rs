//! Whether policies allow a connection, by going through all of them: slow, and as the API describes it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::Family;
use subnet::policy::{
    Isolation, Labels, NamespaceScope, NetworkPolicy, ObjectName, Peer, Peers, Pod, Port, PortMatch, Ports,
    Rule, Uid,
};

use crate::policy::{Cluster, Settings};

/// A cluster, seen from one of its nodes.
#[derive(Clone, Debug)]
pub struct World {
    /// What the node is.
    pub settings: Settings,
    /// The labels of each namespace.
    pub namespaces: BTreeMap<String, Labels>,
    /// All pods that have not ended, without those on their host's network.
    pub pods: Vec<Pod>,
    /// All policies.
    pub policies: Vec<NetworkPolicy>,
}

/// The first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who asks.
    pub source: IpAddr,
    /// Who is asked.
    pub destination: IpAddr,
    /// The number of the protocol.
    pub protocol: u8,
    /// Where the answer goes to.
    pub source_port: u16,
    /// What is asked for.
    pub destination_port: u16,
}

impl World {
    /// Makes `cluster` hold what the world holds, and nothing else.
    pub fn tell(&self, cluster: &mut Cluster) {
        let stale: Vec<String> = cluster
            .namespaces()
            .filter(|name| !self.namespaces.contains_key(*name))
            .map(str::to_owned)
            .collect();
        stale.iter().for_each(|name| cluster.remove_namespace(name));
        let stale: Vec<Uid> =
            cluster.uids().filter(|uid| !self.pods.iter().any(|pod| pod.uid == *uid)).collect();
        stale.into_iter().for_each(|uid| cluster.remove_pod(uid));
        let known = cluster.policies().map(|policy| policy.name.clone());
        let stale: Vec<ObjectName> =
            known.filter(|name| !self.policies.iter().any(|policy| policy.name == *name)).collect();
        stale.iter().for_each(|name| cluster.remove_policy(name));
        self.namespaces.iter().for_each(|(name, labels)| cluster.set_namespace(name, labels));
        self.pods.iter().for_each(|pod| cluster.set_pod(pod));
        self.policies.iter().for_each(|policy| cluster.set_policy(policy.clone()));
    }

    /// Whether this node lets the connection pass: it judges for its own pods only.
    pub fn allows(&self, packet: &Packet) -> bool {
        if packet.source == packet.destination {
            return true;
        }
        let local = |address| self.pod(address).filter(|pod| pod.local);
        let sends = local(packet.source).is_none_or(|pod| self.egress(pod, packet));
        let receives = local(packet.destination).is_none_or(|pod| self.ingress(pod, packet));
        sends && receives
    }

    /// The pod that has this address; of several that claim it, the youngest.
    pub fn pod(&self, address: IpAddr) -> Option<&Pod> {
        let claimants = self.pods.iter().filter(|pod| {
            let own = pod.addresses.iter().find(|own| Family::of(**own) == Family::of(address));
            own == Some(&address)
        });
        claimants.max_by_key(|pod| (pod.created, pod.uid))
    }

    fn selecting<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = &'a NetworkPolicy> {
        self.policies.iter().filter(|policy| {
            policy.name.namespace == pod.name.namespace && policy.pods.matches_labels(&pod.labels)
        })
    }

    fn egress(&self, pod: &Pod, packet: &Packet) -> bool {
        let mut isolated = false;
        for policy in self.selecting(pod) {
            let Isolation::Isolated(rules) = &policy.egress else { continue };
            isolated = true;
            let named = self.pod(packet.destination);
            for rule in rules.iter() {
                let peer = self.peer(rule, policy, packet.destination);
                if peer && ports(rule, named, packet) {
                    return true;
                }
            }
        }
        !isolated
    }

    fn ingress(&self, pod: &Pod, packet: &Packet) -> bool {
        let mut isolated = false;
        for policy in self.selecting(pod) {
            let Isolation::Isolated(rules) = &policy.ingress else { continue };
            isolated = true;
            for rule in rules.iter() {
                let peer = self.peer(rule, policy, packet.source);
                if peer && ports(rule, Some(pod), packet) {
                    return true;
                }
            }
        }
        !isolated
    }

    fn peer(&self, rule: &Rule, policy: &NetworkPolicy, far: IpAddr) -> bool {
        match &rule.peers {
            Peers::Any => true,
            Peers::Of(peers) => peers.iter().any(|peer| self.is_peer(peer, policy, far)),
        }
    }

    fn is_peer(&self, peer: &Peer, policy: &NetworkPolicy, far: IpAddr) -> bool {
        match peer {
            Peer::Block { cidr, except } => {
                let inside = |net: &IpNet| net.contains(&far);
                inside(cidr) && !except.iter().any(inside)
            }
            // All pods of all namespaces are the addresses of the network that are no node's, known or not.
            Peer::Pods { namespaces: NamespaceScope::Matching(all), pods }
                if all.is_everything() && pods.is_everything() =>
            {
                self.settings.networks.iter().any(|net| net.contains(&far))
                    && !self.settings.nodes.contains(&far)
            }
            Peer::Pods { namespaces, pods } => self.pod(far).is_some_and(|pod| {
                let in_scope = match namespaces {
                    NamespaceScope::Own => pod.name.namespace == policy.name.namespace,
                    NamespaceScope::Matching(labels) => {
                        let namespace = self.namespaces.get(&*pod.name.namespace);
                        labels.is_everything() || namespace.is_some_and(|known| labels.matches_labels(known))
                    }
                };
                in_scope && pods.matches_labels(&pod.labels)
            }),
        }
    }
}

fn ports(rule: &Rule, destination: Option<&Pod>, packet: &Packet) -> bool {
    match &rule.ports {
        Ports::Any => true,
        Ports::Of(ports) => ports.iter().any(|port| is_port(port, destination, packet)),
    }
}

fn is_port(port: &Port, destination: Option<&Pod>, packet: &Packet) -> bool {
    port.protocol as u8 == packet.protocol
        && match &port.port {
            PortMatch::All => true,
            PortMatch::Range(range) => range.contains(&packet.destination_port),
            PortMatch::Named(name) => destination.is_some_and(|pod| {
                let named = pod.ports.iter().filter(|own| own.protocol == port.protocol && own.name == *name);
                named.into_iter().any(|own| own.port == packet.destination_port)
            }),
        }
}
