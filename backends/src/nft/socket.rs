//! The conversation with nf_tables: one transaction per system call, and dumps.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;
use rustix::io::Errno;

use super::encode::{Transaction, head};
use crate::netlink::socket::{NetlinkSocket, Refusal, no_answer};
use crate::netlink::wire::{Message, Writer};

/// What the kernel said to a transaction that it refused.
#[derive(Debug)]
pub(super) struct RefusedTransaction {
    /// Which message it is about; `None` for the transaction as a whole.
    pub(super) position: Option<usize>,
    pub(super) refusal: Refusal,
    /// How many messages were refused besides.
    pub(super) others: usize,
}

/// A socket of the network namespace in which it was opened.
pub(super) struct NftSocket(NetlinkSocket);

impl NftSocket {
    pub(super) fn open() -> io::Result<Self> {
        NetlinkSocket::open(NETLINK_NETFILTER)?.with_words().map(Self)
    }

    /// See [`NetlinkSocket::port`].
    pub(super) fn port(&self) -> u32 {
        self.0.port()
    }

    /// The number that the next message gets.
    pub(super) fn next_sequence(&self) -> u32 {
        self.0.next_sequence()
    }

    /// Carries out a transaction, whose numbers no earlier message had.
    pub(super) fn transact(
        &mut self,
        transaction: &Transaction<'_>,
    ) -> io::Result<Result<(), RefusedTransaction>> {
        let count = transaction.len();
        self.0.number_from(transaction.first());
        let mut refused: Option<RefusedTransaction> = None;
        // The first and the last message frame the others; the last of those asks for an answer.
        let acknowledged = (count > 0).then_some(count);
        let answered = self.0.batch(transaction.bytes(), count + 2, acknowledged, |position, refusal| {
            // The first message that is refused is the cause; others often only follow from it.
            match &mut refused {
                Some(known) => known.others += 1,
                // The message that opens the frame stands for all of them.
                None => {
                    refused =
                        Some(RefusedTransaction { position: position.checked_sub(1), refusal, others: 0 })
                }
            }
        })?;
        match refused {
            Some(refused) => Ok(Err(refused)),
            None if answered => Ok(Ok(())),
            None => Err(no_answer()),
        }
    }

    /// Asks for a table of the kernel; gives whether nothing changed meanwhile.
    pub(super) fn dump(
        &mut self,
        kind: u16,
        family: u8,
        filter: impl FnOnce(&mut Writer),
        each: impl FnMut(&Message<'_>),
    ) -> io::Result<bool> {
        let request = self.request(kind, family, NLM_F_DUMP, filter);
        match self.0.dump(request.bytes(), each) {
            // A thing to be dumped went away since its name was read.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(false),
            done => done,
        }
    }

    /// Asks for one thing, and reads the attributes of the answer.
    pub(super) fn get<T>(&mut self, kind: u16, read: impl FnOnce(&[u8]) -> Option<T>) -> io::Result<T> {
        let request = self.request(kind, 0, 0, |_| {});
        let found = self.0.ask(request.bytes(), |message| read(message.attributes()))?;
        found.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn request(&self, kind: u16, family: u8, flags: u16, body: impl FnOnce(&mut Writer)) -> Writer {
        let mut writer = Writer::default();
        writer.message(head(kind, flags | NLM_F_REQUEST, self.next_sequence(), family, 0), body);
        writer
    }
}
