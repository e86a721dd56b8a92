//! What the plugins behind others in a list do with the result of the one before.

use serde_json::Value;

use crate::conf::Network;
use crate::result::{Attached, pretty};

/// The result of the plugin before, as a chained plugin passes it on.
///
/// # Errors
/// The words of Go's plugins, when there is none.
pub(crate) fn previous(network: &Network) -> Result<&Value, String> {
    network.prev_result.as_ref().ok_or_else(|| "must be called as chained plugin".into())
}

/// The previous result as it is passed on, with what a chained plugin adds.
pub(crate) fn passed_on(previous: &Value) -> String {
    pretty(previous)
}

/// The previous result, read.
///
/// # Errors
/// As [`previous`].
pub(crate) fn attached(network: &Network) -> Result<Attached, String> {
    previous(network).map(Attached::read)
}
