//! The Internet checksum (RFC 1071), summed in the machine's own byte order.
//!
//! The sum doesn't depend on byte order as long as everything that goes in is taken from memory as it lies
//! there, and the result is stored the same way. Numbers that are computed go in through `word`.

/// The sum of `data`, which begins at an even distance from the start of what is summed.
#[inline]
pub fn sum(data: &[u8]) -> u64 {
    let (total, rest) = wide::sum(data);
    total + tail(rest)
}

/// Copies `data` to the start of `buffer`, which is at least as long, and gives its sum: one pass over it instead
/// of two.
#[inline]
pub(crate) fn copy(data: &[u8], room: &mut [u8]) -> u64 {
    let (total, done) = wide::copy(data, room);
    let rest = &data[done..];
    room[done..data.len()].copy_from_slice(rest);
    total + tail(rest)
}

/// The sum of what is shorter than a block.
#[inline]
fn tail(rest: &[u8]) -> u64 {
    let (words, rest) = rest.as_chunks::<4>();
    let total: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_ne_bytes(last))
}

/// A 16-bit number as it lies in a packet.
#[inline]
pub(crate) fn word(number: u16) -> u64 {
    u64::from(number.to_be())
}

/// A sum in 16 bits, with the carries added again.
#[inline]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum to store for a sum.
#[inline]
pub fn finish(sum: u64) -> [u8; 2] {
    (!fold(sum)).to_ne_bytes()
}

/// The sum of the pseudo header of TCP and UDP (RFC 9293 §3.1, RFC 768, RFC 8200 §8.1): that of the two
/// addresses, the protocol, and the length of header and payload.
#[inline]
pub fn pseudo(addresses: u64, protocol: u8, len: u16) -> u64 {
    addresses + word(protocol.into()) + word(len)
}

mod wide;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the RFC says it, byte pair by byte pair.
    fn slow(data: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in data.chunks(2) {
            sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&data)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    proptest! {
        #[test]
        fn the_sum_is_that_of_the_slow_way(data in prop::collection::vec(any::<u8>(), 1..3000)) {
            prop_assert_eq!(finish(sum(&data)), slow(&data).to_be_bytes());
            let pnet = pnet::util::checksum(&data, usize::MAX);
            prop_assert_eq!(finish(sum(&data)), pnet.to_be_bytes());
        }

        #[test]
        fn a_copy_is_the_same_and_has_the_same_sum(data in prop::collection::vec(any::<u8>(), 0..3000), more in 0usize..50) {
            let mut room = vec![0xaa; data.len() + more];
            let total = copy(&data, &mut room);
            prop_assert_eq!(fold(total), fold(sum(&data)));
            prop_assert_eq!(&room[..data.len()], &data[..]);
            prop_assert!(room[data.len()..].iter().all(|byte| *byte == 0xaa));
        }

        #[test]
        fn parts_can_be_summed_one_by_one(data in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..150) {
            let at = (2 * at).min(data.len() / 2 * 2);
            let (head, tail) = data.split_at(at);
            prop_assert_eq!(fold(sum(head) + sum(tail)), fold(sum(&data)));
        }
    }
}
