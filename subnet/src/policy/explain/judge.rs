//! Which rule of a policy allows a connection, and otherwise what keeps each from doing so.

use std::fmt::Write;

use ipnet::IpNet;

use super::{Direction, End, Party, PolicyContext, Question, Side};
use crate::policy::{
    NamespaceScope, NetworkPolicy, Peer, Peers, Pod, Port, PortMatch, Ports, Rule, Selector,
};

/// Rules that come near and are named one by one; the others are counted.
const MAX_NEAR: usize = 8;
/// Labels that controllers make: no policy should name them.
const GENERATED: [&str; 4] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
];

/// What rules are judged by.
pub(super) struct Judge<'a> {
    pub(super) context: &'a PolicyContext,
    pub(super) question: &'a Question,
    pub(super) direction: Direction,
    pub(super) pod: &'a Pod,
    pub(super) far: &'a End,
}

/// Judges the far end by all rules of the policies that isolate a pod.
pub(super) fn judge(judge: &Judge<'_>, selecting: &[&NetworkPolicy]) -> Side {
    let direction = judge.direction;
    let (mut near, mut others) = (Vec::new(), 0);
    for policy in selecting {
        for (number, rule) in direction.of(policy).rules().iter().enumerate() {
            let what = format!("{} {}[{number}]", policy.name, direction.word());
            let (peer, port) = (judge.peers(rule, policy), judge.ports(rule));
            match (&peer, &port) {
                (Ok(peer), Ok(port)) => {
                    return Side::open(format!("allowed by {what}{peer}{port}"));
                }
                (Ok(_), Err(why)) => near.push(format!("{what}: peers match, ports don't ({why})")),
                (Err(why), Ok(_)) => near.push(format!("{what}: ports match, peers don't ({why})")),
                (Err(_), Err(_)) => others += 1,
            }
        }
    }
    let names: Vec<String> = selecting.iter().map(|policy| policy.name.to_string()).collect();
    let mut lines = vec![format!("isolated by {}", shown(&names))];
    others += near.len().saturating_sub(MAX_NEAR);
    lines.extend(near.into_iter().take(MAX_NEAR));
    if others > 0 {
        lines.push(format!("{others} other rules don't match"));
    }
    lines.push("→ DENIED: no rule allows it".into());
    Side { allowed: false, lines, remedy: Some(judge.remedy()) }
}

impl Judge<'_> {
    /// Whether the far end is one of a rule's peers: which, or why not.
    fn peers(&self, rule: &Rule, policy: &NetworkPolicy) -> Result<String, String> {
        let Peers::Of(peers) = &rule.peers else { return Ok(String::new()) };
        if peers.is_empty() {
            return Err("the rule has no peer that is understood".into());
        }
        let word = self.direction.peers();
        let mut reasons = Vec::new();
        for (number, peer) in peers.iter().enumerate() {
            match self.peer(peer, policy) {
                Ok(()) => return Ok(format!(".{word}[{number}] ({})", describe(peer))),
                Err(why) => reasons.push(format!("{word}[{number}] {}{why}", describe(peer))),
            }
        }
        Err(shown(&reasons))
    }

    /// Whether the far end is this peer; otherwise what is special about it not being it.
    fn peer(&self, peer: &Peer, policy: &NetworkPolicy) -> Result<(), String> {
        let plain = || Err(String::new());
        match peer {
            Peer::Block { cidr, except } => {
                let Some(far) = self.far.address else { return plain() };
                let inside = |net: &IpNet| net.contains(&far);
                match (inside(cidr), except.iter().find(|net| inside(net)), &self.far.party) {
                    (true, _, Party::Service(_)) => {
                        Err(": a Service's address never matches an ipBlock, because that of an endpoint takes its place \
                             first"
                            .into())
                    }
                    (true, None, _) => Ok(()),
                    (true, Some(net), _) => Err(format!(": {far} is in its exception {net}")),
                    (false, ..) => plain(),
                }
            }
            Peer::Pods { namespaces, pods } => self.pods(namespaces, pods, policy),
        }
    }

    fn pods(
        &self,
        scope: &NamespaceScope,
        selector: &Selector,
        policy: &NetworkPolicy,
    ) -> Result<(), String> {
        if let NamespaceScope::Matching(namespaces) = scope {
            // All pods: whether or not they are known.
            if namespaces.is_everything() && selector.is_everything() {
                let far = self.far.address;
                let of_pod = far.is_some_and(|far| {
                    self.context.networks.iter().any(|net| net.contains(&far))
                        && !self.context.nodes.contains(&far)
                });
                return if of_pod && !self.far.is_special() { Ok(()) } else { Err(self.no_peer()) };
            }
            if !self.context.namespaces.values().any(|labels| namespaces.matches_labels(labels)) {
                return Err(format!(": namespaceSelector {namespaces} matches no namespace"));
            }
        }
        let Party::Pod(far) = &self.far.party else { return Err(self.no_peer()) };
        let in_scope = match scope {
            NamespaceScope::Own => far.name.namespace == policy.name.namespace,
            NamespaceScope::Matching(namespaces) => {
                let labels = self.context.namespaces.get(&*far.name.namespace);
                namespaces.is_everything() || labels.is_some_and(|labels| namespaces.matches_labels(labels))
            }
        };
        match (in_scope, selector.matches_labels(&far.labels)) {
            (true, true) => Ok(()),
            (false, true) if *scope == NamespaceScope::Own => {
                Err(format!(": only pods of {}, as there is no namespaceSelector", policy.name.namespace))
            }
            (false, true) => Err(format!(": its namespace {} doesn't match", far.name.namespace)),
            (_, false) => Err(String::new()),
        }
    }

    /// Why the far end is no peer of any selector, if it isn't.
    fn no_peer(&self) -> String {
        match &self.far.party {
            Party::Pod(_) => String::new(),
            Party::Finished(name) => format!(": {name} has ended, so that its address counts for nobody"),
            Party::HostNetwork(name) => {
                format!(
                    ": {name} is on its host's network, and so an address of its node: no selector matches it"
                )
            }
            Party::Node => ": a node is no pod: no selector matches it".into(),
            Party::Service(name) => format!(": {name} is a Service: its endpoints are what selectors match"),
            Party::Address => ": no pod has this address".into(),
        }
    }

    /// Whether the port is one of a rule's: by which, or why not.
    fn ports(&self, rule: &Rule) -> Result<String, String> {
        let Ports::Of(ports) = &rule.ports else { return Ok(String::new()) };
        if ports.is_empty() {
            return Err("the rule has no port that is understood".into());
        }
        let mut reasons = Vec::new();
        for port in ports {
            match self.port(port) {
                Ok(how) => return Ok(how),
                Err(why) => reasons.push(why),
            }
        }
        Err(shown(&reasons))
    }

    fn port(&self, port: &Port) -> Result<String, String> {
        let Question { protocol, port: number, .. } = self.question;
        let same = port.protocol == *protocol;
        let name = port.protocol.name();
        match &port.port {
            PortMatch::All if same => Ok(format!(", all of {name}")),
            PortMatch::All => Err(format!("all of {name}")),
            PortMatch::Range(range) if same && range.contains(number) => Ok(String::new()),
            PortMatch::Range(range) if range.start() == range.end() => {
                Err(format!("{name} {}", range.start()))
            }
            PortMatch::Range(range) => Err(format!("{name} {}-{}", range.start(), range.end())),
            PortMatch::Named(wanted) => self.named(port, wanted, same),
        }
    }

    fn named(&self, port: &Port, wanted: &str, same: bool) -> Result<String, String> {
        let destination = match self.direction {
            Direction::Ingress => Some(self.pod),
            Direction::Egress => match &self.far.party {
                Party::Pod(pod) => Some(&**pod),
                _ => None,
            },
        };
        let protocol = port.protocol.name();
        let Some(pod) = destination else {
            return Err(format!("port name {wanted:?}, which only pods have"));
        };
        let of_name: Vec<_> = pod.ports.iter().filter(|own| *own.name == *wanted).collect();
        let numbers: Vec<u16> =
            of_name.iter().filter(|own| own.protocol == port.protocol).map(|own| own.port).collect();
        match (numbers.contains(&self.question.port), &numbers[..], &of_name[..]) {
            (true, ..) if same => {
                Ok(format!(", port {wanted:?} = {} on {}", self.question.port, pod.name.name))
            }
            (_, [], []) => Err(format!("no container of {} has a port named {wanted:?}", pod.name)),
            (_, [], [other, ..]) => {
                Err(format!("port {wanted:?} of {} is {}, not {protocol}", pod.name, other.protocol.name()))
            }
            (_, numbers, _) => {
                let numbers: Vec<_> = numbers.iter().map(u16::to_string).collect();
                Err(format!("{protocol} {wanted:?} = {} on {}", numbers.join(", "), pod.name.name))
            }
        }
    }

    /// What to write into a policy.
    fn remedy(&self) -> String {
        let Question { protocol, port, .. } = self.question;
        let word = self.direction.peers();
        let far = match &self.far.party {
            Party::Pod(far) if far.name.namespace == self.pod.name.namespace => labels(far),
            Party::Pod(far) => format!("{} of namespace {}", labels(far), far.name.namespace),
            Party::Service(name) => format!("the pods behind {name} (a podSelector, with their own port)"),
            Party::Finished(name) => {
                return format!("none: {name} has ended; ask about the pod in its place");
            }
            Party::HostNetwork(_) | Party::Node | Party::Address => match self.far.address {
                Some(address) => format!("an ipBlock with {address}"),
                None => "an ipBlock with the address of its node".into(),
            },
        };
        format!(
            "allow {} {port} {word} {far} in a policy of namespace {} that selects {}",
            protocol.name(),
            self.pod.name.namespace,
            labels(self.pod)
        )
    }
}

/// A peer as the policy has it.
fn describe(peer: &Peer) -> String {
    match peer {
        Peer::Block { cidr, except } if except.is_empty() => format!("ipBlock {cidr}"),
        Peer::Block { cidr, except } => {
            let except: Vec<_> = except.iter().map(IpNet::to_string).collect();
            format!("ipBlock {cidr} except {}", except.join(", "))
        }
        Peer::Pods { namespaces: NamespaceScope::Own, pods } => format!("podSelector {pods}"),
        Peer::Pods { namespaces: NamespaceScope::Matching(namespaces), pods } if pods.is_everything() => {
            format!("namespaceSelector {namespaces}")
        }
        Peer::Pods { namespaces: NamespaceScope::Matching(namespaces), pods } => {
            format!("namespaceSelector {namespaces} and podSelector {pods}")
        }
    }
}

/// A pod's labels as a selector would name them.
fn labels(pod: &Pod) -> String {
    let own = pod.labels.iter().filter(|(key, _)| !GENERATED.contains(&key.as_str()));
    let shown: Vec<_> = own.take(2).map(|(key, value)| format!("{key}={value}")).collect();
    if shown.is_empty() {
        format!("all pods, since {} has no label of its own", pod.name)
    } else {
        shown.join(",")
    }
}

/// A few of many.
pub(super) fn shown(items: &[String]) -> String {
    let mut text = items.iter().take(MAX_NEAR).cloned().collect::<Vec<_>>().join(", ");
    if items.len() > MAX_NEAR {
        let _ = write!(text, " and {} more", items.len() - MAX_NEAR);
    }
    text
}
