//! Queues that limit rates, and the way of a link's incoming packets through another link's queue.

use super::Errno;
use super::message::{Message, Reply, attribute, number, text};
use super::socket::Socket;

/// `TC_H_ROOT`, `TC_H_INGRESS`, and the handles that Go's plugin uses.
const ROOT: u32 = 0xFFFF_FFFF;
const INGRESS: u32 = 0xFFFF_FFF1;
const INGRESS_HANDLE: u32 = 0xFFFF_0000;
const ROOT_HANDLE: u32 = 0x0001_0000;
/// The filter's class, which Go's plugin gives.
const CLASS: u32 = 0x0001_0001;
/// `TCA_KIND` and `TCA_OPTIONS`.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
/// In `TCA_OPTIONS` of tbf: `TCA_TBF_PARMS`, `TCA_TBF_RTAB`, `TCA_TBF_RATE64`, `TCA_TBF_BURST`.
const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
/// A tick of the scheduler is 64 ns.
const NANOSECONDS_PER_TICK: u64 = 64;

/// A limit of a rate, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    /// A second.
    pub(crate) rate: u64,
    pub(crate) burst: u32,
    /// What waits at most, the burst included.
    pub(crate) queue: u32,
}

impl Limit {
    /// The time that the burst takes at the rate, in ticks: how the kernel keeps it.
    pub(crate) fn buffer(self) -> u32 {
        let nanoseconds = u128::from(self.burst) * 1_000_000_000 / u128::from(self.rate.max(1));
        u32::try_from(nanoseconds / u128::from(NANOSECONDS_PER_TICK)).unwrap_or(u32::MAX)
    }
}

fn fixed(index: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend([index, handle, parent, info].into_iter().flat_map(u32::to_ne_bytes));
    bytes
}

/// A queue of a link that lets packets out at a limited rate; one that is there is replaced.
pub(crate) fn limit(index: u32, limit: Limit) -> Message {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE | libc::NLM_F_ACK;
    let message = Message::new(libc::RTM_NEWQDISC, flags, &fixed(index, ROOT_HANDLE, ROOT, 0));
    let rate = u32::try_from(limit.rate).unwrap_or(u32::MAX);
    // tc_tbf_qopt: two tc_ratespec (cell_log, linklayer, overhead, cell_align, mpu, rate), limit, buffer, mtu.
    let mut options = Vec::new();
    options.extend([0, 1, 0, 0, 0, 0, 0, 0]);
    options.extend(rate.to_ne_bytes());
    options.extend([0; 12]);
    options.extend([limit.queue, limit.buffer(), 0].into_iter().flat_map(u32::to_ne_bytes));
    message.with_text(KIND, "tbf").nested(OPTIONS, |nest| {
        let nest = nest.with(TBF_PARMS, &options);
        let nest = if limit.rate > u64::from(u32::MAX) {
            nest.with(TBF_RATE64, &limit.rate.to_ne_bytes())
        } else {
            nest
        };
        nest.with(TBF_BURST, &limit.burst.to_ne_bytes())
    })
}

/// Gives back the queue that the kernel had chosen.
pub(crate) fn unlimit(index: u32) -> Message {
    Message::new(libc::RTM_DELQDISC, libc::NLM_F_ACK, &fixed(index, ROOT_HANDLE, ROOT, 0))
}

/// The place of filters for packets that come in by a link.
pub(crate) fn ingress(index: u32) -> Message {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL | libc::NLM_F_ACK;
    let message = Message::new(libc::RTM_NEWQDISC, flags, &fixed(index, INGRESS_HANDLE, INGRESS, 0));
    message.with_text(KIND, "ingress")
}

/// Removes that place with its filters.
pub(crate) fn delete_ingress(index: u32) -> Message {
    Message::new(libc::RTM_DELQDISC, libc::NLM_F_ACK, &fixed(index, INGRESS_HANDLE, INGRESS, 0))
}

/// Sends all that comes in by a link out by another one, which sends it back when its queue lets it.
pub(crate) fn redirect(index: u32, target: u32) -> Message {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL | libc::NLM_F_ACK;
    let all = (libc::ETH_P_ALL as u16).to_be();
    let info = 1 << 16 | u32::from(all);
    let message = Message::new(libc::RTM_NEWTFILTER, flags, &fixed(index, 0, INGRESS_HANDLE, info));
    message.with_text(KIND, "u32").nested(OPTIONS, |options| {
        options
            .with_u32(1, CLASS)
            .with(5, &any_packet())
            // TCA_U32_ACT: the actions by number.
            .nested(7, |actions| actions.nested(1, |action| mirred(action, target)))
    })
}

/// tc_u32_sel: terminal, one key that compares nothing.
fn any_packet() -> Vec<u8> {
    let mut selector = vec![0; 16];
    selector[0] = 1;
    selector[2] = 1;
    selector.extend([0; 16]);
    selector
}

/// The action: stolen (4), and sent out by the target (redirection is 1).
fn mirred(action: Message, target: u32) -> Message {
    let parameters = [0, 0, 4, 0, 0, 1, target];
    let bytes: Vec<u8> = parameters.into_iter().flat_map(u32::to_ne_bytes).collect();
    action.with_text(KIND, "mirred").nested(OPTIONS, |options| options.with(2, &bytes))
}

/// What a link's queue lets out: rate and buffer, if it is one that limits.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn limit_of(socket: &mut Socket, index: u32) -> Result<Option<(u64, u32)>, Errno> {
    let replies = socket.ask(Message::new(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &fixed(index, 0, 0, 0)))?;
    Ok(replies.iter().filter_map(|reply| parse(reply, index)).next())
}

fn parse(reply: &Reply, index: u32) -> Option<(u64, u32)> {
    let (fixed, rest) = reply.payload.split_at_checked(20)?;
    if number(&fixed[4..8]) != index || text(attribute(rest, KIND)?) != "tbf" {
        return None;
    }
    let options = attribute(rest, OPTIONS)?;
    let parameters = attribute(options, TBF_PARMS)?;
    let rate = match attribute(options, TBF_RATE64).and_then(|rate| rate.try_into().ok()) {
        Some(rate) => u64::from_ne_bytes(rate),
        None => number(parameters.get(8..12)?).into(),
    };
    Some((rate, number(parameters.get(28..32)?)))
}
