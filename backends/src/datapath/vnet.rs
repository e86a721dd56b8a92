//! The header in front of every packet that a TUN device with `IFF_VNET_HDR` gives and takes
//! (include/uapi/linux/virtio_net.h, `struct virtio_net_hdr`), ten bytes in the machine's own byte order.

/// Bytes of the header.
pub(crate) const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

/// What the packet is, in the words of the kernel's segmentation offload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// One packet.
    None,
    /// Several TCP segments over IPv4.
    TcpV4,
    /// Several TCP segments over IPv6.
    TcpV6,
    /// Several UDP datagrams.
    Udp,
    /// Something that was not asked for.
    Other(u8),
}

/// The header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vnet {
    /// The checksum at `checksum_at` is still to be made of what begins at `checksum_from`.
    pub needs_checksum: bool,
    /// All checksums were verified.
    pub verified: bool,
    /// What the packet is.
    pub gso: Gso,
    /// Bytes of headers.
    pub header_len: u16,
    /// Bytes of payload in each segment but the last.
    pub segment: u16,
    /// Where the checksum begins to count.
    pub checksum_from: u16,
    /// Where it is to be stored, from there on.
    pub checksum_at: u16,
}

impl Vnet {
    /// A packet that is as it goes over a wire.
    pub const PLAIN: Self = Self {
        needs_checksum: false,
        verified: false,
        gso: Gso::None,
        header_len: 0,
        segment: 0,
        checksum_from: 0,
        checksum_at: 0,
    };

    /// From the first bytes of what was read.
    pub fn parse(bytes: &[u8; LEN]) -> Self {
        let field = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        // The highest bit says that the segments carry ECN's CWR, which the TCP header says itself.
        let gso = match bytes[1] & 0x7f {
            0 => Gso::None,
            1 => Gso::TcpV4,
            4 => Gso::TcpV6,
            5 => Gso::Udp,
            other => Gso::Other(other),
        };
        Self {
            needs_checksum: bytes[0] & NEEDS_CSUM != 0,
            verified: bytes[0] & DATA_VALID != 0,
            gso,
            header_len: field(2),
            segment: field(4),
            checksum_from: field(6),
            checksum_at: field(8),
        }
    }

    /// The bytes in front of what is written.
    pub(crate) fn bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0] = (u8::from(self.needs_checksum) * NEEDS_CSUM) | (u8::from(self.verified) * DATA_VALID);
        bytes[1] = match self.gso {
            Gso::None => 0,
            Gso::TcpV4 => 1,
            Gso::TcpV6 => 4,
            Gso::Udp => 5,
            Gso::Other(other) => other,
        };
        let fields = [self.header_len, self.segment, self.checksum_from, self.checksum_at];
        for (place, field) in bytes[2..].chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_the_same_after_a_round_trip() {
        for gso in [Gso::None, Gso::TcpV4, Gso::TcpV6, Gso::Udp, Gso::Other(3)] {
            let header = Vnet {
                needs_checksum: true,
                verified: gso == Gso::None,
                gso,
                header_len: 52,
                segment: 1420,
                checksum_from: 20,
                checksum_at: 16,
            };
            assert_eq!(Vnet::parse(&header.bytes()), header);
        }
        assert_eq!(Vnet::PLAIN.bytes(), [0; LEN]);
        assert_eq!(Vnet::parse(&[0, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]).gso, Gso::TcpV4);
    }
}
