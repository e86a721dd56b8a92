//! Network policies, pods and namespaces as values that know no API.
//!
//! A list that an object leaves out and one that is empty mean different things in places, so both have a name
//! here: the reader of objects decides once, and nothing else has to know.

pub mod explain;
pub mod objects;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;

/// Labels by key.
pub type Labels = BTreeMap<String, String>;

/// A namespace and a name in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: Box<str>,
    /// The name.
    pub name: Box<str>,
}

impl ObjectName {
    /// `name` in `namespace`.
    pub fn new(namespace: impl Into<Box<str>>, name: impl Into<Box<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A network policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Its name; it selects pods of its namespace only.
    pub name: ObjectName,
    /// The pods that it is about.
    pub pods: Selector,
    /// Connections to these pods.
    pub ingress: Isolation,
    /// Connections from these pods.
    pub egress: Isolation,
}

/// What a policy says about one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Nothing.
    Unspecified,
    /// Only connections that one of the rules allows.
    Isolated(Arc<[Rule]>),
}

impl Isolation {
    /// The rules; none where the policy says nothing about the direction.
    pub fn rules(&self) -> &[Rule] {
        match self {
            Self::Unspecified => &[],
            Self::Isolated(rules) => rules,
        }
    }
}

/// A rule allows connections with its peers on its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The far ends.
    pub peers: Peers,
    /// The destination ports.
    pub ports: Ports,
}

/// The far ends of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peers {
    /// Any address.
    Any,
    /// Those that one of these describes; none if there are none.
    Of(Box<[Peer]>),
}

/// A far end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Pods that are not on their host's network.
    Pods {
        /// Their namespaces.
        namespaces: NamespaceScope,
        /// Their labels.
        pods: Selector,
    },
    /// Addresses, of pods or not.
    Block {
        /// All of these ...
        cidr: IpNet,
        /// ... but these.
        except: Box<[IpNet]>,
    },
}

/// Which namespaces the pods of a [`Peer`] are in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NamespaceScope {
    /// That of the policy.
    Own,
    /// Those with such labels.
    Matching(Selector),
}

/// The destination ports of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ports {
    /// All ports of all protocols, and protocols without ports.
    Any,
    /// Those that one of these describes; none if there are none.
    Of(Box<[Port]>),
}

/// Destination ports of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// The protocol.
    pub protocol: Protocol,
    /// Which of its ports.
    pub port: PortMatch,
}

/// Ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PortMatch {
    /// All.
    All,
    /// From the first to the last, both included.
    Range(RangeInclusive<u16>),
    /// What the destination pod's containers call so.
    Named(Box<str>),
}

/// A transport protocol with ports; the numbers are those of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// SCTP.
    Sctp = 132,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The name that the API gives it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// By the name that the API gives it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// Labels that an object must have: all of the requirements.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(Arc<[Requirement]>);

impl Selector {
    /// The selector that everything matches.
    pub fn everything() -> Self {
        Self::default()
    }

    /// The selector with these requirements, in an order of its own.
    pub fn new(requirements: impl IntoIterator<Item = Requirement>) -> Self {
        let mut requirements: Vec<Requirement> = requirements.into_iter().collect();
        requirements.sort_unstable();
        requirements.dedup();
        Self(requirements.into())
    }

    /// The requirements in order.
    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// Whether everything matches.
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a clone of this selector is in use, too.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Whether an object matches whose labels `value` gives by key.
    pub fn matches<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.0.iter().all(|requirement| requirement.holds(value(&requirement.key)))
    }

    /// Whether an object with these labels matches.
    pub fn matches_labels(&self, labels: &Labels) -> bool {
        self.matches(|key| labels.get(key).map(String::as_str))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_everything() {
            return f.write_str("all");
        }
        for (i, requirement) in self.0.iter().enumerate() {
            write!(f, "{}{requirement}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// What must hold for one key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    /// The key.
    pub key: Box<str>,
    /// What must hold for its value.
    pub operator: Operator,
}

/// What must hold for the value of a label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// It is one of these.
    In(Box<[Box<str>]>),
    /// It is none of these, or there is no such label.
    NotIn(Box<[Box<str>]>),
    /// There is such a label.
    Exists,
    /// There is no such label.
    DoesNotExist,
}

impl Requirement {
    /// The label `key` has the value `value`.
    pub fn equals(key: impl Into<Box<str>>, value: impl Into<Box<str>>) -> Self {
        Self { key: key.into(), operator: Operator::In([value.into()].into()) }
    }

    fn holds(&self, value: Option<&str>) -> bool {
        let among = |values: &[Box<str>]| value.is_some_and(|value| values.iter().any(|one| **one == *value));
        match &self.operator {
            Operator::In(values) => among(values),
            Operator::NotIn(values) => !among(values),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        match &self.operator {
            Operator::In(values) if values.len() == 1 => write!(f, "{key}={}", values[0]),
            Operator::NotIn(values) if values.len() == 1 => write!(f, "{key}!={}", values[0]),
            Operator::In(values) => write!(f, "{key} in ({})", values.join(",")),
            Operator::NotIn(values) => write!(f, "{key} notin ({})", values.join(",")),
            Operator::Exists => write!(f, "{key}"),
            Operator::DoesNotExist => write!(f, "!{key}"),
        }
    }
}

/// The identity of an object for as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uid(pub u128);

/// A pod.
///
/// One that has ended, and one on its host's network, is no pod here: addresses that it names are not its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its identity.
    pub uid: Uid,
    /// Its name.
    pub name: ObjectName,
    /// Its labels.
    pub labels: Labels,
    /// Its addresses, at most one of each family; none before it has any.
    pub addresses: Vec<IpAddr>,
    /// The ports of its containers that have a name.
    pub ports: Vec<NamedPort>,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Whether it runs on this node.
    pub local: bool,
}

/// A port of a container that has a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// The name.
    pub name: Box<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The number.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_requirement_holds_without_the_label() {
        let labels: Labels = [("app".to_owned(), "web".to_owned())].into();
        let holds =
            |operator| Selector::new([Requirement { key: "tier".into(), operator }]).matches_labels(&labels);
        assert!(holds(Operator::NotIn(["a".into()].into())));
        assert!(holds(Operator::DoesNotExist));
        assert!(!holds(Operator::In(["a".into()].into())));
        assert!(!holds(Operator::Exists));
        assert!(Selector::new([Requirement::equals("app", "web")]).matches_labels(&labels));
        assert!(!Selector::new([Requirement::equals("app", "db")]).matches_labels(&labels));
        assert!(Selector::everything().matches_labels(&labels));
    }

    #[test]
    fn the_order_of_requirements_makes_no_other_selector() {
        let one = || Requirement::equals("a", "1");
        let other = || Requirement { key: "b".into(), operator: Operator::Exists };
        assert_eq!(Selector::new([one(), other(), one()]), Selector::new([other(), one()]));
        assert_eq!(Selector::new([one(), other()]).to_string(), "a=1,b");
    }
}
