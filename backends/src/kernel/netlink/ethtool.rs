//! The one feature of a device that matters to us, read and set over ethtool's netlink family.

#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

use netlink_packet_core::NLM_F_REQUEST;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use crate::nft::wire::{Message, Writer, attributes, find, find_string, messages, native_u32};

/// The kernel works inside the system call, so an answer that is not there after this long never comes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether the device takes packets whose checksum is yet to be computed. Off, the stack computes it before
/// the device sees the packet.
const TX_CHECKSUM: &str = "tx-checksum-ip-generic";

const NLMSG_ERROR: u16 = 2;

/// The family of families, the only one whose number is fixed.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const ETHTOOL_FAMILY: &str = "ethtool";
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_FEATURES_SET: u8 = 12;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_WANTED: u16 = 3;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_BITSET_NOMASK: u16 = 1;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BITS_BIT: u16 = 1;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;
const ETHTOOL_A_BITSET_BIT_VALUE: u16 = 3;

/// A conversation with ethtool in the network namespace in which it is first used.
#[derive(Default)]
pub(super) struct Ethtool {
    session: Option<Session>,
}

/// An open socket, and the number that the kernel gave to ethtool when it started.
struct Session {
    conversation: Conversation,
    family: u16,
}

struct Conversation {
    socket: Socket,
    sequence: u32,
    received: Vec<u8>,
}

/// What an answer says about the feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bit {
    On,
    Off,
    Unlisted,
}

impl Ethtool {
    /// Opens nothing yet: most nodes never need it.
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Whether checksums of what is sent through the device may be left to it.
    pub(super) fn tx_checksum(&mut self, index: u32) -> io::Result<bool> {
        let answer = |body: &[u8]| find(body, ETHTOOL_A_FEATURES_ACTIVE).and_then(feature);
        let bit = self.session()?.features(ETHTOOL_MSG_FEATURES_GET, index, |_| {}, answer)?;
        Ok(bit == Bit::On)
    }

    /// Sets whether checksums of what is sent through the device may be left to it.
    pub(super) fn set_tx_checksum(&mut self, index: u32, on: bool) -> io::Result<()> {
        let wanted = |w: &mut Writer| {
            w.nest(ETHTOOL_A_FEATURES_WANTED, |w| {
                w.nest(ETHTOOL_A_BITSET_BITS, |w| {
                    w.nest(ETHTOOL_A_BITSET_BITS_BIT, |w| {
                        w.string(ETHTOOL_A_BITSET_BIT_NAME, TX_CHECKSUM);
                        if on {
                            w.bytes_attribute(ETHTOOL_A_BITSET_BIT_VALUE, &[]);
                        }
                    });
                });
            });
        };
        let answer = |body: &[u8]| find(body, ETHTOOL_A_FEATURES_WANTED).and_then(feature);
        // The kernel accepts a wish for a feature that the device can't change. Its answer then lists what it
        // did not do.
        match self.session()?.features(ETHTOOL_MSG_FEATURES_SET, index, wanted, answer)? {
            Bit::Unlisted => Ok(()),
            Bit::On | Bit::Off => {
                let state = if on { "off" } else { "on" };
                let words = format!(
                    "{TX_CHECKSUM} of the device with index {index} stays {state}: its driver doesn't let it be \
                     changed (ethtool -k shows [fixed]), so leave the setting at its default"
                );
                Err(io::Error::new(io::ErrorKind::Unsupported, words))
            }
        }
    }

    fn session(&mut self) -> io::Result<&mut Session> {
        match &mut self.session {
            Some(session) => Ok(session),
            none => Ok(none.insert(Session::open()?)),
        }
    }
}

impl Session {
    fn open() -> io::Result<Self> {
        let mut conversation = Conversation::open()?;
        let name = |w: &mut Writer| w.string(CTRL_ATTR_FAMILY_NAME, ETHTOOL_FAMILY);
        let family = conversation.ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, name, family)?;
        Ok(Self { conversation, family })
    }

    /// One message about the features of a device, in which `body` follows the header.
    fn features<T>(
        &mut self,
        command: u8,
        index: u32,
        body: impl FnOnce(&mut Writer),
        answer: impl FnOnce(&[u8]) -> Option<T>,
    ) -> io::Result<T> {
        // Without flags: feature bits come with their names, whose numbers differ between kernels, and a
        // change is answered with what became of it.
        let request = |w: &mut Writer| {
            w.nest(ETHTOOL_A_FEATURES_HEADER, |w| {
                w.bytes_attribute(ETHTOOL_A_HEADER_DEV_INDEX, &index.to_ne_bytes());
            });
            body(w);
        };
        self.conversation.ask(self.family, command, request, answer)
    }
}

impl Conversation {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Refusals without a copy of the request.
        socket.set_cap_ack(true)?;
        socket2::SockRef::from(&socket).set_read_timeout(Some(PATIENCE))?;
        // Four lists of feature names are 4 to 10 KiB.
        Ok(Self { socket, sequence: 0, received: Vec::with_capacity(32 * 1024) })
    }

    /// Asks one question, whose one answer `read` understands.
    fn ask<T>(
        &mut self,
        family: u16,
        command: u8,
        body: impl FnOnce(&mut Writer),
        read: impl FnOnce(&[u8]) -> Option<T>,
    ) -> io::Result<T> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut writer = Writer::default();
        // The version of the request, which neither family looks at.
        let own = [command, 1, 0, 0];
        writer.message_with(family, NLM_F_REQUEST, self.sequence, own, body);
        retried(|| self.socket.send(writer.bytes(), 0))?;
        loop {
            self.received.clear();
            retried(|| self.socket.recv(&mut self.received, 0))?;
            // The answer to a question that was given up comes late.
            if let Some(message) = messages(&self.received).find(|message| message.sequence == self.sequence)
            {
                return answered(&message, family, command, read);
            }
        }
    }
}

fn retried(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// What `message` answers, or the errno of the kernel's refusal.
fn answered<T>(
    message: &Message<'_>,
    family: u16,
    command: u8,
    read: impl FnOnce(&[u8]) -> Option<T>,
) -> io::Result<T> {
    let found = if message.kind == NLMSG_ERROR {
        match native_u32(message.payload, 0).map(|code| code.cast_signed().saturating_abs()) {
            Some(code) if code != 0 => return Err(io::Error::from_raw_os_error(code)),
            _ => None,
        }
    } else {
        (message.kind == family).then(|| read(message.attributes())).flatten()
    };
    found.ok_or_else(|| {
        let words = format!(
            "the kernel's answer to command {command} of netlink family {family} can't be understood: please report \
             this, with uname -r"
        );
        io::Error::new(io::ErrorKind::InvalidData, words)
    })
}

/// The number of the family that was asked for.
fn family(body: &[u8]) -> Option<u16> {
    find(body, CTRL_ATTR_FAMILY_ID)?.try_into().ok().map(u16::from_ne_bytes)
}

/// What a bitset with names says about the feature; `None` when it has no names.
fn feature(bitset: &[u8]) -> Option<Bit> {
    let bits = find(bitset, ETHTOOL_A_BITSET_BITS)?;
    // Without a mask only the bits that are set are listed; with one, those that it covers.
    let all_set = find(bitset, ETHTOOL_A_BITSET_NOMASK).is_some();
    let ours = attributes(bits).find(|(kind, bit)| {
        *kind == ETHTOOL_A_BITSET_BITS_BIT
            && find_string(bit, ETHTOOL_A_BITSET_BIT_NAME).is_some_and(|name| name == TX_CHECKSUM)
    });
    Some(match ours {
        None => Bit::Unlisted,
        Some((_, bit)) if all_set || find(bit, ETHTOOL_A_BITSET_BIT_VALUE).is_some() => Bit::On,
        Some(_) => Bit::Off,
    })
}
