//! Notifications of the kernel, filtered down to "somebody else touched what matters here".

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use netlink_sys::protocols::NETLINK_NETFILTER;
use tokio::sync::Notify;

use super::NftError;
use super::decode::{base, table_id};
use super::model::{Hook, Ruleset, TableId};
use super::uapi::{NFNLGRP_NFTABLES, NFTA_CHAIN_NAME, NFTA_RULE_CHAIN, message};
use crate::netlink::multicast::{MulticastSocket, Received};
use crate::netlink::wire::{Message, find_string, messages};

/// Room for notifications that wait, in bytes; the kernel takes memory only for those that do. Our own
/// changes are notified, too, and thousands of rules and elements at once must not overrun it.
const WAITING: usize = 16 * 1024 * 1024;

/// Which changes matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// The sockets whose changes are our own, see [`super::Nft::port`].
    pub ports: BTreeSet<u32>,
    /// Tables of which every change matters.
    pub tables: BTreeSet<TableId>,
    /// Chains of other tables of which every change matters.
    pub chains: BTreeSet<(TableId, String)>,
    /// A hook at which every base chain that comes or goes matters, of any owner.
    pub hook: Option<Hook>,
}

impl Watched {
    /// Besides what is watched already, the base chains of `hook` in `found`, and those that come later.
    pub fn watch_hook(&mut self, hook: Hook, found: &Ruleset) {
        self.hook = Some(hook);
        let chains = found.hooked(hook).map(|(table, chain)| (table.id.clone(), chain.name.clone()));
        self.chains.extend(chains);
    }

    fn concerned_by(&self, message: &Message<'_>) -> Option<Moved> {
        if self.ports.contains(&message.port)
            || !(message::NEWTABLE..=message::DELSETELEM).contains(&message.kind)
                && !matches!(message.kind, message::NEWOBJ | message::NEWFLOWTABLE | message::DELFLOWTABLE)
        {
            return None;
        }
        // All these messages name the table in their attribute 1.
        let table = table_id(message, 1)?;
        if self.tables.contains(&table) {
            // Programs have numbers, the kernel has none.
            let used_up = message.kind == message::NEWOBJ && message.port == 0;
            return Some(if used_up { Moved::UsedUp(table) } else { Moved::Table(table) });
        }
        let chain = match message.kind {
            message::NEWCHAIN | message::DELCHAIN => find_string(message.attributes(), NFTA_CHAIN_NAME)?,
            message::NEWRULE | message::DELRULE => find_string(message.attributes(), NFTA_RULE_CHAIN)?,
            _ => return None,
        };
        let new = message.kind == message::NEWCHAIN
            && self.hook.is_some()
            && base(table.family, message.attributes()).map(|base| base.hook) == self.hook;
        let place = (table, chain);
        (new || self.chains.contains(&place)).then_some(Moved::Chain(place.0, place.1))
    }
}

/// What somebody else touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Something in a watched table, or the table.
    Table(TableId),
    /// Nobody: packets have used up a quota of a watched table.
    UsedUp(TableId),
    /// A watched chain of another table, or its rules.
    Chain(TableId, String),
    /// Notifications were lost, so it may be anything.
    Anything,
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(table) => write!(f, "table {table}"),
            Self::UsedUp(table) => write!(f, "a used-up quota in table {table}"),
            Self::Chain(table, chain) => write!(f, "chain {chain} in table {table}"),
            Self::Anything => f.write_str("anything"),
        }
    }
}

/// The receiving end of the kernel's notifications about nftables.
pub struct NftListener {
    socket: MulticastSocket,
}

impl NftListener {
    /// Subscribes in the calling thread's network namespace. Needs a running tokio reactor.
    ///
    /// # Errors
    /// [`NftError::Netlink`] when no netlink socket can be had.
    pub fn open() -> Result<Self, NftError> {
        let socket = MulticastSocket::subscribe(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES], Some(WAITING));
        let failed = |source| NftError::Netlink { what: "subscribing to notifications", source };
        Ok(Self { socket: socket.map_err(failed)? })
    }

    /// Waits until somebody else touches what is watched at that moment. Cancelling loses nothing but what
    /// was in the notification being looked at.
    ///
    /// # Errors
    /// [`NftError::Netlink`] when the socket fails.
    pub async fn moved(&self, watched: &Mutex<Watched>) -> Result<Moved, NftError> {
        let mut buffer = MulticastSocket::buffer();
        loop {
            let received = self.socket.receive(&mut buffer).await;
            match received.map_err(|source| NftError::Netlink { what: "receiving notifications", source })? {
                Received::Datagram(datagram) => {
                    let watched = watched.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(moved) = messages(datagram).find_map(|message| watched.concerned_by(&message))
                    {
                        return Ok(moved);
                    }
                }
                Received::Lost => return Ok(Moved::Anything),
            }
        }
    }

    /// Wakes `moved` whenever somebody else touches what is watched; ends only when the socket fails.
    pub async fn run(&self, watched: &Mutex<Watched>, moved: &Notify) -> NftError {
        loop {
            match self.moved(watched).await {
                Ok(what) => {
                    tracing::debug!(%what, "nftables: somebody else made a change");
                    moved.notify_one();
                }
                Err(error) => return error,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::netlink::wire::Writer;
    use crate::nft::model::TableFamily;
    use crate::nft::uapi::{NFPROTO_IPV4, NFTA_OBJ_TABLE};

    #[test]
    fn a_quota_that_packets_use_up_is_told_from_one_that_a_program_sets() {
        let table = TableId::new(TableFamily::Ip, "t");
        let watched = Watched { ports: [7].into(), tables: [table.clone()].into(), ..Watched::default() };
        let of = |name: &str, port: u32| {
            let mut w = Writer::default();
            w.string(NFTA_OBJ_TABLE, name);
            let payload = [vec![NFPROTO_IPV4, 0, 0, 0], w.into_bytes()].concat();
            watched.concerned_by(&Message {
                kind: message::NEWOBJ,
                flags: 0,
                sequence: 0,
                port,
                payload: &payload,
            })
        };
        assert_eq!(of("t", 0), Some(Moved::UsedUp(table.clone())));
        assert_eq!(of("t", 8), Some(Moved::Table(table)));
        assert_eq!((of("t", 7), of("u", 0)), (None, None));
    }

    proptest! {
        #[test]
        fn arbitrary_notifications_never_panic(kind in 2560u16..2580, port: u32, payload: Vec<u8>) {
            let tables = [TableId::new(TableFamily::Ip, "t")].into();
            let watched = Watched { tables, hook: Some(Hook::Forward), ..Watched::default() };
            watched.concerned_by(&Message { kind, flags: 0, sequence: 0, port, payload: &payload });
        }
    }
}
