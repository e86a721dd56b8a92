//! Keys of one length in order, as compact as they can be: what a set of addresses in the kernel holds.

use std::net::IpAddr;

use subnet::policy::Protocol;

/// Keys of the same length, sorted, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    len: usize,
    bytes: Vec<u8>,
}

impl Keys {
    /// None yet, each to be `len` bytes long.
    pub(super) fn new(len: usize) -> Self {
        Self { len, bytes: Vec::new() }
    }

    /// Those in `bytes`, one after another in any order.
    pub(super) fn from_unsorted(len: usize, bytes: &[u8]) -> Self {
        if let (4, (words, _)) = (len, bytes.as_chunks::<4>()) {
            // IPv4 addresses, the most frequent keys by far.
            let mut keys: Vec<u32> = words.iter().map(|word| u32::from_be_bytes(*word)).collect();
            keys.sort_unstable();
            keys.dedup();
            return Self { len, bytes: keys.into_iter().flat_map(u32::to_be_bytes).collect() };
        }
        let mut keys: Vec<&[u8]> = bytes.chunks_exact(len).collect();
        keys.sort_unstable();
        keys.dedup();
        Self { len, bytes: keys.concat() }
    }

    /// How many.
    pub(super) fn count(&self) -> usize {
        self.bytes.len() / self.len
    }

    /// All in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.len)
    }

    /// Those that begin with `prefix`.
    pub(super) fn with_prefix<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let start = self.position(prefix).unwrap_or_else(|place| place);
        self.bytes[start * self.len..].chunks_exact(self.len).take_while(move |key| key.starts_with(prefix))
    }

    /// All in order, one after another.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether `key`, which has the length of these, is one of them.
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        self.position(key).is_ok()
    }

    /// Adds `key`; `false` if it was there.
    pub(super) fn insert(&mut self, key: &[u8]) -> bool {
        let Err(place) = self.position(key) else { return false };
        let at = place * self.len;
        self.bytes.splice(at..at, key.iter().copied());
        true
    }

    /// Removes `key`; `false` if it wasn't there.
    pub(super) fn remove(&mut self, key: &[u8]) -> bool {
        let Ok(place) = self.position(key) else { return false };
        let at = place * self.len;
        self.bytes.drain(at..at + self.len);
        true
    }

    /// Where a key is, or would be.
    fn position(&self, key: &[u8]) -> Result<usize, usize> {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = usize::midpoint(low, high);
            match self.bytes[middle * self.len..(middle + 1) * self.len].cmp(key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(middle),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }
}

/// An address as a key.
pub(super) fn of_address(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().into(),
        IpAddr::V6(v6) => v6.octets().into(),
    }
}

/// The address that a key begins with.
pub(super) fn address_of(key: &[u8]) -> Option<IpAddr> {
    match key.len() {
        4 | 12 => key.first_chunk::<4>().map(|v4| IpAddr::from(*v4)),
        _ => key.first_chunk::<16>().map(|v6| IpAddr::from(*v6)),
    }
}

/// The length of [`of_endpoint`] behind the address.
pub(super) const PORT_LEN: usize = 8;

/// An address, a protocol and a port as a key of several fields: each begins at a register of its own.
pub(super) fn of_endpoint(address: IpAddr, protocol: Protocol, port: u16) -> Vec<u8> {
    let mut key = of_address(address);
    let [high, low] = port.to_be_bytes();
    key.extend([protocol as u8, 0, 0, 0, high, low, 0, 0]);
    key
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_are_a_set(steps: Vec<(bool, [u8; 2])>) {
            let (mut keys, mut model) = (Keys::new(2), BTreeSet::new());
            for (add, key) in steps {
                let key = key.map(|byte| byte % 8);
                match add {
                    true => prop_assert_eq!(keys.insert(&key), model.insert(key)),
                    false => prop_assert_eq!(keys.remove(&key), model.remove(&key)),
                }
                prop_assert_eq!(keys.contains(&key), model.contains(&key));
                let begun: Vec<_> = model.iter().filter(|one| one[0] == key[0]).copied().collect();
                prop_assert_eq!(keys.with_prefix(&key[..1]).collect::<Vec<_>>(), begun);
            }
            prop_assert_eq!(keys.iter().map(<[u8]>::to_vec).collect::<Vec<_>>(), model.iter().map(|key| key.to_vec()).collect::<Vec<_>>());
            let bytes = model.iter().rev().chain(&model).flatten().copied().collect::<Vec<_>>();
            prop_assert_eq!(Keys::from_unsorted(2, &bytes), keys);
        }

        #[test]
        fn addresses_are_sorted_as_other_keys_are(mut keys: Vec<[u8; 4]>) {
            let sorted = Keys::from_unsorted(4, &keys.concat());
            keys.sort_unstable();
            keys.dedup();
            prop_assert_eq!(sorted.iter().map(<[u8]>::to_vec).collect::<Vec<_>>(), keys.iter().map(|key| key.to_vec()).collect::<Vec<_>>());
        }
    }
}
