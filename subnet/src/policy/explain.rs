//! Why a connection is allowed or refused: the same answer as the tables give, with the rule that gives it, and
//! otherwise with what comes near and what stands in the way; pure.

mod judge;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Isolation, Labels, NetworkPolicy, ObjectName, Pod, Protocol};
use judge::{Judge, judge, shown};

/// What is known of the cluster.
#[derive(Clone, Debug, Default)]
pub struct PolicyContext {
    /// All policies.
    pub policies: Vec<Arc<NetworkPolicy>>,
    /// The labels of each namespace.
    pub namespaces: BTreeMap<String, Labels>,
    /// The networks of the cluster's pods.
    pub networks: Vec<IpNet>,
    /// Addresses inside the networks that are nodes'.
    pub nodes: BTreeSet<IpAddr>,
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Who has the address.
    pub party: Party,
    /// The address that is asked about; a pod may have none yet.
    pub address: Option<IpAddr>,
    /// The node that it is on, if that is known.
    pub node: Option<String>,
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    /// A pod with an address of its own.
    Pod(Box<Pod>),
    /// A pod whose phase is Succeeded or Failed.
    Finished(ObjectName),
    /// A pod on its host's network.
    HostNetwork(ObjectName),
    /// A node.
    Node,
    /// A Service: its address is replaced by that of an endpoint before policies are asked.
    Service(ObjectName),
    /// An unknown address.
    Address,
}

/// The first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Who asks.
    pub source: End,
    /// Who is asked.
    pub destination: End,
    /// By this protocol.
    pub protocol: Protocol,
    /// On this port.
    pub port: u16,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Whether the connection is allowed.
    pub allowed: bool,
    /// Why, in lines for people.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Egress,
    Ingress,
}

impl Direction {
    fn word(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }

    fn peers(self) -> &'static str {
        match self {
            Self::Egress => "to",
            Self::Ingress => "from",
        }
    }

    fn of(self, policy: &NetworkPolicy) -> &Isolation {
        match self {
            Self::Egress => &policy.egress,
            Self::Ingress => &policy.ingress,
        }
    }
}

/// What one direction says.
struct Side {
    allowed: bool,
    lines: Vec<String>,
    remedy: Option<String>,
}

impl Side {
    fn open(line: impl Into<String>) -> Self {
        Self { allowed: true, lines: vec![line.into()], remedy: None }
    }
}

/// Explains what becomes of a connection.
pub fn explain(context: &PolicyContext, question: &Question) -> Explanation {
    let Question { source, destination, protocol, port } = question;
    let mut text = format!("{source} → {destination} {} {port}\n", protocol.name());
    let sides = [
        (Direction::Egress, side(context, question, Direction::Egress)),
        (Direction::Ingress, side(context, question, Direction::Ingress)),
    ];
    let mut remedies = Vec::new();
    for (direction, side) in &sides {
        for (number, line) in side.lines.iter().enumerate() {
            put(&mut text, if number == 0 { direction.word() } else { "" }, line);
        }
        remedies.extend(side.remedy.clone());
    }
    let both = [(source, destination), (destination, source)].into_iter();
    let notes: BTreeSet<String> =
        both.filter(|(end, other)| !end.is_node_of(other)).filter_map(|(end, _)| end.note()).collect();
    for note in notes {
        put(&mut text, "note", &note);
    }
    for remedy in remedies {
        put(&mut text, "remedy", &remedy);
    }
    let allowed = sides.iter().all(|(_, side)| side.allowed);
    put(&mut text, "verdict", if allowed { "allowed" } else { "DENIED" });
    Explanation { allowed, text }
}

fn put(text: &mut String, heading: &str, line: &str) {
    let _ = writeln!(text, "  {heading:<8} {line}");
}

/// What the policies of one end say about the other.
fn side(context: &PolicyContext, question: &Question, direction: Direction) -> Side {
    let (subject, far) = match direction {
        Direction::Egress => (&question.source, &question.destination),
        Direction::Ingress => (&question.destination, &question.source),
    };
    let pod = match &subject.party {
        Party::Pod(pod) => pod,
        Party::Finished(name) => return Side::open(format!("{name} has ended: no policy is about it")),
        Party::HostNetwork(name) => {
            return Side::open(format!("{name} is on its host's network: no policy is about it"));
        }
        Party::Node => return Side::open("no policy is about a node"),
        Party::Service(name) => {
            return Side::open(format!("judged at the endpoint of {name} that is chosen"));
        }
        Party::Address => return Side::open("no policy is about an address outside of pods"),
    };
    if subject.address.is_some() && subject.address == far.address {
        return Side::open("a pod always reaches itself");
    }
    if far.is_node_of(subject) {
        return Side::open("a pod and its own node always reach each other");
    }
    let selecting: Vec<&NetworkPolicy> = isolating(&context.policies, pod, direction).collect();
    if selecting.is_empty() {
        return Side::open(format!("no policy isolates {} for {}", pod.name, direction.word()));
    }
    judge(&Judge { context, question, direction, pod, far }, &selecting)
}

/// The policies that isolate a pod for a direction.
fn isolating<'a>(
    policies: &'a [Arc<NetworkPolicy>],
    pod: &'a Pod,
    direction: Direction,
) -> impl Iterator<Item = &'a NetworkPolicy> {
    let of_pod = |policy: &&NetworkPolicy| {
        policy.name.namespace == pod.name.namespace && policy.pods.matches_labels(&pod.labels)
    };
    let says = move |policy: &&NetworkPolicy| *direction.of(policy) != Isolation::Unspecified;
    policies.iter().map(|policy| &**policy).filter(of_pod).filter(says)
}

/// A line for each pod: its addresses, and the policies that isolate it.
pub fn list(policies: &[Arc<NetworkPolicy>], pods: &[Pod]) -> String {
    let mut text = String::new();
    for pod in pods {
        let addresses: Vec<String> = pod.addresses.iter().map(IpAddr::to_string).collect();
        let addresses = if addresses.is_empty() { "no address yet".to_owned() } else { addresses.join(", ") };
        let _ = writeln!(text, "{} ({addresses})", pod.name);
        for direction in [Direction::Egress, Direction::Ingress] {
            let names: Vec<String> =
                isolating(policies, pod, direction).map(|policy| policy.name.to_string()).collect();
            match names[..] {
                [] => put(&mut text, direction.word(), "open: no policy isolates it"),
                _ => put(&mut text, direction.word(), &format!("isolated by {}", shown(&names))),
            }
        }
    }
    text
}

impl End {
    /// Whether this is the node of `pod`, or something on its host's network.
    fn is_node_of(&self, pod: &Self) -> bool {
        matches!(self.party, Party::Node | Party::HostNetwork(_))
            && self.node.is_some()
            && self.node == pod.node
    }

    /// Whether it is known not to be a pod of the network though its address may look like it.
    fn is_special(&self) -> bool {
        !matches!(self.party, Party::Pod(_) | Party::Address)
    }

    /// What to know about such an end, with any policies.
    fn note(&self) -> Option<String> {
        match &self.party {
            Party::Node => Some(
                "another node is an address like any from outside; with vxlan its pods' traffic to nodes, and its own, \
                 has the address of its flannel device"
                    .into(),
            ),
            Party::HostNetwork(name) => {
                Some(format!("{name} is on its host's network: it is judged as an address of its node"))
            }
            Party::Finished(name) => Some(format!("{name} has ended: another pod may have its address by now")),
            Party::Service(name) => {
                Some(format!("policies see the endpoint that {name} leads to: ask about one of its pods"))
            }
            Party::Pod(pod) if self.address.is_none() => {
                Some(format!("{} has no address yet: as soon as it has one, this holds", pod.name))
            }
            Party::Pod(_) | Party::Address => None,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match &self.party {
            Party::Pod(pod) => Some(pod.name.to_string()),
            Party::Finished(name) | Party::HostNetwork(name) => Some(name.to_string()),
            Party::Service(name) => Some(format!("Service {name}")),
            Party::Node | Party::Address => None,
        };
        let mut about: Vec<String> = Vec::new();
        match (&name, self.address) {
            (Some(name), address) => {
                f.write_str(name)?;
                about.extend(address.map(|address| address.to_string()));
            }
            (None, Some(address)) => write!(f, "{address}")?,
            (None, None) => f.write_str("nobody")?,
        }
        about.extend(self.node.as_ref().map(|node| format!("node {node}")));
        if !about.is_empty() {
            write!(f, " ({})", about.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
