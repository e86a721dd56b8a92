//! Generic netlink: families that the kernel numbers when they are loaded.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::socket::{NetlinkSocket, no_answer};
use super::wire::{Head, Message, Writer, find};

/// The family of families, the only one whose number is fixed.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// A conversation with one family.
pub(crate) struct GenericFamily {
    socket: NetlinkSocket,
    number: u16,
}

impl GenericFamily {
    /// Opens a socket in the calling thread's network namespace and looks the family up by its name.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let mut family = Self { socket: NetlinkSocket::open(NETLINK_GENERIC)?, number: GENL_ID_CTRL };
        let body = |w: &mut Writer| w.string(CTRL_ATTR_FAMILY_NAME, name);
        family.number = family.ask(CTRL_CMD_GETFAMILY, body, number)?;
        Ok(family)
    }

    /// Asks for a dump, and hands each message of it to `each`.
    pub(crate) fn dump(
        &mut self,
        command: u8,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let request = self.request(command, NLM_F_REQUEST | NLM_F_DUMP, body);
        let number = self.number;
        let each = |message: &Message<'_>| {
            answer(message, number, |body| {
                each(body);
                Some(())
            });
        };
        self.socket.dump(&request, each).map(drop)
    }

    /// Sends one request that changes something.
    pub(crate) fn change(&mut self, command: u8, body: impl FnOnce(&mut Writer)) -> io::Result<()> {
        let request = self.request(command, NLM_F_REQUEST | NLM_F_ACK, body);
        let mut outcome = Ok(());
        let answered = self.socket.batch(&request, 1, Some(0), |_, refusal| outcome = Err(refusal.error))?;
        outcome.and_then(|()| if answered { Ok(()) } else { Err(no_answer()) })
    }

    fn request(&self, command: u8, flags: u16, body: impl FnOnce(&mut Writer)) -> Vec<u8> {
        // The version, which is 1 in the families used here.
        let (own, sequence) = ([command, 1, 0, 0], self.socket.next_sequence());
        let mut writer = Writer::default();
        writer.message(Head { kind: self.number, flags, sequence, own }, body);
        writer.into_bytes()
    }

    /// Sends one request, whose one answer `read` understands.
    pub(crate) fn ask<T>(
        &mut self,
        command: u8,
        body: impl FnOnce(&mut Writer),
        read: impl FnOnce(&[u8]) -> Option<T>,
    ) -> io::Result<T> {
        let request = self.request(command, NLM_F_REQUEST, body);
        let number = self.number;
        self.socket.ask(&request, |message| answer(message, number, read))?.ok_or_else(|| {
            let words = format!(
                "the kernel's answer to command {command} of netlink family {number} can't be understood: please report \
                 this, with uname -r"
            );
            io::Error::new(io::ErrorKind::InvalidData, words)
        })
    }
}

/// What `read` finds in a message of the family.
pub(super) fn answer<T>(
    message: &Message<'_>,
    family: u16,
    read: impl FnOnce(&[u8]) -> Option<T>,
) -> Option<T> {
    (message.kind == family).then(|| read(message.attributes())).flatten()
}

/// The number of the family that was asked for.
pub(super) fn number(body: &[u8]) -> Option<u16> {
    find(body, CTRL_ATTR_FAMILY_ID)?.try_into().ok().map(u16::from_ne_bytes)
}
