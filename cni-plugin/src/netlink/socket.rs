//! A conversation with the kernel in the network namespace in which it was begun.

use std::io::{self, Read, Write};

use socket2::{Domain, Protocol, Type};

use super::Errno;
use super::message::{Message, Reply, number, replies};

/// Larger than any datagram that the kernel sends.
const BUFFER: usize = 64 << 10;

/// A netlink socket. It stays in the namespace in which it was opened.
pub(crate) struct Socket {
    socket: socket2::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// A request of several that the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Which of them, from 0.
    pub(crate) index: usize,
    /// Why.
    pub(crate) errno: Errno,
}

impl From<Refusal> for Errno {
    fn from(refusal: Refusal) -> Self {
        refusal.errno
    }
}

impl Socket {
    /// About links, addresses, routes and queues.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn route() -> Result<Self, Errno> {
        Self::open(libc::NETLINK_ROUTE)
    }

    /// About packet filters.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn netfilter() -> Result<Self, Errno> {
        Self::open(libc::NETLINK_NETFILTER)
    }

    fn open(protocol: i32) -> Result<Self, Errno> {
        let socket = socket2::Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::from(libc::SOCK_RAW),
            Some(Protocol::from(protocol)),
        )?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Carries out requests in order, all of them even if one is refused, in one exchange.
    ///
    /// # Errors
    /// The first refusal.
    pub(crate) fn execute(&mut self, messages: Vec<Message>) -> Result<(), Refusal> {
        let mut refused: Option<Refusal> = None;
        for (index, outcome) in self.outcomes(messages)?.into_iter().enumerate() {
            if let Err(errno) = outcome {
                refused = refused.or(Some(Refusal { index, errno }));
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Carries out requests in order; what became of each.
    ///
    /// # Errors
    /// When the conversation itself fails.
    pub(crate) fn outcomes(&mut self, messages: Vec<Message>) -> Result<Vec<Result<(), Errno>>, Refusal> {
        let broken = |errno| Refusal { index: 0, errno };
        let count = messages.len();
        let first = self.send(messages).map_err(broken)?;
        let mut outcomes: Vec<Option<Result<(), Errno>>> = vec![None; count];
        for (index, wanted) in first.answered.iter().enumerate() {
            if !wanted {
                outcomes[index] = Some(Ok(()));
            }
        }
        while outcomes.iter().any(Option::is_none) {
            for reply in self.receive().map_err(broken)? {
                let index = reply.sequence.wrapping_sub(first.sequence) as usize;
                let Some(outcome) = outcomes.get_mut(index) else { continue };
                if i32::from(reply.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                let errno = -(number(&reply.payload) as i32);
                if errno != 0 && !first.answered[index] {
                    // About the whole of a batch: nothing else is answered.
                    return Err(Refusal { index, errno: Errno(errno) });
                }
                *outcome = Some(if errno == 0 { Ok(()) } else { Err(Errno(errno)) });
            }
        }
        Ok(outcomes.into_iter().flatten().collect())
    }

    /// The answers to a request: one, or with `NLM_F_DUMP` all that there are.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn ask(&mut self, message: Message) -> Result<Vec<Reply>, Errno> {
        let sent = self.send(vec![message])?;
        let mut answers = Vec::new();
        loop {
            for reply in self.receive()? {
                if reply.sequence != sent.sequence {
                    continue;
                }
                let kind = i32::from(reply.kind);
                if kind == libc::NLMSG_ERROR || kind == libc::NLMSG_DONE {
                    let errno = -(number(&reply.payload) as i32);
                    return if errno == 0 { Ok(answers) } else { Err(Errno(errno)) };
                }
                answers.push(reply);
            }
        }
    }

    fn send(&mut self, messages: Vec<Message>) -> Result<Sent, Errno> {
        let sequence = self.sequence.wrapping_add(1);
        let answered = messages.iter().map(Message::wants_answer).collect();
        let mut datagram = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            datagram.extend(message.finished(self.sequence));
        }
        self.socket.write_all(&datagram)?;
        Ok(Sent { sequence, answered })
    }

    fn receive(&mut self) -> Result<Vec<Reply>, Errno> {
        loop {
            match self.socket.read(&mut self.buffer) {
                Ok(length) => return Ok(replies(&self.buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Requests that are on their way.
struct Sent {
    /// The number of the first.
    sequence: u32,
    /// Which of them are answered one by one.
    answered: Vec<bool>,
}
