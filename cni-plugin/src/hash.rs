//! Names made of hashes, as Go's plugins make them, so that either finds what the other made.

use sha2::{Digest, Sha512};

/// `prefix` with as much of the hash of `text` as `length` allows.
pub(crate) fn name(prefix: &str, length: usize, text: &str) -> String {
    let hash = Sha512::digest(text);
    let hex = hash.iter().map(|byte| format!("{byte:02x}"));
    let mut name = hex.fold(prefix.to_owned(), |name, byte| name + &byte);
    name.truncate(length);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_start_of_the_hash() {
        // printf cbr0c1 | sha512sum
        assert_eq!(name("bwp", 15, "cbr0c1"), "bwp68f1f1eeb62c");
        assert_eq!(name("CNI-DN-", 28, "cbr0c1"), "CNI-DN-68f1f1eeb62cad3d0bdd5");
    }
}
