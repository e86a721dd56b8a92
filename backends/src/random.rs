//! Random numbers that can't be predicted, from the kernel.

use subnet::Mac;

/// A locally administered unicast address that can't be guessed: a host that knows it can make frames
/// for this node's pods.
pub fn mac() -> Mac {
    let [a, b, c, d, e, f] = bytes();
    Mac([(a & 0xfe) | 0x02, b, c, d, e, f])
}

/// Any number of eight bits.
pub fn byte() -> u8 {
    let [byte] = bytes();
    byte
}

/// Any number of sixteen bits.
pub fn id() -> u16 {
    u16::from_ne_bytes(bytes())
}

/// Sixteen bytes that can't be guessed.
pub fn token() -> [u8; 16] {
    bytes()
}

/// Random bytes.
#[expect(unsafe_code, reason = "the standard library has no access to it")]
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        // SAFETY: `rest` is writable for the length that is given, and nothing else refers to it.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        // Fails only when a signal comes before the pool is ready, early in the boot.
        filled += usize::try_from(got).unwrap_or(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn random_macs_are_local_unicast_and_never_the_same() {
        let macs: BTreeSet<_> = (0..1000).map(|_| super::mac()).collect();
        assert_eq!(macs.len(), 1000);
        assert!(macs.iter().all(|mac| mac.is_unicast() && mac.0[0] & 2 == 2));
    }
}
