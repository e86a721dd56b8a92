//! Names of network devices, small enough to be copied like a number.

use std::fmt;
use std::str::FromStr;

/// A device name: 1 to 15 bytes, as the kernel allows them (`IFNAMSIZ`, include/uapi/linux/if.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    bytes: [u8; 15],
    len: u8,
}

/// The text can't name a network device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} can't name a network device: 1 to 15 bytes, neither \".\" nor \"..\", without '/', ':' and white space"
)]
pub struct BadName(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let fits = (1..=15).contains(&text.len()) && !matches!(text, "." | "..");
        if !fits || text.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace()) {
            return Err(BadName(text.chars().take(40).collect()));
        }
        let mut bytes = [0; 15];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes, len: text.len() as u8 })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_up_to_fifteen_bytes_round_trip() {
        for text in ["a", "flannel.1", "flannel.9999999"] {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), text);
        }
        for text in ["", ".", "..", "a/b", "a b", "a:1", "flannel.10000000"] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }
}
