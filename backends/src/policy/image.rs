//! The tables as a value, and what has to change for one to become another; pure.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use subnet::Family;
use subnet::policy::Protocol;

use super::keys::Keys;
use super::selector::PodSelector;
use crate::nft::{Chain, Data, Expr, Rule, Set, Span, Table};

/// What the table holds: objects by name.
///
/// But for a few of fixed names, a name is a hash of the content, so most objects are never edited: they come
/// and go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) chains: BTreeMap<String, Arc<Chain>>,
    pub(super) sets: BTreeMap<String, Arc<ImageSet>>,
}

/// A set or map without its elements, and where these come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ImageSet {
    pub(super) set: Set,
    pub(super) content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// These.
    Fixed(BTreeMap<Span, Option<Data>>),
    /// Those of the set itself when it is made, which go by themselves.
    Volatile,
    /// The members of a selector, which change more often than anything else and are kept apart.
    Members(Arc<MemberKey>),
}

/// Whose addresses a set holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct MemberKey {
    /// These pods; `None` for all.
    pub(super) pods: Option<Arc<PodSelector>>,
    /// With each address, the ports of this protocol to which the pod gives this name.
    pub(super) port: Option<(Protocol, Box<str>)>,
    /// Addresses of this family.
    pub(super) family: Family,
}

impl MemberKey {
    /// The length of a key in bytes.
    pub(super) fn key_len(&self) -> usize {
        let address = if self.family == Family::V4 { 4 } else { 16 };
        address + if self.port.is_some() { super::keys::PORT_LEN } else { 0 }
    }
}

/// One part of what has to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// A chain comes, without rules yet.
    AddChain(Arc<Chain>),
    /// A set or map comes, with these elements.
    AddSet(Set),
    /// A set of single keys comes, with these, one after another.
    AddKeys(Set, Vec<u8>),
    /// A chain that has come without rules gets these.
    AddRules(Arc<Chain>),
    /// A chain that is there gets these rules instead of those that it has.
    Rules(Arc<Chain>),
    /// A set loses elements.
    DeleteElements(Set),
    /// A set gains elements.
    AddElements(Set),
    /// A chain loses its rules, before it goes.
    Empty(String),
    /// A map goes, with what leads from it to chains.
    DeleteMap(String),
    /// A chain goes.
    DeleteChain(String),
    /// A set goes.
    DeleteSet(String),
}

/// The members of sets, by whose they are.
pub(super) trait MembersOf {
    fn members(&self, key: &MemberKey) -> &Keys;
}

impl ImageSet {
    pub(super) fn fixed(set: Set, elements: BTreeMap<Span, Option<Data>>) -> Self {
        Self { set, content: Content::Fixed(elements) }
    }

    /// All elements.
    pub(super) fn elements(&self, members: &impl MembersOf) -> BTreeMap<Span, Option<Data>> {
        match &self.content {
            Content::Fixed(elements) => elements.clone(),
            Content::Volatile => self.set.elements.clone(),
            Content::Members(key) => members.members(key).iter().map(|key| (span(key), None)).collect(),
        }
    }

    pub(super) fn with(&self, elements: BTreeMap<Span, Option<Data>>) -> Set {
        Set { elements, ..self.set.clone() }
    }
}

/// A single key.
pub(super) fn span(key: &[u8]) -> Span {
    Span { from: key.into(), to: key.into() }
}

impl Image {
    /// The table that this is, with everything in it.
    pub(super) fn table(&self, empty: Table, members: &impl MembersOf) -> Table {
        Table {
            chains: self.chains.values().map(|chain| Chain::clone(chain)).collect(),
            sets: self.sets.values().map(|set| set.with(set.elements(members))).collect(),
            ..empty
        }
    }
}

/// What makes `wanted` of what the kernel has; `None` when what is there can't be changed into it, because an object
/// that has the right name is of another kind.
pub(super) fn diff_found(wanted: &Image, found: &Table, members: &impl MembersOf) -> Option<Vec<Edit>> {
    let chains: BTreeMap<&str, &Chain> =
        found.chains.iter().map(|chain| (chain.name.as_str(), chain)).collect();
    let sets: BTreeMap<&str, &Set> = found.sets.iter().map(|set| (set.name.as_str(), set)).collect();
    let mut edits = Edits::default();
    for (name, chain) in &wanted.chains {
        match chains.get(name.as_str()) {
            Some(known) if known.base != chain.base => return None,
            Some(known) if same_rules(&chain.rules, &known.rules) => {}
            Some(_) => edits.rules.push(Arc::clone(chain)),
            None => edits.add_chains.push(Arc::clone(chain)),
        }
    }
    for (name, want) in &wanted.sets {
        match (sets.get(name.as_str()), &want.content) {
            (Some(known), _) if !same_kind(&want.set, known) => return None,
            (Some(_), Content::Volatile) => {}
            (Some(known), Content::Fixed(elements)) => edits.elements(want, &known.elements, elements),
            (Some(known), Content::Members(key)) => {
                edits.keys(want, &known.elements, members.members(key));
            }
            (None, _) => edits.add_set(want, members),
        }
    }
    for chain in found.chains.iter().filter(|chain| !wanted.chains.contains_key(&chain.name)) {
        edits.delete_chains.push(chain.name.clone());
    }
    for set in found.sets.iter().filter(|set| !wanted.sets.contains_key(&set.name)) {
        edits.delete_set(set);
    }
    Some(edits.in_order())
}

/// What makes `wanted` of `known`, where the members of sets that stay are changed apart, by `deltas`.
///
/// Objects that both share are compared by their address, so it costs little but a walk over the names.
pub(super) fn diff(known: &Image, wanted: &Image, deltas: Vec<Delta>, members: &impl MembersOf) -> Vec<Edit> {
    let mut edits = Edits::default();
    if !std::ptr::eq(known, wanted) {
        pairs(&known.chains, &wanted.chains, |pair| match pair {
            Pair::Gone(chain) => edits.delete_chains.push(chain.name.clone()),
            Pair::New(chain) => edits.add_chains.push(Arc::clone(chain)),
            Pair::Both(before, chain) if before == chain => {}
            Pair::Both(_, chain) => edits.rules.push(Arc::clone(chain)),
        });
        pairs(&known.sets, &wanted.sets, |pair| match pair {
            Pair::Gone(set) => edits.delete_set(&set.set),
            Pair::New(set) => edits.add_set(set, members),
            Pair::Both(before, set) => {
                if let (Content::Fixed(before), Content::Fixed(after)) = (&before.content, &set.content) {
                    edits.elements(set, before, after);
                }
            }
        });
    }
    for delta in deltas {
        // One that is new has all of its members, one that goes needs none.
        let Some(set) = known.sets.get(&delta.set).filter(|_| wanted.sets.contains_key(&delta.set)) else {
            continue;
        };
        let spans =
            |keys: Vec<Vec<u8>>| keys.into_iter().map(|key| (span(&key), None)).collect::<BTreeMap<_, _>>();
        edits.change(set, spans(delta.removed), spans(delta.added));
    }
    edits.in_order()
}

/// What two maps have under one key.
enum Pair<'a, T> {
    Gone(&'a Arc<T>),
    New(&'a Arc<T>),
    Both(&'a Arc<T>, &'a Arc<T>),
}

/// Tells what differs between two maps by address or presence, in the order of the keys.
fn pairs<'a, T>(
    before: &'a BTreeMap<String, Arc<T>>,
    after: &'a BTreeMap<String, Arc<T>>,
    mut tell: impl FnMut(Pair<'a, T>),
) {
    let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let order = match (before.peek(), after.peek()) {
            (Some((old, _)), Some((new, _))) => old.cmp(new),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return,
        };
        let old = before.next_if(|_| order != Ordering::Greater).map(|(_, old)| old);
        let new = after.next_if(|_| order != Ordering::Less).map(|(_, new)| new);
        match (old, new) {
            (Some(old), Some(new)) if Arc::ptr_eq(old, new) => {}
            (Some(old), Some(new)) => tell(Pair::Both(old, new)),
            (Some(old), None) => tell(Pair::Gone(old)),
            (None, Some(new)) => tell(Pair::New(new)),
            (None, None) => return,
        }
    }
}

/// How the members of a set changed.
#[derive(Debug, Default)]
pub(super) struct Delta {
    pub(super) set: String,
    pub(super) added: Vec<Vec<u8>>,
    pub(super) removed: Vec<Vec<u8>>,
}

/// Edits by kind: what something leads to or uses is there before it, and goes after it.
#[derive(Default)]
struct Edits {
    add_chains: Vec<Arc<Chain>>,
    add_keys: Vec<(Set, Vec<u8>)>,
    add_sets: Vec<Set>,
    rules: Vec<Arc<Chain>>,
    delete_elements: Vec<Set>,
    add_elements: Vec<Set>,
    delete_chains: Vec<String>,
    delete_maps: Vec<String>,
    delete_sets: Vec<String>,
}

impl Edits {
    fn delete_set(&mut self, set: &Set) {
        let list = if set.data.is_some() { &mut self.delete_maps } else { &mut self.delete_sets };
        list.push(set.name.clone());
    }

    fn add_set(&mut self, set: &ImageSet, members: &impl MembersOf) {
        match &set.content {
            Content::Members(key) => {
                self.add_keys.push((set.set.clone(), members.members(key).bytes().to_vec()));
            }
            Content::Fixed(_) | Content::Volatile => self.add_sets.push(set.with(set.elements(members))),
        }
    }

    /// The same as [`Self::elements`] for a set of single keys, without making elements of those that stay.
    fn keys(&mut self, set: &ImageSet, before: &BTreeMap<Span, Option<Data>>, after: &Keys) {
        let stays = |span: &Span| span.from == span.to && after.contains(&span.from);
        let gone = before.iter().filter(|(found, _)| !stays(found));
        let gone: BTreeMap<_, _> = gone.map(|(span, data)| (span.clone(), data.clone())).collect();
        let mut new = BTreeMap::new();
        if before.len() - gone.len() != after.count() {
            new.extend(
                after.iter().map(|key| (span(key), None)).filter(|(span, _)| !before.contains_key(span)),
            );
        }
        self.change(set, gone, new);
    }

    fn elements(
        &mut self,
        set: &ImageSet,
        before: &BTreeMap<Span, Option<Data>>,
        after: &BTreeMap<Span, Option<Data>>,
    ) {
        let only = |these: &BTreeMap<Span, Option<Data>>, others: &BTreeMap<Span, Option<Data>>| {
            let differing = these.iter().filter(|(span, data)| others.get(span) != Some(data));
            differing.map(|(span, data)| (span.clone(), data.clone())).collect::<BTreeMap<_, _>>()
        };
        self.change(set, only(before, after), only(after, before));
    }

    fn change(
        &mut self,
        set: &ImageSet,
        removed: BTreeMap<Span, Option<Data>>,
        added: BTreeMap<Span, Option<Data>>,
    ) {
        if !removed.is_empty() {
            self.delete_elements.push(set.with(removed));
        }
        if !added.is_empty() {
            self.add_elements.push(set.with(added));
        }
    }

    /// A new chain is there before maps and rules that lead to it, and a set before rules that use it. A map of a
    /// pod is changed after what it leads to is complete. An element leaves before it comes with another verdict.
    ///
    /// The kernel finds a set by going through all of the table in the order in which they came. So sets come before
    /// maps: most rules name a set of addresses, and each map but those of pods is named by one rule.
    fn in_order(mut self) -> Vec<Edit> {
        self.add_sets.sort_by_key(|set| set.data.is_some());
        let empty = self.delete_chains.iter().cloned().map(Edit::Empty);
        let parts = self.add_chains.iter().cloned().map(Edit::AddChain);
        let parts = parts.chain(self.add_keys.into_iter().map(|(set, keys)| Edit::AddKeys(set, keys)));
        let parts = parts.chain(self.add_sets.into_iter().map(Edit::AddSet));
        let parts = parts.chain(self.add_chains.iter().cloned().map(Edit::AddRules));
        let parts = parts.chain(self.rules.into_iter().map(Edit::Rules));
        let parts = parts.chain(self.delete_elements.into_iter().map(Edit::DeleteElements));
        let parts = parts.chain(self.add_elements.into_iter().map(Edit::AddElements));
        let parts = parts.chain(empty);
        let parts = parts.chain(self.delete_maps.into_iter().map(Edit::DeleteMap));
        let parts = parts.chain(self.delete_chains.iter().cloned().map(Edit::DeleteChain));
        parts.chain(self.delete_sets.into_iter().map(Edit::DeleteSet)).collect()
    }
}

/// What counters counted makes no difference.
fn same_rules(wanted: &[Rule], found: &[Rule]) -> bool {
    let same = |want: &Expr, have: &Expr| {
        matches!((want, have), (Expr::Counter { .. }, Expr::Counter { .. })) || want == have
    };
    wanted.len() == found.len()
        && wanted.iter().zip(found).all(|(want, have)| {
            want.comment == have.comment
                && want.exprs.len() == have.exprs.len()
                && want.exprs.iter().zip(&have.exprs).all(|(want, have)| same(want, have))
        })
}

fn same_kind(wanted: &Set, found: &Set) -> bool {
    (wanted.flags, &wanted.key, wanted.data, wanted.size) == (found.flags, &found.key, found.data, found.size)
}
