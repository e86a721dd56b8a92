//! Messages of a dump as values. A message that lacks something never makes this panic: what can't be read is left
//! out.

use std::collections::BTreeMap;
use std::time::Duration;

use super::expr::Expr;
use super::expr_codec;
use super::model::{Base, Chain, Flowtable, Hook, Policy, Rule, Ruleset, Table, TableFamily, TableId};
use super::quota;
use super::set::{Data, DataType, Key, Set, Span, flags, preceding};
use super::uapi::*;
use crate::netlink::wire::{Message, attributes, find, find_string, find_u32, find_u64, messages, string};

impl Ruleset {
    /// Reads messages such as those of a dump, or those of a [`super::Transaction`] that makes tables.
    ///
    /// What can't be read, or belongs to no table among them, is left out.
    pub fn decode(bytes: &[u8]) -> Self {
        let mut assembly = Assembly::default();
        messages(bytes).for_each(|message| assembly.add(&message));
        assembly.finish()
    }
}

/// Puts a ruleset together from messages in the order tables, chains, sets, elements, rules.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    ruleset: Ruleset,
    tables: BTreeMap<TableId, usize>,
    chains: BTreeMap<(usize, String), usize>,
    sets: BTreeMap<(usize, String), usize>,
    /// The elements of sets whose ranges are written as two elements each, per set.
    halves: BTreeMap<(usize, usize), Vec<Half>>,
}

#[derive(Debug)]
struct Half {
    key: Vec<u8>,
    end: bool,
    data: Option<Data>,
}

impl Assembly {
    /// Adds what a `NEW...` message tells; those about tables that were not told before are passed over.
    pub(super) fn add(&mut self, message: &Message<'_>) {
        let read = match message.kind {
            message::NEWTABLE => self.table(message),
            message::NEWCHAIN => self.chain(message),
            message::NEWSET => self.set(message),
            message::NEWSETELEM => self.elements(message),
            message::NEWFLOWTABLE => self.flowtable(message),
            message::NEWOBJ => self.object(message),
            message::NEWRULE => self.rule(message),
            _ => Some(()),
        };
        if read.is_none() {
            tracing::debug!(kind = message.kind, "passing over an nftables message that can't be read");
        }
    }

    /// What was told so far, without the elements of sets.
    pub(super) fn ruleset(&self) -> &Ruleset {
        &self.ruleset
    }

    pub(super) fn finish(mut self) -> Ruleset {
        for ((table, set), halves) in std::mem::take(&mut self.halves) {
            self.ruleset.tables[table].sets[set].elements.extend(spans(halves));
        }
        self.ruleset
    }

    fn table(&mut self, message: &Message<'_>) -> Option<()> {
        let b = message.attributes();
        let id = table_id(message, NFTA_TABLE_NAME)?;
        let mut table = Table::new(id.clone());
        table.dormant = find_u32(b, NFTA_TABLE_FLAGS).unwrap_or(0) & NFT_TABLE_F_DORMANT != 0;
        table.comment = find(b, NFTA_TABLE_USERDATA).and_then(|data| comment(data, UDATA_COMMENT));
        match self.tables.get(&id) {
            Some(&again) => self.ruleset.tables[again] = table,
            None => {
                self.tables.insert(id, self.ruleset.tables.len());
                self.ruleset.tables.push(table);
            }
        }
        Some(())
    }

    fn chain(&mut self, message: &Message<'_>) -> Option<()> {
        let b = message.attributes();
        let id = table_id(message, NFTA_CHAIN_TABLE)?;
        let Some(&table) = self.tables.get(&id) else { return Some(()) };
        let name = find_string(b, NFTA_CHAIN_NAME)?;
        let chains = &mut self.ruleset.tables[table].chains;
        self.chains.insert((table, name.clone()), chains.len());
        chains.push(Chain {
            name,
            base: base(id.family, b),
            comment: find(b, NFTA_CHAIN_USERDATA).and_then(|data| comment(data, UDATA_COMMENT)),
            rules: Vec::new(),
        });
        Some(())
    }

    fn rule(&mut self, message: &Message<'_>) -> Option<()> {
        let b = message.attributes();
        let Some(&table) = self.tables.get(&table_id(message, NFTA_RULE_TABLE)?) else { return Some(()) };
        let chain = *self.chains.get(&(table, find_string(b, NFTA_RULE_CHAIN)?))?;
        self.ruleset.tables[table].chains[chain].rules.push(Rule {
            exprs: expr_codec::read_all(find(b, NFTA_RULE_EXPRESSIONS).unwrap_or_default()),
            comment: find(b, NFTA_RULE_USERDATA).and_then(|data| comment(data, UDATA_COMMENT)),
            handle: find_u64(b, NFTA_RULE_HANDLE),
        });
        Some(())
    }

    fn flowtable(&mut self, message: &Message<'_>) -> Option<()> {
        let b = message.attributes();
        let Some(&table) = self.tables.get(&table_id(message, NFTA_FLOWTABLE_TABLE)?) else {
            return Some(());
        };
        let hook = find(b, NFTA_FLOWTABLE_HOOK)?;
        let devices = attributes(find(hook, NFTA_FLOWTABLE_HOOK_DEVS).unwrap_or_default());
        self.ruleset.tables[table].flowtables.push(Flowtable {
            name: find_string(b, NFTA_FLOWTABLE_NAME)?,
            priority: find_u32(hook, NFTA_FLOWTABLE_HOOK_PRIORITY)?.cast_signed(),
            devices: devices.map(|(_, name)| string(name)).collect(),
            counter: find_u32(b, NFTA_FLOWTABLE_FLAGS).unwrap_or(0) & NFT_FLOWTABLE_COUNTER != 0,
        });
        Some(())
    }

    fn object(&mut self, message: &Message<'_>) -> Option<()> {
        let table = self.tables.get(&table_id(message, NFTA_OBJ_TABLE)?);
        if let Some((&table, quota)) = table.zip(quota::read(message.attributes())) {
            self.ruleset.tables[table].quotas.push(quota);
        }
        Some(())
    }

    fn set(&mut self, message: &Message<'_>) -> Option<()> {
        let b = message.attributes();
        let Some(&table) = self.tables.get(&table_id(message, NFTA_SET_TABLE)?) else { return Some(()) };
        let flags = find_u32(b, NFTA_SET_FLAGS).unwrap_or(0);
        let kind = find_u32(b, NFTA_SET_DATA_TYPE).unwrap_or(0);
        let len =
            if kind == DataType::VERDICT.kind { 0 } else { find_u32(b, NFTA_SET_DATA_LEN).unwrap_or(0) };
        let name = find_string(b, NFTA_SET_NAME)?;
        let sets = &mut self.ruleset.tables[table].sets;
        self.sets.insert((table, name.clone()), sets.len());
        sets.push(Set {
            name,
            key: Key {
                kind: find_u32(b, NFTA_SET_KEY_TYPE).unwrap_or(0),
                fields: fields(b).unwrap_or_else(|| find_u32(b, NFTA_SET_KEY_LEN).into_iter().collect()),
            },
            data: (flags & flags::MAP != 0).then_some(DataType { kind, len }),
            flags,
            timeout: find_u64(b, NFTA_SET_TIMEOUT).map(Duration::from_millis),
            comment: find(b, NFTA_SET_USERDATA).and_then(|data| comment(data, UDATA_SET_COMMENT)),
            size: size(b).filter(|_| flags & flags::CONSTANT == 0),
            elements: BTreeMap::new(),
            lifetimes: BTreeMap::new(),
        });
        Some(())
    }

    fn elements(&mut self, message: &Message<'_>) -> Option<()> {
        let b = message.attributes();
        let Some(&table) = self.tables.get(&table_id(message, NFTA_SET_ELEM_LIST_TABLE)?) else {
            return Some(());
        };
        let number = *self.sets.get(&(table, find_string(b, NFTA_SET_ELEM_LIST_SET)?))?;
        let set = &mut self.ruleset.tables[table].sets[number];
        for (_, element) in attributes(find(b, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default()) {
            // The element that stands for all other keys has none.
            let Some(key) = find(element, NFTA_SET_ELEM_KEY).and_then(expr_codec::read_value) else {
                continue;
            };
            let data = find(element, NFTA_SET_ELEM_DATA).and_then(|data| {
                let verdict = expr_codec::read_verdict(data).map(Data::Verdict);
                verdict.or_else(|| expr_codec::read_value(data).map(Data::Value))
            });
            if set.has_end_elements() {
                let end =
                    find_u32(element, NFTA_SET_ELEM_FLAGS).unwrap_or(0) & NFT_SET_ELEM_INTERVAL_END != 0;
                self.halves.entry((table, number)).or_default().push(Half { key, end, data });
            } else {
                let last = find(element, NFTA_SET_ELEM_KEY_END).and_then(expr_codec::read_value);
                let to = last.unwrap_or_else(|| key.clone());
                let span = Span { from: key, to };
                if let Some(left) = lifetime(element) {
                    set.lifetimes.insert(span.clone(), left);
                }
                set.elements.insert(span, data);
            }
        }
        Some(())
    }
}

/// The chain of a rule and the bytes that its counter has counted, if it has one.
pub(super) fn counted(message: &Message<'_>) -> Option<(String, u64)> {
    let b = message.attributes();
    let exprs = expr_codec::read_all(find(b, NFTA_RULE_EXPRESSIONS)?);
    let bytes = exprs.iter().find_map(|expr| match expr {
        Expr::Counter { bytes, .. } => Some(*bytes),
        _ => None,
    })?;
    Some((find_string(b, NFTA_RULE_CHAIN)?, bytes))
}

/// The table that a message names in its attribute `kind`.
pub(super) fn table_id(message: &Message<'_>, kind: u16) -> Option<TableId> {
    let family = TableFamily::from_number(message.family());
    find_string(message.attributes(), kind).map(|name| TableId { family, name })
}

/// Where a chain sees packets, from the attributes of a chain.
pub(super) fn base(family: TableFamily, chain: &[u8]) -> Option<Base> {
    let hook = find(chain, NFTA_CHAIN_HOOK)?;
    Some(Base {
        kind: find_string(chain, NFTA_CHAIN_TYPE).unwrap_or_default(),
        hook: Hook::from_number(family, find_u32(hook, NFTA_HOOK_HOOKNUM)?),
        priority: find_u32(hook, NFTA_HOOK_PRIORITY)?.cast_signed(),
        policy: if find_u32(chain, NFTA_CHAIN_POLICY) == Some(0) { Policy::Drop } else { Policy::Accept },
    })
}

fn size(set: &[u8]) -> Option<u32> {
    find_u32(find(set, NFTA_SET_DESC)?, NFTA_SET_DESC_SIZE)
}

/// What is left of an element's time.
fn lifetime(element: &[u8]) -> Option<Duration> {
    find_u64(element, NFTA_SET_ELEM_EXPIRATION).map(Duration::from_millis)
}

fn fields(set: &[u8]) -> Option<Vec<u32>> {
    let concat = find(find(set, NFTA_SET_DESC)?, NFTA_SET_DESC_CONCAT)?;
    Some(attributes(concat).filter_map(|(_, field)| find_u32(field, NFTA_SET_FIELD_LEN)).collect())
}

/// The text of the entry `kind` in user data.
fn comment(mut data: &[u8], kind: u8) -> Option<String> {
    loop {
        let ([found, len], rest) = data.split_first_chunk::<2>()?;
        let value = rest.get(..usize::from(*len))?;
        if *found == kind {
            return Some(string(value));
        }
        data = &rest[value.len()..];
    }
}

/// Puts ranges together again. The kernel tells the halves in no order to rely on.
fn spans(mut halves: Vec<Half>) -> Vec<(Span, Option<Data>)> {
    halves.sort_by(|a, b| a.key.cmp(&b.key).then(b.end.cmp(&a.end)));
    let mut spans: Vec<(Span, Option<Data>)> = Vec::with_capacity(halves.len() / 2);
    let mut open: Option<Half> = None;
    for half in halves {
        let begun = open.take();
        if let Some((start, to)) = begun.zip(preceding(&half.key)) {
            spans.push((Span { from: start.key, to }, start.data));
        }
        if !half.end {
            open = Some(half);
        }
    }
    if let Some(start) = open {
        let to = vec![0xff; start.key.len()];
        spans.push((Span { from: start.key, to }, start.data));
    }
    spans
}
