//! Network policies, pods and namespaces as the API server writes them; pure.
//!
//! The API server refuses what makes no sense, but not each version refuses the same. What can't be understood
//! allows nothing, and is told.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

use super::explain::{End, Party};
use super::{
    Isolation, Labels, NamedPort, NamespaceScope, NetworkPolicy, ObjectName, Operator, Peer, Peers, Pod,
    Port, PortMatch, Ports, Protocol, Requirement, Rule, Selector, Uid,
};

/// A policy, and what of it means nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPolicy {
    /// The policy.
    pub policy: NetworkPolicy,
    /// A sentence for each member that was ignored.
    pub ignored: Vec<String>,
}

/// A pod object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadPod {
    /// A pod with addresses of its own, now or soon.
    Own(Pod),
    /// One that has ended or is on its host's network: no policy is about it, and none can name it.
    Without(Uid),
}

/// An object can't be understood at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an object that can't be read: {0}")]
pub struct Unreadable(String);

/// Reads a `networking.k8s.io/v1` NetworkPolicy.
///
/// # Errors
/// [`Unreadable`] when it is none.
pub fn network_policy(json: &[u8]) -> Result<ReadPolicy, Unreadable> {
    let object: ApiObject<PolicySpec> = read(json)?;
    let mut ignored = Vec::new();
    let spec = object.spec.unwrap_or_default();
    let listed = |kind: &str| spec.policy_types.iter().flatten().any(|one| one == kind);
    let untyped = spec.policy_types.as_ref().is_none_or(Vec::is_empty);
    let (ingress, egress) = (spec.ingress.unwrap_or_default(), spec.egress.unwrap_or_default());
    let mut direction = |isolated: bool, name: &str, rules: Vec<RuleObject>| {
        if !isolated {
            return Isolation::Unspecified;
        }
        let rules = rules.into_iter().enumerate();
        Isolation::Isolated(rules.map(|(i, rule)| rule.read(&format!("{name}[{i}]"), &mut ignored)).collect())
    };
    let egress_isolated = listed("Egress") || untyped && !egress.is_empty();
    let ingress = direction(untyped || listed("Ingress"), "ingress", ingress);
    let egress = direction(egress_isolated, "egress", egress);
    let pods = spec.pod_selector.unwrap_or_default().read().map_err(|why| {
        Unreadable(format!("{}/{}: spec.podSelector {why}", object.metadata.namespace, object.metadata.name))
    })?;
    let name = ObjectName::new(object.metadata.namespace, object.metadata.name);
    Ok(ReadPolicy { policy: NetworkPolicy { name, pods, ingress, egress }, ignored })
}

/// Reads a Pod; `node` is this node's name.
///
/// # Errors
/// [`Unreadable`] when it is none.
pub fn pod(json: &[u8], node: &str) -> Result<ReadPod, Unreadable> {
    let object: PodObject = read(json)?;
    let uid = uid(&object.metadata.uid);
    let (spec, status) = (object.spec.unwrap_or_default(), object.status.unwrap_or_default());
    if spec.host_network.unwrap_or(false) || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return Ok(ReadPod::Without(uid));
    }
    let listed = status.pod_ips.into_iter().flatten().filter_map(|entry| entry.ip);
    let mut addresses = Vec::new();
    for address in listed.chain(status.pod_ip).filter_map(|text| text.parse().ok()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    // An init container that is restarted runs beside the others.
    let sidecars = spec
        .init_containers
        .into_iter()
        .flatten()
        .filter(|one| one.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.into_iter().flatten().chain(sidecars);
    let ports = containers.flat_map(|container| container.ports.unwrap_or_default());
    Ok(ReadPod::Own(Pod {
        uid,
        name: ObjectName::new(object.metadata.namespace, object.metadata.name),
        labels: object.metadata.labels.unwrap_or_default(),
        addresses,
        ports: ports.filter_map(ContainerPort::read).collect(),
        created: object.metadata.creation_timestamp.as_deref().and_then(seconds).unwrap_or(0),
        local: spec.node_name.as_deref() == Some(node),
    }))
}

/// Reads a Pod as one end of a connection; `node` is this node's name.
///
/// # Errors
/// [`Unreadable`] when it is none.
pub fn end(json: &[u8], node: &str) -> Result<End, Unreadable> {
    let object: PodObject = read(json)?;
    let name = ObjectName::new(object.metadata.namespace, object.metadata.name);
    let (spec, status) = (object.spec.unwrap_or_default(), object.status.unwrap_or_default());
    let (party, address) = match pod(json, node)? {
        ReadPod::Own(pod) => {
            let address = pod.addresses.first().copied();
            (Party::Pod(Box::new(pod)), address)
        }
        ReadPod::Without(_) => {
            let address = status.pod_ip.and_then(|text| text.parse().ok());
            let on_host = spec.host_network.unwrap_or(false);
            (if on_host { Party::HostNetwork(name) } else { Party::Finished(name) }, address)
        }
    };
    Ok(End { party, address, node: spec.node_name })
}

/// Reads a Service: its name and the addresses by which it is reached inside the cluster.
///
/// # Errors
/// [`Unreadable`] when it is none.
pub fn service(json: &[u8]) -> Result<(ObjectName, Vec<IpAddr>), Unreadable> {
    let object: ApiObject<ServiceSpec> = read(json)?;
    let spec = object.spec.unwrap_or_default();
    let texts = spec.cluster_ips.into_iter().flatten().chain(spec.cluster_ip);
    let addresses = texts.filter_map(|text| text.parse().ok()).collect();
    Ok((ObjectName::new(object.metadata.namespace, object.metadata.name), addresses))
}

/// Reads a Namespace: its name and labels.
///
/// # Errors
/// [`Unreadable`] when it is none.
pub fn namespace(json: &[u8]) -> Result<(String, Labels), Unreadable> {
    let object: ApiObject<serde::de::IgnoredAny> = read(json)?;
    Ok((object.metadata.name, object.metadata.labels.unwrap_or_default()))
}

/// Reads the namespace and the name of an object of any kind.
///
/// # Errors
/// [`Unreadable`] when it has none.
pub fn name(json: &[u8]) -> Result<ObjectName, Unreadable> {
    let object: ApiObject<serde::de::IgnoredAny> = read(json)?;
    Ok(ObjectName::new(object.metadata.namespace, object.metadata.name))
}

/// Reads the uid by which kubelet and the container runtime know a static pod, from the Pod that stands for it in the
/// API; `None` for any other pod.
pub fn static_uid(json: &[u8]) -> Option<Uid> {
    #[derive(Deserialize)]
    struct Mirror {
        metadata: Annotated,
    }
    #[derive(Deserialize)]
    struct Annotated {
        annotations: Option<Labels>,
    }
    let annotations = read::<Mirror>(json).ok()?.metadata.annotations?;
    annotations.contains_key("kubernetes.io/config.mirror").then_some(())?;
    annotations.get("kubernetes.io/config.hash").map(|hash| uid(hash))
}

fn read<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Unreadable> {
    serde_json::from_slice(json).map_err(|error| Unreadable(error.to_string()))
}

#[derive(Deserialize)]
struct ApiObject<S> {
    metadata: ObjectMetadata,
    spec: Option<S>,
}

#[derive(Default, Deserialize)]
struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct PodObject {
    metadata: ObjectMetadata,
    spec: Option<PodSpec>,
    status: Option<PodStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
    labels: Option<Labels>,
    creation_timestamp: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PolicySpec {
    pod_selector: Option<SelectorObject>,
    policy_types: Option<Vec<String>>,
    ingress: Option<Vec<RuleObject>>,
    egress: Option<Vec<RuleObject>>,
}

#[derive(Deserialize)]
struct RuleObject {
    from: Option<Vec<PeerObject>>,
    to: Option<Vec<PeerObject>>,
    ports: Option<Vec<PortObject>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PeerObject {
    pod_selector: Option<SelectorObject>,
    namespace_selector: Option<SelectorObject>,
    ip_block: Option<BlockObject>,
}

#[derive(Deserialize)]
struct BlockObject {
    #[serde(default)]
    cidr: String,
    except: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortObject {
    protocol: Option<String>,
    port: Option<NumberOrName>,
    end_port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrName {
    Number(i64),
    Name(String),
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SelectorObject {
    match_labels: Option<BTreeMap<String, String>>,
    match_expressions: Option<Vec<ExpressionObject>>,
}

#[derive(Deserialize)]
struct ExpressionObject {
    #[serde(default)]
    key: String,
    #[serde(default)]
    operator: String,
    values: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    restart_policy: Option<String>,
    ports: Option<Vec<ContainerPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    protocol: Option<String>,
    #[serde(default)]
    container_port: i64,
}

#[derive(Default, Deserialize)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: Option<String>,
}

impl ContainerPort {
    fn read(self) -> Option<NamedPort> {
        let name = self.name.filter(|name| !name.is_empty())?;
        let protocol = protocol(self.protocol.as_deref())?;
        Some(NamedPort { name: name.into(), protocol, port: u16::try_from(self.container_port).ok()? })
    }
}

impl RuleObject {
    fn read(self, place: &str, ignored: &mut Vec<String>) -> Rule {
        let mut note = |what: &str, i: usize, why: String| ignored.push(format!("{place}.{what}[{i}] {why}"));
        let what = if self.from.is_some() { "from" } else { "to" };
        let peers = match self.from.or(self.to).filter(|list| !list.is_empty()) {
            None => Peers::Any,
            Some(list) => {
                let read = list
                    .into_iter()
                    .enumerate()
                    .filter_map(|(i, peer)| peer.read().map_err(|why| note(what, i, why)).ok());
                Peers::Of(read.collect())
            }
        };
        let ports = match self.ports.filter(|list| !list.is_empty()) {
            None => Ports::Any,
            Some(list) => {
                let read = list
                    .into_iter()
                    .enumerate()
                    .filter_map(|(i, port)| port.read().map_err(|why| note("ports", i, why)).ok());
                Ports::Of(read.collect())
            }
        };
        Rule { peers, ports }
    }
}

impl PeerObject {
    fn read(self) -> Result<Peer, String> {
        match (self.ip_block, self.namespace_selector, self.pod_selector) {
            (Some(block), None, None) => block.read(),
            (None, None, None) => Err("has no field that is known, so it matches nothing".to_owned()),
            (Some(_), ..) => Err("has an ipBlock and a selector, so it matches nothing".to_owned()),
            (None, namespaces, pods) => {
                let namespaces = match namespaces {
                    None => NamespaceScope::Own,
                    Some(selector) => NamespaceScope::Matching(
                        selector.read().map_err(|why| format!("namespaceSelector {why}"))?,
                    ),
                };
                let pods = pods.unwrap_or_default().read().map_err(|why| format!("podSelector {why}"))?;
                Ok(Peer::Pods { namespaces, pods })
            }
        }
    }
}

impl BlockObject {
    fn read(self) -> Result<Peer, String> {
        let net = |text: &str| -> Result<IpNet, String> {
            let net = text
                .parse::<IpNet>()
                .map_err(|_| format!("names {text:?}, which is no block of addresses"))?;
            Ok(net.trunc())
        };
        let except = self.except.unwrap_or_default();
        let except = except.iter().map(|text| net(text)).collect::<Result<Vec<_>, _>>()?;
        Ok(Peer::Block { cidr: net(&self.cidr)?, except: except.into() })
    }
}

impl PortObject {
    fn read(self) -> Result<Port, String> {
        let name = self.protocol.as_deref();
        let protocol = protocol(name)
            .ok_or_else(|| format!("names the protocol {:?}, which is not known", name.unwrap_or("")))?;
        let number = |number: i64| u16::try_from(number).ok().filter(|number| *number > 0);
        let port = match (self.port, self.end_port) {
            (None, None) => PortMatch::All,
            (Some(NumberOrName::Name(name)), None) => PortMatch::Named(name.into()),
            (Some(NumberOrName::Number(first)), last) => {
                let last = last.unwrap_or(first);
                match number(first).zip(number(last)).filter(|(first, last)| first <= last) {
                    Some((first, last)) => PortMatch::Range(first..=last),
                    None => {
                        return Err(format!(
                            "asks for the ports {first} to {last}, which is no range of ports"
                        ));
                    }
                }
            }
            (_, Some(_)) => return Err("has an endPort without a number as port".to_owned()),
        };
        Ok(Port { protocol, port })
    }
}

impl SelectorObject {
    fn read(self) -> Result<Selector, String> {
        let equal = self.match_labels.unwrap_or_default().into_iter();
        let equal = equal.map(|(key, value)| Ok(Requirement::equals(key, value)));
        let others = self.match_expressions.unwrap_or_default().into_iter().map(ExpressionObject::read);
        Ok(Selector::new(equal.chain(others).collect::<Result<Vec<_>, String>>()?))
    }
}

impl ExpressionObject {
    fn read(self) -> Result<Requirement, String> {
        let mut values: Vec<Box<str>> = self.values.into_iter().flatten().map(Into::into).collect();
        values.sort_unstable();
        values.dedup();
        let operator = match self.operator.as_str() {
            "In" => Operator::In(values.into()),
            "NotIn" => Operator::NotIn(values.into()),
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => return Err(format!("has the operator {other:?}, which is not known")),
        };
        Ok(Requirement { key: self.key.into(), operator })
    }
}

/// TCP where none is named.
fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name {
        None | Some("") => Some(Protocol::Tcp),
        Some(name) => Protocol::from_name(name),
    }
}

/// Reads a uid. Most are UUIDs; any other text counts as a whole.
pub fn uid(text: &str) -> Uid {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    if let (32, Ok(number)) = (digits.len(), u128::from_str_radix(&digits, 16)) {
        return Uid(number);
    }
    // FNV-1a: no two objects of a server have the same uid by intention.
    let fnv = |sum: u128, byte: u8| {
        (sum ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    };
    Uid(text.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, fnv))
}

/// A time such as `2026-11-28T16:00:00Z` in seconds since 1970.
fn seconds(text: &str) -> Option<u64> {
    let part = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (part(0..4)?, part(5..7)?, part(8..10)?);
    let (hour, minute, second) = (part(11..13)?, part(14..16)?, part(17..19)?);
    // Years that begin with March have their leap day at the end.
    let (year, month) =
        if month > 2 { (year, month.checked_sub(3)?) } else { (year.checked_sub(1)?, month + 9) };
    let days =
        year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day.checked_sub(1)?;
    Some(days.checked_sub(719_468)? * 86_400 + hour * 3_600 + minute * 60 + second)
}

impl fmt::Display for ReadPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "network policy {}: {}", self.policy.name, self.ignored.join("; "))
    }
}
