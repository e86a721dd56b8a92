//! A blocking netlink socket: many messages per system call, dumps, single requests.

use std::io;
use std::time::Duration;

use netlink_packet_core::NLM_F_DUMP_INTR;
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;
use rustix::net::sockopt;

use super::wire::{HEADER, Message, attributes, messages, native_u32, string};

/// The kernel works inside the system call, so an answer that is not there after this time never comes.
const TIMEOUT: Duration = Duration::from_secs(10);

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Flags of an error message: the request is not repeated in it, and details follow.
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Flags of `recv`: wait until something is there, or (`MSG_DONTWAIT`) don't.
const WAIT: i32 = 0;
const NO_WAIT: i32 = 0x40;

/// What the kernel said when it refused a message.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: io::Error,
    /// The kernel's own words, which it seldom has.
    pub(crate) words: Option<String>,
}

/// A socket of the network namespace in which it was opened.
pub(crate) struct NetlinkSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
    received: Vec<u8>,
    /// The longest batch that fits into the send buffer, in bytes.
    sendable: usize,
}

impl NetlinkSocket {
    /// Opens a socket of `protocol`, one of `NETLINK_*`.
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        // Refusals come without a copy of the request.
        socket.set_cap_ack(true)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(TIMEOUT))?;
        let sendable = sockopt::socket_send_buffer_size(&socket)? / 2;
        Ok(Self { socket, port, sequence: 0, received: Vec::with_capacity(64 * 1024), sendable })
    }

    /// Has the kernel add its own words to refusals, where it has some.
    pub(crate) fn with_words(self) -> io::Result<Self> {
        self.socket.set_ext_ack(true)?;
        Ok(self)
    }

    /// Has the kernel take filters in dump requests seriously.
    pub(crate) fn with_strict_filters(self) -> io::Result<Self> {
        self.socket.set_netlink_get_strict_chk(true)?;
        Ok(self)
    }

    /// The number under which notifications name this socket as the origin of a change.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// The number that the next message gets.
    pub(crate) fn next_sequence(&self) -> u32 {
        self.sequence.wrapping_add(1)
    }

    /// Has the next message get this number, which none had of which an answer may still come.
    pub(crate) fn number_from(&mut self, next: u32) {
        self.sequence = next.wrapping_sub(1);
    }

    /// Sends `count` messages that are numbered from [`Self::next_sequence`] on, and reports each refused one by its
    /// position. Only the message at `acknowledged` asks for an acknowledgement: the kernel reports failures in any case.
    /// Gives whether that one was answered; if it wasn't, answers were lost.
    ///
    /// # Errors
    /// The conversation failed, so nothing is known about messages that were not reported.
    pub(crate) fn batch(
        &mut self,
        bytes: &[u8],
        count: usize,
        acknowledged: Option<usize>,
        mut refused: impl FnMut(usize, Refusal),
    ) -> io::Result<bool> {
        let first = self.next_sequence();
        self.sequence = self.sequence.wrapping_add(count as u32);
        self.make_room(bytes.len());
        self.send(bytes)?;
        let mut answered = acknowledged.is_none();
        // All answers are there when the system call returns, so an answer that found no room is not waited for.
        while self.receive(NO_WAIT)? {
            for message in messages(&self.received) {
                let position = message.sequence.wrapping_sub(first) as usize;
                if message.kind != NLMSG_ERROR || position >= count {
                    continue;
                }
                let Some((code, words)) = verdict(&message) else { continue };
                answered |= acknowledged == Some(position);
                if code != 0 {
                    refused(position, Refusal { error: io::Error::from_raw_os_error(code), words });
                }
            }
        }
        Ok(answered)
    }

    /// Sends one message that asks for a dump, and hands each entry to `each`. Gives whether nothing changed meanwhile.
    pub(crate) fn dump(&mut self, bytes: &[u8], mut each: impl FnMut(&Message<'_>)) -> io::Result<bool> {
        let sequence = self.send_one(bytes)?;
        let mut consistent = true;
        loop {
            self.receive(WAIT)?;
            for message in messages(&self.received).filter(|message| message.sequence == sequence) {
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match verdict(&message) {
                            Some((code, _)) if code != 0 => Err(io::Error::from_raw_os_error(code)),
                            _ => Ok(consistent),
                        };
                    }
                    _ => each(&message),
                }
            }
        }
    }

    /// Sends one message that asks for one thing, and reads the answer.
    ///
    /// # Errors
    /// The kernel's errno; `UnexpectedEof` where it only acknowledges.
    pub(crate) fn ask<T>(&mut self, bytes: &[u8], read: impl FnOnce(&Message<'_>) -> T) -> io::Result<T> {
        let sequence = self.send_one(bytes)?;
        loop {
            self.receive(WAIT)?;
            // The answer to a request that was given up comes late.
            let answer = messages(&self.received).find(|message| message.sequence == sequence);
            let Some(message) = answer else { continue };
            return match (message.kind, verdict(&message)) {
                (NLMSG_ERROR, Some((0, _)) | None) => Err(no_answer()),
                (NLMSG_ERROR, Some((code, _))) => Err(io::Error::from_raw_os_error(code)),
                _ => Ok(read(&message)),
            };
        }
    }

    /// Hands on what the kernel tells without being asked, one datagram of it. Nothing, if it tells nothing for a while or
    /// more than there is room for.
    pub(crate) fn hear(&mut self, mut each: impl FnMut(&Message<'_>)) -> io::Result<()> {
        match self.receive(WAIT) {
            Ok(_) => {
                messages(&self.received).for_each(|message| each(&message));
                Ok(())
            }
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::NOBUFS) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn send_one(&mut self, bytes: &[u8]) -> io::Result<u32> {
        self.sequence = self.next_sequence();
        self.send(bytes)?;
        Ok(self.sequence)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        uninterrupted(|| self.socket.send(bytes, 0)).map(drop)
    }

    /// Receives one datagram; `false` when there is none and `flags` say not to wait.
    fn receive(&mut self, flags: i32) -> io::Result<bool> {
        loop {
            self.received.clear();
            let Err(error) = uninterrupted(|| self.socket.recv(&mut self.received, flags)) else {
                return Ok(true);
            };
            match Errno::from_io_error(&error) {
                // More messages were refused than answers have room. The first answers are there.
                Some(Errno::NOBUFS) if flags == NO_WAIT => {}
                Some(Errno::AGAIN) if flags == NO_WAIT => return Ok(false),
                _ => return Err(error),
            }
        }
    }

    /// A batch goes out in one piece, which must fit into the send buffer. Where the buffer can't grow, the kernel refuses
    /// the batch as too long.
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

/// The kernel did not answer what it has to answer.
pub(crate) fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the kernel gave no answer")
}

/// Repeats a call while it is interrupted: a wait on a socket with a time limit is, whenever this process is stopped and
/// continued or its machine is frozen (signal(7)).
///
/// # Errors
/// The call's other errors.
pub(crate) fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
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

    use super::super::wire::Writer;
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
