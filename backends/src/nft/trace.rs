//! Traces of packets: which chains and rules they meet, as the kernel tells it (`nftrace`).
//!
//! A [`Tracer`] makes a table of its own that marks a few packets of one flow, and listens to what the kernel says about
//! them. The table belongs to the tracer's netlink socket, so the kernel removes it when the process ends in whichever
//! way. A kernel before 5.12 doesn't know owners; there [`sweep`] removes what a killed process left.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_NETFILTER;
use subnet::Family;

use super::change::Change;
use super::expr::{Expr, Op, Rate, Reg, Verdict};
use super::expr_codec;
use super::matches::{
    ICMP, ICMPV6, TCP, UDP, destination, destination_port, family, limit, protocol, source, source_port,
};
use super::model::{Base, Chain, Hook, Rule};
pub use super::model::{Table, TableFamily, TableId};
use super::uapi::*;
use super::{Nft, NftError, failed};
use crate::netlink::multicast::{MulticastSocket, Received};
use crate::netlink::wire::{Message, find, find_string, find_u32, find_u64, messages};

/// How the names of the tables begin; the process id follows.
const PREFIX: &str = "flannel-trace-";
/// Before everything else, also before packets are defragmented.
const FIRST: i32 = -400;
/// After everything else: what gets here has passed all other chains of its hook.
const LAST: i32 = i32::MAX;
/// Packets that are marked: so many a second, and so many at once.
const RATE: Rate = Rate { packets: 5, seconds: 1, burst: 10 };

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP of either family.
    Icmp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

/// Which packets are traced, and their answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// By which protocol; any if none is given.
    pub transport: Option<Transport>,
    /// To which port.
    pub port: Option<u16>,
}

impl Flow {
    /// The conditions of a packet of the flow, or of its answers.
    fn conditions(&self, answers: bool) -> Vec<Vec<Expr>> {
        let of = Family::of(self.source);
        let (from, to) =
            if answers { (self.destination, self.source) } else { (self.source, self.destination) };
        let mut parts =
            vec![family(of), source(Op::Eq, IpNet::from(from)), destination(Op::Eq, IpNet::from(to))];
        let number = self.transport.map(|transport| match (transport, of) {
            (Transport::Tcp, _) => TCP,
            (Transport::Udp, _) => UDP,
            (Transport::Icmp, Family::V4) => ICMP,
            (Transport::Icmp, Family::V6) => ICMPV6,
        });
        parts.extend(number.map(|number| protocol(Op::Eq, number)));
        parts.extend(self.port.map(|port| match answers {
            true => source_port(Op::Eq, port),
            false => destination_port(Op::Eq, port),
        }));
        parts
    }

    /// The rules that mark packets of both directions.
    fn rules(&self) -> Vec<Rule> {
        let mark = || vec![Expr::Constant { to: Reg(0), data: vec![1] }, Expr::SetTrace { from: Reg(0) }];
        let rule = |answers| {
            let mut parts = self.conditions(answers);
            parts.extend([limit(RATE), mark()]);
            Rule::new(parts)
        };
        vec![rule(false), rule(true)]
    }
}

/// What the kernel says about one packet at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceStep {
    /// The same for everything that happens to one packet.
    pub packet: u32,
    /// The table.
    pub table: TableId,
    /// The chain.
    pub chain: String,
    /// What happened there.
    pub event: Event,
    /// Index of the device that it came in by.
    pub incoming: Option<u32>,
    /// Index of the device that it leaves by.
    pub outgoing: Option<u32>,
    /// The packet's first bytes from its network header on, where the kernel repeats them.
    pub network: Vec<u8>,
    /// From its transport header on.
    pub transport: Vec<u8>,
}

/// What happened to a packet at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A rule matched.
    Rule {
        /// The kernel's number for it.
        handle: u64,
        /// What it decided.
        verdict: Outcome,
    },
    /// A base chain ended without a decision, so its policy counts.
    Policy {
        /// Whether it passes.
        accepted: bool,
    },
    /// A chain ended, and the packet goes on where it came from.
    Return,
}

/// What a rule decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// On to the next hook.
    Accept,
    /// The end.
    Drop,
    /// On to the next rule.
    Continue,
    /// Into another chain.
    Chain(String),
    /// Out of this chain.
    Return,
    /// Queued to a program, or stolen.
    Other(i32),
}

/// Marks packets and hears about them.
pub struct Tracer {
    nft: Nft,
    listener: MulticastSocket,
    table: TableId,
    owned: bool,
}

impl Tracer {
    /// Begins to mark packets of this flow in the calling thread's network namespace. Needs a running tokio reactor.
    ///
    /// # Errors
    /// [`NftError`] when the kernel refuses that.
    pub fn start(flow: &Flow) -> Result<Self, NftError> {
        let table = TableId::new(TableFamily::Inet, format!("{PREFIX}{}", std::process::id()));
        // Before anything is marked.
        let listener = MulticastSocket::subscribe(NETLINK_NETFILTER, &[NFNLGRP_NFTRACE], None)
            .map_err(failed("subscribing to traces"))?;
        let mut nft = Nft::open()?;
        let chains = chains(flow);
        let mut changes = vec![Change::AddOwnedTable(table.clone())];
        changes.extend(chains.iter().map(|chain| Change::AddChain { table: table.clone(), chain }));
        let owned = match nft.commit(&changes) {
            Ok(()) => true,
            Err(_) => {
                changes[0] = Change::AddTable(table.clone());
                nft.commit(&changes)?;
                false
            }
        };
        Ok(Self { nft, listener, table, owned })
    }

    /// Whether the kernel removes the table when this process ends in whichever way.
    pub fn is_owned(&self) -> bool {
        self.owned
    }

    /// Whether a step is in the tracer's own table, which no packet is affected by.
    pub fn is_own(&self, step: &TraceStep) -> bool {
        step.table == self.table
    }

    /// Waits for the next steps; cancelling loses nothing but what is being looked at.
    ///
    /// # Errors
    /// [`NftError::Netlink`] when the socket fails.
    pub async fn next(&self) -> Result<Steps, NftError> {
        let mut buffer = MulticastSocket::buffer();
        match self.listener.receive(&mut buffer).await.map_err(failed("receiving traces"))? {
            Received::Datagram(datagram) => {
                Ok(Steps::Heard(messages(datagram).filter_map(|message| step(&message)).collect()))
            }
            Received::Lost => Ok(Steps::Lost),
        }
    }

    /// A table as it is now, to name rules with.
    ///
    /// # Errors
    /// [`NftError`] when it can't be read.
    pub fn table(&mut self, id: &TableId) -> Result<Option<Table>, NftError> {
        let found = self.nft.dump_tables(std::slice::from_ref(id))?;
        Ok(found.table(id).cloned())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Err(error) = self.nft.commit(&[Change::DeleteTable(self.table.clone())]) {
            tracing::debug!(%error, "the table of a trace could not be removed");
        }
    }
}

/// What was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steps {
    /// These steps.
    Heard(Vec<TraceStep>),
    /// There were more than found room.
    Lost,
}

/// The tables of traces whose process is gone, and which its kernel did not remove.
///
/// # Errors
/// [`NftError`] when tables can't be read.
pub fn left() -> Result<Vec<TableId>, NftError> {
    let is_left = |name: &str| {
        let process = name.strip_prefix(PREFIX).and_then(|id| id.parse::<u32>().ok());
        process.is_some_and(|id| !std::path::Path::new("/proc").join(id.to_string()).exists())
    };
    Ok(Nft::open()?.table_ids()?.into_iter().filter(|id| is_left(&id.name)).collect())
}

/// Removes these tables; gives those that went.
///
/// # Errors
/// [`NftError`] when tables can't be read.
pub fn sweep() -> Result<Vec<TableId>, NftError> {
    let mut nft = Nft::open()?;
    let mut removed = left()?;
    // One with an owner is refused, and goes with it: its process is in another PID namespace.
    removed.retain(|id| nft.commit(&[Change::DeleteTable(id.clone())]).is_ok());
    Ok(removed)
}

/// The first chains mark packets; the last ones tell that they have passed a hook, and by which devices.
fn chains(flow: &Flow) -> Vec<Chain> {
    let mut chains: Vec<Chain> = [("first-prerouting", Hook::Prerouting), ("first-output", Hook::Output)]
        .into_iter()
        .map(|(name, hook)| Chain { rules: flow.rules(), ..Chain::base(name, Base::filter(hook, FIRST)) })
        .collect();
    let passed = [
        ("prerouting", Hook::Prerouting),
        ("input", Hook::Input),
        ("forward", Hook::Forward),
        ("output", Hook::Output),
        ("postrouting", Hook::Postrouting),
    ];
    chains.extend(passed.map(|(name, hook)| Chain::base(name, Base::filter(hook, LAST))));
    chains
}

/// Reads one message of a trace.
fn step(message: &Message<'_>) -> Option<TraceStep> {
    let b = message.attributes();
    let number = |kind| find_u32(b, kind).filter(|index| *index != 0);
    let bytes = |kind| find(b, kind).unwrap_or_default().to_vec();
    if message.kind != message::TRACE {
        return None;
    }
    let verdict = || find(b, NFTA_TRACE_VERDICT).and_then(outcome);
    let event = match find_u32(b, NFTA_TRACE_TYPE)? {
        NFT_TRACETYPE_POLICY => Event::Policy { accepted: find_u32(b, NFTA_TRACE_POLICY)? == 1 },
        NFT_TRACETYPE_RETURN => Event::Return,
        NFT_TRACETYPE_RULE => {
            Event::Rule { handle: find_u64(b, NFTA_TRACE_RULE_HANDLE)?, verdict: verdict()? }
        }
        _ => return None,
    };
    Some(TraceStep {
        packet: find_u32(b, NFTA_TRACE_ID)?,
        table: TableId {
            family: TableFamily::from_number(message.family()),
            name: find_string(b, NFTA_TRACE_TABLE)?,
        },
        chain: find_string(b, NFTA_TRACE_CHAIN)?,
        event,
        incoming: number(NFTA_TRACE_IIF),
        outgoing: number(NFTA_TRACE_OIF),
        network: bytes(NFTA_TRACE_NETWORK_HEADER),
        transport: bytes(NFTA_TRACE_TRANSPORT_HEADER),
    })
}

fn outcome(verdict: &[u8]) -> Option<Outcome> {
    /// `NFT_CONTINUE`
    const CONTINUE: i32 = -1;
    Some(match expr_codec::read_decision(verdict)? {
        Verdict::Other(CONTINUE) => Outcome::Continue,
        Verdict::Accept => Outcome::Accept,
        Verdict::Drop => Outcome::Drop,
        Verdict::Return => Outcome::Return,
        Verdict::Jump(chain) | Verdict::Goto(chain) => Outcome::Chain(chain),
        Verdict::Other(code) => Outcome::Other(code),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::netlink::wire::{Head, Writer};

    fn message(body: impl FnOnce(&mut Writer)) -> Option<TraceStep> {
        let mut w = Writer::default();
        w.message(Head { kind: message::TRACE, flags: 0, sequence: 0, own: [2, 0, 0, 0] }, body);
        messages(w.bytes()).next().and_then(|message| step(&message))
    }

    fn common(w: &mut Writer, kind: u32) {
        w.string(NFTA_TRACE_TABLE, "filter");
        w.string(NFTA_TRACE_CHAIN, "FORWARD");
        w.u32(NFTA_TRACE_TYPE, kind);
        w.u32(NFTA_TRACE_ID, 7);
        w.u32(NFTA_TRACE_IIF, 3);
    }

    #[test]
    fn steps_are_read_as_the_kernel_writes_them() {
        let dropped = message(|w| {
            common(w, NFT_TRACETYPE_RULE);
            w.u64(NFTA_TRACE_RULE_HANDLE, 12);
            w.nest(NFTA_TRACE_VERDICT, |w| w.u32(NFTA_VERDICT_CODE, 0));
            w.bytes_attribute(NFTA_TRACE_NETWORK_HEADER, &[0x45]);
        });
        let expected = TraceStep {
            packet: 7,
            table: TableId::new(TableFamily::Ip, "filter"),
            chain: "FORWARD".to_owned(),
            event: Event::Rule { handle: 12, verdict: Outcome::Drop },
            incoming: Some(3),
            outgoing: None,
            network: vec![0x45],
            transport: Vec::new(),
        };
        assert_eq!(dropped, Some(expected));
        let policy = message(|w| {
            common(w, NFT_TRACETYPE_POLICY);
            w.u32(NFTA_TRACE_POLICY, 1);
        });
        assert_eq!(policy.unwrap().event, Event::Policy { accepted: true });
        for (code, expected) in
            [(-1, Outcome::Continue), (1, Outcome::Accept), (-5, Outcome::Return), (3, Outcome::Other(3))]
        {
            let step = message(|w| {
                common(w, NFT_TRACETYPE_RULE);
                w.u64(NFTA_TRACE_RULE_HANDLE, 1);
                w.nest(NFTA_TRACE_VERDICT, |w| w.u32(NFTA_VERDICT_CODE, i32::cast_unsigned(code)));
            });
            assert_eq!(step.unwrap().event, Event::Rule { handle: 1, verdict: expected });
        }
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(payload: Vec<u8>) {
            step(&Message { kind: message::TRACE, flags: 0, sequence: 0, port: 0, payload: &payload });
        }
    }
}
