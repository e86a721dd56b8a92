//! Rules of nf_tables, as many as port mappings need: written in one transaction, read back by their comments.

use std::net::IpAddr;

use super::Errno;
use super::address::{family as address_family, octets};
use super::message::{Message, Reply, attribute, attributes, text};
use super::socket::{Refusal, Socket};

/// Numbers of `linux/netfilter/nf_tables.h`, `nfnetlink.h` and `nf_nat.h`.
mod abi {
    pub(super) const SUBSYSTEM: u16 = 10;
    pub(super) const BATCH_BEGIN: u16 = 16;
    pub(super) const BATCH_END: u16 = 17;
    pub(super) const NEWTABLE: u16 = SUBSYSTEM << 8;
    pub(super) const NEWCHAIN: u16 = SUBSYSTEM << 8 | 3;
    pub(super) const DELCHAIN: u16 = SUBSYSTEM << 8 | 5;
    pub(super) const NEWRULE: u16 = SUBSYSTEM << 8 | 6;
    pub(super) const GETRULE: u16 = SUBSYSTEM << 8 | 7;
    pub(super) const DELRULE: u16 = SUBSYSTEM << 8 | 8;
    pub(super) const GETGEN: u16 = SUBSYSTEM << 8 | 16;
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const TABLE_USERDATA: u16 = 6;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_POLICY: u16 = 5;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_NUMBER: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_HANDLE: u16 = 3;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const RULE_USERDATA: u16 = 7;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const EXPR_NAME: u16 = 1;
    pub(super) const EXPR_DATA: u16 = 2;
    pub(super) const DATA_VALUE: u16 = 1;
    pub(super) const DATA_VERDICT: u16 = 2;
    pub(super) const VERDICT_CODE: u16 = 1;
    pub(super) const VERDICT_CHAIN: u16 = 2;
    pub(super) const JUMP: i32 = -3;
    pub(super) const REG_VERDICT: u32 = 0;
    pub(super) const REG_1: u32 = 1;
    pub(super) const REG_2: u32 = 2;
    pub(super) const RTN_LOCAL: u32 = 2;
}

/// `NFPROTO_IPV4` or `NFPROTO_IPV6`: the family of a table.
pub(crate) fn family(ipv6: bool) -> u8 {
    if ipv6 { 10 } else { 2 }
}

/// The fixed part of messages: family, version, and a number that only batches use.
fn fixed(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn be(number: u32) -> [u8; 4] {
    number.to_be_bytes()
}

/// Types of user data: what `nft` shows as the comment, and what it passes over.
const COMMENT: u8 = 0;
const NETWORK: u8 = 0xF1;
/// As much user data as the kernel takes for a rule.
const MAX_USERDATA: usize = 256;

/// User data as the `nft` program writes a comment: type, length, text, and a zero byte.
fn userdata(kind: u8, value: &str) -> Vec<u8> {
    let length = u8::try_from(value.len() + 1).unwrap_or(u8::MAX);
    let mut bytes = vec![kind, length];
    bytes.extend(value.as_bytes().iter().take(usize::from(length) - 1));
    bytes.push(0);
    bytes
}

/// Whose a rule is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner<'a> {
    /// The comment, which tells it to `nft` and to Go's plugin too.
    pub(crate) container: &'a str,
    /// Left out if there is no room for it.
    pub(crate) network: &'a str,
}

impl Owner<'_> {
    fn userdata(&self) -> Vec<u8> {
        let mut bytes = userdata(COMMENT, self.container);
        let network = userdata(NETWORK, self.network);
        if bytes.len() + network.len() <= MAX_USERDATA {
            bytes.extend(network);
        }
        bytes
    }
}

/// As long as a comment can be.
pub(crate) const MAX_COMMENT: usize = 253;

/// A table, unless it is there.
pub(crate) fn table(family: u8, name: &str, comment: &str) -> Message {
    let message = Message::new(abi::NEWTABLE, libc::NLM_F_CREATE | libc::NLM_F_ACK, &fixed(family, 0));
    message.with_text(abi::TABLE_NAME, name).with(abi::TABLE_USERDATA, &userdata(COMMENT, comment))
}

/// Where a base chain of type nat hooks in, and its priority.
pub(crate) type Hook = (u32, i32);

/// A chain, unless it is there.
pub(crate) fn chain(family: u8, table: &str, name: &str, hook: Option<Hook>) -> Message {
    let message = Message::new(abi::NEWCHAIN, libc::NLM_F_CREATE | libc::NLM_F_ACK, &fixed(family, 0));
    let message = message.with_text(abi::CHAIN_TABLE, table).with_text(abi::CHAIN_NAME, name);
    let Some((number, priority)) = hook else { return message };
    let message = message.nested(abi::CHAIN_HOOK, |hook| {
        hook.with(abi::HOOK_NUMBER, &be(number)).with(abi::HOOK_PRIORITY, &priority.to_be_bytes())
    });
    message.with(abi::CHAIN_POLICY, &be(1)).with_text(abi::CHAIN_TYPE, "nat")
}

/// Removes all rules of a chain.
pub(crate) fn flush(family: u8, table: &str, chain: &str) -> Message {
    let message = Message::new(abi::DELRULE, libc::NLM_F_ACK, &fixed(family, 0));
    message.with_text(abi::RULE_TABLE, table).with_text(abi::RULE_CHAIN, chain)
}

/// Removes one rule.
pub(crate) fn delete_rule(family: u8, table: &str, rule: &Rule) -> Message {
    flush(family, table, &rule.chain).with(abi::RULE_HANDLE, &rule.handle.to_be_bytes())
}

/// Removes a chain without rules.
pub(crate) fn delete_chain(family: u8, table: &str, chain: &str) -> Message {
    let message = Message::new(abi::DELCHAIN, libc::NLM_F_ACK, &fixed(family, 0));
    message.with_text(abi::CHAIN_TABLE, table).with_text(abi::CHAIN_NAME, chain)
}

/// One expression of a rule.
pub(crate) enum Expr {
    /// The source or destination address is this one.
    Source(IpAddr),
    Destination(IpAddr),
    /// The destination is an address of the host.
    DestinationIsLocal,
    /// The packet is of this transport protocol, and has this destination port.
    Port(u8, u16),
    /// The packet goes to this address and port instead.
    Dnat(IpAddr, u16),
    /// The packet gets the address of the link that it leaves by.
    Masquerade,
    Jump(&'static str),
}

/// A rule at the end of a chain.
pub(crate) fn rule(
    family: u8,
    table: &str,
    chain: &str,
    exprs: &[Expr],
    owner: Option<Owner<'_>>,
) -> Message {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND | libc::NLM_F_ACK;
    let message = Message::new(abi::NEWRULE, flags, &fixed(family, 0));
    let message = message.with_text(abi::RULE_TABLE, table).with_text(abi::RULE_CHAIN, chain);
    let message = message.nested(abi::RULE_EXPRESSIONS, |list| exprs.iter().fold(list, add_expr));
    match owner {
        Some(owner) => message.with(abi::RULE_USERDATA, &owner.userdata()),
        None => message,
    }
}

fn add_expr(list: Message, expr: &Expr) -> Message {
    match *expr {
        Expr::Source(address) => {
            let offset = if address.is_ipv4() { 12 } else { 8 };
            equal(payload(list, 1, offset, octets(address).len()), &octets(address))
        }
        Expr::Destination(address) => {
            let offset = if address.is_ipv4() { 16 } else { 24 };
            equal(payload(list, 1, offset, octets(address).len()), &octets(address))
        }
        Expr::DestinationIsLocal => {
            // Result 3 is the type of the address, flag 2 is about the destination.
            let list =
                named(list, "fib", |data| data.with(1, &be(abi::REG_1)).with(2, &be(3)).with(3, &be(2)));
            equal(list, &abi::RTN_LOCAL.to_ne_bytes())
        }
        Expr::Port(protocol, port) => {
            // Key 16 is the transport protocol.
            let list = named(list, "meta", |data| data.with(1, &be(abi::REG_1)).with(2, &be(16)));
            equal(payload(equal(list, &[protocol]), 2, 2, 2), &port.to_be_bytes())
        }
        Expr::Dnat(address, port) => {
            let list = immediate(list, abi::REG_1, &octets(address));
            let list = immediate(list, abi::REG_2, &port.to_be_bytes());
            let family = if address_family(address) == libc::AF_INET6 { 10 } else { 2 };
            named(list, "nat", |data| {
                data.with(1, &be(1)).with(2, &be(family)).with(3, &be(abi::REG_1)).with(5, &be(abi::REG_2))
            })
        }
        Expr::Masquerade => named(list, "masq", |data| data),
        Expr::Jump(chain) => named(list, "immediate", |data| {
            data.with(1, &be(abi::REG_VERDICT)).nested(2, |value| {
                value.nested(abi::DATA_VERDICT, |verdict| {
                    verdict
                        .with(abi::VERDICT_CODE, &abi::JUMP.to_be_bytes())
                        .with_text(abi::VERDICT_CHAIN, chain)
                })
            })
        }),
    }
}

fn named(list: Message, name: &str, data: impl FnOnce(Message) -> Message) -> Message {
    list.nested(abi::LIST_ELEMENT, |one| one.with_text(abi::EXPR_NAME, name).nested(abi::EXPR_DATA, data))
}

/// Loads bytes of a header: 1 is the network's, 2 the transport's.
fn payload(list: Message, base: u32, offset: u32, length: usize) -> Message {
    named(list, "payload", |data| {
        data.with(1, &be(abi::REG_1)).with(2, &be(base)).with(3, &be(offset)).with(4, &be(length as u32))
    })
}

fn equal(list: Message, value: &[u8]) -> Message {
    named(list, "cmp", |data| {
        data.with(1, &be(abi::REG_1)).with(2, &be(0)).nested(3, |data| data.with(abi::DATA_VALUE, value))
    })
}

fn immediate(list: Message, register: u32, value: &[u8]) -> Message {
    named(list, "immediate", |data| {
        data.with(1, &be(register)).nested(2, |data| data.with(abi::DATA_VALUE, value))
    })
}

/// Carries out changes, all of them or none.
///
/// # Errors
/// The first refusal.
pub(crate) fn commit(socket: &mut Socket, changes: Vec<Message>) -> Result<(), Refusal> {
    let mark = |kind: u16| Message::new(kind, 0, &fixed(0, abi::SUBSYSTEM));
    let mut batch = vec![mark(abi::BATCH_BEGIN)];
    batch.extend(changes);
    if let [_, unanswered @ .., _last] = &mut batch[..] {
        // Refusals are told anyhow, and answers to hundreds of changes would not fit into the socket.
        unanswered.iter_mut().for_each(Message::leave_unanswered);
    }
    batch.push(mark(abi::BATCH_END));
    socket.execute_at_once(batch)
}

/// Whether the kernel has nf_tables.
///
/// # Errors
/// Its refusal.
pub(crate) fn probe(socket: &mut Socket) -> Result<(), Errno> {
    socket.execute(vec![Message::new(abi::GETGEN, libc::NLM_F_ACK, &fixed(0, 0))]).map_err(Errno::from)
}

/// A rule that the kernel has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) chain: String,
    pub(crate) handle: u64,
    /// Empty if there is none.
    pub(crate) comment: String,
    /// The network, if the rule tells it: those of Go's plugin don't.
    pub(crate) network: Option<String>,
    /// The chain that it jumps to, if it does.
    pub(crate) jump: Option<String>,
}

/// The rules of a table, none if there is no such table.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn rules(socket: &mut Socket, family: u8, table: &str) -> Result<Vec<Rule>, Errno> {
    let message = Message::new(abi::GETRULE, libc::NLM_F_DUMP, &fixed(family, 0));
    match socket.ask(message.with_text(abi::RULE_TABLE, table)) {
        Ok(replies) => Ok(replies.iter().filter_map(|reply| parse(reply, family, table)).collect()),
        Err(Errno::NO_ENTRY) => Ok(Vec::new()),
        Err(errno) => Err(errno),
    }
}

fn parse(reply: &Reply, family: u8, table: &str) -> Option<Rule> {
    let (fixed, rest) = reply.payload.split_at_checked(4)?;
    // Kernels before 5.9 do not filter by the table.
    if fixed[0] != family || text(attribute(rest, abi::RULE_TABLE)?) != table {
        return None;
    }
    let expressions = attribute(rest, abi::RULE_EXPRESSIONS).unwrap_or_default();
    let jump = attributes(expressions).find_map(|(_, one)| {
        let value = attribute(attribute(one, abi::EXPR_DATA)?, 2)?;
        Some(text(attribute(attribute(value, abi::DATA_VERDICT)?, abi::VERDICT_CHAIN)?))
    });
    Some(Rule {
        chain: text(attribute(rest, abi::RULE_CHAIN)?),
        handle: u64::from_be_bytes(attribute(rest, abi::RULE_HANDLE)?.try_into().ok()?),
        comment: told(rest, COMMENT).unwrap_or_default(),
        network: told(rest, NETWORK),
        jump,
    })
}

/// What a rule's user data tell under a type.
fn told(rule: &[u8], wanted: u8) -> Option<String> {
    find(attribute(rule, abi::RULE_USERDATA)?, wanted)
}

/// User data are triples of type, length and value.
fn find(mut userdata: &[u8], wanted: u8) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == wanted {
            return Some(text(value));
        }
        userdata = &rest[usize::from(*length)..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_rule_tells_its_network_where_there_is_room_for_it() {
        for (length, expected) in [(64, Some("cbr0")), (246, Some("cbr0")), (247, None), (MAX_COMMENT, None)]
        {
            let container = "c".repeat(length);
            let bytes = Owner { container: &container, network: "cbr0" }.userdata();
            assert!(bytes.len() <= MAX_USERDATA);
            assert_eq!(find(&bytes, COMMENT), Some(container));
            assert_eq!(find(&bytes, NETWORK).as_deref(), expected, "{length}");
        }
    }

    proptest! {
        #[test]
        fn a_comment_is_read_as_it_was_written(wanted in "[a-zA-Z0-9._-]{1,253}", before in prop::collection::vec(any::<u8>(), 0..20)) {
            let mut bytes = vec![7, before.len() as u8];
            bytes.extend(before);
            bytes.extend(userdata(COMMENT, &wanted));
            prop_assert_eq!(find(&bytes, COMMENT), Some(wanted));
        }

        #[test]
        fn arbitrary_user_data_never_panic(bytes: Vec<u8>) {
            let _ = (find(&bytes, COMMENT), find(&bytes, NETWORK));
        }
    }
}
