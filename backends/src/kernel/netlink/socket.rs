//! The netlink conversation: dumps, single questions, and many changes per system call.

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Messages per system call. If the kernel refused every one of them, its answers would still fit into
/// the default receive buffer of 208 KiB; a batch that overruns it never gets its last answer.
const BATCH: usize = 128;

/// The kernel works inside the system call, so an answer that is not there after this long never comes.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a dump that the kernel calls inconsistent, because something changed meanwhile, is repeated.
const DUMP_TRIES: usize = 4;

/// A change for the kernel: the message and its `NLM_F_*` flags besides `REQUEST` and `ACK`.
pub(super) type Request = (RouteNetlinkMessage, u16);

/// A blocking rtnetlink socket of the network namespace in which it was opened.
pub(super) struct Conversation {
    socket: Socket,
    sequence: u32,
    received: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Conversation {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Answers without a copy of the request; filters in dump requests are taken seriously.
        socket.set_cap_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        socket2::SockRef::from(&socket).set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0, received: Vec::with_capacity(64 * 1024), outgoing: Vec::new() })
    }

    /// Reads a whole table and hands each entry to `each`, after `start`, which is called again when the
    /// dump has to be repeated.
    pub(super) fn dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        mut start: impl FnMut() -> T,
        mut each: impl FnMut(&mut T, RouteNetlinkMessage),
    ) -> io::Result<T> {
        for attempt in 1.. {
            let mut collected = start();
            let sequence = self.send_one(request.clone(), NLM_F_DUMP)?;
            let mut consistent = true;
            self.receive(|message| {
                if message.header.sequence_number != sequence {
                    return Ok(false);
                }
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => each(&mut collected, inner),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(true),
                    NetlinkPayload::Error(error) => return refusal(&error).map_or(Ok(true), Err),
                    _ => {}
                }
                Ok(false)
            })?;
            // What an inconsistent dump got wrong is put right after the notification about it.
            if consistent || attempt == DUMP_TRIES {
                return Ok(collected);
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// Asks one question and returns the one answer.
    pub(super) fn ask(&mut self, request: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let sequence = self.send_one(request, 0)?;
        let mut answer = None;
        self.receive(|message| {
            if message.header.sequence_number != sequence {
                return Ok(false);
            }
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => answer = Some(inner),
                NetlinkPayload::Error(error) => return refusal(&error).map_or(Ok(true), Err),
                _ => {}
            }
            Ok(true)
        })?;
        answer.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
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
            let batch: Vec<Request> = requests.by_ref().take(BATCH).collect();
            let count = batch.len();
            if let Err(error) = self.batch(batch, |position, error| failures.push((done + position, error))) {
                // The conversation broke, so nothing is known about the rest of this batch.
                failures.push((done + count - 1, error));
            }
            done += count;
        }
        failures
    }

    /// Only the last message asks for an acknowledgement; the kernel reports failures in any case.
    fn batch(&mut self, batch: Vec<Request>, mut failed: impl FnMut(usize, io::Error)) -> io::Result<()> {
        let first = self.sequence.wrapping_add(1);
        let count = batch.len() as u32;
        self.outgoing.clear();
        for (position, (message, flags)) in batch.into_iter().enumerate() {
            let ack = if position as u32 + 1 == count { NLM_F_ACK } else { 0 };
            self.append(message, flags | ack);
        }
        self.flush()?;
        self.receive(|message| {
            let position = message.header.sequence_number.wrapping_sub(first);
            if position < count
                && let NetlinkPayload::Error(error) = &message.payload
            {
                if let Some(error) = refusal(error) {
                    failed(position as usize, error);
                }
                return Ok(position + 1 == count);
            }
            Ok(false)
        })
    }

    fn send_one(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<u32> {
        self.outgoing.clear();
        self.append(message, flags);
        self.flush()?;
        Ok(self.sequence)
    }

    fn append(&mut self, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.sequence_number = self.sequence;
        header.flags = flags | NLM_F_REQUEST;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = self.outgoing.len();
        self.outgoing.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut self.outgoing[start..]);
    }

    fn flush(&mut self) -> io::Result<()> {
        loop {
            match self.socket.send(&self.outgoing, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands received messages to `each` until it says `true`.
    fn receive(
        &mut self,
        mut each: impl FnMut(NetlinkMessage<RouteNetlinkMessage>) -> io::Result<bool>,
    ) -> io::Result<()> {
        loop {
            self.received.clear();
            match self.socket.recv(&mut self.received, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let mut finished = false;
            for message in messages(&self.received) {
                finished |= each(message)?;
            }
            if finished {
                return Ok(());
            }
        }
    }
}

/// The messages of one datagram; those that can't be decoded are left out.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = NetlinkMessage<RouteNetlinkMessage>> {
    const HEADER: usize = 16;
    std::iter::from_fn(move || {
        loop {
            let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
            if length < HEADER || length > datagram.len() {
                return None;
            }
            let (one, rest) = datagram.split_at(length.next_multiple_of(4).min(datagram.len()));
            datagram = rest;
            match NetlinkMessage::deserialize(&one[..length]) {
                Ok(message) => return Some(message),
                Err(error) => tracing::debug!(%error, "passing over a netlink message that can't be decoded"),
            }
        }
    })
}

/// The errno of a refusal; `None` for an acknowledgement.
fn refusal(error: &netlink_packet_core::ErrorMessage) -> Option<io::Error> {
    error.code.map(|code| io::Error::from_raw_os_error(code.get().saturating_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let _ = messages(&bytes).count();
            let mut two = framed(kind, &body);
            two.resize(two.len().next_multiple_of(4), 0);
            two.extend(framed(kind, &body));
            prop_assert!(messages(&two).count() <= 2);
        }
    }
}
