//! A conversation with the kernel in the network namespace in which it was begun.

use std::io::{self, Write};
use std::os::fd::AsFd;

use socket2::{Domain, Protocol, Type};

use super::Errno;
use super::message::{Message, Reply, number, replies};
use super::options::{self, receive};

/// Larger than any datagram that the kernel sends.
const BUFFER: usize = 64 << 10;
/// So many requests are sent before their answers are read: the answers to a few hundred fill the socket (ENOBUFS).
const AT_ONCE: usize = 64;
/// What a send buffer has room for in any case, in bytes; the ordinary one has some 208 KiB.
const ROOM: usize = 64 << 10;
/// `NETLINK_GET_STRICT_CHK`.
const STRICT_CHECK: i32 = 12;

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
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Has the kernel take the conditions of a dump seriously, such as the index of a link, if it knows how to (4.20).
    pub(crate) fn ask_strictly(&self) {
        let _ = options::set(self.socket.as_fd(), STRICT_CHECK, 1);
    }

    /// Carries out requests in order, all of them even if one is refused.
    ///
    /// # Errors
    /// The first refusal.
    pub(crate) fn execute(&mut self, messages: Vec<Message>) -> Result<(), Refusal> {
        first_refusal(self.exchange(messages)?)
    }

    /// Carries out requests that belong together in one datagram, however long it is.
    ///
    /// # Errors
    /// The first refusal.
    pub(crate) fn execute_at_once(&mut self, messages: Vec<Message>) -> Result<(), Refusal> {
        first_refusal(self.exchange_at_once(messages)?)
    }

    /// Carries out requests in order; what became of each.
    ///
    /// # Errors
    /// When the conversation itself fails.
    pub(crate) fn outcomes(&mut self, messages: Vec<Message>) -> Result<Vec<Result<(), Errno>>, Refusal> {
        let told = self.exchange(messages)?;
        Ok(told.into_iter().map(|one| one.map(drop)).collect())
    }

    /// The answers to a request: one, or with `NLM_F_DUMP` all that there are.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn ask(&mut self, message: Message) -> Result<Vec<Reply>, Errno> {
        self.exchange(vec![message])?.pop().unwrap_or(Ok(Vec::new()))
    }

    /// Sends requests, all of which are carried out in order even if one is refused; gives the answers to each, or its
    /// refusal. Of those that are sent in one datagram one may be a dump.
    ///
    /// # Errors
    /// When the conversation itself fails.
    pub(crate) fn exchange(&mut self, messages: Vec<Message>) -> Result<Vec<Told>, Refusal> {
        let (mut told, mut rest) = (Vec::with_capacity(messages.len()), messages.into_iter());
        while rest.len() > 0 {
            let part = rest.by_ref().take(AT_ONCE).collect();
            let before = told.len();
            let answers = self.exchange_at_once(part);
            told.extend(answers.map_err(|refusal| Refusal { index: before + refusal.index, ..refusal })?);
        }
        Ok(told)
    }

    fn exchange_at_once(&mut self, messages: Vec<Message>) -> Result<Vec<Told>, Refusal> {
        let broken = |errno| Refusal { index: 0, errno };
        let first = self.send(messages).map_err(broken)?;
        let mut told: Vec<Told> = first.answered.iter().map(|_| Ok(Vec::new())).collect();
        let mut open = first.answered.clone();
        while open.contains(&true) {
            for reply in self.receive().map_err(broken)? {
                let index = reply.sequence.wrapping_sub(first.sequence) as usize;
                let Some(one) = told.get_mut(index) else { continue };
                if !matches!(i32::from(reply.kind), libc::NLMSG_ERROR | libc::NLMSG_DONE) {
                    if let Ok(replies) = one {
                        replies.push(reply);
                    }
                    continue;
                }
                let errno = Errno(-(number(&reply.payload) as i32));
                if errno.0 != 0 && !first.answered[index] {
                    // About the whole of a batch: nothing else is answered.
                    return Err(Refusal { index, errno });
                }
                if errno.0 != 0 {
                    *one = Err(errno);
                }
                open[index] = false;
            }
        }
        Ok(told)
    }

    fn send(&mut self, messages: Vec<Message>) -> Result<Sent, Errno> {
        let sequence = self.sequence.wrapping_add(1);
        let answered = messages.iter().map(Message::wants_answer).collect();
        let mut datagram = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            datagram.extend(message.finished(self.sequence));
        }
        if datagram.len() > ROOM {
            // With the kernel's own part of it. Without the right to it the ordinary buffer has to do.
            let room = i32::try_from(datagram.len() + ROOM).unwrap_or(i32::MAX);
            let _ = options::set_socket(self.socket.as_fd(), libc::SO_SNDBUFFORCE, room);
        }
        self.socket.write_all(&datagram)?;
        Ok(Sent { sequence, answered })
    }

    fn receive(&mut self) -> Result<Vec<Reply>, Errno> {
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Ok(()) => return Ok(replies(&self.buffer)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn first_refusal(told: Vec<Told>) -> Result<(), Refusal> {
    let refusals = told.into_iter().enumerate().filter_map(|(index, one)| Some((index, one.err()?)));
    refusals.map(|(index, errno)| Err(Refusal { index, errno })).next().unwrap_or(Ok(()))
}

/// The answers to a request, or why the kernel refused it.
pub(crate) type Told = Result<Vec<Reply>, Errno>;

/// Requests that are on their way.
struct Sent {
    /// The number of the first.
    sequence: u32,
    /// Which of them are answered one by one.
    answered: Vec<bool>,
}
