//! The error object that a runtime reads from standard output, and the codes the specification gives them.

use std::borrow::Cow;
use std::fmt;

use serde_json::Value;
use subnet::gojson;

/// The delegate or the runtime speaks a version of the specification that this plugin does not.
pub(crate) const INCOMPATIBLE_VERSION: u64 = 1;
/// A `CNI_*` variable is missing or makes no sense.
pub(crate) const BAD_ENVIRONMENT: u64 = 4;
/// Standard input or output failed.
pub(crate) const IO_FAILURE: u64 = 5;
/// The network configuration is not JSON of the right shape.
pub(crate) const UNDECODABLE: u64 = 6;
/// The network configuration lacks what every network has.
pub(crate) const BAD_NETWORK: u64 = 7;
/// The pod's network namespace is the plugin's own.
pub(crate) const BAD_NETNS: u64 = 8;
/// Nothing is wrong with the request: the runtime should try again later.
pub(crate) const TRY_AGAIN_LATER: u64 = 11;
/// STATUS: an ADD would fail now.
pub(crate) const NOT_AVAILABLE: u64 = 50;
/// Everything that has no code of its own; the number is Go's.
pub(crate) const OTHER: u64 = 999;

/// Why a command failed. Its `Display` is the text for standard output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CniError {
    /// A number of the specification, or a plugin's own from 100 on.
    pub(crate) code: u64,
    /// One sentence or more for people.
    pub(crate) msg: String,
    /// More of it; may be empty.
    pub(crate) details: String,
}

impl CniError {
    /// An error without details.
    pub(crate) fn new(code: u64, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// The error object that a delegate printed, if `stdout` is one.
    pub(crate) fn from_delegate(stdout: &[u8]) -> Option<Self> {
        let Ok(Value::Object(object)) = serde_json::from_slice(stdout) else { return None };
        let text = |key| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let code = object.get("code").and_then(Value::as_u64);
        let (msg, details) = (text("msg"), text("details"));
        (code.is_some() || !msg.is_empty()).then(|| Self { code: code.unwrap_or(OTHER), msg, details })
    }
}

/// More than any message of ours has; what goes beyond quotes foreign text.
const MAX_LENGTH: usize = 2000;

/// At most [`MAX_LENGTH`] bytes of a message: names, values and other programs' errors are quoted in messages, may
/// have any length, and go into logs each time that a runtime tries again.
pub(crate) fn bounded(message: &str) -> Cow<'_, str> {
    if message.len() <= MAX_LENGTH {
        return Cow::Borrowed(message);
    }
    let end = (0..=MAX_LENGTH).rev().find(|end| message.is_char_boundary(*end)).unwrap_or_default();
    Cow::Owned(format!("{}… ({} bytes more)", &message[..end], message.len() - end))
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let msg = gojson::to_string(&bounded(&self.msg));
        write!(f, "{{\n    \"code\": {},\n    \"msg\": {msg}", self.code)?;
        if !self.details.is_empty() {
            write!(f, ",\n    \"details\": {}", gojson::to_string(&bounded(&self.details)))?;
        }
        f.write_str("\n}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_object_is_indented_and_keeps_gos_order() {
        let error = CniError { details: "of \"it\"".into(), ..CniError::new(7, "missing network name") };
        assert_eq!(
            error.to_string(),
            "{\n    \"code\": 7,\n    \"msg\": \"missing network name\",\n    \"details\": \"of \\\"it\\\"\"\n}"
        );
        assert_eq!(CniError::new(4, "x").to_string(), "{\n    \"code\": 4,\n    \"msg\": \"x\"\n}");
    }

    #[test]
    fn what_is_no_error_object_is_not_taken_for_one() {
        for text in ["", "null", "[]", "{}", "bridge: boom", r#"{"cniVersion":"1.0.0"}"#] {
            assert_eq!(CniError::from_delegate(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_error_survives_printing_and_reading(code: u64, msg in ".+", details in ".*") {
            let error = CniError { code, msg, details };
            prop_assert_eq!(CniError::from_delegate(error.to_string().as_bytes()), Some(error));
        }

        #[test]
        fn arbitrary_bytes_of_a_delegate_never_panic(bytes: Vec<u8>) {
            let _ = CniError::from_delegate(&bytes);
        }
    }
}
