//! Netlink messages and attributes as bytes: writing them, and reading them without trust.

/// A netlink message's own header.
pub(crate) const HEADER: usize = 16;

/// The `nfgenmsg` that every message of the netfilter subsystems begins with; `genlmsghdr` is as long.
const GENERIC: usize = 4;

/// What a message's headers say besides the length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// The subsystem's own header: `nfgenmsg` or `genlmsghdr`.
    pub(crate) own: [u8; GENERIC],
}

/// Messages one after another in one buffer.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    too_long: bool,
}

impl Writer {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Whether an attribute since the last call was longer than netlink can say (64 KiB).
    pub(crate) fn take_too_long(&mut self) -> bool {
        std::mem::take(&mut self.too_long)
    }

    pub(crate) fn message(&mut self, head: Head, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(head.kind.to_ne_bytes());
        self.bytes.extend(head.flags.to_ne_bytes());
        self.bytes.extend(head.sequence.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(head.own);
        body(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Sets `NLM_F_*` flags of the message that begins at `start`.
    pub(crate) fn add_flags(&mut self, start: usize, flags: u16) {
        let field = &mut self.bytes[start + 6..start + 8];
        let flags = flags | u16::from_ne_bytes([field[0], field[1]]);
        field.copy_from_slice(&flags.to_ne_bytes());
    }

    pub(crate) fn bytes_attribute(&mut self, kind: u16, value: &[u8]) {
        let start = self.open(kind);
        self.bytes.extend(value);
        self.close(start);
    }

    /// Integers are in network order in all attributes of this subsystem.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.bytes_attribute(kind, &value.to_be_bytes());
    }

    pub(crate) fn u64(&mut self, kind: u16, value: u64) {
        self.bytes_attribute(kind, &value.to_be_bytes());
    }

    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        let start = self.open(kind);
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
        self.close(start);
    }

    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        const NLA_F_NESTED: u16 = 0x8000;
        let start = self.open(kind | NLA_F_NESTED);
        body(self);
        self.close(start);
    }

    /// Attributes that are there already, one after another.
    pub(crate) fn raw(&mut self, attributes: &[u8]) {
        self.bytes.extend(attributes);
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        match u16::try_from(self.bytes.len() - start) {
            Ok(length) => self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes()),
            Err(_) => self.too_long = true,
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A received message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    /// The socket that asked for what the message tells.
    pub(crate) port: u32,
    /// Everything behind the netlink header.
    pub(crate) payload: &'a [u8],
}

impl<'a> Message<'a> {
    pub(crate) fn family(&self) -> u8 {
        self.payload.first().copied().unwrap_or_default()
    }

    pub(crate) fn attributes(&self) -> &'a [u8] {
        self.payload.get(GENERIC..).unwrap_or_default()
    }
}

/// The messages of one datagram, up to the first that is cut off.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = native_u32(datagram, 0)? as usize;
        let message = Message {
            kind: u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?),
            flags: u16::from_ne_bytes(datagram.get(6..8)?.try_into().ok()?),
            sequence: native_u32(datagram, 8)?,
            port: native_u32(datagram, 12)?,
            payload: datagram.get(HEADER..length)?,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes` as kind and value, up to the first that is cut off.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const NLA_TYPE_MASK: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let head: [u8; 4] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([head[2], head[3]]) & NLA_TYPE_MASK, value))
    })
}

/// The value of the first attribute of `kind`.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

pub(crate) fn find_u32(bytes: &[u8], kind: u16) -> Option<u32> {
    find(bytes, kind)?.try_into().ok().map(u32::from_be_bytes)
}

pub(crate) fn find_u64(bytes: &[u8], kind: u16) -> Option<u64> {
    find(bytes, kind)?.try_into().ok().map(u64::from_be_bytes)
}

pub(crate) fn find_string(bytes: &[u8], kind: u16) -> Option<String> {
    find(bytes, kind).map(string)
}

/// The text up to the first zero byte.
pub(crate) fn string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// An integer of a netlink header, which is in the host's order.
pub(crate) fn native_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD: Head = Head { kind: 7, flags: 1, sequence: 9, own: [2, 0, 0, 0] };

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::default();
        for _ in 0..2 {
            writer.message(HEAD, |w| {
                w.string(1, "abcd");
                w.nest(2, |w| w.u32(3, 5));
                w.u64(4, 6);
            });
        }
        let read: Vec<_> = messages(writer.bytes()).collect();
        assert_eq!(read.len(), 2);
        for message in read {
            assert_eq!((message.kind, message.flags, message.sequence), (7, 1, 9));
            assert_eq!(message.family(), 2);
            let body = message.attributes();
            assert_eq!(find_string(body, 1).as_deref(), Some("abcd"));
            assert_eq!(find(body, 2).and_then(|nest| find_u32(nest, 3)), Some(5));
            assert_eq!(find_u64(body, 4), Some(6));
            assert_eq!(find(body, 5), None);
        }
    }

    #[test]
    fn an_attribute_that_netlink_cannot_hold_is_noticed() {
        let mut writer = Writer::default();
        writer.bytes_attribute(1, &[0; 65_531]);
        assert!(!writer.take_too_long());
        writer.bytes_attribute(1, &[0; 65_532]);
        assert!(writer.take_too_long());
        assert!(!writer.take_too_long());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_without_panic_or_end(bytes: Vec<u8>) {
            for message in messages(&bytes) {
                message.family();
                prop_assert!(attributes(message.attributes()).count() <= bytes.len());
            }
            prop_assert!(attributes(&bytes).count() <= bytes.len());
            string(&bytes);
        }
    }
}
