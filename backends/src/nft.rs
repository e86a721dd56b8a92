//! nftables over netlink: whole tables replaced in one transaction, and read back as values.
//!
//! ```no_run
//! use backends::nft::{Base, Chain, Hook, Nft, Op, Rule, Table, TableFamily, TableId, differs, matches::*};
//!
//! let mut chain = Chain::base("forward", Base::filter(Hook::Forward, 0));
//! chain.rules.push(Rule::new([source(Op::Eq, "10.244.0.0/16".parse()?), accept()]));
//! let mut table = Table::new(TableId::new(TableFamily::Ip, "flannel-ipv4"));
//! table.chains.push(chain);
//!
//! let mut nft = Nft::open()?;
//! nft.apply(std::slice::from_ref(&table))?;
//! let found = nft.dump_tables(&[table.id.clone()])?;
//! assert_eq!(differs(&[table], &found), None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A table is as desired, or it is replaced; only elements of sets come and go one by one ([`Refit`]). [`NftListener`] tells when somebody
//! else touched it. What stands in other people's tables is only ever read, and changed rule by rule.

mod change;
mod compare;
mod decode;
mod describe;
mod encode;
mod expr;
mod expr_codec;
mod foreign;
mod listen;
pub mod matches;
mod model;
mod offloaded;
mod quota;
mod registers;
mod set;
mod socket;
mod state_codec;
pub mod trace;
mod uapi;

use std::collections::BTreeSet;
use std::io;

pub use change::{Change, Place};
pub use compare::{Refit, differs};
pub use describe::ruleset_text;
pub use encode::Transaction;
#[cfg(feature = "testing")]
pub(crate) use expr::Lookup;
pub(crate) use expr::{CtKey, MetaKey, PayloadBase, Reg};
pub use expr::{CtState, Expr, Op, Rate, Verdict, masquerade_flags};
#[cfg(any(test, feature = "testing"))]
pub use foreign::may_refuse;
pub use foreign::removal;
pub use listen::{Moved, NftListener, Watched};
pub use model::{
    Base, Chain, Flowtable, Hook, POLICY_TABLE, Policy, Rule, Ruleset, Table, TableFamily, TableId,
};
pub(crate) use model::{FAST_PATH_TABLE, fast_path_tables, name_with_network};
pub(crate) use offloaded::any_offloaded;
pub use quota::Quota;
pub(crate) use set::Data;
#[cfg(feature = "testing")]
pub(crate) use set::flags as set_flags;
pub use set::{KeyType, Set, Span};

use decode::Assembly;
use rustix::io::Errno;
use socket::{NftSocket, RefusedTransaction};
use uapi::*;

use crate::netlink::wire::{self, Writer};

/// How often a dump is repeated because something changed meanwhile. On a busy node somebody, such as
/// kube-proxy, changes something often, but hardly within each of so many milliseconds.
const DUMP_TRIES: usize = 20;

/// The kernel refuses, or can't be talked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// A part of a transaction was refused, so all of it was.
    #[error("{object}: {source}{details}")]
    Refused {
        /// What the refused message is about.
        object: String,
        /// The kernel's errno.
        #[source]
        source: io::Error,
        /// The kernel's own words, how much else was refused, and what to do.
        details: String,
    },
    /// Something can't be said to the kernel.
    #[error("{object}: {why}")]
    Invalid {
        /// What.
        object: String,
        /// Why.
        why: String,
    },
    /// The ruleset changed during every attempt to read it.
    #[error("the nftables ruleset changed during each of {DUMP_TRIES} attempts to read it")]
    Unsteady,
    /// The netlink conversation failed as a whole.
    #[error("nftables: {what}: {source}{remedy}", remedy = remedy(.source))]
    Netlink {
        /// What was being done.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The nftables of one network namespace.
pub struct Nft {
    socket: NftSocket,
}

impl Nft {
    /// Opens a socket in the calling thread's network namespace, to which it belongs from then on.
    ///
    /// # Errors
    /// [`NftError::Netlink`] when no netlink socket can be had.
    pub fn open() -> Result<Self, NftError> {
        let socket = NftSocket::open().map_err(failed("opening a netlink socket"))?;
        Ok(Self { socket })
    }

    /// The number by which a [`NftListener`] knows changes made through this value.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Makes each of these tables exactly as given, all of them or none.
    ///
    /// # Errors
    /// [`NftError::Refused`] names the first rule, set, ... that the kernel refused.
    pub fn apply(&mut self, wanted: &[Table]) -> Result<(), NftError> {
        let changes: Vec<Change<'_>> = wanted.iter().map(Change::Replace).collect();
        self.commit(&changes)
    }

    /// Makes all of these changes or none.
    ///
    /// # Errors
    /// [`NftError::Refused`] names the first rule, set, ... that the kernel refused.
    pub fn commit(&mut self, changes: &[Change<'_>]) -> Result<(), NftError> {
        if changes.is_empty() {
            return Ok(());
        }
        self.carry_out(&Transaction::new(changes, self.next_sequence())?)
    }

    /// The number that the next message gets.
    pub(crate) fn next_sequence(&self) -> u32 {
        self.socket.next_sequence()
    }

    /// Makes the changes of a transaction, or none of them.
    ///
    /// # Errors
    /// [`NftError::Refused`] names the first rule, set, ... that the kernel refused.
    pub(crate) fn carry_out(&mut self, transaction: &Transaction<'_>) -> Result<(), NftError> {
        let answer = self.socket.transact(transaction).map_err(failed("sending a transaction"))?;
        answer.map_err(|RefusedTransaction { position, refusal, others }| {
            let words = refusal.words.map(|words| format!(" ({words})")).unwrap_or_default();
            let others = match others {
                0 => String::new(),
                others => format!("; {others} more messages were refused"),
            };
            NftError::Refused {
                object: transaction.object(position),
                details: format!("{words}{}{others}", remedy(&refusal.error)),
                source: refusal.error,
            }
        })
    }

    /// The tables that there are.
    ///
    /// # Errors
    /// [`NftError::Netlink`] when they can't be read.
    pub(crate) fn table_ids(&mut self) -> Result<Vec<TableId>, NftError> {
        let mut found = Vec::new();
        let add = |message: &wire::Message<'_>| found.extend(decode::table_id(message, NFTA_TABLE_NAME));
        self.socket.dump(message::GETTABLE, 0, |_| {}, add).map_err(failed("reading tables"))?;
        Ok(found)
    }

    /// Reads everything.
    ///
    /// # Errors
    /// [`NftError::Netlink`], or [`NftError::Unsteady`] when others don't stop changing it.
    pub fn dump(&mut self) -> Result<Ruleset, NftError> {
        self.steadily(|nft| nft.read(|_| true))
    }

    /// Reads these tables; those that are not there are left out.
    ///
    /// # Errors
    /// As [`Self::dump`].
    pub fn dump_tables(&mut self, tables: &[TableId]) -> Result<Ruleset, NftError> {
        self.steadily(|nft| nft.read(|id| tables.contains(id)))
    }

    /// Reads the base chains of `hook` and the chains that their rules lead to, and nothing else: neither
    /// sets nor other chains, of which others can have very many.
    ///
    /// # Errors
    /// As [`Self::dump`].
    pub fn dump_hook(&mut self, hook: Hook) -> Result<Ruleset, NftError> {
        self.steadily(|nft| nft.read_hook(hook))
    }

    /// The bytes that the first counter of each chain of a table has counted, by chain; of a table that only its owner changes.
    ///
    /// # Errors
    /// [`NftError::Netlink`] when they can't be read.
    pub(crate) fn counters(&mut self, table: &TableId) -> Result<Vec<(String, u64)>, NftError> {
        let mut found = Vec::new();
        let of_table = |w: &mut wire::Writer| w.string(NFTA_RULE_TABLE, &table.name);
        let add = |message: &wire::Message<'_>| found.extend(decode::counted(message));
        self.socket
            .dump(message::GETRULE, table.family.number(), of_table, add)
            .map_err(failed("reading counters"))?;
        Ok(found)
    }

    /// Repeats `read` until nothing changed meanwhile.
    fn steadily(
        &mut self,
        read: impl Fn(&mut Self) -> io::Result<Option<Ruleset>>,
    ) -> Result<Ruleset, NftError> {
        for _ in 0..DUMP_TRIES {
            let before = self.generation()?;
            self.settle()?;
            let found = read(self).map_err(failed("reading the ruleset"))?;
            if let Some(found) = found
                && self.generation()? == before
            {
                return Ok(found);
            }
        }
        Err(NftError::Unsteady)
    }

    /// Waits until the transaction that made this generation is through.
    ///
    /// The generation changes when a transaction begins to take effect. Until it is through, replaced
    /// tables are still listed before those that replace them, and a dump of a table's rules by name gives
    /// those of the former: none. An empty transaction changes nothing, but has to wait for its turn.
    fn settle(&mut self) -> Result<(), NftError> {
        let nothing = Transaction::new(&[], self.socket.next_sequence())?;
        let answer =
            self.socket.transact(&nothing).and_then(|answer| answer.map_err(|refused| refused.refusal.error));
        answer.map_err(failed("waiting for the ruleset to settle"))
    }

    /// A number that each transaction raises by one, and sometimes by two.
    pub(crate) fn generation(&mut self) -> Result<u32, NftError> {
        let read = |attributes: &[u8]| wire::find_u32(attributes, NFTA_GEN_ID);
        self.socket.get(message::GETGEN, read).map_err(failed("reading the ruleset's generation"))
    }

    fn read(&mut self, wanted: impl Fn(&TableId) -> bool) -> io::Result<Option<Ruleset>> {
        let mut assembly = Assembly::default();
        let mut steady = self.read_tables(&mut assembly, wanted)?;
        let tables: Vec<TableId> = assembly.ruleset().tables.iter().map(|table| table.id.clone()).collect();
        for id in &tables {
            let family = id.family.number();
            let of_table = |kind| move |w: &mut Writer| w.string(kind, &id.name);
            steady &=
                self.socket.dump(message::GETSET, family, of_table(NFTA_SET_TABLE), |m| assembly.add(m))?;
            steady &=
                self.socket.dump(message::GETRULE, family, of_table(NFTA_RULE_TABLE), |m| assembly.add(m))?;
            steady &=
                self.socket.dump(message::GETFLOWTABLE, family, of_table(NFTA_FLOWTABLE_TABLE), |m| {
                    assembly.add(m)
                })?;
            steady &=
                self.socket.dump(message::GETOBJ, family, of_table(NFTA_OBJ_TABLE), |m| assembly.add(m))?;
            let sets = assembly.ruleset().table(id).map(|table| &table.sets).into_iter().flatten();
            for name in sets.map(|set| set.name.clone()).collect::<Vec<_>>() {
                let of_set = |w: &mut Writer| {
                    w.string(NFTA_SET_ELEM_LIST_TABLE, &id.name);
                    w.string(NFTA_SET_ELEM_LIST_SET, &name);
                };
                steady &= self.socket.dump(message::GETSETELEM, family, of_set, |m| assembly.add(m))?;
            }
        }
        Ok(steady.then(|| assembly.finish()))
    }

    fn read_hook(&mut self, hook: Hook) -> io::Result<Option<Ruleset>> {
        let mut assembly = Assembly::default();
        let mut steady = self.read_tables(&mut assembly, |_| true)?;
        let mut seen = BTreeSet::new();
        let chains = assembly.ruleset().hooked(hook);
        let mut todo: Vec<_> = chains.map(|(table, chain)| (table.id.clone(), chain.name.clone())).collect();
        while let Some((id, name)) = todo.pop() {
            if !seen.insert((id.clone(), name.clone())) {
                continue;
            }
            let of_chain = |w: &mut Writer| {
                w.string(NFTA_RULE_TABLE, &id.name);
                w.string(NFTA_RULE_CHAIN, &name);
            };
            let family = id.family.number();
            steady &= self.socket.dump(message::GETRULE, family, of_chain, |m| assembly.add(m))?;
            let chain = assembly.ruleset().table(&id).and_then(|table| table.chain(&name));
            let rules = chain.into_iter().flat_map(|chain| &chain.rules);
            todo.extend(rules.filter_map(|rule| Some((id.clone(), rule.leads_to()?.to_owned()))));
        }
        let mut found = assembly.finish();
        for table in &mut found.tables {
            table.chains.retain(|chain| seen.contains(&(table.id.clone(), chain.name.clone())));
        }
        found.tables.retain(|table| !table.chains.is_empty());
        Ok(steady.then_some(found))
    }

    /// Tables and chains without rules.
    fn read_tables(&mut self, into: &mut Assembly, wanted: impl Fn(&TableId) -> bool) -> io::Result<bool> {
        let mut steady = self.socket.dump(
            message::GETTABLE,
            0,
            |_| {},
            |message| {
                if decode::table_id(message, NFTA_TABLE_NAME).is_some_and(|id| wanted(&id)) {
                    into.add(message);
                }
            },
        )?;
        steady &= self.socket.dump(message::GETCHAIN, 0, |_| {}, |message| into.add(message))?;
        Ok(steady)
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> NftError {
    move |source| NftError::Netlink { what, source }
}

/// What to do about an errno that says little.
fn remedy(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::PERM) => "; this takes the capability NET_ADMIN",
        Some(Errno::NOENT) => {
            "; what it names is not there, or the kernel has no module for it (nft_masq, nft_ct, ...)"
        }
        Some(Errno::BUSY) => "; something else still uses it",
        Some(Errno::OPNOTSUPP) => {
            "; the kernel can't do this, or not in this chain: load nf_tables and nft_chain_nat"
        }
        Some(Errno::MSGSIZE) => {
            "; it doesn't fit into the send buffer: raise net.core.wmem_max, or give NET_ADMIN"
        }
        _ => "",
    }
}
