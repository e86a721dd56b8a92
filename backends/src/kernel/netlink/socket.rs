//! The conversation with rtnetlink, in typed messages.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::nexthop::NexthopMessage;
use crate::netlink::socket::{NetlinkSocket, no_answer};
use crate::netlink::wire::Message;

/// Messages per system call. If the kernel refused every one of them, its answers would still fit into
/// the default receive buffer of 208 KiB; a batch that overruns it never gets its last answer.
const BATCH: usize = 128;

/// How often a dump that the kernel calls inconsistent, because something changed meanwhile, is repeated.
const DUMP_TRIES: usize = 4;

/// A change for the kernel: the message and its `NLM_F_*` flags; `REQUEST` and `ACK` are added.
pub(super) type Request = (Body, u16);

/// What a request says.
#[derive(Clone)]
pub(super) enum Body {
    Typed(RouteNetlinkMessage),
    /// A message that `netlink-packet-route` does not have.
    Nexthop(NexthopMessage),
}

impl From<RouteNetlinkMessage> for Body {
    fn from(message: RouteNetlinkMessage) -> Self {
        Self::Typed(message)
    }
}

impl From<NexthopMessage> for Body {
    fn from(message: NexthopMessage) -> Self {
        Self::Nexthop(message)
    }
}

impl NetlinkSerializable for Body {
    fn message_type(&self) -> u16 {
        match self {
            Self::Typed(message) => message.message_type(),
            Self::Nexthop(message) => message.kind(),
        }
    }

    fn buffer_len(&self) -> usize {
        match self {
            Self::Typed(message) => message.buffer_len(),
            Self::Nexthop(message) => message.bytes().len(),
        }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        match self {
            Self::Typed(message) => message.serialize(buffer),
            Self::Nexthop(message) => buffer.copy_from_slice(message.bytes()),
        }
    }
}

/// A socket of the network namespace in which it was opened.
pub(super) struct RouteSocket {
    socket: NetlinkSocket,
    outgoing: Vec<u8>,
}

impl RouteSocket {
    pub(super) fn open() -> io::Result<Self> {
        let socket = NetlinkSocket::open(NETLINK_ROUTE)?.with_strict_filters()?;
        Ok(Self { socket, outgoing: Vec::new() })
    }

    /// The number under which notifications name this socket as the origin of a change.
    pub(super) fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Reads a whole table and hands each entry to `each`, after `start`, which is called again when the
    /// dump has to be repeated.
    pub(super) fn dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        start: impl FnMut() -> T,
        mut each: impl FnMut(&mut T, RouteNetlinkMessage),
    ) -> io::Result<T> {
        self.dump_raw(&Body::Typed(request.clone()), start, |collected, message| {
            if let Some(inner) = decode(message) {
                each(collected, inner);
            }
        })
    }

    /// The same, of messages as they are.
    pub(super) fn dump_raw<T>(
        &mut self,
        request: &Body,
        mut start: impl FnMut() -> T,
        mut each: impl FnMut(&mut T, &Message<'_>),
    ) -> io::Result<T> {
        for attempt in 1.. {
            let mut collected = start();
            self.write([(request.clone(), NLM_F_DUMP)], 0);
            let consistent = self.socket.dump(&self.outgoing, |message| each(&mut collected, message))?;
            // What an inconsistent dump got wrong is put right after the notification about it.
            if consistent || attempt == DUMP_TRIES {
                return Ok(collected);
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// Asks one question and returns the one answer.
    pub(super) fn ask(&mut self, request: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        self.write([(request.into(), 0)], 0);
        self.socket.ask(&self.outgoing, decode)?.ok_or_else(no_answer)
    }

    /// Makes one change.
    pub(super) fn change(&mut self, request: Request) -> io::Result<()> {
        match self.changes(vec![request]).pop() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Makes many changes in order, and returns those that the kernel refused, with their position.
    pub(super) fn changes(&mut self, requests: Vec<Request>) -> Vec<(usize, io::Error)> {
        let mut failures = Vec::new();
        let mut done = 0;
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let count = self.write(requests.by_ref().take(BATCH), NLM_F_ACK);
            let last = count - 1;
            let answered = self.socket.batch(&self.outgoing, count, Some(last), |position, refusal| {
                failures.push((done + position, refusal.error));
            });
            match answered {
                Ok(true) => {}
                // The conversation broke, so nothing is known about the rest of this batch.
                Ok(false) => failures.push((done + last, no_answer())),
                Err(error) => failures.push((done + last, error)),
            }
            done += count;
        }
        failures
    }

    /// Puts messages into the outgoing buffer, the last one with the flags `last` besides; gives their number.
    fn write(&mut self, requests: impl IntoIterator<Item = Request>, last: u16) -> usize {
        self.outgoing.clear();
        let mut requests = requests.into_iter().peekable();
        let mut sequence = self.socket.next_sequence();
        let mut count = 0;
        while let Some((message, flags)) = requests.next() {
            let mut header = NetlinkHeader::default();
            header.sequence_number = sequence;
            header.flags = flags | NLM_F_REQUEST | if requests.peek().is_none() { last } else { 0 };
            let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
            message.finalize();
            let start = self.outgoing.len();
            self.outgoing.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut self.outgoing[start..]);
            sequence = sequence.wrapping_add(1);
            count += 1;
        }
        count
    }
}

/// A message as `netlink-packet-route` has it, if it can be decoded.
pub(super) fn decode(message: &Message<'_>) -> Option<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = message.kind;
    RouteNetlinkMessage::deserialize(&header, message.payload)
        .inspect_err(|error| tracing::debug!(%error, "passing over a netlink message that can't be decoded"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::wire;
    use proptest::prelude::*;

    /// A message of rtnetlink with an arbitrary body.
    fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_never_panic(bytes: Vec<u8>, kind in 16u16..32, body: Vec<u8>) {
            let messages = |bytes: &[u8]| wire::messages(bytes).filter_map(|message| decode(&message)).count();
            let _ = messages(&bytes);
            let mut two = framed(kind, &body);
            two.resize(two.len().next_multiple_of(4), 0);
            two.extend(framed(kind, &body));
            prop_assert!(messages(&two) <= 2);
        }
    }
}
