//! The chains and sets of classes, kept as long as a pod needs them, so that a pod's arrival costs what is new; pure.

use std::collections::{HashMap, HashSet};
use std::iter;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::Family;
use subnet::policy::Protocol;

use super::class::{Allowed, AnyOf, Book, Member, Term, TermId, joined_blocks};
use super::image::{Image, ImageSet, MemberKey};
use super::intervals::Intervals;
use super::keys;
use super::members::Members;
use super::names::{hash, member_set};
use super::settings::{Settings, digit};
use crate::nft::matches::*;
use crate::nft::{Chain, Data, Expr, KeyType, Op, Rate, Rule, Set, Span, Verdict};

/// The chain that accepts, and marks the connection.
pub(super) const ACCEPTED: &str = "ok";
/// The chain that judges by the destination.
pub(super) const INGRESS: &str = "ingress";
/// Refusals that are logged of each class, and of each list of peers in egress.
const LOGGED: Rate = Rate { packets: 10, seconds: 1, burst: 5 };

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Ingress => "in",
            Self::Egress => "eg",
        }
    }

    /// The address of the far end.
    fn far(self, family: Family) -> Field {
        match self {
            Self::Ingress => Field::Source(family),
            Self::Egress => Field::Destination(family),
        }
    }

    fn far_in(self, op: Op, net: IpNet) -> Vec<Expr> {
        match self {
            Self::Ingress => source(op, net),
            Self::Egress => destination(op, net),
        }
    }

    /// Where what is allowed goes on. What the source allows has to be allowed by the destination, too, and returns to the
    /// base chain for that: the kernel follows each way through the chains when something changes, and would follow all of
    /// [`INGRESS`] once for each rule that led there.
    fn allowed(self) -> Vec<Expr> {
        match self {
            Self::Ingress => goto(ACCEPTED),
            Self::Egress => leave(),
        }
    }

    /// From a pod's address to its class.
    pub(super) fn to_class(self, chain: String) -> Verdict {
        match self {
            Self::Ingress => Verdict::Goto(chain),
            Self::Egress => Verdict::Jump(chain),
        }
    }

    /// From a port to those who are allowed there. [`Self::Ingress`] comes back to ask who is allowed on any port.
    fn to_peers(self, chain: String) -> Verdict {
        match self {
            Self::Ingress => Verdict::Jump(chain),
            Self::Egress => Verdict::Goto(chain),
        }
    }
}

/// Logs and drops. That a packet was refused by the chain of this name, the log tells.
fn refuse(chain: &str, settings: &Settings) -> Vec<Rule> {
    let logged = settings
        .log_group
        .map(|group| Rule::new([limit(LOGGED), log(group, &format!("flannel-policy {chain}"))]));
    logged.into_iter().chain([Rule::new([counter(), drop()])]).collect()
}

/// What was laid out before, by what it is for. All of it follows from the settings, from the numbers of a [`Book`], and
/// from the sizes of sets; when one of these changes, it has to be forgotten.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// By the address of what is allowed, which the part keeps alive.
    classes: HashMap<(Direction, usize), Arc<ClassPart>>,
    peers: HashMap<(Direction, AnyOf), Arc<PeersPart>>,
    members: HashMap<(TermId, Family), MemberSet>,
    /// Whether `members` are those of the classes.
    members_known: bool,
    /// The chains and sets of the classes.
    placed: Image,
    pub(super) nodes: HashMap<Family, Arc<ImageSet>>,
}

/// What a class needs in one direction.
#[derive(Debug)]
pub(super) struct ClassPart {
    allowed: Arc<Allowed>,
    pub(super) chain: Arc<Chain>,
    /// From ports to chains of peers.
    pub(super) map: Option<Arc<ImageSet>>,
    pub(super) peers: Vec<Arc<PeersPart>>,
}

/// The chain that lets some far ends pass, with the sets that it uses.
#[derive(Debug)]
pub(super) struct PeersPart {
    pub(super) chain: Arc<Chain>,
    pub(super) sets: Vec<Arc<ImageSet>>,
}

#[derive(Debug)]
struct MemberSet {
    key: Arc<MemberKey>,
    /// Once its size is known.
    set: Option<Arc<ImageSet>>,
}

impl Parts {
    /// The members that sets for these pods are about; `None` if the classes of the last run are these.
    pub(super) fn members(
        &mut self,
        pods: &[Member],
        settings: &Settings,
        book: &Book,
    ) -> Option<HashSet<Arc<MemberKey>>> {
        let classes: HashMap<_, _> = pods
            .iter()
            .flat_map(by_direction)
            .map(|(way, allowed)| (class_id(way, allowed), allowed))
            .collect();
        if self.members_known
            && classes.len() == self.classes.len()
            && classes.keys().all(|id| self.classes.contains_key(id))
        {
            return None;
        }
        let mut terms = HashSet::new();
        for allowed in classes.into_values() {
            let of_ports = allowed.ports.iter().flat_map(|(_, _, peers)| peers.iter());
            terms.extend(of_ports.chain(allowed.rest.iter()).copied());
        }
        self.members_known = true;
        self.members.retain(|(term, _), _| terms.contains(term));
        let families: Vec<Family> = settings.families().collect();
        for (term, family) in terms.iter().flat_map(|term| families.iter().map(|family| (*term, *family))) {
            if self.members.contains_key(&(term, family)) {
                continue;
            }
            if let Some(key) = member_key(book.term(term), family) {
                self.members.insert((term, family), MemberSet { key: Arc::new(key), set: None });
            }
        }
        Some(self.members.values().map(|member| Arc::clone(&member.key)).collect())
    }

    /// The sets of these members, whose sizes have to be known.
    pub(super) fn member_sets(&mut self, members: &Members) -> impl Iterator<Item = Arc<ImageSet>> {
        self.members.values_mut().map(|member| Arc::clone(member.set(members)))
    }
}

impl MemberSet {
    fn set(&mut self, members: &Members) -> &Arc<ImageSet> {
        self.set.get_or_insert_with(|| Arc::new(member_set(&self.key, members)))
    }
}

fn member_key(term: &Term, family: Family) -> Option<MemberKey> {
    let (pods, port) = match term {
        Term::Any | Term::EveryPod | Term::Block(_) => return None,
        Term::NamedInBlock { block, .. } if block.family != family => return None,
        Term::NamedInBlock { protocol, name, .. } => (None, Some((*protocol, name.clone()))),
        Term::Pods(pods) => (Some(Arc::clone(pods)), None),
        Term::Named { pods, protocol, name } => (pods.clone(), Some((*protocol, name.clone()))),
    };
    Some(MemberKey { pods, port, family })
}

/// One run that lays classes out.
pub(super) struct Draw<'a> {
    settings: &'a Settings,
    book: &'a Book,
    members: &'a Members,
    parts: &'a mut Parts,
    /// Parts of the last run that this one hasn't needed yet.
    before: HashMap<(Direction, usize), Arc<ClassPart>>,
    /// Parts that the last run did not have.
    new: Vec<Arc<ClassPart>>,
}

impl<'a> Draw<'a> {
    pub(super) fn new(
        settings: &'a Settings,
        book: &'a Book,
        members: &'a Members,
        parts: &'a mut Parts,
    ) -> Self {
        let before = std::mem::take(&mut parts.classes);
        Self { settings, book, members, parts, before, new: Vec::new() }
    }

    /// The chains and sets of all classes of this run. What it did not need is forgotten. Where no class of the last run is
    /// gone, only those that came are placed: looking for a place by name costs more than all else that a pod's arrival does.
    pub(super) fn finish(self) -> Image {
        let Self { parts, before, new, .. } = self;
        if before.is_empty() {
            new.iter().for_each(|part| place(&mut parts.placed, part));
        } else {
            parts.placed = Image::default();
            parts.classes.values().for_each(|part| place(&mut parts.placed, part));
        }
        std::mem::drop((before, new));
        parts.peers.retain(|_, part| Arc::strong_count(part) > 1);
        parts.placed.clone()
    }

    /// What a class needs in one direction. Pods with equal labels have the same `allowed`, not only an equal one.
    pub(super) fn class(&mut self, direction: Direction, allowed: &Arc<Allowed>) -> Arc<ClassPart> {
        let id = class_id(direction, allowed);
        if let Some(part) = self.parts.classes.get(&id) {
            return Arc::clone(part);
        }
        let known = self.before.remove(&id).filter(|part| Arc::ptr_eq(&part.allowed, allowed));
        let part = known.unwrap_or_else(|| {
            let part = Arc::new(self.new_class(direction, allowed));
            self.new.push(Arc::clone(&part));
            part
        });
        self.parts.classes.insert(id, Arc::clone(&part));
        part
    }

    fn new_class(&mut self, direction: Direction, allowed: &Arc<Allowed>) -> ClassPart {
        let mut all = Vec::new();
        let mut peers = |draw: &mut Self, terms: &AnyOf| {
            let part = draw.peers(direction, terms);
            let name = part.chain.name.clone();
            all.push(part);
            name
        };
        let mut ports = Vec::new();
        for (protocol, range, terms) in &allowed.ports {
            let terms = self.on_port(direction, terms, &allowed.rest);
            ports.push((*protocol, range.clone(), peers(self, &terms)));
        }
        let rest = (!allowed.rest.is_empty()).then(|| peers(self, &allowed.rest));
        let name = format!("{}-{}", direction.prefix(), hash(&(&ports, &rest, self.settings.log_group)));
        let mut chain = Chain::regular(name.clone());
        let mut map = None;
        if !ports.is_empty() {
            let of_ports = format!("{name}-p");
            chain.rules.push(Rule::new([verdict_map(&[Field::Protocol, Field::DestinationPort], &of_ports)]));
            map = Some(Arc::new(port_map(direction, of_ports, ports)));
        }
        match (direction, rest) {
            (Direction::Egress, Some(rest)) => chain.rules.push(Rule::new([goto(&rest)])),
            (_, rest) => {
                chain.rules.extend(rest.map(|rest| Rule::new([jump(&rest)])));
                chain.rules.extend(refuse(&name, self.settings));
            }
        }
        ClassPart { allowed: Arc::clone(allowed), chain: Arc::new(chain), map, peers: all }
    }

    /// Who is allowed on a port: where nothing comes back from there, those who are allowed on any port as well.
    fn on_port(&self, direction: Direction, terms: &AnyOf, rest: &AnyOf) -> AnyOf {
        match direction {
            Direction::Ingress => Arc::clone(terms),
            Direction::Egress => self.book.any_of(terms.iter().chain(rest.iter()).copied().collect()),
        }
    }

    /// The chain that lets any of these far ends pass.
    fn peers(&mut self, direction: Direction, terms: &AnyOf) -> Arc<PeersPart> {
        if let Some(part) = self.parts.peers.get(&(direction, Arc::clone(terms))) {
            return Arc::clone(part);
        }
        let (mut words, mut rules, mut sets) = (Vec::new(), Vec::new(), Vec::new());
        for (word, conditions) in self.conditions(direction, terms, &mut sets) {
            words.push(word);
            rules.push(Rule::new([conditions, direction.allowed()]));
        }
        let name = format!("{}-peers-{}", direction.prefix(), hash(&words));
        if direction == Direction::Egress {
            rules.extend(refuse(&name, self.settings));
        }
        let chain = Arc::new(Chain { rules, ..Chain::regular(name) });
        let part = Arc::new(PeersPart { chain, sets });
        self.parts.peers.insert((direction, Arc::clone(terms)), Arc::clone(&part));
        part
    }

    /// The conditions of each rule, each with words that are as different as the conditions are.
    fn conditions(
        &mut self,
        direction: Direction,
        terms: &AnyOf,
        sets: &mut Vec<Arc<ImageSet>>,
    ) -> Vec<(String, Vec<Expr>)> {
        let book = self.book;
        let mut terms: Vec<(&Term, TermId)> = terms.iter().map(|id| (book.term(*id), *id)).collect();
        // Numbers depend on what came when, and another run has to come to the same names.
        terms.sort_unstable();
        if terms.iter().any(|(term, _)| **term == Term::Any) {
            return vec![("any".to_owned(), Vec::new())];
        }
        let mut rules = Vec::new();
        for of in self.settings.families().collect::<Vec<_>>() {
            let blocks = joined_blocks(terms.iter().map(|(term, _)| *term), of);
            if !blocks.is_empty() {
                let (word, condition) = block_condition(direction, &blocks, sets);
                rules.push((word, [family(of), condition].concat()));
            }
            for (term, id) in &terms {
                rules.extend(
                    self.condition(direction, of, (term, *id), sets)
                        .map(|(word, steps)| (word, [family(of), steps].concat())),
                );
            }
        }
        rules
    }

    fn condition(
        &mut self,
        direction: Direction,
        of: Family,
        (term, id): (&Term, TermId),
        sets: &mut Vec<Arc<ImageSet>>,
    ) -> Option<(String, Vec<Expr>)> {
        let far = direction.far(of);
        let endpoint = [far, Field::Protocol, Field::DestinationPort];
        Some(match term {
            Term::Any | Term::Block(_) => return None,
            Term::EveryPod => {
                let network = self.settings.network(of)?;
                let nodes = format!("nodes{}", digit(of));
                let word = format!("pods of {network}");
                (word, [direction.far_in(Op::Eq, network), not_in_set(&[far], &nodes)].concat())
            }
            Term::Pods(_) => {
                let set = self.member_set(id, of, sets)?;
                (set.clone(), in_set(&[far], &set))
            }
            Term::Named { .. } => {
                let set = self.member_set(id, of, sets)?;
                (set.clone(), in_set(&endpoint, &set))
            }
            Term::NamedInBlock { block, .. } => {
                let set = self.member_set(id, of, sets)?;
                let (word, inside) = block_condition(direction, block, sets);
                (format!("{word} {set}"), [inside, in_set(&endpoint, &set)].concat())
            }
        })
    }

    /// The name of the set of a term's members; `None` for a term without any in this family.
    fn member_set(&mut self, id: TermId, family: Family, sets: &mut Vec<Arc<ImageSet>>) -> Option<String> {
        let set = self.parts.members.get_mut(&(id, family))?.set(self.members);
        sets.push(Arc::clone(set));
        Some(set.set.name.clone())
    }
}

/// What policies allow a pod, in each direction that they isolate.
pub(super) fn by_direction(pod: &Member) -> impl Iterator<Item = (Direction, &Arc<Allowed>)> {
    let ways = [(Direction::Ingress, &pod.class.ingress), (Direction::Egress, &pod.class.egress)];
    ways.into_iter().filter_map(|(way, allowed)| Some((way, allowed.as_ref()?)))
}

/// What stands for a class in one direction, as long as its part is kept, which keeps `allowed` alive.
fn class_id(direction: Direction, allowed: &Arc<Allowed>) -> (Direction, usize) {
    (direction, Arc::as_ptr(allowed).addr())
}

/// Puts what a class needs to where it has to be; other classes may share some of it.
fn place(image: &mut Image, part: &ClassPart) {
    for chain in iter::once(&part.chain).chain(part.peers.iter().map(|peers| &peers.chain)) {
        if !image.chains.contains_key(&chain.name) {
            image.chains.insert(chain.name.clone(), Arc::clone(chain));
        }
    }
    for set in part.map.iter().chain(part.peers.iter().flat_map(|peers| &peers.sets)) {
        if !image.sets.contains_key(&set.set.name) {
            image.sets.insert(set.set.name.clone(), Arc::clone(set));
        }
    }
}

/// From ports to chains of peers.
fn port_map(
    direction: Direction,
    name: String,
    ports: Vec<(Protocol, RangeInclusive<u16>, String)>,
) -> ImageSet {
    let mut set = Set::verdict_map(name, &[KeyType::Protocol, KeyType::Port]);
    if ports.iter().any(|(_, range, _)| range.start() != range.end()) {
        set = set.with_ranges();
    }
    let elements = ports.into_iter().map(|(protocol, range, chain)| {
        let key = Span::concat([Span::protocol(protocol as u8), Span::ports(range)]);
        (key, Some(Data::Verdict(direction.to_peers(chain))))
    });
    ImageSet::fixed(set, elements.collect())
}

fn block_condition(
    direction: Direction,
    block: &Intervals,
    sets: &mut Vec<Arc<ImageSet>>,
) -> (String, Vec<Expr>) {
    match block.as_net() {
        // Everybody of the family: the condition on the family says it.
        Some(net) if net.prefix_len() == 0 => (net.to_string(), Vec::new()),
        Some(net) => (net.to_string(), direction.far_in(Op::Eq, net)),
        None => {
            let name = format!("b{}-{}", digit(block.family), hash(block));
            let spans = block
                .bounds()
                .map(|(first, last)| Span { from: keys::of_address(first), to: keys::of_address(last) });
            let set = Set::new(name.clone(), &[KeyType::address(block.family)]).with_ranges();
            sets.push(Arc::new(ImageSet::fixed(set, spans.map(|span| (span, None)).collect())));
            (name.clone(), in_set(&[direction.far(block.family)], &name))
        }
    }
}
