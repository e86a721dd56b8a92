//! The words that rules are made of: each function gives the steps for one condition or action.
//!
//! ```
//! use backends::nft::{Op, Rule, matches::*};
//!
//! let network: ipnet::IpNet = "10.244.0.0/16".parse().unwrap();
//! // ip saddr 10.244.0.0/16 accept
//! let rule = Rule::new([source(Op::Eq, network), accept()]);
//! assert_eq!(rule.exprs.len(), 3);
//! ```

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use subnet::Family;

use super::expr::{CtKey, Expr, Lookup, MetaKey, Op, PayloadBase, Rate, Reg, Verdict, packet_type};
use super::uapi::{NFPROTO_IPV4, NFPROTO_IPV6};

/// The length of an interface name in a register: `IFNAMSIZ`.
const NAME_LEN: usize = 16;

/// The number of TCP, for [`protocol`].
pub const TCP: u8 = 6;
/// The number of UDP, for [`protocol`].
pub const UDP: u8 = 17;
/// The number of IPv4 in IP, for [`protocol`].
pub(crate) const IPIP: u8 = 4;
/// The number of ICMP, for [`protocol`].
pub(crate) const ICMP: u8 = 1;
/// The number of ICMPv6, for [`protocol`].
pub(crate) const ICMPV6: u8 = 58;
/// The number of SCTP, for [`protocol`].
#[cfg(any(test, feature = "testing"))]
pub const SCTP: u8 = 132;

/// Something about a packet that can be a key of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The source address of a packet of this family.
    Source(Family),
    /// The destination address of a packet of this family.
    Destination(Family),
    /// The transport protocol.
    Protocol,
    /// The source port.
    SourcePort,
    /// The destination port.
    DestinationPort,
    /// The mark.
    Mark,
    /// The incoming interface's name.
    InName,
    /// The outgoing interface's name.
    OutName,
}

impl Field {
    fn load(self, to: Reg) -> Expr {
        let payload = |header, offset, len| Expr::Payload { header, offset, len, to };
        let meta = |key| Expr::Meta { key, to };
        match self {
            Self::Source(Family::V4) => payload(PayloadBase::Network, 12, 4),
            Self::Destination(Family::V4) => payload(PayloadBase::Network, 16, 4),
            Self::Source(Family::V6) => payload(PayloadBase::Network, 8, 16),
            Self::Destination(Family::V6) => payload(PayloadBase::Network, 24, 16),
            Self::SourcePort => payload(PayloadBase::Transport, 0, 2),
            Self::DestinationPort => payload(PayloadBase::Transport, 2, 2),
            Self::Protocol => meta(MetaKey::L4Proto),
            Self::Mark => meta(MetaKey::Mark),
            Self::InName => meta(MetaKey::InName),
            Self::OutName => meta(MetaKey::OutName),
        }
    }

    /// How many registers its value takes.
    fn registers(self) -> u8 {
        match self {
            Self::Source(Family::V6) | Self::Destination(Family::V6) | Self::InName | Self::OutName => 4,
            _ => 1,
        }
    }
}

/// The packet is of this family; needed before addresses in a table of family `inet`.
pub fn family(family: Family) -> Vec<Expr> {
    let number = match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    };
    compare(Expr::Meta { key: MetaKey::NfProto, to: Reg(0) }, Op::Eq, vec![number])
}

/// The source address is, or is not, in `net`.
pub fn source(op: Op, net: IpNet) -> Vec<Expr> {
    address(Field::Source(Family::of(net.addr())), op, net)
}

/// The destination address is, or is not, in `net`.
pub fn destination(op: Op, net: IpNet) -> Vec<Expr> {
    address(Field::Destination(Family::of(net.addr())), op, net)
}

/// The mark equals `value`.
#[cfg(any(test, feature = "testing"))]
pub fn mark(op: Op, value: u32) -> Vec<Expr> {
    compare(Field::Mark.load(Reg(0)), op, value.to_ne_bytes().into())
}

/// The bits `mask` of the mark equal `value`.
pub fn mark_bits(mask: u32, op: Op, value: u32) -> Vec<Expr> {
    masked(Field::Mark.load(Reg(0)), mask.to_ne_bytes().into(), op, value.to_ne_bytes().into())
}

/// The incoming interface's name; `*` at the end stands for any rest.
pub fn in_name(op: Op, name: &str) -> Vec<Expr> {
    compare(Field::InName.load(Reg(0)), op, interface(name))
}

/// The outgoing interface's name; `*` at the end stands for any rest.
pub fn out_name(op: Op, name: &str) -> Vec<Expr> {
    compare(Field::OutName.load(Reg(0)), op, interface(name))
}

/// The connection's state is one of the bits of [`CtState`](super::expr::CtState).
pub fn ct_state(bits: u32) -> Vec<Expr> {
    masked(Expr::Ct { key: CtKey::State, to: Reg(0) }, bits.to_ne_bytes().into(), Op::Ne, vec![0; 4])
}

/// The connection is in none of these states; `bits` are those of [`super::CtState`].
pub fn ct_state_none_of(bits: u32) -> Vec<Expr> {
    masked(Expr::Ct { key: CtKey::State, to: Reg(0) }, bits.to_ne_bytes().into(), Op::Eq, vec![0; 4])
}

/// Every so many packets that get here, one.
pub fn one_of(modulus: u32) -> Vec<Expr> {
    compare(Expr::Count { modulus, to: Reg(0) }, Op::Eq, vec![0; 4])
}

/// Adds the key made of `fields` to a set of this table that is changed by packets.
pub fn remember(fields: &[Field], set: &str) -> Vec<Expr> {
    let mut steps = look_up(fields, set, Lookup::In);
    steps.pop();
    steps.push(Expr::Remember { set: set.to_owned(), from: Reg(0) });
    steps
}

/// Takes the packet's bytes off a quota of the table.
pub fn quota(name: &str) -> Vec<Expr> {
    vec![Expr::Quota { name: name.to_owned() }]
}

/// Adds the packet's connection to a flowtable of the table.
pub fn offload(flowtable: &str) -> Vec<Expr> {
    vec![Expr::Offload { flowtable: flowtable.to_owned() }]
}

/// The packet goes in the direction of the connection's first packet (`reply` false), or in the other.
pub fn ct_reply(reply: bool) -> Vec<Expr> {
    compare(Expr::Ct { key: CtKey::Direction, to: Reg(0) }, Op::Eq, vec![u8::from(reply)])
}

/// The bits `mask` of the connection's mark equal `value`.
pub fn ct_mark_bits(mask: u32, op: Op, value: u32) -> Vec<Expr> {
    masked(ct_mark(), mask.to_ne_bytes().into(), op, value.to_ne_bytes().into())
}

/// The set of this table has the bits `mask` of the connection's mark.
pub fn ct_mark_in_set(mask: u32, set: &str) -> Vec<Expr> {
    let mask = mask.to_ne_bytes().to_vec();
    let bitwise = Expr::Bitwise { from: Reg(0), to: Reg(0), xor: vec![0; mask.len()], mask };
    vec![ct_mark(), bitwise, Expr::Lookup { set: set.to_owned(), from: Reg(0), mode: Lookup::In }]
}

/// Sets the bits `mask` of the connection's mark to `value`, and leaves the others.
pub fn set_ct_mark_bits(mask: u32, value: u32) -> Vec<Expr> {
    let (keep, xor) = ((!mask).to_ne_bytes().into(), value.to_ne_bytes().into());
    let bitwise = Expr::Bitwise { from: Reg(0), to: Reg(0), mask: keep, xor };
    vec![ct_mark(), bitwise, Expr::SetCtMark { from: Reg(0) }]
}

fn ct_mark() -> Expr {
    Expr::Ct { key: CtKey::Mark, to: Reg(0) }
}

/// The frame carries packets of this family; needed before addresses in a table of family `bridge`.
pub fn ether_type(family: Family) -> Vec<Expr> {
    let number: u16 = match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    };
    compare(Expr::Meta { key: MetaKey::EtherType, to: Reg(0) }, Op::Eq, number.to_be_bytes().into())
}

/// The frame's destination.
pub fn ether_destination(op: Op, mac: [u8; 6]) -> Vec<Expr> {
    compare(Expr::Payload { header: PayloadBase::Link, offset: 0, len: 6, to: Reg(0) }, op, mac.into())
}

/// Sends the frame to this host: its destination becomes `mac`, which must be the host's.
pub fn to_this_host(mac: [u8; 6]) -> Vec<Expr> {
    vec![
        Expr::Constant { to: Reg(0), data: mac.into() },
        Expr::WritePayload { header: PayloadBase::Link, offset: 0, len: 6, from: Reg(0) },
        Expr::Constant { to: Reg(0), data: vec![packet_type::HOST] },
        Expr::SetPacketType { from: Reg(0) },
    ]
}

/// It is an ICMP redirect of this family.
pub fn icmp_redirect(family: Family) -> Vec<Expr> {
    const ICMP_REDIRECT: u8 = 5;
    const ND_REDIRECT: u8 = 137;
    let (number, kind) = match family {
        Family::V4 => (ICMP, ICMP_REDIRECT),
        Family::V6 => (ICMPV6, ND_REDIRECT),
    };
    let mut steps = protocol(Op::Eq, number);
    steps.push(Expr::Payload { header: PayloadBase::Transport, offset: 0, len: 1, to: Reg(0) });
    steps.push(Expr::Cmp { from: Reg(0), op: Op::Eq, data: vec![kind] });
    steps
}

/// The ICMPv6 type is in the range.
pub fn icmpv6_types(range: RangeInclusive<u8>) -> Vec<Expr> {
    let mut steps = protocol(Op::Eq, ICMPV6);
    steps.push(Expr::Payload { header: PayloadBase::Transport, offset: 0, len: 1, to: Reg(0) });
    steps.push(Expr::Cmp { from: Reg(0), op: Op::Ge, data: vec![*range.start()] });
    steps.push(Expr::Cmp { from: Reg(0), op: Op::Le, data: vec![*range.end()] });
    steps
}

/// The bits `mask` of the flags of TCP equal `value`, see [`tcp_flags`].
pub fn tcp_flag_bits(mask: u8, op: Op, value: u8) -> Vec<Expr> {
    let load = Expr::Payload { header: PayloadBase::Transport, offset: 13, len: 1, to: Reg(0) };
    [protocol(Op::Eq, TCP), masked(load, vec![mask], op, vec![value])].concat()
}

/// Flags of TCP.
pub mod tcp_flags {
    /// The first packet in its direction.
    pub const SYN: u8 = 0x02;
    /// It acknowledges something.
    pub const ACK: u8 = 0x10;
}

/// Ends the rule for packets beyond a rate.
pub fn limit(rate: Rate) -> Vec<Expr> {
    vec![Expr::Limit(rate)]
}

/// Hands the packet to NFLOG.
pub fn log(group: u16, prefix: &str) -> Vec<Expr> {
    vec![Expr::Log { group, prefix: prefix.to_owned() }]
}

/// The host's route to the source address does, or does not, leave by the interface that the packet came in by.
pub fn reverse_path(exists: bool) -> Vec<Expr> {
    compare(Expr::ReversePath { to: Reg(0) }, Op::Eq, vec![u8::from(exists), 0, 0, 0])
}

/// The source is an address of this host.
pub fn source_is_local() -> Vec<Expr> {
    /// `RTN_LOCAL`.
    const LOCAL: u32 = 2;
    compare(Expr::SourceType { to: Reg(0) }, Op::Eq, LOCAL.to_ne_bytes().into())
}

/// The VNI of a VXLAN datagram is none of `vnis`; a datagram that is too short to have one is not matched.
pub fn vni_is_none_of(vnis: &[u32]) -> Vec<Expr> {
    // The UDP header, flags and reserved bits; then three bytes (RFC 7348 §5).
    let mut steps = vec![Expr::Payload { header: PayloadBase::Transport, offset: 12, len: 3, to: Reg(0) }];
    let data = |vni: &u32| vni.to_be_bytes()[1..].to_vec();
    steps.extend(vnis.iter().map(|vni| Expr::Cmp { from: Reg(0), op: Op::Ne, data: data(vni) }));
    steps
}

/// Both addresses of an IPv4 packet that is the payload are outside of `networks`; a payload that is too short to have
/// addresses is not matched.
pub(crate) fn inner_outside(networks: &[IpNet]) -> Vec<Expr> {
    // The payload's header begins where that of a transport protocol would (RFC 791 §3.1).
    const ADDRESSES: [u32; 2] = [12, 16];
    let outside = |network: &IpNet, offset| {
        let load = Expr::Payload { header: PayloadBase::Transport, offset, len: 4, to: Reg(0) };
        masked(load, octets(network.netmask()), Op::Ne, octets(network.network()))
    };
    networks
        .iter()
        .flat_map(|network| ADDRESSES.into_iter().flat_map(move |at| outside(network, at)))
        .collect()
}

/// The transport protocol; needed before ports.
pub fn protocol(op: Op, number: u8) -> Vec<Expr> {
    compare(Field::Protocol.load(Reg(0)), op, vec![number])
}

/// The source port.
pub fn source_port(op: Op, port: u16) -> Vec<Expr> {
    compare(Field::SourcePort.load(Reg(0)), op, port.to_be_bytes().into())
}

/// The destination port.
pub fn destination_port(op: Op, port: u16) -> Vec<Expr> {
    compare(Field::DestinationPort.load(Reg(0)), op, port.to_be_bytes().into())
}

/// The destination port is in the range.
#[cfg(any(test, feature = "testing"))]
pub fn destination_ports(range: RangeInclusive<u16>) -> Vec<Expr> {
    let mut steps = destination_port(Op::Ge, *range.start());
    steps.push(Expr::Cmp { from: Reg(0), op: Op::Le, data: range.end().to_be_bytes().into() });
    steps
}

/// The set of this table has the key made of `fields`.
pub fn in_set(fields: &[Field], set: &str) -> Vec<Expr> {
    look_up(fields, set, Lookup::In)
}

/// The set of this table doesn't have the key made of `fields`.
pub fn not_in_set(fields: &[Field], set: &str) -> Vec<Expr> {
    look_up(fields, set, Lookup::NotIn)
}

/// Does what the map of this table says for the key made of `fields`; goes on if it has no such key.
pub fn verdict_map(fields: &[Field], map: &str) -> Vec<Expr> {
    look_up(fields, map, Lookup::Verdict)
}

/// The same for the network of this length of an address.
pub fn network_verdict_map(address: Field, prefix_len: u8, map: &str) -> Vec<Expr> {
    let len = match address.load(Reg(0)) {
        Expr::Payload { len, .. } => len as usize,
        _ => 0,
    };
    let bits = |byte: usize| usize::from(prefix_len).saturating_sub(8 * byte).min(8);
    let mask: Vec<u8> = (0..len).map(|byte| !(0xff_u16 >> bits(byte)) as u8).collect();
    let bitwise = Expr::Bitwise { from: Reg(0), to: Reg(0), xor: vec![0; mask.len()], mask };
    vec![
        address.load(Reg(0)),
        bitwise,
        Expr::Lookup { set: map.to_owned(), from: Reg(0), mode: Lookup::Verdict },
    ]
}

/// Counts packets and bytes that get here.
pub fn counter() -> Vec<Expr> {
    vec![Expr::Counter { packets: 0, bytes: 0 }]
}

/// Gives the packet the address of the outgoing interface; the flags are
/// [`masquerade_flags`](super::expr::masquerade_flags).
pub fn masquerade(flags: u32) -> Vec<Expr> {
    vec![Expr::Masquerade { flags }]
}

/// Lets the packet pass.
pub fn accept() -> Vec<Expr> {
    verdict(Verdict::Accept)
}

/// Drops the packet.
pub fn drop() -> Vec<Expr> {
    verdict(Verdict::Drop)
}

/// Leaves the chain.
pub fn leave() -> Vec<Expr> {
    verdict(Verdict::Return)
}

/// Runs `chain` and comes back.
pub fn jump(chain: &str) -> Vec<Expr> {
    verdict(Verdict::Jump(chain.to_owned()))
}

/// Runs `chain` and doesn't come back.
pub fn goto(chain: &str) -> Vec<Expr> {
    verdict(Verdict::Goto(chain.to_owned()))
}

/// Decides.
pub(crate) fn verdict(verdict: Verdict) -> Vec<Expr> {
    vec![Expr::Verdict(verdict)]
}

/// A prefix of whole bytes is compared as such, any other through a mask: so does the `nft` program, which
/// reads both back as a prefix.
fn address(field: Field, op: Op, net: IpNet) -> Vec<Expr> {
    let (mut bytes, mask) = (octets(net.network()), octets(net.netmask()));
    let prefix = usize::from(net.prefix_len());
    let mut load = field.load(Reg(0));
    if prefix == 0 || !prefix.is_multiple_of(8) {
        return masked(load, mask, op, bytes);
    }
    bytes.truncate(prefix / 8);
    if let Expr::Payload { len, .. } = &mut load {
        *len = bytes.len() as u32;
    }
    compare(load, op, bytes)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

fn compare(load: Expr, op: Op, data: Vec<u8>) -> Vec<Expr> {
    vec![load, Expr::Cmp { from: Reg(0), op, data }]
}

fn masked(load: Expr, mask: Vec<u8>, op: Op, data: Vec<u8>) -> Vec<Expr> {
    let xor = vec![0; mask.len()];
    let bitwise = Expr::Bitwise { from: Reg(0), to: Reg(0), mask, xor };
    vec![load, bitwise, Expr::Cmp { from: Reg(0), op, data }]
}

fn look_up(fields: &[Field], set: &str, mode: Lookup) -> Vec<Expr> {
    let mut register = 0;
    let mut steps = Vec::with_capacity(fields.len() + 1);
    for field in fields {
        steps.push(field.load(Reg(register)));
        register += field.registers();
    }
    steps.push(Expr::Lookup { set: set.to_owned(), from: Reg(0), mode });
    steps
}

/// A name in full is compared with the zeros behind it, the beginning of a name without.
fn interface(name: &str) -> Vec<u8> {
    match name.strip_suffix('*') {
        Some(beginning) => beginning.as_bytes().into(),
        None => padded_name(name),
    }
}

/// An interface's name as the kernel has it in registers.
pub(crate) fn padded_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_owned();
    bytes.resize(bytes.len().max(NAME_LEN), 0);
    bytes
}
