//! The conversation with the kernel: one transaction per system call, and dumps.

use std::io;
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::sockopt;

use super::encode::Transaction;
use super::wire::{HEADER, Head, Message, Writer, attributes, messages, native_u32, string};

/// The kernel works inside the system call, so an answer that is not there after this long never comes.
const PATIENCE: Duration = Duration::from_secs(10);

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Flags of an error message: the request is not repeated in it, and details follow.
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

const MSG_DONTWAIT: i32 = 0x40;
pub(super) const ENOENT: i32 = 2;
pub(super) const EMSGSIZE: i32 = 90;
pub(super) const ENOBUFS: i32 = 105;

/// What the kernel said to a transaction.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Which message it is about; `None` for the transaction as a whole.
    pub(super) position: Option<usize>,
    pub(super) error: io::Error,
    /// The kernel's own words, which it seldom has.
    pub(super) words: Option<String>,
    /// How many messages were refused besides.
    pub(super) others: usize,
}

/// A blocking socket of the network namespace in which it was opened.
pub(super) struct Conversation {
    socket: Socket,
    port: u32,
    sequence: u32,
    received: Vec<u8>,
    sendable: usize,
}

impl Conversation {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        // Answers without a copy of the request, and with the kernel's words where it has some.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        socket2::SockRef::from(&socket).set_read_timeout(Some(PATIENCE))?;
        let sendable = sockopt::socket_send_buffer_size(&socket)? / 2;
        Ok(Self { socket, port, sequence: 0, received: Vec::with_capacity(64 * 1024), sendable })
    }

    /// The number under which notifications name this socket as the origin of a change.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// The number that the next message gets.
    pub(super) fn next_sequence(&self) -> u32 {
        self.sequence.wrapping_add(1)
    }

    /// Carries out a transaction that was numbered from [`Self::next_sequence`].
    pub(super) fn transact(&mut self, transaction: &Transaction<'_>) -> io::Result<Result<(), Refusal>> {
        let first = self.next_sequence();
        let count = transaction.len();
        self.sequence = self.sequence.wrapping_add(count as u32 + 2);
        self.make_room(transaction.bytes().len());
        send(&self.socket, transaction.bytes())?;
        // All answers are there when the system call returns, so nobody waits for one that got no room.
        let mut acknowledged = count == 0;
        let mut refusal: Option<Refusal> = None;
        while self.receive(MSG_DONTWAIT)? {
            for message in messages(&self.received) {
                let position = message.sequence.wrapping_sub(first) as usize;
                if message.kind != NLMSG_ERROR || position > count {
                    continue;
                }
                let Some((code, words)) = verdict(&message) else { continue };
                // The message that opens the frame stands for all of them.
                let position = position.checked_sub(1);
                if code == 0 {
                    acknowledged |= position.is_some_and(|position| position + 1 == count);
                    continue;
                }
                // The first message that is refused is the cause; others often only follow from it.
                match &mut refusal {
                    Some(known) => known.others += 1,
                    None => {
                        let error = io::Error::from_raw_os_error(code);
                        refusal = Some(Refusal { position, error, words, others: 0 });
                    }
                }
            }
        }
        match refusal {
            Some(refusal) => Ok(Err(refusal)),
            None if acknowledged => Ok(Ok(())),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the kernel gave no answer")),
        }
    }

    /// Asks for a table of the kernel; gives whether nothing changed meanwhile.
    pub(super) fn dump(
        &mut self,
        kind: u16,
        family: u8,
        filter: impl FnOnce(&mut Writer),
        mut each: impl FnMut(&Message<'_>),
    ) -> io::Result<bool> {
        let sequence = self.ask(kind, family, NLM_F_DUMP, filter)?;
        let mut steady = true;
        loop {
            self.receive(0)?;
            for message in messages(&self.received).filter(|message| message.sequence == sequence) {
                steady &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match verdict(&message) {
                            // A thing to be dumped went away since its name was read.
                            Some((ENOENT, _)) => Ok(false),
                            Some((code, _)) if code != 0 => Err(io::Error::from_raw_os_error(code)),
                            _ => Ok(steady),
                        };
                    }
                    _ => each(&message),
                }
            }
        }
    }

    /// Asks for one thing, and reads the attributes of the answer.
    pub(super) fn get<T>(&mut self, kind: u16, mut read: impl FnMut(&[u8]) -> Option<T>) -> io::Result<T> {
        let sequence = self.ask(kind, 0, 0, |_| {})?;
        loop {
            self.receive(0)?;
            let answer = messages(&self.received).find(|message| message.sequence == sequence);
            let Some(message) = answer else { continue };
            let found = match (message.kind, verdict(&message)) {
                (NLMSG_ERROR, Some((code, _))) => return Err(io::Error::from_raw_os_error(code)),
                _ => read(message.attributes()),
            };
            return found.ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
    }

    fn ask(&mut self, kind: u16, family: u8, flags: u16, body: impl FnOnce(&mut Writer)) -> io::Result<u32> {
        let sequence = self.next_sequence();
        self.sequence = sequence;
        let mut w = Writer::default();
        w.message(Head { kind, flags: flags | NLM_F_REQUEST, sequence, family, resource: 0 }, body);
        send(&self.socket, w.bytes())?;
        Ok(sequence)
    }

    /// Receives one datagram; `false` when there is none and `flags` say not to wait.
    fn receive(&mut self, flags: i32) -> io::Result<bool> {
        loop {
            self.received.clear();
            match self.socket.recv(&mut self.received, flags) {
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // More messages were refused than answers have room. The first answers are there.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) && flags == MSG_DONTWAIT => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && flags == MSG_DONTWAIT => {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A transaction goes out in one piece, which must fit into the send buffer. Where this fails, the
    /// kernel refuses the transaction as too long.
    fn make_room(&mut self, len: usize) {
        if len <= self.sendable {
            return;
        }
        // The kernel doubles the number, for its own overhead. Without privilege it stops at wmem_max.
        let forced = sockopt::set_socket_send_buffer_size_force(&self.socket, len);
        if forced.or_else(|_| sockopt::set_socket_send_buffer_size(&self.socket, len)).is_ok() {
            self.sendable =
                sockopt::socket_send_buffer_size(&self.socket).map_or(self.sendable, |size| size / 2);
        }
    }
}

fn send(socket: &Socket, bytes: &[u8]) -> io::Result<()> {
    loop {
        match socket.send(bytes, 0) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The errno of an acknowledgement, a refusal or the end of a dump (0: none), and the kernel's words.
fn verdict(message: &Message<'_>) -> Option<(i32, Option<String>)> {
    let code = native_u32(message.payload, 0)?.cast_signed().saturating_abs();
    let words = (message.kind == NLMSG_ERROR && message.flags & NLM_F_ACK_TLVS != 0).then(|| {
        let repeated = native_u32(message.payload, 4).map_or(0, |length| length as usize);
        let request = if message.flags & NLM_F_CAPPED != 0 { HEADER } else { repeated.next_multiple_of(4) };
        let details = message.payload.get(4 + request..).unwrap_or_default();
        attributes(details).find_map(|(kind, value)| (kind == NLMSGERR_ATTR_MSG).then(|| string(value)))
    });
    Some((code, words.flatten()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_words_are_found_behind_a_capped_request() {
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend([0; HEADER]);
        let mut w = Writer::default();
        w.u32(2, 5);
        w.string(NLMSGERR_ATTR_MSG, "no such thing");
        payload.extend(w.bytes());
        let flags = NLM_F_CAPPED | NLM_F_ACK_TLVS;
        let message = Message { kind: NLMSG_ERROR, flags, sequence: 0, port: 0, payload: &payload };
        assert_eq!(verdict(&message), Some((22, Some("no such thing".to_owned()))));
        assert_eq!(verdict(&Message { flags: 0, ..message }), Some((22, None)));
        assert_eq!(verdict(&Message { payload: &payload[..3], ..message }), None);
    }

    proptest! {
        #[test]
        fn arbitrary_answers_never_panic(kind in 2u16..4, flags: u16, payload: Vec<u8>) {
            verdict(&Message { kind, flags, sequence: 0, port: 0, payload: &payload });
        }
    }
}
