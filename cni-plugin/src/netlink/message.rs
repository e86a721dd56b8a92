//! Messages of netlink: a header, a fixed part, and attributes, which may be nested.

/// A request to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    bytes: Vec<u8>,
}

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
const NESTED: u16 = 1 << 15;
const TYPE_MASK: u16 = !(0b11 << 14);

impl Message {
    /// A request of `kind` with its fixed part.
    pub(crate) fn new(kind: u16, flags: i32, fixed: &[u8]) -> Self {
        let flags = libc::NLM_F_REQUEST | flags;
        let mut bytes = Vec::with_capacity(256);
        bytes.extend([0; 4]);
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags as u16).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        Self { bytes }.padded()
    }

    /// With an attribute.
    pub(crate) fn with(mut self, kind: u16, payload: &[u8]) -> Self {
        let length = (ATTRIBUTE_HEADER + payload.len()) as u16;
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(payload);
        self.padded()
    }

    /// With a text, which ends with a zero byte.
    pub(crate) fn with_text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// With a number of the host's byte order.
    pub(crate) fn with_u32(self, kind: u16, number: u32) -> Self {
        self.with(kind, &number.to_ne_bytes())
    }

    /// With an attribute that holds what `inner` adds.
    pub(crate) fn nested(mut self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        let mut filled = inner(self);
        let length = (filled.bytes.len() - start) as u16;
        filled.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    /// With bytes as they are, such as a fixed part inside of an attribute.
    pub(crate) fn with_raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self.padded()
    }

    fn padded(mut self) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Whose effect the kernel tells as it tells it to all that listen, if it knows how to.
    pub(crate) fn echoed(mut self) -> Self {
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | libc::NLM_F_ECHO as u16;
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self
    }

    /// Has the kernel tell nothing of it unless it refuses it.
    pub(super) fn leave_unanswered(&mut self) {
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) & !(libc::NLM_F_ACK as u16);
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    }

    /// Whether the kernel answers it.
    pub(super) fn wants_answer(&self) -> bool {
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        i32::from(flags) & (libc::NLM_F_ACK | libc::NLM_F_DUMP) != 0
    }

    /// The bytes to be sent, under this sequence number.
    pub(super) fn finished(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A received message.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    /// Its type.
    pub(crate) kind: u16,
    /// The number of the request that it answers.
    pub(crate) sequence: u32,
    /// What follows the header.
    pub(crate) payload: Vec<u8>,
}

/// The messages of a datagram; what is damaged ends it.
pub(super) fn replies(mut datagram: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while let Some(header) = datagram.get(..HEADER) {
        let length = number(&header[..4]) as usize;
        let Some(payload) = datagram.get(HEADER..length) else { break };
        replies.push(Reply {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            sequence: number(&header[8..12]),
            payload: payload.to_vec(),
        });
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    replies
}

/// The attributes in `bytes`, without the flags in their types; what is damaged ends them.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..ATTRIBUTE_HEADER)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        let payload = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The payload of one attribute.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, payload)| payload)
}

/// The number in the first four bytes; 0 if there are fewer.
pub(crate) fn number(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// A text without the zero byte at its end.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_as_itself(outer in 1u16..100, inner in 1u16..100, payload: Vec<u8>, number: u32) {
            let message = Message::new(18, libc::NLM_F_ACK, &[0; 16])
                .nested(outer, |message| message.with(inner, &payload).with_u32(inner + 1, number));
            prop_assert!(message.wants_answer());
            let datagram = [message.clone().finished(7), message.finished(8)].concat();
            let replies = replies(&datagram);
            prop_assert_eq!(replies.iter().map(|reply| (reply.kind, reply.sequence)).collect::<Vec<_>>(), [(18, 7), (18, 8)]);
            let nest = attribute(&replies[1].payload[16..], outer).unwrap();
            prop_assert_eq!(attribute(nest, inner).unwrap(), payload);
            prop_assert_eq!(super::number(attribute(nest, inner + 1).unwrap()), number);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = replies(&bytes);
            let _ = attributes(&bytes).map(|(_, payload)| text(payload)).collect::<Vec<_>>();
        }
    }
}
