//! A table of cases: policies, pods on two nodes, and which connections they forbid.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, anyhow};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;
use subnet::Family;
use subnet::policy::objects;
use subnet::policy::{
    Isolation, Labels, NamedPort, NetworkPolicy, ObjectName, Peer, Peers, Pod, Protocol, Rule, Uid,
};

use super::{Packet, World};
use crate::policy::Settings;

/// All cases, and the pods that they are about.
pub struct Cases {
    pods: Vec<Subject>,
    namespaces: BTreeMap<String, Labels>,
    /// Each by itself.
    pub cases: Vec<Case>,
}

/// Policies, perhaps several after one another.
pub struct Case {
    /// What it is about.
    pub name: String,
    /// One after the other.
    pub steps: Vec<Step>,
}

/// The cluster at one moment, and what is forbidden then.
pub struct Step {
    policies: Vec<NetworkPolicy>,
    pod_labels: BTreeMap<String, Labels>,
    namespace_labels: BTreeMap<String, Labels>,
    denied: Vec<String>,
}

struct Subject {
    key: String,
    namespace: String,
    name: String,
    labels: Labels,
    address: Ipv4Addr,
    node: String,
    host: bool,
    ports: Vec<NamedPort>,
}

/// A connection of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The pod that asks.
    pub from: String,
    /// The pod or node that is asked.
    pub to: String,
    /// With which protocol.
    pub protocol: Protocol,
    /// On which port.
    pub port: u16,
    /// Whether it is allowed.
    pub allowed: bool,
}

impl Cases {
    /// Reads the table.
    ///
    /// # Errors
    /// A sentence when it has another form.
    pub fn read(text: &str) -> anyhow::Result<Self> {
        let root: Value = serde_json::from_str(text)?;
        let pods = list(&root["pods"])?.iter().map(subject).collect::<anyhow::Result<Vec<_>>>()?;
        let namespaces = root["namespaces"].as_object().context("no namespaces")?;
        let namespaces = namespaces
            .iter()
            .map(|(name, value)| Ok((name.clone(), labels(value)?)))
            .collect::<anyhow::Result<_>>()?;
        let cases = list(&root["cases"])?.iter().map(case).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { pods, namespaces, cases })
    }

    /// The pods of a node, by their keys in the table, with their IPv4 addresses.
    pub fn pods_of<'a>(&'a self, node: &'a str) -> impl Iterator<Item = (&'a str, Ipv4Addr)> {
        let pods = self.pods.iter().filter(move |pod| pod.node == node && !pod.host);
        pods.map(|pod| (pod.key.as_str(), pod.address))
    }

    /// The address of a pod or node.
    ///
    /// # Panics
    /// When the table has none of that key.
    pub fn address(&self, key: &str, family: Family) -> IpAddr {
        in_family(self.pods.iter().find(|pod| pod.key == key).expect("a key of the table").address, family)
    }

    /// Which of these nodes a pod is on, or which it is.
    ///
    /// # Panics
    /// When the table has none of that key.
    pub fn node_of(&self, key: &str) -> &str {
        &self.pods.iter().find(|pod| pod.key == key).expect("a key of the table").node
    }

    /// The cluster of a step as `node` sees it, with these families.
    pub fn world(&self, step: &Step, node: &str, families: &[Family]) -> World {
        let number = |pod: &Subject| Uid(u128::from(pod.address.to_bits()));
        let pods = self.pods.iter().filter(|pod| !pod.host).map(|pod| {
            let mut labels = pod.labels.clone();
            labels.extend(step.pod_labels.get(&pod.key).cloned().unwrap_or_default());
            Pod {
                uid: number(pod),
                name: ObjectName::new(pod.namespace.as_str(), pod.name.as_str()),
                labels,
                addresses: families.iter().map(|family| in_family(pod.address, *family)).collect(),
                ports: pod.ports.clone(),
                created: 0,
                local: pod.node == node,
            }
        });
        let mut namespaces = self.namespaces.clone();
        for (key, labels) in &step.namespace_labels {
            namespaces.entry(format!("pt-{key}")).or_default().extend(labels.clone());
        }
        World {
            settings: settings(node, families),
            namespaces,
            pods: pods.collect(),
            policies: step.policies.iter().map(|policy| in_families(policy, families)).collect(),
        }
    }

    /// Every connection of the table with what is right for it.
    pub fn cells(&self, step: &Step) -> Vec<Cell> {
        let mut cells = Vec::new();
        for from in self.pods.iter().filter(|pod| !pod.host) {
            for to in &self.pods {
                let ports: &[(Protocol, u16)] = if to.host {
                    &[(Protocol::Tcp, 18090)]
                } else {
                    &[(Protocol::Tcp, 80), (Protocol::Tcp, 81), (Protocol::Udp, 80), (Protocol::Udp, 81)]
                };
                cells.extend(ports.iter().map(|(protocol, port)| {
                    let name = if *protocol == Protocol::Tcp { "TCP" } else { "UDP" };
                    let line = format!("{} {} {name} {port}", from.key, to.key);
                    let allowed = !step.denied.contains(&line);
                    Cell {
                        from: from.key.clone(),
                        to: to.key.clone(),
                        protocol: *protocol,
                        port: *port,
                        allowed,
                    }
                }));
            }
        }
        cells
    }

    /// The first packet of a connection of the table.
    pub fn packet(&self, cell: &Cell, family: Family) -> Packet {
        Packet {
            source: self.address(&cell.from, family),
            destination: self.address(&cell.to, family),
            protocol: cell.protocol as u8,
            source_port: 40_000,
            destination_port: cell.port,
        }
    }
}

/// What the nodes of the table are: `node1` has 10.244.0.0/24, `node2` 10.244.1.0/24.
pub fn settings(node: &str, families: &[Family]) -> Settings {
    let third = u8::from(node == "node2");
    let nets = |bits: u8, third: u8| {
        families.iter().map(move |family| {
            net_in_family(Ipv4Net::new_assert(Ipv4Addr::new(10, 244, third, 0), bits), *family)
        })
    };
    let nodes = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(third, fourth)| Ipv4Addr::new(10, 244, third, fourth));
    Settings {
        networks: nets(16, 0).collect(),
        subnets: nets(24, third).collect(),
        nodes: families.iter().flat_map(|family| nodes.map(|node| in_family(node, *family))).collect(),
        strict: false,
        // One node of either kind, so that what holds for one is seen to hold for the other.
        ipvs: third == 1,
        log_group: None,
    }
}

/// The address itself, or one of IPv6 that ends with it, so that blocks mean the same in both families.
pub fn in_family(address: Ipv4Addr, family: Family) -> IpAddr {
    match family {
        Family::V4 => address.into(),
        Family::V6 => Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(address.to_bits())).into(),
    }
}

/// The same for a block.
pub fn net_in_family(net: Ipv4Net, family: Family) -> IpNet {
    match in_family(net.addr(), family) {
        IpAddr::V4(_) => net.into(),
        IpAddr::V6(v6) => Ipv6Net::new_assert(v6, net.prefix_len() + 96).into(),
    }
}

/// Each block in each of the families.
fn in_families(policy: &NetworkPolicy, families: &[Family]) -> NetworkPolicy {
    let net = |net: &IpNet, family| match net {
        IpNet::V4(v4) => net_in_family(*v4, family),
        IpNet::V6(_) => *net,
    };
    let peer = |peer: &Peer| match peer {
        Peer::Pods { .. } => vec![peer.clone()],
        Peer::Block { cidr, except } => families
            .iter()
            .map(|family| Peer::Block {
                cidr: net(cidr, *family),
                except: except.iter().map(|hole| net(hole, *family)).collect(),
            })
            .collect(),
    };
    let rule = |rule: &Rule| Rule {
        peers: match &rule.peers {
            Peers::Any => Peers::Any,
            Peers::Of(peers) => Peers::Of(peers.iter().flat_map(peer).collect()),
        },
        ports: rule.ports.clone(),
    };
    let direction = |direction: &Isolation| match direction {
        Isolation::Unspecified => Isolation::Unspecified,
        Isolation::Isolated(rules) => Isolation::Isolated(rules.iter().map(rule).collect()),
    };
    NetworkPolicy { ingress: direction(&policy.ingress), egress: direction(&policy.egress), ..policy.clone() }
}

fn case(value: &Value) -> anyhow::Result<Case> {
    let steps = list(&value["steps"])?.iter().map(step).collect::<anyhow::Result<_>>()?;
    Ok(Case { name: text(&value["name"])?.to_owned(), steps })
}

fn step(value: &Value) -> anyhow::Result<Step> {
    let by_key = |value: &Value| -> anyhow::Result<BTreeMap<String, Labels>> {
        let map = value.as_object().ok_or_else(|| anyhow!("no labels: {value}"))?;
        map.iter().map(|(key, value)| Ok((key.clone(), labels(value)?))).collect()
    };
    let policies = list(&value["policies"])?.iter().map(|policy| {
        let read = objects::network_policy(policy.to_string().as_bytes())?;
        anyhow::ensure!(read.ignored.is_empty(), "{read}");
        Ok(read.policy)
    });
    Ok(Step {
        policies: policies.collect::<anyhow::Result<_>>()?,
        pod_labels: by_key(&value["podLabels"])?,
        namespace_labels: by_key(&value["namespaceLabels"])?,
        denied: list(&value["denied"])?
            .iter()
            .map(|line| text(line).map(str::to_owned))
            .collect::<anyhow::Result<_>>()?,
    })
}

fn subject(value: &Value) -> anyhow::Result<Subject> {
    let ports = list(&value["ports"])?.iter().map(|port| {
        Ok(NamedPort {
            name: text(&port["name"])?.into(),
            protocol: Protocol::from_name(text(&port["protocol"])?).context("a protocol")?,
            port: port["port"].as_u64().and_then(|port| u16::try_from(port).ok()).context("a port")?,
        })
    });
    Ok(Subject {
        key: text(&value["key"])?.to_owned(),
        namespace: text(&value["ns"])?.to_owned(),
        name: text(&value["name"])?.to_owned(),
        labels: labels(&value["labels"])?,
        address: text(&value["ips"][0])?.parse()?,
        node: text(&value["node"])?.to_owned(),
        host: value["host"] == true,
        ports: ports.collect::<anyhow::Result<_>>()?,
    })
}

fn labels(value: &Value) -> anyhow::Result<Labels> {
    let map = value.as_object().ok_or_else(|| anyhow!("no labels: {value}"))?;
    map.iter().map(|(key, value)| Ok((key.clone(), text(value)?.to_owned()))).collect()
}

fn list(value: &Value) -> anyhow::Result<&Vec<Value>> {
    value.as_array().ok_or_else(|| anyhow!("no list: {value}"))
}

fn text(value: &Value) -> anyhow::Result<&str> {
    value.as_str().ok_or_else(|| anyhow!("no text: {value}"))
}
