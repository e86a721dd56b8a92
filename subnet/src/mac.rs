//! Ethernet (MAC) addresses as Flannel leases carry them.

use std::fmt;
use std::str::FromStr;

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// The text is not a 48-bit MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address such as \"c6:d2:32:6f:8f:44\"")]
pub struct BadMac(String);

impl Mac {
    /// Whether a device can carry this address: unicast and not all zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    /// Accepts what Go's `net.ParseMAC` accepts for 48 bits: `00:11:…`, `00-11-…` and `0011.2233.4455`.
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let (separator, digits) = match text.len() {
            17 if text.contains(':') => (':', 2),
            17 => ('-', 2),
            14 => ('.', 4),
            _ => return Err(bad()),
        };
        let mut mac = [0; 6];
        let mut filled = 0;
        for group in text.split(separator) {
            if group.len() != digits || !group.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            for pair in 0..digits / 2 {
                let octet = u8::from_str_radix(&group[2 * pair..2 * pair + 2], 16).map_err(|_| bad())?;
                *mac.get_mut(filled).ok_or_else(bad)? = octet;
                filled += 1;
            }
        }
        if filled == 6 { Ok(Self(mac)) } else { Err(bad()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 6]) {
            prop_assert_eq!(Mac(bytes).to_string().parse(), Ok(Mac(bytes)));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,24}") {
            let _ = text.parse::<Mac>();
        }
    }

    #[test]
    fn every_spelling_of_go_is_read() {
        let expected = Ok(Mac([0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44]));
        for text in ["c6:d2:32:6f:8f:44", "C6-D2-32-6F-8F-44", "c6d2.326f.8f44"] {
            assert_eq!(text.parse::<Mac>(), expected, "{text}");
        }
        for text in ["", "c6:d2:32:6f:8f", "c6:d2:32:6f:8f:4g", "+6:d2:32:6f:8f:44", "c6d2:326f:8f44:00"] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}
