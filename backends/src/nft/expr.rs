//! What a rule does, step by step: load something into a register, compare it, decide.
//!
//! The steps are those of the kernel, so that what is read back equals what was written. Rules are put
//! together from the functions in [`super::matches`], not from single steps.

use super::uapi::{NFTA_XT_INFO, NFTA_XT_NAME};
use crate::netlink::wire;

/// A 32-bit register, 0 to 15. Longer values take several in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reg(pub u8);

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expr {
    /// Loads what the kernel knows about the packet.
    Meta {
        /// What.
        key: MetaKey,
        /// Where to.
        to: Reg,
    },
    /// Loads bytes of the packet.
    Payload {
        /// Which header `offset` counts from.
        header: PayloadBase,
        /// The first byte.
        offset: u32,
        /// How many bytes.
        len: u32,
        /// Where to.
        to: Reg,
    },
    /// Loads what connection tracking knows about the packet's connection.
    Ct {
        /// What.
        key: CtKey,
        /// Where to.
        to: Reg,
    },
    /// Loads whether the host's route to the packet's source leaves by the interface that it came in by: 1 or
    /// 0 in the first byte of four.
    ReversePath {
        /// Where to.
        to: Reg,
    },
    /// Loads of what type the packet's source is by the host's routes, as `rtnetlink` numbers types of routes.
    SourceType {
        /// Where to.
        to: Reg,
    },
    /// Sets the mark of the packet's connection.
    SetCtMark {
        /// The value.
        from: Reg,
    },
    /// Sets what kind of destination the frame has, see `packet_type`.
    SetPacketType {
        /// The value, one byte.
        from: Reg,
    },
    /// Has the kernel tell what becomes of the packet, or not.
    SetTrace {
        /// One byte, 0 or 1.
        from: Reg,
    },
    /// Overwrites bytes of the packet; no checksum is corrected.
    WritePayload {
        /// Which header `offset` counts from.
        header: PayloadBase,
        /// The first byte.
        offset: u32,
        /// How many bytes.
        len: u32,
        /// The value.
        from: Reg,
    },
    /// Loads a constant.
    Constant {
        /// Where to.
        to: Reg,
        /// The value.
        data: Vec<u8>,
    },
    /// Ends the rule for packets beyond a rate.
    Limit(Rate),
    /// Hands the packet to NFLOG.
    Log {
        /// The group to which programs subscribe.
        group: u16,
        /// What the message begins with.
        prefix: String,
    },
    /// Computes `(register & mask) ^ xor`.
    Bitwise {
        /// The value.
        from: Reg,
        /// Where the result goes.
        to: Reg,
        /// As long as the value.
        mask: Vec<u8>,
        /// As long as the value.
        xor: Vec<u8>,
    },
    /// Ends the rule unless the comparison holds.
    Cmp {
        /// The value on the left.
        from: Reg,
        /// How they are compared.
        op: Op,
        /// The value on the right.
        data: Vec<u8>,
    },
    /// Looks a value up in a set or verdict map of the same table.
    Lookup {
        /// The set's name.
        set: String,
        /// The first register of the key.
        from: Reg,
        /// What follows from it.
        mode: Lookup,
    },
    /// Decides.
    Verdict(Verdict),
    /// Replaces the source address by that of the outgoing interface.
    Masquerade {
        /// Bits of [`masquerade_flags`].
        flags: u32,
    },
    /// Counts.
    Counter {
        /// Packets so far.
        packets: u64,
        /// Bytes so far.
        bytes: u64,
    },
    /// Loads a number that grows by one with each packet that gets here, and starts again from 0.
    Count {
        /// How many numbers there are.
        modulus: u32,
        /// Where to.
        to: Reg,
    },
    /// Adds a key to a set of the same table that is changed by packets.
    Remember {
        /// The set's name.
        set: String,
        /// The first register of the key.
        from: Reg,
    },
    /// Takes the packet's bytes off a quota of the same table, and ends the rule once it is used up.
    Quota {
        /// The quota's name.
        name: String,
    },
    /// Adds the packet's connection to a flowtable of the same table.
    Offload {
        /// The flowtable's name.
        flowtable: String,
    },
    /// Refuses the packet with an answer.
    Reject {
        /// `NFT_REJECT_*`: 0 ICMP, 1 TCP reset, 2 ICMP of the packet's family.
        kind: u32,
        /// The ICMP code.
        code: u8,
    },
    /// A step of somebody else's rule that this module doesn't read.
    Unknown {
        /// Its kind in the kernel's words.
        name: String,
        /// Its attributes as they are.
        bytes: Vec<u8>,
    },
}

impl Expr {
    /// The target's name if this is a target of iptables, such as `MASQUERADE` or `REJECT`.
    pub fn xt_target(&self) -> Option<String> {
        self.xt("target").and_then(|bytes| wire::find_string(bytes, NFTA_XT_NAME))
    }

    /// The match's name if this is a match of iptables, such as `comment` or `mark`.
    pub(crate) fn xt_match(&self) -> Option<String> {
        self.xt("match").and_then(|bytes| wire::find_string(bytes, NFTA_XT_NAME))
    }

    /// The text if this is the match `comment` of iptables.
    pub(super) fn xt_comment(&self) -> Option<String> {
        let bytes = self.xt("match")?;
        let comment = wire::find_string(bytes, NFTA_XT_NAME)? == "comment";
        comment.then(|| wire::find_string(bytes, NFTA_XT_INFO)).flatten()
    }

    fn xt(&self, kind: &str) -> Option<&[u8]> {
        match self {
            Self::Unknown { name, bytes } if name == kind => Some(bytes),
            _ => None,
        }
    }
}

/// The end of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Leaves this base chain; chains of later priority still see the packet.
    Accept,
    /// Drops the packet for good.
    Drop,
    /// Goes on behind the jump that led here; in a base chain, to its policy.
    Return,
    /// Runs a chain and comes back.
    Jump(String),
    /// Runs a chain and comes back where this chain would have.
    Goto(String),
    /// Another verdict, by its number.
    Other(i32),
}

/// What [`Expr::Meta`] can load; the numbers are `NFT_META_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MetaKey {
    /// The network protocol's EtherType, in network order.
    EtherType = 1,
    /// The packet's mark, a number in the host's byte order.
    Mark = 3,
    /// The incoming interface's index, in the host's byte order.
    InIndex = 4,
    /// The outgoing interface's index.
    OutIndex = 5,
    /// The incoming interface's name, 16 bytes filled with zeros.
    InName = 6,
    /// The outgoing interface's name.
    OutName = 7,
    /// The family: one byte, 2 for IPv4 and 10 for IPv6.
    NfProto = 15,
    /// The transport protocol's number, one byte.
    L4Proto = 16,
}

impl MetaKey {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        let all = [
            Self::EtherType,
            Self::Mark,
            Self::InIndex,
            Self::OutIndex,
            Self::InName,
            Self::OutName,
            Self::NfProto,
            Self::L4Proto,
        ];
        all.into_iter().find(|key| *key as u32 == number)
    }
}

/// What [`Expr::Ct`] can load; the numbers are `NFT_CT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CtKey {
    /// Bits of [`CtState`], in the host's byte order.
    State = 0,
    /// One byte: 0 in the direction of the connection's first packet, 1 in the other.
    Direction = 1,
    /// The connection's mark, in the host's byte order.
    Mark = 3,
}

impl CtKey {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::State, Self::Direction, Self::Mark].into_iter().find(|key| *key as u32 == number)
    }
}

/// A number of packets per time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many packets.
    pub packets: u64,
    /// In how many seconds.
    pub seconds: u64,
    /// How many at once.
    pub burst: u32,
}

/// Values of [`Expr::SetPacketType`], from `if_packet.h`.
pub(crate) mod packet_type {
    /// To this host.
    pub(crate) const HOST: u8 = 0;
}

/// Where an offset counts from; the numbers are `NFT_PAYLOAD_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PayloadBase {
    /// The Ethernet header.
    Link = 0,
    /// The IP header.
    Network = 1,
    /// The TCP, UDP, ... header.
    Transport = 2,
}

impl PayloadBase {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::Link, Self::Network, Self::Transport].into_iter().find(|header| *header as u32 == number)
    }
}

/// A comparison, byte by byte from the first; the numbers are `NFT_CMP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    /// Equal.
    Eq = 0,
    /// Not equal.
    Ne = 1,
    /// Less.
    Lt = 2,
    /// Less or equal.
    Le = 3,
    /// Greater.
    Gt = 4,
    /// Greater or equal.
    Ge = 5,
}

impl Op {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        let all = [Self::Eq, Self::Ne, Self::Lt, Self::Le, Self::Gt, Self::Ge];
        all.into_iter().find(|op| *op as u32 == number)
    }
}

/// What follows from looking a key up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The rule ends unless the set has the key.
    In,
    /// The rule ends if the set has the key.
    NotIn,
    /// The map's verdict for the key is carried out.
    Verdict,
}

/// Bits of a connection's state.
#[derive(Clone, Copy, Debug)]
pub struct CtState;

impl CtState {
    /// Belongs to no connection.
    pub const INVALID: u32 = 1;
    /// Packets were seen in both directions.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// New, but expected by another connection, or an ICMP error about one.
    pub const RELATED: u32 = 1 << 2;
    /// The first packet.
    pub const NEW: u32 = 1 << 3;
}

/// Flags of a masquerade, from `nf_nat.h`.
pub mod masquerade_flags {
    /// A source port that can't be guessed, and that two flows rarely pick at once.
    pub const FULLY_RANDOM: u32 = 1 << 4;
}
