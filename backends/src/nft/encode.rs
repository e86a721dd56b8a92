//! Changes as the messages of one transaction; pure.

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST};

use super::NftError;
use super::change::{Change, Origin, Part, Place};
use super::expr_codec;
use super::model::{Base, Chain, Flowtable, Policy, Rule, Table, TableId};
use super::quota;
use super::set::{Data, DataType, Set, Span, flags, following};
use super::uapi::*;
use crate::netlink::wire::{Head, Writer};

#[cfg(test)]
mod tests;

/// The longest name, `NFT_NAME_MAXLEN` without the zero.
const NAME_MAX: usize = 255;
/// The longest comment that `nft` shows, without the zero.
const COMMENT_MAX: usize = 127;
/// Elements per message in bytes, so that the attribute around them never exceeds 64 KiB.
const ELEMENTS_MAX: usize = 48 * 1024;

/// The messages for some changes, which take effect together or not at all.
#[derive(Debug)]
pub struct Transaction<'a> {
    changes: &'a [Change<'a>],
    /// The number of the first message.
    first: u32,
    bytes: Vec<u8>,
    /// What each message is about, but for the two that frame them.
    origins: Vec<Origin>,
}

impl<'a> Transaction<'a> {
    /// The messages, the first of which carries the number `sequence`.
    ///
    /// # Errors
    /// [`NftError::Invalid`] when something can't be said to the kernel, such as a name that is too long.
    pub fn new(changes: &'a [Change<'a>], sequence: u32) -> Result<Self, NftError> {
        let mut encoder =
            Encoder { changes, w: Writer::default(), sequence, origins: Vec::new(), last: 0, sets: 0 };
        encoder.frame(NFNL_MSG_BATCH_BEGIN);
        for (number, change) in changes.iter().enumerate() {
            encoder.change(number, change)?;
        }
        // Only the last message asks for an answer; the kernel reports failures in any case.
        if !encoder.origins.is_empty() {
            encoder.w.add_flags(encoder.last, NLM_F_ACK);
        }
        encoder.frame(NFNL_MSG_BATCH_END);
        Ok(Self { changes, first: sequence, bytes: encoder.w.into_bytes(), origins: encoder.origins })
    }

    /// All messages in one piece, as they have to be sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The number of the first message.
    pub(super) fn first(&self) -> u32 {
        self.first
    }

    /// How many messages there are between the two that frame them.
    pub(super) fn len(&self) -> usize {
        self.origins.len()
    }

    /// What the message at `position` is about; `None` is the transaction as a whole.
    pub(super) fn object(&self, position: Option<usize>) -> String {
        position
            .and_then(|position| self.origins.get(position))
            .map_or_else(|| "transaction".to_owned(), |origin| origin.words(self.changes))
    }
}

/// A message's headers. `resource` is the subsystem in the frame messages of a batch, else 0.
pub(super) fn head(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) -> Head {
    let [high, low] = resource.to_be_bytes();
    Head { kind, flags, sequence, own: [family, NFNETLINK_V0, high, low] }
}

struct Encoder<'a> {
    changes: &'a [Change<'a>],
    w: Writer,
    sequence: u32,
    origins: Vec<Origin>,
    /// Where the last message begins.
    last: usize,
    /// How many sets were made; each has a number of its own in a transaction.
    sets: u32,
}

impl Encoder<'_> {
    /// One of the two messages around the others.
    fn frame(&mut self, kind: u16) {
        let head = self.head(kind, NLM_F_REQUEST, 0, NFNL_SUBSYS_NFTABLES);
        self.w.message(head, |_| {});
    }

    fn head(&mut self, kind: u16, flags: u16, family: u8, resource: u16) -> Head {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        head(kind, flags, sequence, family, resource)
    }

    fn message(
        &mut self,
        origin: Origin,
        kind: u16,
        flags: u16,
        table: &TableId,
        body: impl FnOnce(&mut Writer),
    ) -> Result<(), NftError> {
        self.origins.push(origin);
        self.last = self.w.bytes().len();
        let head = self.head(kind, NLM_F_REQUEST | flags, table.family.number(), 0);
        self.w.message(head, body);
        if self.w.take_too_long() {
            return Err(self.invalid(origin, "longer than the 64 KiB that one attribute can hold".to_owned()));
        }
        Ok(())
    }

    fn invalid(&self, origin: Origin, why: String) -> NftError {
        NftError::Invalid { object: origin.words(self.changes), why }
    }

    fn change(&mut self, number: usize, change: &Change<'_>) -> Result<(), NftError> {
        let origin = Origin { change: number, part: Part::Whole };
        let elements = |first, last| Origin { change: number, part: Part::Elements(0, first, last) };
        match change {
            Change::Replace(table) => self.replace(number, table),
            Change::DeleteTable(id) => self.delete_table(origin, id),
            Change::DeleteChain { table, chain } => self.message(origin, message::DELCHAIN, 0, table, |w| {
                w.string(NFTA_CHAIN_TABLE, &table.name);
                w.string(NFTA_CHAIN_NAME, chain);
            }),
            Change::DeleteRule { table, chain, handle } => {
                self.message(origin, message::DELRULE, 0, table, |w| {
                    w.string(NFTA_RULE_TABLE, &table.name);
                    w.string(NFTA_RULE_CHAIN, chain);
                    w.u64(NFTA_RULE_HANDLE, *handle);
                })
            }
            Change::AddFlowtable { table, flowtable } => {
                self.flowtable(origin, message::NEWFLOWTABLE, table, flowtable)
            }
            Change::DeleteDevices { table, flowtable } => {
                self.flowtable(origin, message::DELFLOWTABLE, table, flowtable)
            }
            Change::AddElements { table, set } => self.elements(message::NEWSETELEM, elements, table, set),
            Change::AddKeys { table, set, keys } => self.keys(elements, table, set, keys),
            Change::DeleteElements { table, set } => self.elements(message::DELSETELEM, elements, table, set),
            Change::AddRule { table, chain, rule, place } => self.rule(origin, table, chain, rule, *place),
            Change::AddTable(table) => self.message(origin, message::NEWTABLE, NLM_F_CREATE, table, |w| {
                w.string(NFTA_TABLE_NAME, &table.name);
            }),
            Change::AddOwnedTable(table) => {
                self.message(origin, message::NEWTABLE, NLM_F_CREATE, table, |w| {
                    w.string(NFTA_TABLE_NAME, &table.name);
                    w.u32(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER);
                })
            }
            Change::AddChain { table, chain } => {
                self.chain(origin, table, chain)?;
                self.rules(number, table, chain)
            }
            Change::AddBareChain { table, chain } => self.chain(origin, table, chain),
            Change::AddRules { table, chain } => self.rules(number, table, chain),
            Change::FlushChain { table, chain } => self.message(origin, message::DELRULE, 0, table, |w| {
                w.string(NFTA_RULE_TABLE, &table.name);
                w.string(NFTA_RULE_CHAIN, chain);
            }),
            Change::AddSet { table, set } => {
                self.set(origin, table, set)?;
                self.elements(message::NEWSETELEM, elements, table, set)
            }
            Change::DeleteSet { table, set } => self.message(origin, message::DELSET, 0, table, |w| {
                w.string(NFTA_SET_TABLE, &table.name);
                w.string(NFTA_SET_NAME, set);
            }),
        }
    }

    /// Deletion of what isn't there is refused, so it is added first.
    fn delete_table(&mut self, origin: Origin, id: &TableId) -> Result<(), NftError> {
        self.check_name(origin, &id.name)?;
        self.message(origin, message::NEWTABLE, NLM_F_CREATE, id, |w| w.string(NFTA_TABLE_NAME, &id.name))?;
        self.message(origin, message::DELTABLE, 0, id, |w| w.string(NFTA_TABLE_NAME, &id.name))
    }

    /// Chains come before what leads to them, sets with their elements before the rules that use them.
    fn replace(&mut self, number: usize, table: &Table) -> Result<(), NftError> {
        let at = |part| Origin { change: number, part };
        let id = &table.id;
        self.delete_table(at(Part::Whole), id)?;
        let comment = self.comment(at(Part::Whole), table.comment.as_deref())?;
        self.message(at(Part::Whole), message::NEWTABLE, NLM_F_CREATE, id, |w| {
            w.string(NFTA_TABLE_NAME, &id.name);
            w.u32(NFTA_TABLE_FLAGS, if table.dormant { NFT_TABLE_F_DORMANT } else { 0 });
            user_data(w, NFTA_TABLE_USERDATA, &comment);
        })?;
        for (i, chain) in table.chains.iter().enumerate() {
            self.chain(at(Part::Chain(i)), id, chain)?;
        }
        for (i, set) in table.sets.iter().enumerate() {
            self.set(at(Part::Set(i)), id, set)?;
            let part = |first, last| at(Part::Elements(i, first, last));
            self.elements(message::NEWSETELEM, part, id, set)?;
        }
        for quota in &table.quotas {
            let body = |w: &mut Writer| quota::write(w, &id.name, quota);
            self.message(at(Part::Whole), message::NEWOBJ, NLM_F_CREATE, id, body)?;
        }
        for (i, flowtable) in table.flowtables.iter().enumerate() {
            self.flowtable(at(Part::Flowtable(i)), message::NEWFLOWTABLE, id, flowtable)?;
        }
        for (i, chain) in table.chains.iter().enumerate() {
            for (j, rule) in chain.rules.iter().enumerate() {
                self.rule(at(Part::Rule(i, j)), id, &chain.name, rule, Place::Last)?;
            }
        }
        Ok(())
    }

    fn chain(&mut self, origin: Origin, table: &TableId, chain: &Chain) -> Result<(), NftError> {
        self.check_name(origin, &chain.name)?;
        let comment = self.comment(origin, chain.comment.as_deref())?;
        self.message(origin, message::NEWCHAIN, NLM_F_CREATE, table, |w| {
            w.string(NFTA_CHAIN_TABLE, &table.name);
            w.string(NFTA_CHAIN_NAME, &chain.name);
            if let Some(Base { kind, hook, priority, policy }) = &chain.base {
                w.nest(NFTA_CHAIN_HOOK, |w| {
                    w.u32(NFTA_HOOK_HOOKNUM, hook.number());
                    w.u32(NFTA_HOOK_PRIORITY, priority.cast_unsigned());
                });
                w.u32(NFTA_CHAIN_POLICY, u32::from(*policy == Policy::Accept));
                w.string(NFTA_CHAIN_TYPE, kind);
            }
            user_data(w, NFTA_CHAIN_USERDATA, &comment);
        })
    }

    fn rules(&mut self, number: usize, table: &TableId, chain: &Chain) -> Result<(), NftError> {
        for (i, rule) in chain.rules.iter().enumerate() {
            let origin = Origin { change: number, part: Part::Rule(0, i) };
            self.rule(origin, table, &chain.name, rule, Place::Last)?;
        }
        Ok(())
    }

    fn rule(
        &mut self,
        origin: Origin,
        table: &TableId,
        chain: &str,
        rule: &Rule,
        place: Place,
    ) -> Result<(), NftError> {
        let comment = self.comment(origin, rule.comment.as_deref())?;
        let flags = NLM_F_CREATE | if place == Place::Last { NLM_F_APPEND } else { 0 };
        self.message(origin, message::NEWRULE, flags, table, |w| {
            w.string(NFTA_RULE_TABLE, &table.name);
            w.string(NFTA_RULE_CHAIN, chain);
            if let Place::Before(handle) = place {
                w.u64(NFTA_RULE_POSITION, handle);
            }
            w.nest(NFTA_RULE_EXPRESSIONS, |w| rule.exprs.iter().for_each(|expr| expr_codec::write(w, expr)));
            user_data(w, NFTA_RULE_USERDATA, &comment);
        })
    }

    fn set(&mut self, origin: Origin, table: &TableId, set: &Set) -> Result<(), NftError> {
        self.check_name(origin, &set.name)?;
        self.sets += 1;
        let id = self.sets;
        let mut user = udata(UDATA_SET_KEY_ORDER, &set.key.byte_order().to_ne_bytes());
        if let Some(comment) = &set.comment {
            user.extend(self.text(origin, UDATA_SET_COMMENT, comment)?);
        }
        self.message(origin, message::NEWSET, NLM_F_CREATE, table, |w| {
            w.string(NFTA_SET_TABLE, &table.name);
            w.string(NFTA_SET_NAME, &set.name);
            w.u32(NFTA_SET_ID, id);
            w.u32(NFTA_SET_FLAGS, set.flags);
            w.u32(NFTA_SET_KEY_TYPE, set.key.kind);
            w.u32(NFTA_SET_KEY_LEN, set.key.len());
            if let Some(DataType { kind, len }) = set.data {
                w.u32(NFTA_SET_DATA_TYPE, kind);
                w.u32(NFTA_SET_DATA_LEN, len);
            }
            if let Some(timeout) = set.timeout {
                w.u64(NFTA_SET_TIMEOUT, timeout.as_millis() as u64);
            }
            w.nest(NFTA_SET_DESC, |w| {
                let constant = set.flags & (flags::CONSTANT | flags::INTERVAL) == flags::CONSTANT;
                if let Some(size) = set.size.or_else(|| constant.then_some(set.elements.len() as u32)) {
                    w.u32(NFTA_SET_DESC_SIZE, size);
                }
                if set.flags & flags::CONCAT != 0 {
                    w.nest(NFTA_SET_DESC_CONCAT, |w| {
                        for len in &set.key.fields {
                            w.nest(NFTA_LIST_ELEM, |w| w.u32(NFTA_SET_FIELD_LEN, *len));
                        }
                    });
                }
            });
            user_data(w, NFTA_SET_USERDATA, &user);
        })
    }

    /// Adds a flowtable, or devices to it, or takes devices out of it.
    fn flowtable(
        &mut self,
        origin: Origin,
        kind: u16,
        table: &TableId,
        flowtable: &Flowtable,
    ) -> Result<(), NftError> {
        self.check_name(origin, &flowtable.name)?;
        let new = kind == message::NEWFLOWTABLE;
        self.message(origin, kind, if new { NLM_F_CREATE } else { 0 }, table, |w| {
            w.string(NFTA_FLOWTABLE_TABLE, &table.name);
            w.string(NFTA_FLOWTABLE_NAME, &flowtable.name);
            w.nest(NFTA_FLOWTABLE_HOOK, |w| {
                w.u32(NFTA_FLOWTABLE_HOOK_NUM, NF_NETDEV_INGRESS);
                w.u32(NFTA_FLOWTABLE_HOOK_PRIORITY, flowtable.priority.cast_unsigned());
                w.nest(NFTA_FLOWTABLE_HOOK_DEVS, |w| {
                    flowtable.devices.iter().for_each(|device| w.string(NFTA_DEVICE_NAME, device));
                });
            });
            if new && flowtable.counter {
                w.u32(NFTA_FLOWTABLE_FLAGS, NFT_FLOWTABLE_COUNTER);
            }
        })
    }

    /// Several messages, none of them with half a range.
    fn elements(
        &mut self,
        kind: u16,
        at: impl Fn(usize, usize) -> Origin,
        table: &TableId,
        set: &Set,
    ) -> Result<(), NftError> {
        let mut list = Writer::default();
        let mut first = 0;
        for (i, (span, data)) in set.elements.iter().enumerate() {
            if span.from.len() != set.key.len() as usize || span.to.len() != span.from.len() {
                let why = format!("{} bytes long where keys have {}", span.from.len(), set.key.len());
                return Err(self.invalid(at(i, i), why));
            }
            element(&mut list, set, span, data.as_ref());
            if list.bytes().len() > ELEMENTS_MAX || i + 1 == set.elements.len() {
                let flags = if kind == message::NEWSETELEM { NLM_F_CREATE } else { 0 };
                self.message(at(first, i), kind, flags, table, |w| {
                    w.string(NFTA_SET_ELEM_LIST_TABLE, &table.name);
                    w.string(NFTA_SET_ELEM_LIST_SET, &set.name);
                    w.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |w| w.raw(list.bytes()));
                })?;
                list.clear();
                first = i + 1;
            }
        }
        Ok(())
    }

    /// The same messages as of [`Self::elements`] for single keys without anything else.
    fn keys(
        &mut self,
        at: impl Fn(usize, usize) -> Origin,
        table: &TableId,
        set: &Set,
        keys: &[u8],
    ) -> Result<(), NftError> {
        let len = set.key.len() as usize;
        if len == 0
            || !keys.len().is_multiple_of(len)
            || set.data.is_some()
            || set.flags & flags::INTERVAL != 0
        {
            let why = format!("{} bytes are no keys of {len} bytes each of a set", keys.len());
            return Err(self.invalid(at(0, 0), why));
        }
        // Elements differ in nothing but the key, which is what they end with.
        let mut template = Writer::default();
        let zero = vec![0; len];
        element(&mut template, set, &Span { from: zero.clone(), to: zero }, None);
        let padding = len.next_multiple_of(4) - len;
        let (before, _) = template.bytes().split_at(template.bytes().len() - len - padding);
        let in_message = ELEMENTS_MAX / template.bytes().len() + 1;
        for (i, part) in keys.chunks(in_message * len).enumerate() {
            let first = i * in_message;
            let origin = at(first, first + part.len() / len - 1);
            self.message(origin, message::NEWSETELEM, NLM_F_CREATE, table, |w| {
                w.string(NFTA_SET_ELEM_LIST_TABLE, &table.name);
                w.string(NFTA_SET_ELEM_LIST_SET, &set.name);
                w.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |w| {
                    for key in part.chunks_exact(len) {
                        w.raw(before);
                        w.raw(key);
                        w.raw(&[0; 4][..padding]);
                    }
                });
            })?;
        }
        Ok(())
    }

    fn check_name(&self, origin: Origin, name: &str) -> Result<(), NftError> {
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            let why = format!("the name {name:?} must be 1 to {NAME_MAX} bytes long and without a zero byte");
            return Err(self.invalid(origin, why));
        }
        Ok(())
    }

    fn comment(&self, origin: Origin, comment: Option<&str>) -> Result<Vec<u8>, NftError> {
        comment.map_or(Ok(Vec::new()), |comment| self.text(origin, UDATA_COMMENT, comment))
    }

    fn text(&self, origin: Origin, kind: u8, text: &str) -> Result<Vec<u8>, NftError> {
        if text.len() > COMMENT_MAX || text.contains('\0') {
            let why = format!(
                "the comment {text:?} must be at most {COMMENT_MAX} bytes long and without a zero byte"
            );
            return Err(self.invalid(origin, why));
        }
        Ok(udata(kind, &[text.as_bytes(), &[0]].concat()))
    }
}

fn element(w: &mut Writer, set: &Set, span: &Span, data: Option<&Data>) {
    w.nest(NFTA_LIST_ELEM, |w| {
        expr_codec::value(w, NFTA_SET_ELEM_KEY, &span.from);
        if set.flags & flags::INTERVAL != 0 && !set.has_end_elements() {
            expr_codec::value(w, NFTA_SET_ELEM_KEY_END, &span.to);
        }
        match data {
            Some(Data::Verdict(verdict)) => {
                w.nest(NFTA_SET_ELEM_DATA, |w| expr_codec::write_verdict(w, verdict))
            }
            Some(Data::Value(bytes)) => expr_codec::value(w, NFTA_SET_ELEM_DATA, bytes),
            None => {}
        }
        if let Some(lifetime) = set.lifetimes.get(span) {
            w.u64(NFTA_SET_ELEM_TIMEOUT, lifetime.as_millis() as u64);
        }
    });
    // A range up to the highest key has no end.
    if set.has_end_elements()
        && let Some(end) = following(&span.to)
    {
        w.nest(NFTA_LIST_ELEM, |w| {
            expr_codec::value(w, NFTA_SET_ELEM_KEY, &end);
            w.u32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
        });
    }
}

/// One entry of user data as `nft` lays it out: kind, length, value.
fn udata(kind: u8, value: &[u8]) -> Vec<u8> {
    let mut entry = vec![kind, value.len() as u8];
    entry.extend(value);
    entry
}

fn user_data(w: &mut Writer, kind: u16, entries: &[u8]) {
    if !entries.is_empty() {
        w.bytes_attribute(kind, entries);
    }
}
