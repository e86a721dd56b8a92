//! What policies mean for a pod of this node: which far ends it may talk to, on which ports.
//!
//! Pods for which this comes out the same are a class, and share their chains.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use subnet::Family;
use subnet::policy::{
    Isolation, NamedPort, NamespaceScope, NetworkPolicy, ObjectName, Peer, Peers, PortMatch, Ports, Protocol,
    Rule,
};

use super::intervals::Intervals;
use super::selector::{PodSelector, SelectorScope};

/// A kind of far end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Term {
    /// Everybody.
    Any,
    /// Every address inside the network that is no node's.
    EveryPod,
    /// Some pods.
    Pods(Arc<PodSelector>),
    /// Some addresses.
    Block(Intervals),
    /// Pods, or with `None` all pods, on the port to which they give this name.
    Named { pods: Option<Arc<PodSelector>>, protocol: Protocol, name: Box<str> },
    /// The same for whichever pods have these addresses.
    NamedInBlock { block: Intervals, protocol: Protocol, name: Box<str> },
}

/// The number of a term.
pub(super) type TermId = u32;

/// Terms, each once; any of them is enough. In order.
pub(super) type AnyOf = Arc<[TermId]>;

/// What one direction allows a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Allowed {
    /// On these destination ports; they don't overlap.
    pub(super) ports: Vec<(Protocol, RangeInclusive<u16>, AnyOf)>,
    /// On any port and with any protocol.
    pub(super) rest: AnyOf,
}

/// What policies mean for a pod; `None` is a direction that none of them isolates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Class {
    pub(super) ingress: Option<Arc<Allowed>>,
    pub(super) egress: Option<Arc<Allowed>>,
}

/// A pod of this node.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) class: Arc<Class>,
}

/// Policies as terms. What was worked out once is kept as long as the policy is the same.
#[derive(Debug, Default)]
pub(super) struct Book {
    terms: Vec<Term>,
    numbers: HashMap<Term, TermId>,
    policies: BTreeMap<ObjectName, (Arc<NetworkPolicy>, Arc<ClassEntry>)>,
}

/// A policy as terms.
#[derive(Debug)]
struct ClassEntry {
    ingress: Vec<EntryRule>,
    egress: Vec<EntryRule>,
}

#[derive(Debug)]
struct EntryRule {
    /// For all ports below, or without ports.
    peers: Vec<TermId>,
    /// `None` for rules that don't speak of ports.
    ports: Option<Vec<EntryPort>>,
    /// What named ports of destination pods make of the rule.
    named: Vec<TermId>,
}

#[derive(Debug)]
enum EntryPort {
    Range(Protocol, RangeInclusive<u16>),
    /// One that the pod's own containers give the number to.
    Named(Protocol, Box<str>),
}

impl Book {
    pub(super) fn term(&self, id: TermId) -> &Term {
        &self.terms[id as usize]
    }

    /// What `policies`, which select a pod with these ports, mean for it.
    pub(super) fn class<'a>(
        &mut self,
        policies: impl IntoIterator<Item = &'a Arc<NetworkPolicy>>,
        ports: &[NamedPort],
    ) -> Class {
        let (mut ingress, mut egress): (Option<Vec<_>>, Option<Vec<_>>) = (None, None);
        for policy in policies {
            let entry = self.entry(policy);
            if policy.ingress != Isolation::Unspecified {
                ingress.get_or_insert_default().push(Arc::clone(&entry));
            }
            if policy.egress != Isolation::Unspecified {
                egress.get_or_insert_default().push(entry);
            }
        }
        let ingress =
            ingress.map(|entries| allowed(self, entries.iter().flat_map(|entry| &entry.ingress), ports));
        let egress = egress.map(|entries| allowed(self, entries.iter().flat_map(|entry| &entry.egress), &[]));
        Class { ingress: ingress.map(Arc::new), egress: egress.map(Arc::new) }
    }

    /// Forgets policies that are gone, and after very many of them everything: classes that were worked out before
    /// mean nothing then. Whether everything.
    pub(super) fn tidy(&mut self, exists: impl Fn(&ObjectName) -> bool) -> bool {
        /// So many terms more than there are in use may be kept.
        const SLACK: usize = 10_000;
        self.policies.retain(|name, _| exists(name));
        let rules = self.policies.values().flat_map(|(_, entry)| entry.ingress.iter().chain(&entry.egress));
        let used: usize = rules.map(|rule| rule.peers.len() + rule.named.len()).sum();
        let too_many = self.terms.len() > used + SLACK;
        if too_many {
            *self = Self::default();
        }
        too_many
    }

    fn entry(&mut self, policy: &Arc<NetworkPolicy>) -> Arc<ClassEntry> {
        if let Some((known, entry)) = self.policies.get(&policy.name)
            && Arc::ptr_eq(known, policy)
        {
            return Arc::clone(entry);
        }
        let namespace = &policy.name.namespace;
        let ingress = policy.ingress.rules().iter().map(|rule| self.rule(namespace, rule, false)).collect();
        let egress = policy.egress.rules().iter().map(|rule| self.rule(namespace, rule, true)).collect();
        let entry = Arc::new(ClassEntry { ingress, egress });
        self.policies.insert(policy.name.clone(), (Arc::clone(policy), Arc::clone(&entry)));
        entry
    }

    fn rule(&mut self, namespace: &str, rule: &Rule, egress: bool) -> EntryRule {
        let peers: Vec<Term> = match &rule.peers {
            Peers::Any => vec![Term::Any],
            Peers::Of(peers) => peers.iter().filter_map(|peer| term(namespace, peer)).collect(),
        };
        let mut named = Vec::new();
        let ports = match &rule.ports {
            Ports::Any => None,
            Ports::Of(ports) => Some(
                ports
                    .iter()
                    .filter_map(|port| match &port.port {
                        PortMatch::All => Some(EntryPort::Range(port.protocol, 0..=u16::MAX)),
                        PortMatch::Range(range) => Some(EntryPort::Range(port.protocol, range.clone())),
                        PortMatch::Named(name) if egress => {
                            named.extend(peers.iter().map(|peer| named_term(peer, port.protocol, name)));
                            None
                        }
                        PortMatch::Named(name) => Some(EntryPort::Named(port.protocol, name.clone())),
                    })
                    .collect(),
            ),
        };
        let mut number = |terms: Vec<Term>| terms.into_iter().map(|term| self.number(term)).collect();
        EntryRule { peers: number(peers), ports, named: number(named) }
    }

    fn number(&mut self, term: Term) -> TermId {
        let terms = &mut self.terms;
        *self.numbers.entry(term).or_insert_with_key(|term| {
            terms.push(term.clone());
            terms.len() as TermId - 1
        })
    }

    /// Where everybody is allowed, further peers say nothing more.
    pub(super) fn any_of(&self, terms: BTreeSet<TermId>) -> AnyOf {
        match terms.iter().find(|id| *self.term(**id) == Term::Any) {
            Some(any) => [*any].into(),
            None => terms.into_iter().collect(),
        }
    }
}

/// `None` for a peer that no address can match.
fn term(namespace: &str, peer: &Peer) -> Option<Term> {
    match peer {
        Peer::Block { cidr, except } => {
            let block = Intervals::block(*cidr, except);
            (!block.is_empty()).then_some(Term::Block(block))
        }
        Peer::Pods { namespaces: NamespaceScope::Matching(all), pods }
            if all.is_everything() && pods.is_everything() =>
        {
            Some(Term::EveryPod)
        }
        Peer::Pods { namespaces, pods } => {
            let scope = match namespaces {
                NamespaceScope::Own => SelectorScope::Namespace(namespace.into()),
                NamespaceScope::Matching(labels) => SelectorScope::Matching(labels.clone()),
            };
            Some(Term::Pods(Arc::new(PodSelector { scope, pods: pods.clone() })))
        }
    }
}

fn named_term(peer: &Term, protocol: Protocol, name: &str) -> Term {
    let name = name.into();
    match peer {
        Term::Pods(pods) => Term::Named { pods: Some(Arc::clone(pods)), protocol, name },
        Term::Block(block) => Term::NamedInBlock { block: block.clone(), protocol, name },
        _ => Term::Named { pods: None, protocol, name },
    }
}

/// The first and the last port, and who is allowed there.
type PortRange<'a> = (u16, u16, &'a [TermId]);

/// All rules of one direction together, cut into port ranges that don't overlap.
fn allowed<'a>(book: &Book, rules: impl Iterator<Item = &'a EntryRule>, own_ports: &[NamedPort]) -> Allowed {
    let mut rest = BTreeSet::new();
    let mut ranges: BTreeMap<Protocol, Vec<PortRange<'_>>> = BTreeMap::new();
    for rule in rules {
        rest.extend(&rule.named);
        let Some(ports) = &rule.ports else {
            rest.extend(&rule.peers);
            continue;
        };
        for port in ports {
            match port {
                EntryPort::Range(protocol, range) => {
                    ranges.entry(*protocol).or_default().push((*range.start(), *range.end(), &rule.peers));
                }
                EntryPort::Named(protocol, name) => {
                    let numbers =
                        own_ports.iter().filter(|own| (own.protocol, &own.name) == (*protocol, name));
                    let ranges = ranges.entry(*protocol).or_default();
                    ranges.extend(numbers.map(|own| (own.port, own.port, &*rule.peers)));
                }
            }
        }
    }
    let rest = book.any_of(rest);
    let everybody = rest.first().is_some_and(|id| *book.term(*id) == Term::Any);
    let mut ports = Vec::new();
    if !everybody {
        for (protocol, ranges) in ranges {
            cut(book, &ranges, |range, terms| ports.push((protocol, range, terms)));
        }
        ports.retain(|(_, _, terms)| terms.iter().any(|term| !rest.contains(term)));
    }
    Allowed { ports, rest }
}

/// Tells each range between two bounds, with the terms of all ranges that cover it; neighbours that would say
/// the same are told as one.
fn cut(book: &Book, ranges: &[PortRange<'_>], mut tell: impl FnMut(RangeInclusive<u16>, AnyOf)) {
    // At each port: the ranges that begin there, and those that ended right before.
    let mut bounds: BTreeMap<u32, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
    for (i, (first, last, _)) in ranges.iter().enumerate() {
        bounds.entry((*first).into()).or_default().0.push(i);
        bounds.entry(u32::from(*last) + 1).or_default().1.push(i);
    }
    let mut active: BTreeSet<usize> = BTreeSet::new();
    let mut open: Option<(u32, AnyOf)> = None;
    for (port, (begin, end)) in bounds {
        for ended in end {
            active.remove(&ended);
        }
        active.extend(begin);
        let terms = book.any_of(active.iter().flat_map(|i| ranges[*i].2).copied().collect());
        if open.as_ref().is_some_and(|(_, same)| *same == terms) {
            continue;
        }
        if let Some((start, terms)) = open.take() {
            tell(start as u16..=(port - 1) as u16, terms);
        }
        open = (!terms.is_empty()).then_some((port, terms));
    }
}

/// The addresses of all blocks among the terms, joined for each family.
pub(super) fn joined_blocks<'a>(terms: impl Iterator<Item = &'a Term> + Clone, family: Family) -> Intervals {
    Intervals::union(
        family,
        terms.filter_map(|term| match term {
            Term::Block(block) if block.family == family => Some(block),
            _ => None,
        }),
    )
}
