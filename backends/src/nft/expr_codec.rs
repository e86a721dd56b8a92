//! The steps of rules as attributes, in both directions.

use super::expr::{CtKey, Expr, Lookup, MetaKey, Op, PayloadBase, Rate, Reg, Verdict};
use super::registers::{from_register, only, reg, register};
use super::state_codec;
use super::uapi::*;
use crate::netlink::wire::{Writer, attributes, find, find_string, find_u32, find_u64};

const VERDICT_REGISTER: u32 = 0;

/// Appends one step to a list of steps.
pub(super) fn write(w: &mut Writer, expr: &Expr) {
    w.nest(NFTA_LIST_ELEM, |w| {
        w.string(NFTA_EXPR_NAME, name(expr));
        w.nest(NFTA_EXPR_DATA, |w| body(w, expr));
    });
}

fn name(expr: &Expr) -> &str {
    match expr {
        Expr::Meta { .. } | Expr::SetPacketType { .. } | Expr::SetTrace { .. } => "meta",
        Expr::Payload { .. } | Expr::WritePayload { .. } => "payload",
        Expr::Ct { .. } | Expr::SetCtMark { .. } => "ct",
        Expr::ReversePath { .. } | Expr::SourceType { .. } => "fib",
        Expr::Limit(_) => "limit",
        Expr::Log { .. } => "log",
        Expr::Bitwise { .. } => "bitwise",
        Expr::Cmp { .. } => "cmp",
        Expr::Lookup { .. } => "lookup",
        Expr::Verdict(_) | Expr::Constant { .. } => "immediate",
        Expr::Masquerade { .. } => "masq",
        Expr::Counter { .. } => "counter",
        Expr::Count { .. } => "numgen",
        Expr::Remember { .. } => "dynset",
        Expr::Quota { .. } => "objref",
        Expr::Offload { .. } => "flow_offload",
        Expr::Reject { .. } => "reject",
        Expr::Unknown { name, .. } => name,
    }
}

fn body(w: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Meta { key, to } => keyed(w, (NFTA_META_KEY, *key as u32), (NFTA_META_DREG, *to)),
        Expr::Payload { header, offset, len, to } => {
            payload(w, (NFTA_PAYLOAD_DREG, *to), *header, *offset, *len)
        }
        Expr::Ct { key, to } => keyed(w, (NFTA_CT_KEY, *key as u32), (NFTA_CT_DREG, *to)),
        Expr::ReversePath { to } => fib(w, *to, REVERSE_PATH),
        Expr::SourceType { to } => fib(w, *to, SOURCE_TYPE),
        Expr::SetCtMark { from } => keyed(w, (NFTA_CT_KEY, CtKey::Mark as u32), (NFTA_CT_SREG, *from)),
        Expr::SetPacketType { from } => set_meta(w, NFT_META_PKTTYPE, *from),
        Expr::SetTrace { from } => set_meta(w, NFT_META_NFTRACE, *from),
        Expr::WritePayload { header, offset, len, from } => {
            payload(w, (NFTA_PAYLOAD_SREG, *from), *header, *offset, *len);
            no_checksum(w);
        }
        Expr::Constant { to, data } => {
            w.u32(NFTA_IMMEDIATE_DREG, register(*to));
            value(w, NFTA_IMMEDIATE_DATA, data);
        }
        Expr::Limit(rate) => write_limit(w, *rate),
        Expr::Log { group, prefix } => {
            w.string(NFTA_LOG_PREFIX, prefix);
            w.bytes_attribute(NFTA_LOG_GROUP, &group.to_be_bytes());
        }
        Expr::Bitwise { from, to, mask, xor } => {
            w.u32(NFTA_BITWISE_SREG, register(*from));
            w.u32(NFTA_BITWISE_DREG, register(*to));
            w.u32(NFTA_BITWISE_LEN, mask.len() as u32);
            value(w, NFTA_BITWISE_MASK, mask);
            value(w, NFTA_BITWISE_XOR, xor);
        }
        Expr::Cmp { from, op, data } => {
            w.u32(NFTA_CMP_SREG, register(*from));
            w.u32(NFTA_CMP_OP, *op as u32);
            value(w, NFTA_CMP_DATA, data);
        }
        Expr::Lookup { set, from, mode } => write_lookup(w, set, *from, *mode),
        Expr::Verdict(verdict) => {
            w.u32(NFTA_IMMEDIATE_DREG, VERDICT_REGISTER);
            w.nest(NFTA_IMMEDIATE_DATA, |w| write_verdict(w, verdict));
        }
        // The kernel tells no flags by leaving them out, and so do we.
        Expr::Masquerade { flags: 0 } => {}
        Expr::Masquerade { flags } => w.u32(NFTA_MASQ_FLAGS, *flags),
        Expr::Counter { packets, bytes } => {
            w.u64(NFTA_COUNTER_BYTES, *bytes);
            w.u64(NFTA_COUNTER_PACKETS, *packets);
        }
        Expr::Reject { kind, code } => {
            w.u32(NFTA_REJECT_TYPE, *kind);
            w.bytes_attribute(NFTA_REJECT_ICMP_CODE, &[*code]);
        }
        Expr::Count { .. } | Expr::Remember { .. } | Expr::Quota { .. } => state_codec::write(w, expr),
        Expr::Offload { flowtable } => w.string(NFTA_FLOW_OFFLOAD_TABLE, flowtable),
        Expr::Unknown { bytes, .. } => w.raw(bytes),
    }
}

fn fib(w: &mut Writer, to: Reg, (result, flags): (u32, u32)) {
    w.u32(NFTA_FIB_DREG, register(to));
    w.u32(NFTA_FIB_RESULT, result);
    w.u32(NFTA_FIB_FLAGS, flags);
}

/// Has the kernel correct no checksum of what is written.
fn no_checksum(w: &mut Writer) {
    for kind in [NFTA_PAYLOAD_CSUM_TYPE, NFTA_PAYLOAD_CSUM_OFFSET, NFTA_PAYLOAD_CSUM_FLAGS] {
        w.u32(kind, 0);
    }
}

/// Sets something that the kernel knows about the packet.
fn set_meta(w: &mut Writer, key: u32, from: Reg) {
    keyed(w, (NFTA_META_KEY, key), (NFTA_META_SREG, from));
}

/// A key of the packet or its connection, and the register that it is read to or written from.
fn keyed(w: &mut Writer, (kind, key): (u16, u32), (direction, reg): (u16, Reg)) {
    w.u32(kind, key);
    w.u32(direction, register(reg));
}

/// A part of the packet, and the register that it is read to or written from.
fn payload(w: &mut Writer, (direction, reg): (u16, Reg), header: PayloadBase, offset: u32, len: u32) {
    w.u32(direction, register(reg));
    w.u32(NFTA_PAYLOAD_BASE, header as u32);
    w.u32(NFTA_PAYLOAD_OFFSET, offset);
    w.u32(NFTA_PAYLOAD_LEN, len);
}

fn write_limit(w: &mut Writer, Rate { packets, seconds, burst }: Rate) {
    w.u64(NFTA_LIMIT_RATE, packets);
    w.u64(NFTA_LIMIT_UNIT, seconds);
    w.u32(NFTA_LIMIT_BURST, burst);
    w.u32(NFTA_LIMIT_TYPE, 0);
    w.u32(NFTA_LIMIT_FLAGS, 0);
}

fn write_lookup(w: &mut Writer, set: &str, from: Reg, mode: Lookup) {
    w.string(NFTA_LOOKUP_SET, set);
    w.u32(NFTA_LOOKUP_SREG, register(from));
    match mode {
        Lookup::In => {}
        Lookup::NotIn => w.u32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV),
        Lookup::Verdict => w.u32(NFTA_LOOKUP_DREG, VERDICT_REGISTER),
    }
}

pub(super) fn value(w: &mut Writer, kind: u16, bytes: &[u8]) {
    w.nest(kind, |w| w.bytes_attribute(NFTA_DATA_VALUE, bytes));
}

/// The one attribute that says a verdict.
pub(super) fn write_verdict(w: &mut Writer, verdict: &Verdict) {
    let (code, chain) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (JUMP, Some(chain)),
        Verdict::Goto(chain) => (GOTO, Some(chain)),
        Verdict::Return => (RETURN, None),
        Verdict::Other(code) => (*code, None),
    };
    w.nest(NFTA_DATA_VERDICT, |w| {
        w.u32(NFTA_VERDICT_CODE, code.cast_unsigned());
        if let Some(chain) = chain {
            w.string(NFTA_VERDICT_CHAIN, chain);
        }
    });
}

/// Result and flags of `fib saddr . iif oif exists` in the words of `nft`.
const REVERSE_PATH: (u32, u32) = (NFT_FIB_RESULT_OIF, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF | NFTA_FIB_F_PRESENT);
/// Those of `fib saddr type`.
const SOURCE_TYPE: (u32, u32) = (NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_SADDR);

const JUMP: i32 = -3;
const GOTO: i32 = -4;
const RETURN: i32 = -5;

/// Reads a list of steps.
pub(super) fn read_all(list: &[u8]) -> Vec<Expr> {
    attributes(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM).map(|(_, expr)| read(expr)).collect()
}

/// A step that says more than [`Expr`] can hold is [`Expr::Unknown`]: nothing is lost or misread.
fn read(expr: &[u8]) -> Expr {
    let name = find_string(expr, NFTA_EXPR_NAME).unwrap_or_default();
    let bytes = find(expr, NFTA_EXPR_DATA).unwrap_or_default();
    known(&name, bytes).unwrap_or_else(|| Expr::Unknown { name, bytes: bytes.to_owned() })
}

fn known(name: &str, b: &[u8]) -> Option<Expr> {
    let only = |kinds: &[u16]| only(b, kinds);
    let reg = |kind| reg(b, kind);
    Some(match name {
        "meta" => read_meta(b)?,
        "payload" if find(b, NFTA_PAYLOAD_SREG).is_some() => write_payload(b)?,
        "payload" => {
            only(&[NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET, NFTA_PAYLOAD_LEN])?;
            Expr::Payload {
                header: PayloadBase::from_number(find_u32(b, NFTA_PAYLOAD_BASE)?)?,
                offset: find_u32(b, NFTA_PAYLOAD_OFFSET)?,
                len: find_u32(b, NFTA_PAYLOAD_LEN)?,
                to: reg(NFTA_PAYLOAD_DREG)?,
            }
        }
        "ct" => read_ct(b)?,
        "fib" => read_fib(b)?,
        "limit" => limit(b)?,
        "log" => log(b)?,
        "bitwise" => read_bitwise(b)?,
        "cmp" => Expr::Cmp {
            from: reg(NFTA_CMP_SREG)?,
            op: Op::from_number(find_u32(b, NFTA_CMP_OP)?)?,
            data: read_value(find(b, NFTA_CMP_DATA)?)?,
        },
        "lookup" => read_lookup(b)?,
        "immediate" => {
            let data = find(b, NFTA_IMMEDIATE_DATA)?;
            match find_u32(b, NFTA_IMMEDIATE_DREG)? {
                VERDICT_REGISTER => Expr::Verdict(read_verdict(data)?),
                _ => Expr::Constant { to: reg(NFTA_IMMEDIATE_DREG)?, data: read_value(data)? },
            }
        }
        "masq" => {
            only(&[NFTA_MASQ_FLAGS])?;
            Expr::Masquerade { flags: find_u32(b, NFTA_MASQ_FLAGS).unwrap_or(0) }
        }
        "counter" => {
            only(&[NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS, NFTA_COUNTER_PAD])?;
            Expr::Counter {
                packets: find_u64(b, NFTA_COUNTER_PACKETS)?,
                bytes: find_u64(b, NFTA_COUNTER_BYTES)?,
            }
        }
        "numgen" | "dynset" | "objref" => state_codec::read(name, b)?,
        "flow_offload" => {
            only(&[NFTA_FLOW_OFFLOAD_TABLE])?;
            Expr::Offload { flowtable: find_string(b, NFTA_FLOW_OFFLOAD_TABLE)? }
        }
        "reject" => Expr::Reject {
            kind: find_u32(b, NFTA_REJECT_TYPE)?,
            code: find(b, NFTA_REJECT_ICMP_CODE).and_then(<[u8]>::first).copied().unwrap_or(0),
        },
        _ => return None,
    })
}

fn read_fib(b: &[u8]) -> Option<Expr> {
    only(b, &[NFTA_FIB_DREG, NFTA_FIB_RESULT, NFTA_FIB_FLAGS])?;
    let to = reg(b, NFTA_FIB_DREG)?;
    match (find_u32(b, NFTA_FIB_RESULT)?, find_u32(b, NFTA_FIB_FLAGS)?) {
        REVERSE_PATH => Some(Expr::ReversePath { to }),
        SOURCE_TYPE => Some(Expr::SourceType { to }),
        _ => None,
    }
}

fn read_meta(b: &[u8]) -> Option<Expr> {
    if find(b, NFTA_META_SREG).is_some() {
        only(b, &[NFTA_META_SREG, NFTA_META_KEY])?;
        let from = reg(b, NFTA_META_SREG)?;
        return match find_u32(b, NFTA_META_KEY)? {
            NFT_META_PKTTYPE => Some(Expr::SetPacketType { from }),
            NFT_META_NFTRACE => Some(Expr::SetTrace { from }),
            _ => None,
        };
    }
    only(b, &[NFTA_META_DREG, NFTA_META_KEY])?;
    let key = MetaKey::from_number(find_u32(b, NFTA_META_KEY)?)?;
    Some(Expr::Meta { key, to: reg(b, NFTA_META_DREG)? })
}

fn read_ct(b: &[u8]) -> Option<Expr> {
    if find(b, NFTA_CT_SREG).is_some() {
        only(b, &[NFTA_CT_SREG, NFTA_CT_KEY])?;
        let mark = find_u32(b, NFTA_CT_KEY)? == CtKey::Mark as u32;
        let from = reg(b, NFTA_CT_SREG)?;
        return mark.then_some(Expr::SetCtMark { from });
    }
    only(b, &[NFTA_CT_DREG, NFTA_CT_KEY])?;
    Some(Expr::Ct { key: CtKey::from_number(find_u32(b, NFTA_CT_KEY)?)?, to: reg(b, NFTA_CT_DREG)? })
}

fn read_bitwise(b: &[u8]) -> Option<Expr> {
    // The operation 0 is this one; older kernels know no other and don't name it.
    let mask_and_xor = find_u32(b, NFTA_BITWISE_OP).unwrap_or(0) == 0;
    let (mask, xor) = (read_value(find(b, NFTA_BITWISE_MASK)?)?, read_value(find(b, NFTA_BITWISE_XOR)?)?);
    let (from, to) = (reg(b, NFTA_BITWISE_SREG)?, reg(b, NFTA_BITWISE_DREG)?);
    let fits = find_u32(b, NFTA_BITWISE_LEN)? as usize == mask.len() && mask.len() == xor.len();
    (mask_and_xor && fits).then_some(Expr::Bitwise { from, to, mask, xor })
}

fn read_lookup(b: &[u8]) -> Option<Expr> {
    let mode = match (find_u32(b, NFTA_LOOKUP_DREG), find_u32(b, NFTA_LOOKUP_FLAGS).unwrap_or(0)) {
        (None, 0) => Lookup::In,
        (None, NFT_LOOKUP_F_INV) => Lookup::NotIn,
        (Some(VERDICT_REGISTER), 0) => Lookup::Verdict,
        _ => return None,
    };
    Some(Expr::Lookup { set: find_string(b, NFTA_LOOKUP_SET)?, from: reg(b, NFTA_LOOKUP_SREG)?, mode })
}

/// Only what corrects no checksum is read.
fn write_payload(b: &[u8]) -> Option<Expr> {
    let plain = [NFTA_PAYLOAD_CSUM_TYPE, NFTA_PAYLOAD_CSUM_OFFSET, NFTA_PAYLOAD_CSUM_FLAGS]
        .into_iter()
        .all(|kind| find_u32(b, kind).unwrap_or(0) == 0);
    let known = attributes(b).all(|(kind, _)| kind != NFTA_PAYLOAD_DREG && kind <= NFTA_PAYLOAD_CSUM_FLAGS);
    Some(Expr::WritePayload {
        header: PayloadBase::from_number(find_u32(b, NFTA_PAYLOAD_BASE)?)?,
        offset: find_u32(b, NFTA_PAYLOAD_OFFSET)?,
        len: find_u32(b, NFTA_PAYLOAD_LEN)?,
        from: find_u32(b, NFTA_PAYLOAD_SREG).and_then(from_register).filter(|_| plain && known)?,
    })
}

/// Only a limit of packets is read, neither one of bytes nor one that lets through what is above it.
fn limit(b: &[u8]) -> Option<Expr> {
    let plain =
        [NFTA_LIMIT_TYPE, NFTA_LIMIT_FLAGS].into_iter().all(|kind| find_u32(b, kind).unwrap_or(0) == 0);
    let known = attributes(b).all(|(kind, _)| kind <= NFTA_LIMIT_PAD);
    (plain && known).then_some(Expr::Limit(Rate {
        packets: find_u64(b, NFTA_LIMIT_RATE)?,
        seconds: find_u64(b, NFTA_LIMIT_UNIT)?,
        burst: find_u32(b, NFTA_LIMIT_BURST)?,
    }))
}

/// Only a whole packet handed over at once is read; the kernel names the defaults of length and threshold.
fn log(b: &[u8]) -> Option<Expr> {
    let known = attributes(b).all(|(kind, _)| kind <= NFTA_LOG_QTHRESHOLD)
        && find_u32(b, NFTA_LOG_SNAPLEN).unwrap_or(0) == 0
        && find(b, NFTA_LOG_QTHRESHOLD).is_none_or(|value| value.iter().all(|byte| *byte == 0));
    let group = find(b, NFTA_LOG_GROUP)?.try_into().ok().map(u16::from_be_bytes)?;
    known.then_some(Expr::Log { group, prefix: find_string(b, NFTA_LOG_PREFIX)? })
}

/// The bytes inside a `nft_data` attribute.
pub(super) fn read_value(data: &[u8]) -> Option<Vec<u8>> {
    find(data, NFTA_DATA_VALUE).map(<[u8]>::to_owned)
}

/// The verdict inside a `nft_data` attribute.
pub(super) fn read_verdict(data: &[u8]) -> Option<Verdict> {
    read_decision(find(data, NFTA_DATA_VERDICT)?)
}

/// A verdict's own attributes.
pub(super) fn read_decision(verdict: &[u8]) -> Option<Verdict> {
    Some(match find_u32(verdict, NFTA_VERDICT_CODE)?.cast_signed() {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        JUMP => Verdict::Jump(find_string(verdict, NFTA_VERDICT_CHAIN)?),
        GOTO => Verdict::Goto(find_string(verdict, NFTA_VERDICT_CHAIN)?),
        RETURN => Verdict::Return,
        other => Verdict::Other(other),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 18] = [
        "objref",
        "numgen",
        "dynset",
        "flow_offload",
        "meta",
        "payload",
        "ct",
        "fib",
        "bitwise",
        "cmp",
        "lookup",
        "immediate",
        "masq",
        "counter",
        "reject",
        "match",
        "limit",
        "log",
    ];

    fn written(expr: &Expr) -> Vec<u8> {
        let mut w = Writer::default();
        write(&mut w, expr);
        w.into_bytes()
    }

    fn attribute_soup() -> impl Strategy<Value = Vec<u8>> {
        let value = prop_oneof![
            any::<u32>().prop_map(|n| n.to_be_bytes().to_vec()),
            (0u32..24).prop_map(|n| n.to_be_bytes().to_vec()),
            proptest::collection::vec(any::<u8>(), 0..20),
        ];
        proptest::collection::vec((1u16..8, value), 0..6).prop_map(|attributes| {
            let mut w = Writer::default();
            attributes.iter().for_each(|(kind, value)| w.bytes_attribute(*kind, value));
            w.into_bytes()
        })
    }

    #[test]
    fn what_cannot_be_held_stays_as_it_is() {
        // meta mark set: a source register instead of a destination.
        let mut w = Writer::default();
        w.u32(NFTA_META_KEY, MetaKey::Mark as u32);
        w.u32(3, 8);
        let set_mark = Expr::Unknown { name: "meta".to_owned(), bytes: w.into_bytes() };
        assert_eq!(read_all(&written(&set_mark)), [set_mark]);
    }

    #[test]
    fn a_target_and_a_comment_of_iptables_are_read() {
        let xt = |kind: &str, name: &str, info: &[u8]| {
            let mut w = Writer::default();
            w.string(NFTA_XT_NAME, name);
            w.u32(2, 0);
            w.bytes_attribute(NFTA_XT_INFO, info);
            Expr::Unknown { name: kind.to_owned(), bytes: w.into_bytes() }
        };
        let mut text = b"flanneld masq".to_vec();
        text.resize(256, 0);
        let (target, comment) = (xt("target", "MASQUERADE", &[0; 24]), xt("match", "comment", &text));
        assert_eq!(target.xt_target().as_deref(), Some("MASQUERADE"));
        assert_eq!((target.xt_match(), target.xt_comment()), (None, None));
        assert_eq!(comment.xt_match().as_deref(), Some("comment"));
        assert_eq!(comment.xt_comment().as_deref(), Some("flanneld masq"));
        assert_eq!(xt("match", "mark", &text).xt_comment(), None);
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_written_so_that_it_reads_the_same(
            name in proptest::sample::select(&NAMES[..]), bytes in attribute_soup(),
        ) {
            let foreign = Expr::Unknown { name: name.to_owned(), bytes };
            let read = read_all(&written(&foreign));
            prop_assert_eq!(read.len(), 1);
            prop_assert_eq!(read_all(&written(&read[0])), read);
        }

        #[test]
        fn arbitrary_bytes_never_panic(name in proptest::sample::select(&NAMES[..]), bytes: Vec<u8>) {
            read_all(&bytes);
            known(name, &bytes);
            let expr = Expr::Unknown { name: name.to_owned(), bytes };
            drop((expr.xt_target(), expr.xt_match(), expr.xt_comment()));
        }
    }
}
