//! The messages of WireGuard (its paper, section 5.4): what is in them, and nothing about keys.

/// Bytes of a handshake initiation.
pub const INITIATION: usize = 148;
/// Bytes of a handshake response.
pub const RESPONSE: usize = 92;
/// Bytes of a cookie reply.
pub const COOKIE: usize = 64;
/// Bytes in front of an encrypted packet.
pub const HEADER: usize = 16;
/// Bytes behind it.
pub const TAG: usize = 16;
/// Packets are padded to a multiple of this.
pub const PADDING: usize = 16;
/// Bytes of each of the two codes at the end of a handshake message.
pub(crate) const MAC: usize = 16;

/// A message by its kind; its length is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireguardMessage<'a> {
    /// Begins a handshake.
    Initiation(&'a [u8; INITIATION]),
    /// Answers it.
    Response(&'a [u8; RESPONSE]),
    /// Asks for the same message again, with a proof of its sender's address.
    Cookie(&'a [u8; COOKIE]),
    /// An encrypted packet, or none.
    Data {
        /// The session, by the number that its receiver gave it.
        receiver: u32,
        /// Which packet of the session.
        counter: u64,
    },
}

impl<'a> WireguardMessage<'a> {
    /// What a datagram is; `None` for what is no message.
    #[inline]
    pub fn parse(datagram: &'a [u8]) -> Option<Self> {
        // The type, and three bytes that are reserved.
        match *datagram.first_chunk()? {
            [4, 0, 0, 0] if datagram.len() >= HEADER + TAG => {
                let counter = u64::from_le_bytes(*datagram[8..].first_chunk()?);
                Some(Self::Data { receiver: number(datagram, 4)?, counter })
            }
            [1, 0, 0, 0] => Some(Self::Initiation(datagram.try_into().ok()?)),
            [2, 0, 0, 0] => Some(Self::Response(datagram.try_into().ok()?)),
            [3, 0, 0, 0] => Some(Self::Cookie(datagram.try_into().ok()?)),
            _ => None,
        }
    }
}

/// The number at `at`.
#[inline]
pub(crate) fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The length of a datagram with a packet of `len` bytes: padded, but never longer than the device's MTU makes it.
#[inline]
pub fn sealed_len(len: usize, mtu: usize) -> usize {
    HEADER + len.max(mtu.min((len + PADDING - 1) & !(PADDING - 1))) + TAG
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_of_the_right_length_and_with_zeros_in_the_reserved_bytes_are_messages() {
        for len in 0..=200 {
            for kind in 0..=5_u8 {
                let mut bytes = vec![0; len];
                bytes.iter_mut().take(1).for_each(|first| *first = kind);
                let right = match kind {
                    1 => len == INITIATION,
                    2 => len == RESPONSE,
                    3 => len == COOKIE,
                    4 => len >= HEADER + TAG,
                    _ => false,
                };
                assert_eq!(WireguardMessage::parse(&bytes).is_some(), right, "type {kind}, {len} bytes");
                for reserved in 1..len.min(4) {
                    let mut wrong = bytes.clone();
                    wrong[reserved] = 1;
                    assert_eq!(WireguardMessage::parse(&wrong), None, "type {kind}, {len} bytes");
                }
            }
        }
    }

    #[test]
    fn packets_are_padded_up_to_the_mtu() {
        for (len, sealed) in [(0, 32), (1, 48), (16, 48), (17, 64), (1408, 1440), (1409, 1452), (1420, 1452)]
        {
            assert_eq!(sealed_len(len, 1420), sealed, "{len}");
        }
        assert_eq!(sealed_len(1500, 1420), 1532, "what is longer than the MTU is not cut");
    }
}
