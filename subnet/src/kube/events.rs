//! Events at this node's object, where an operator looks first (`kubectl describe node`).

use serde_json::{Value, json};

use super::connection::{Connection, Failure};

const PATH: &str = "/api/v1/namespaces/default/events";

/// An event of core/v1 at a node, which happens at `now`.
pub(super) fn event(now: &str, name: &str, uid: &str, warning: bool, reason: &str, message: &str) -> Value {
    // The API server refuses longer ones.
    const MAX_MESSAGE: usize = 1024;
    let end = (0..=MAX_MESSAGE.min(message.len())).rev().find(|end| message.is_char_boundary(*end));
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": format!("{name}."), "namespace": "default"},
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid},
        "type": if warning { "Warning" } else { "Normal" },
        "reason": reason,
        "message": &message[..end.unwrap_or_default()],
        "source": {"component": "flanneld", "host": name},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    })
}

/// Leaves an event that was made by [`event`].
pub(super) async fn leave(connection: &Connection, event: &Value) -> Result<(), Failure> {
    connection.post(PATH, event.to_string().into_bytes()).await
}
