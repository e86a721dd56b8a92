//! Queues that limit rates, and the way of a link's incoming packets through another link's queue.

use super::Errno;
use super::message::{Message, Reply, attribute, attributes, number, text};
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
/// `TCA_U32_ACT`, the actions by number, and in `TCA_OPTIONS` of one of them `TCA_MIRRED_PARMS`.
const U32_ACTIONS: u16 = 7;
const MIRRED_PARMS: u16 = 2;
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
    /// The time that the burst takes at the rate, in ticks: what is asked for, which kernels since 3.15 compute themselves from the
    /// burst.
    pub(crate) fn buffer(self) -> u32 {
        u32::try_from(self.ticks()).unwrap_or(u32::MAX)
    }

    fn ticks(self) -> u64 {
        u64::from(self.burst) * 1_000_000_000 / self.rate.max(1) / NANOSECONDS_PER_TICK
    }

    /// What Go's plugin asks for: it counts whole microseconds, and of a number that is too large it keeps the lower 32 bits,
    /// or on processors such as arm64 the largest number.
    fn buffers_of_go(self) -> [u32; 2] {
        let microseconds = u64::from(self.burst) * 1_000_000 / self.rate.max(1);
        let ticks = |microseconds: u32| u64::from(microseconds) * 1000 / NANOSECONDS_PER_TICK;
        let largest = u32::try_from(microseconds).unwrap_or(u32::MAX);
        [ticks(microseconds as u32) as u32, u32::try_from(ticks(largest)).unwrap_or(u32::MAX)]
    }

    /// How a queue differs from the one that an ADD of this or of Go's plugin makes for this limit.
    pub(crate) fn difference(self, found: Queue) -> Option<String> {
        if found.rate != self.rate {
            return Some(format!(
                "Rate doesn't match: {} bytes a second instead of {}",
                found.rate, self.rate
            ));
        }
        // The largest number stands for more than there is room for, of which Go's plugin keeps the lower 32 bits.
        if self.queue != u32::MAX && found.queue != self.queue {
            return Some(format!("Limit doesn't match: {} bytes instead of {}", found.queue, self.queue));
        }
        let ticks = self.ticks();
        // The kernel multiplies by the reciprocal of the rate, of which it has 32 bits. Of the product it tells the lower 32 bits.
        let lower = found.buffer.wrapping_sub(ticks as u32).cast_signed().unsigned_abs();
        let same = u64::from(lower) <= (ticks >> 30) + 1;
        let of_go = self.buffers_of_go().into_iter().any(|buffer| buffer.abs_diff(found.buffer) <= 1);
        (!same && !of_go)
            .then(|| format!("Buffer doesn't match: {} ticks instead of {}", found.buffer, ticks as u32))
    }
}

/// A queue that limits, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Queue {
    /// Bytes a second.
    pub(crate) rate: u64,
    /// What waits at most, in bytes.
    pub(crate) queue: u32,
    /// The time that the burst takes, in ticks: its lower 32 bits.
    pub(crate) buffer: u32,
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
            .nested(U32_ACTIONS, |actions| actions.nested(1, |action| mirred(action, target)))
    })
}

/// Whether what comes in by a link is sent on by another one.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn leads_to(socket: &mut Socket, index: u32, target: u32) -> Result<bool, Errno> {
    let filters = Message::new(libc::RTM_GETTFILTER, libc::NLM_F_DUMP, &fixed(index, 0, INGRESS_HANDLE, 0));
    match socket.ask(filters) {
        Ok(replies) => Ok(replies.iter().any(|reply| targets(reply).contains(&target))),
        // There is no such link, or nothing on it that could have filters.
        Err(Errno::NO_DEVICE | Errno::INVALID | Errno::NO_ENTRY) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The links that a filter's actions send packets on by.
fn targets(reply: &Reply) -> Vec<u32> {
    let options = reply.payload.get(20..).and_then(|rest| attribute(rest, OPTIONS));
    let actions = options.and_then(|options| attribute(options, U32_ACTIONS)).unwrap_or_default();
    let target = |action: &[u8]| {
        let parameters = attribute(attribute(action, OPTIONS)?, MIRRED_PARMS)?;
        parameters
            .get(24..28)
            .map(number)
            .filter(|_| attribute(action, KIND).map(text).as_deref() == Some("mirred"))
    };
    attributes(actions).filter_map(|(_, action)| target(action)).collect()
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
    action.with_text(KIND, "mirred").nested(OPTIONS, |options| options.with(MIRRED_PARMS, &bytes))
}

/// What a link's queue lets out, if it is one that limits.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn limit_of(socket: &mut Socket, index: u32) -> Result<Option<Queue>, Errno> {
    let replies = socket.ask(Message::new(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &fixed(index, 0, 0, 0)))?;
    Ok(replies.iter().filter_map(|reply| parse(reply, index)).next())
}

fn parse(reply: &Reply, index: u32) -> Option<Queue> {
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
    Some(Queue { rate, queue: number(parameters.get(24..28)?), buffer: number(parameters.get(28..32)?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What kubelet asks for: 2147483647 bits at once, and a rate in bits.
    fn of_kubelet(rate: u64) -> Limit {
        let burst = 2_147_483_647 / 8;
        let rate = rate / 8;
        Limit { rate, burst, queue: burst + u32::try_from(rate / 40).unwrap() }
    }

    #[test]
    fn a_queue_is_that_of_its_limit_and_of_no_other() {
        let rates = [1000, 500_000, 1_000_000, 5_000_000, 7_000_000, 8_000_000, 100_000_000];
        for limit in rates.map(of_kubelet) {
            let exact = Queue { rate: limit.rate, queue: limit.queue, buffer: limit.ticks() as u32 };
            let [wrapped, largest] = limit.buffers_of_go();
            for buffer in [exact.buffer, exact.buffer.wrapping_add(1), wrapped, largest] {
                assert_eq!(limit.difference(Queue { buffer, ..exact }), None, "{limit:?} {buffer}");
            }
            for (found, expected) in [
                (Queue { rate: limit.rate + 1, ..exact }, "Rate doesn't match"),
                (Queue { queue: limit.queue - 1, ..exact }, "Limit doesn't match"),
                (Queue { buffer: exact.buffer.wrapping_add(100_000), ..exact }, "Buffer doesn't match"),
                (Queue { buffer: exact.buffer.wrapping_sub(100_000), ..exact }, "Buffer doesn't match"),
            ] {
                let difference = limit.difference(found).unwrap_or_default();
                assert!(difference.starts_with(expected), "{limit:?} {found:?}: {difference}");
            }
        }
    }

    #[test]
    fn the_buffers_of_gos_plugin_are_what_it_was_seen_to_set() {
        assert_eq!(of_kubelet(1_000_000).buffers_of_go(), [3_489_660_803, u32::MAX]);
        let small = Limit { rate: 1_000_000, burst: 10_000, queue: 35_000 };
        assert_eq!(small.buffers_of_go(), [156_250, 156_250]);
    }
}
