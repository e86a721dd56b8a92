//! Talking to the kernel about links, addresses and routes: blocking, with as few round trips as possible.

pub(crate) mod address;
pub(crate) mod conntrack;
pub(crate) mod link;
pub(crate) mod listen;
pub(crate) mod message;
pub(crate) mod netconf;
pub(crate) mod nft;
mod options;
pub(crate) mod route;
pub(crate) mod socket;
pub(crate) mod tc;

use std::fmt;
use std::io;

/// Why the kernel refused something. Its `Display` is the text that Go programs print for the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    /// What was to be made is there.
    pub(crate) const EXISTS: Self = Self(libc::EEXIST);
    /// There is no such link.
    pub(crate) const NO_DEVICE: Self = Self(libc::ENODEV);
    /// The kernel does not know a request of this form.
    pub(crate) const INVALID: Self = Self(libc::EINVAL);
    /// It knows it, and can't do it.
    pub(crate) const NOT_SUPPORTED: Self = Self(libc::EOPNOTSUPP);
    /// There is no such object.
    pub(crate) const NO_ENTRY: Self = Self(libc::ENOENT);
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// Go's words where the C libraries differ.
fn words(errno: i32) -> Option<&'static str> {
    Some(match errno {
        libc::ENOMEM => "cannot allocate memory",
        libc::EBUSY => "device or resource busy",
        libc::EMFILE => "too many open files",
        libc::EOPNOTSUPP => "operation not supported",
        libc::EADDRINUSE => "address already in use",
        libc::EADDRNOTAVAIL => "cannot assign requested address",
        libc::ENETUNREACH => "network is unreachable",
        _ => return None,
    })
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(words) = words(self.0) {
            return f.write_str(words);
        }
        let text = io::Error::from_raw_os_error(self.0).to_string();
        let text = text.split(" (os error").next().unwrap_or_default();
        let mut letters = text.chars();
        let first = letters.next().map(|letter| letter.to_ascii_lowercase());
        write!(f, "{}{}", first.map(String::from).unwrap_or_default(), letters.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_worded_as_go_words_it() {
        assert_eq!(Errno(libc::EEXIST).to_string(), "file exists");
        assert_eq!(Errno(libc::EPERM).to_string(), "operation not permitted");
        assert_eq!(Errno(libc::ENODEV).to_string(), "no such device");
        assert_eq!(Errno(libc::EBUSY).to_string(), "device or resource busy");
    }
}
