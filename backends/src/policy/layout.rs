//! From classes to chains, maps and sets; pure. The text that `nft list ruleset` prints of it is in
//! `docs/adr/022-network-policy.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::Family;

use super::class::{Allowed, AnyOf, Book, Class, Term, TermId, joined_blocks};
use super::generation::{FORWARD, Generations};
use super::image::{Content, Image, ImageSet, MemberKey, span};
use super::keys;
use super::members::Members;
use crate::nft::matches::*;
use crate::nft::{
    Base, Chain, CtState, Data, Expr, Hook, KeyType, Op, Rate, Rule, Set, Span, Table, TableFamily, TableId,
    Verdict,
};

/// Where it hangs: before other programs' chains, which see what this one accepts.
const PRIORITY: i32 = -5;
const ACCEPTED: &str = "ok";
const INGRESS: &str = "ingress";
const MIDSTREAM: &str = "midstream";
const INVALID: &str = "invalid";
const REPLY: &str = "reply";
const UNKNOWN: &str = "unknown";

/// Ports from this one on are taken for a client's, those below for a server's.
const CLIENT_PORTS: u16 = 32768;
/// Refusals that are logged of each class.
const LOGGED: Rate = Rate { packets: 10, seconds: 1, burst: 5 };
/// The longest text of a comment.
const COMMENT_MAX: usize = 127;

/// What an operator chose, and what the node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's network, one of each family at most.
    pub networks: Vec<IpNet>,
    /// This node's part of it.
    pub subnets: Vec<IpNet>,
    /// Addresses inside the network that are no pod's: of each lease the first one and the gateway.
    pub nodes: BTreeSet<IpAddr>,
    /// Whether addresses of this node that belong to no known pod are cut off.
    pub strict: bool,
    /// The NFLOG group that is told of refused packets.
    pub log_group: Option<u16>,
}

impl Settings {
    pub(super) fn families(&self) -> impl Iterator<Item = Family> + '_ {
        Family::BOTH.into_iter().filter(|family| self.network(*family).is_some())
    }

    fn network(&self, family: Family) -> Option<IpNet> {
        self.networks.iter().copied().find(|net| Family::of(net.addr()) == family)
    }
}

/// The table that filters.
pub(super) fn filter_table() -> TableId {
    TableId::new(TableFamily::Inet, "flannel-policy")
}

/// It without anything in it.
pub(super) fn empty_table() -> Table {
    Table { comment: Some("network policies, by flanneld".to_owned()), ..Table::new(filter_table()) }
}

/// A pod of this node, for the maps.
#[derive(Debug)]
pub(super) struct Member<'a> {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) class: &'a Class,
}

/// All that the table holds, but for what belongs to generations.
pub(super) fn image(settings: &Settings, pods: &[Member<'_>], book: &Book, members: &Members) -> Image {
    let mut layout = Layout {
        settings,
        book,
        members,
        image: Image::default(),
        names: BTreeMap::new(),
        member_sets: BTreeMap::new(),
    };
    layout.pods(pods);
    for family in settings.families() {
        let nodes = settings.nodes.iter().filter(|address| Family::of(**address) == family);
        layout.addresses(&format!("nodes{}", digit(family)), family, nodes);
        if settings.strict {
            let gateways =
                settings.nodes.iter().filter(|node| settings.subnets.iter().any(|net| net.contains(*node)));
            let known = pods.iter().flat_map(|pod| &pod.addresses).chain(gateways);
            layout.addresses(
                &format!("known{}", digit(family)),
                family,
                known.filter(|one| Family::of(**one) == family),
            );
        }
    }
    layout.fixed_chains();
    layout.image
}

/// What each generation has anew: the number in the first rule and where it is written, and whose replies pass.
pub(super) fn stamp(
    image: &mut Image,
    settings: &Settings,
    generations: &Generations,
    now: std::time::Instant,
) {
    let fresh = generations.fresh_set(now);
    let mut ok = Chain::regular(ACCEPTED);
    ok.rules =
        vec![Rule::new([set_ct_mark_bits(generations.mask(), generations.mark())]), Rule::new([accept()])];
    image.chains.insert(ok.name.clone(), ok);
    image.chains.insert(FORWARD.to_owned(), forward(settings, generations));
    // Elements that go by themselves are no part of what is compared.
    image.sets.retain(|name, _| !name.starts_with("fresh-"));
    image.sets.insert(fresh.name.clone(), ImageSet { set: fresh, content: Content::Volatile });
}

fn forward(settings: &Settings, generations: &Generations) -> Chain {
    let mask = generations.mask();
    let mut rules = vec![Rule::new([ct_mark_bits(mask, Op::Eq, generations.mark()), accept()])];
    for of in Family::BOTH {
        let (digit, source_of, destination_of) = (digit(of), Field::Source(of), Field::Destination(of));
        let Some(_) = settings.network(of) else {
            rules.push(Rule::new([family(of), accept()]));
            continue;
        };
        if settings.strict {
            let known = format!("known{digit}");
            for subnet in settings.subnets.iter().filter(|net| Family::of(net.addr()) == of) {
                for (inside, field) in
                    [(source(Op::Eq, *subnet), source_of), (destination(Op::Eq, *subnet), destination_of)]
                {
                    rules.push(Rule::new([family(of), inside, not_in_set(&[field], &known), goto(UNKNOWN)]));
                }
            }
        }
        let policed = format!("pol{digit}");
        let nobody = [not_in_set(&[source_of], &policed), not_in_set(&[destination_of], &policed)].concat();
        rules.push(Rule::new([family(of), nobody, accept()]));
        for group in multicast(of) {
            rules.push(Rule::new([family(of), destination(Op::Eq, group), accept()]));
        }
    }
    let fresh = generations.set_name();
    rules.extend([
        Rule::new([ct_reply(true), ct_mark_in_set(mask, &fresh), accept()]),
        Rule::new([protocol(Op::Eq, ICMP), ct_state(CtState::RELATED), accept()]),
        Rule::new([protocol(Op::Eq, ICMPV6), ct_state(CtState::RELATED), accept()]),
        Rule::new([family(Family::V6), icmpv6_types(133..=137), accept()]),
        Rule::new([ct_state(CtState::INVALID), goto(INVALID)]),
        Rule::new([ct_reply(true), goto(REPLY)]),
    ]);
    for of in settings.families() {
        let pair = [Field::Source(of), Field::Destination(of)];
        rules.push(Rule::new([family(of), in_set(&pair, &format!("self{}", digit(of))), goto(ACCEPTED)]));
    }
    rules.push(Rule::new([
        tcp_flag_bits(tcp_flags::SYN | tcp_flags::ACK, Op::Ne, tcp_flags::SYN),
        jump(MIDSTREAM),
    ]));
    for of in settings.families() {
        rules.push(Rule::new([family(of), verdict_map(&[Field::Source(of)], &format!("eg{}", digit(of)))]));
    }
    rules.push(Rule::new([goto(INGRESS)]));
    Chain { rules, ..Chain::base(FORWARD, Base::filter(Hook::Forward, PRIORITY)) }
}

/// Policies say nothing about these, and they are never routed.
fn multicast(of: Family) -> Vec<IpNet> {
    let nets: &[&str] = match of {
        Family::V4 => &["224.0.0.0/4", "255.255.255.255/32"],
        Family::V6 => &["ff00::/8"],
    };
    nets.iter().filter_map(|net| net.parse().ok()).collect()
}

fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    fn prefix(self) -> &'static str {
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

    /// Where what is allowed goes on: the other end has to allow it too.
    fn allowed(self) -> &'static str {
        match self {
            Self::Ingress => ACCEPTED,
            Self::Egress => INGRESS,
        }
    }
}

struct Layout<'a> {
    settings: &'a Settings,
    book: &'a Book,
    members: &'a Members,
    image: Image,
    /// Chains that are there already, by what they are for.
    names: BTreeMap<(Direction, AnyOf), String>,
    /// Sets of members that are there already: finding one by its selector compares much text.
    member_sets: BTreeMap<(TermId, Family), String>,
}

impl Layout<'_> {
    fn pods(&mut self, pods: &[Member<'_>]) {
        let mut chains: BTreeMap<(Direction, *const Allowed), String> = BTreeMap::new();
        let mut maps: BTreeMap<(Direction, Family), BTreeMap<Span, Option<Data>>> = BTreeMap::new();
        let mut policed = BTreeSet::new();
        for pod in pods {
            let directions =
                [(Direction::Ingress, &pod.class.ingress), (Direction::Egress, &pod.class.egress)];
            for (direction, allowed) in directions {
                let Some(allowed) = allowed else { continue };
                // Pods with equal labels have the same value, not only an equal one.
                let chain = match chains.get(&(direction, std::sync::Arc::as_ptr(allowed))) {
                    Some(chain) => chain.clone(),
                    None => {
                        let chain = self.class(direction, allowed);
                        chains.insert((direction, std::sync::Arc::as_ptr(allowed)), chain.clone());
                        chain
                    }
                };
                for address in &pod.addresses {
                    let verdict = Some(Data::Verdict(Verdict::Goto(chain.clone())));
                    maps.entry((direction, Family::of(*address)))
                        .or_default()
                        .insert(Span::address(*address), verdict);
                    policed.insert(*address);
                }
            }
        }
        for family in self.settings.families() {
            let digit = digit(family);
            let kind = KeyType::address(family);
            for direction in [Direction::Ingress, Direction::Egress] {
                let map = Set::verdict_map(format!("{}{digit}", direction.prefix()), &[kind]);
                let elements = maps.remove(&(direction, family)).unwrap_or_default();
                self.insert(ImageSet::fixed(map, elements));
            }
            let of_family = || policed.iter().filter(|address| Family::of(**address) == family);
            self.addresses(&format!("pol{digit}"), family, of_family());
            let pairs =
                of_family().map(|address| (span(&keys::of_address(*address).repeat(2)), None)).collect();
            self.insert(ImageSet::fixed(Set::new(format!("self{digit}"), &[kind, kind]), pairs));
        }
    }

    /// The chain of a class in one direction.
    fn class(&mut self, direction: Direction, allowed: &Allowed) -> String {
        let prefix = direction.prefix();
        let ports: Vec<_> = allowed
            .ports
            .iter()
            .map(|(protocol, range, terms)| (*protocol, range.clone(), self.peers(direction, terms)))
            .collect();
        let rest = (!allowed.rest.is_empty()).then(|| self.peers(direction, &allowed.rest));
        let name = format!("{prefix}-{:032x}", hash(&(&ports, &rest, self.settings.log_group)));
        if self.image.chains.contains_key(&name) {
            return name;
        }
        let mut chain = Chain::regular(name.clone());
        if !ports.is_empty() {
            let map = format!("{name}-p");
            chain.rules.push(Rule::new([verdict_map(&[Field::Protocol, Field::DestinationPort], &map)]));
            let mut set = Set::verdict_map(map, &[KeyType::Protocol, KeyType::Port]);
            if ports.iter().any(|(_, range, _)| range.start() != range.end()) {
                set = set.with_ranges();
            }
            let elements = ports.into_iter().map(|(protocol, range, chain)| {
                let key = Span::concat([Span::protocol(protocol as u8), Span::ports(range)]);
                (key, Some(Data::Verdict(Verdict::Jump(chain))))
            });
            self.insert(ImageSet::fixed(set, elements.collect()));
        }
        chain.rules.extend(rest.map(|rest| Rule::new([jump(&rest)])));
        if let Some(group) = self.settings.log_group {
            chain.rules.push(Rule::new([limit(LOGGED), log(group, &format!("flannel-policy {name}"))]));
        }
        chain.rules.push(Rule::new([counter(), drop()]));
        self.image.chains.insert(name.clone(), chain);
        name
    }

    /// The chain that lets any of these far ends pass.
    fn peers(&mut self, direction: Direction, terms: &AnyOf) -> String {
        if let Some(name) = self.names.get(&(direction, terms.clone())) {
            return name.clone();
        }
        let (mut words, mut rules) = (Vec::new(), Vec::new());
        for (word, conditions) in self.conditions(direction, terms) {
            words.push(word);
            rules.push(Rule::new([conditions, goto(direction.allowed())]));
        }
        let name = format!("{}-peers-{:032x}", direction.prefix(), hash(&words));
        self.image.chains.insert(name.clone(), Chain { rules, ..Chain::regular(name.clone()) });
        self.names.insert((direction, terms.clone()), name.clone());
        name
    }

    /// The conditions of each rule, each with words that are as different as the conditions are.
    fn conditions(&mut self, direction: Direction, terms: &AnyOf) -> Vec<(String, Vec<Expr>)> {
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
                let (word, condition) = self.block(direction, &blocks);
                rules.push((word, [family(of), condition].concat()));
            }
            for (term, id) in &terms {
                rules.extend(
                    self.condition(direction, of, term, *id)
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
        term: &Term,
        id: TermId,
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
            Term::Pods(pods) => {
                let set = self.member_set(id, MemberKey { pods: Some(pods.clone()), port: None, family: of });
                (set.clone(), in_set(&[far], &set))
            }
            Term::Named { pods, protocol, name } => {
                let port = Some((*protocol, name.clone()));
                let set = self.member_set(id, MemberKey { pods: pods.clone(), port, family: of });
                (set.clone(), in_set(&endpoint, &set))
            }
            Term::NamedInBlock { block, .. } if block.family != of => return None,
            Term::NamedInBlock { block, protocol, name } => {
                let (word, inside) = self.block(direction, block);
                let port = Some((*protocol, name.clone()));
                let set = self.member_set(id, MemberKey { pods: None, port, family: of });
                (format!("{word} {set}"), [inside, in_set(&endpoint, &set)].concat())
            }
        })
    }

    fn block(&mut self, direction: Direction, block: &super::intervals::Intervals) -> (String, Vec<Expr>) {
        match block.as_net() {
            // Everybody of the family: the condition on the family says it.
            Some(net) if net.prefix_len() == 0 => (net.to_string(), Vec::new()),
            Some(net) => (net.to_string(), direction.far_in(Op::Eq, net)),
            None => {
                let name = format!("b{}-{:032x}", digit(block.family), hash(block));
                let spans = block
                    .bounds()
                    .map(|(first, last)| Span { from: keys::of_address(first), to: keys::of_address(last) });
                let set = Set::new(name.clone(), &[KeyType::address(block.family)]).with_ranges();
                self.insert(ImageSet::fixed(set, spans.map(|span| (span, None)).collect()));
                (name.clone(), in_set(&[direction.far(block.family)], &name))
            }
        }
    }

    fn member_set(&mut self, id: TermId, key: MemberKey) -> String {
        if let Some(name) = self.member_sets.get(&(id, key.family)) {
            return name.clone();
        }
        let (family, name) = (key.family, self.new_member_set(key));
        self.member_sets.insert((id, family), name.clone());
        name
    }

    fn new_member_set(&mut self, key: MemberKey) -> String {
        let (size, address) = (self.members.size(&key), KeyType::address(key.family));
        let kind = if key.port.is_some() { 'n' } else { 's' };
        let name = format!("{kind}{}-{:032x}-{size}", digit(key.family), hash(&(&key.pods, &key.port)));
        if !self.image.sets.contains_key(&name) {
            let fields = [address, KeyType::Protocol, KeyType::Port];
            let fields = if key.port.is_some() { &fields[..] } else { &fields[..1] };
            let mut set = Set::new(name.clone(), fields).with_size(size);
            set.comment = Some(words(&key));
            self.insert(ImageSet { set, content: Content::Members(key) });
        }
        name
    }

    fn addresses<'a>(&mut self, name: &str, family: Family, addresses: impl Iterator<Item = &'a IpAddr>) {
        let elements = addresses.map(|address| (Span::address(*address), None)).collect();
        self.insert(ImageSet::fixed(Set::new(name, &[KeyType::address(family)]), elements));
    }

    fn fixed_chains(&mut self) {
        let mut ingress = Chain::regular(INGRESS);
        for of in self.settings.families() {
            let map = format!("in{}", digit(of));
            ingress.rules.push(Rule::new([family(of), verdict_map(&[Field::Destination(of)], &map)]));
        }
        ingress.rules.push(Rule::new([goto(ACCEPTED)]));
        let mut midstream = Chain::regular(MIDSTREAM);
        let from_server = [source_port(Op::Lt, CLIENT_PORTS), destination_port(Op::Ge, CLIENT_PORTS)];
        midstream.rules = vec![Rule::new([protocol(Op::Eq, TCP), from_server.concat(), counter(), drop()])];
        let dropping = [INVALID, REPLY, UNKNOWN].map(|name| {
            let rules = vec![Rule::new([counter(), drop()])];
            Chain { rules, ..Chain::regular(name) }
        });
        let unknown = self.settings.strict;
        let chains = [ingress, midstream].into_iter().chain(dropping);
        let chains = chains.filter(|chain| chain.name != UNKNOWN || unknown);
        self.image.chains.extend(chains.map(|chain| (chain.name.clone(), chain)));
    }

    fn insert(&mut self, set: ImageSet) {
        self.image.sets.insert(set.set.name.clone(), set);
    }
}

/// What a set of members is about, for the reader of `nft list ruleset`.
fn words(key: &MemberKey) -> String {
    let mut words = match &key.pods {
        Some(pods) => pods.to_string(),
        None => "all pods".to_owned(),
    };
    if let Some((_, name)) = &key.port {
        words += &format!(", port {name}");
    }
    let end = (0..=COMMENT_MAX.min(words.len())).rev().find(|end| words.is_char_boundary(*end)).unwrap_or(0);
    words.truncate(end);
    words
}

/// A number for a content, the same in every run of the same build.
///
/// Users write what is hashed, so it is long enough that two contents with one number can't be found.
fn hash(content: &impl Hash) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, content).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(1) << 64 | half(2)
}
