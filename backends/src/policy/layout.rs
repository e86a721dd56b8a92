//! From classes to chains, maps and sets; pure. The text that `nft list ruleset` prints of it is in
//! `docs/adr/022-network-policy.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use subnet::Family;

use super::class::{Book, Member};
use super::generation::{FORWARD, Generations, OUTPUT};
use super::image::{Content, Image, ImageSet, span};
use super::keys;
use super::members::Members;
use super::parts::{ACCEPTED, Direction, Draw, INGRESS, Parts, by_direction};
use super::settings::{Settings, digit};
use crate::nft::matches::*;
use crate::nft::{
    Base, Chain, CtState, Data, Hook, KeyType, Op, POLICY_TABLE, Rule, Set, Span, Table, TableFamily, TableId,
};

/// Where it hangs: before other programs' chains, which see what this one accepts.
const PRIORITY: i32 = -5;
const MIDSTREAM: &str = "midstream";
const INVALID: &str = "invalid";
const REPLY: &str = "reply";
const UNKNOWN: &str = "unknown";

/// Ports from this one on are taken for a client's, those below for a server's.
const CLIENT_PORTS: u16 = 32768;

/// The table that filters.
pub(super) fn filter_table() -> TableId {
    TableId::new(TableFamily::Inet, POLICY_TABLE)
}

/// It without anything in it.
pub(super) fn empty_table() -> Table {
    Table { comment: Some("network policies, by flanneld".to_owned()), ..Table::new(filter_table()) }
}

/// All that the table holds, but for what belongs to generations.
pub(super) fn image(
    settings: &Settings,
    pods: &[Member],
    book: &Book,
    members: &Members,
    parts: &mut Parts,
) -> Image {
    let mut layout = Layout { settings, image: Image::default() };
    layout.pods(pods, Draw::new(settings, book, members, parts));
    for family in settings.families() {
        let name = format!("nodes{}", digit(family));
        let nodes = parts.nodes.entry(family).or_insert_with(|| {
            let nodes = settings.nodes.iter().filter(|address| Family::of(**address) == family);
            Arc::new(addresses(&name, family, nodes))
        });
        layout.image.sets.insert(name, Arc::clone(nodes));
        if settings.strict {
            let gateways =
                settings.nodes.iter().filter(|node| settings.subnets.iter().any(|net| net.contains(*node)));
            let known = pods.iter().flat_map(|pod| &pod.addresses).chain(gateways);
            let known = known.filter(|one| Family::of(**one) == family);
            layout.insert(addresses(&format!("known{}", digit(family)), family, known));
        }
    }
    layout.fixed_chains();
    layout.image
}

/// What changes with each generation: the number in the first rule and where it is written, and whose replies pass.
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
    image.chains.insert(ok.name.clone(), Arc::new(ok));
    let rules = judgement(settings, generations);
    if settings.ipvs {
        let mut rules = rules.clone();
        // What this node itself sends is not judged, as nothing is between a pod and its own node.
        rules.insert(1, Rule::new([source_is_local(), accept()]));
        let output = Chain { rules, ..Chain::base(OUTPUT, Base::filter(Hook::Output, PRIORITY)) };
        image.chains.insert(OUTPUT.to_owned(), Arc::new(output));
    } else {
        image.chains.remove(OUTPUT);
    }
    let forward = Chain { rules, ..Chain::base(FORWARD, Base::filter(Hook::Forward, PRIORITY)) };
    image.chains.insert(FORWARD.to_owned(), Arc::new(forward));
    // Elements that go by themselves are no part of what is compared.
    image.sets.retain(|name, _| !name.starts_with("fresh-"));
    let name = fresh.name.clone();
    image.sets.insert(name, Arc::new(ImageSet { set: fresh, content: Content::Volatile }));
}

/// From a packet that passes this node to what policies say of it.
fn judgement(settings: &Settings, generations: &Generations) -> Vec<Rule> {
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
    rules
}

/// Policies say nothing about these, and they are never routed.
fn multicast(of: Family) -> Vec<IpNet> {
    let nets: &[&str] = match of {
        Family::V4 => &["224.0.0.0/4", "255.255.255.255/32"],
        Family::V6 => &["ff00::/8"],
    };
    nets.iter().filter_map(|net| net.parse().ok()).collect()
}

struct Layout<'a> {
    settings: &'a Settings,
    image: Image,
}

impl Layout<'_> {
    fn pods(&mut self, pods: &[Member], mut draw: Draw<'_>) {
        let mut maps: BTreeMap<(Direction, Family), BTreeMap<Span, Option<Data>>> = BTreeMap::new();
        let mut policed = BTreeSet::new();
        for pod in pods {
            for (direction, allowed) in by_direction(pod) {
                let part = draw.class(direction, allowed);
                for address in &pod.addresses {
                    let verdict = Some(Data::Verdict(direction.to_class(part.chain.name.clone())));
                    maps.entry((direction, Family::of(*address)))
                        .or_default()
                        .insert(Span::address(*address), verdict);
                    policed.insert(*address);
                }
            }
        }
        self.image = draw.finish();
        for family in self.settings.families() {
            let digit = digit(family);
            let kind = KeyType::address(family);
            for direction in [Direction::Ingress, Direction::Egress] {
                let map = Set::verdict_map(format!("{}{digit}", direction.prefix()), &[kind]);
                let elements = maps.remove(&(direction, family)).unwrap_or_default();
                self.insert(ImageSet::fixed(map, elements));
            }
            let of_family = || policed.iter().filter(|address| Family::of(**address) == family);
            self.insert(addresses(&format!("pol{digit}"), family, of_family()));
            let pairs =
                of_family().map(|address| (span(&keys::of_address(*address).repeat(2)), None)).collect();
            self.insert(ImageSet::fixed(Set::new(format!("self{digit}"), &[kind, kind]), pairs));
        }
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
        self.image.chains.extend(chains.map(|chain| (chain.name.clone(), Arc::new(chain))));
    }

    fn insert(&mut self, set: ImageSet) {
        self.image.sets.insert(set.set.name.clone(), Arc::new(set));
    }
}

/// A set of addresses.
fn addresses<'a>(name: &str, family: Family, addresses: impl Iterator<Item = &'a IpAddr>) -> ImageSet {
    let elements = addresses.map(|address| (Span::address(*address), None)).collect();
    ImageSet::fixed(Set::new(name, &[KeyType::address(family)]), elements)
}
