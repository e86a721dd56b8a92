//! The agent's own events at its node's object.

use std::sync::Arc;

use super::connection::{Connection, Failure};
use super::events::{event, leave};
use super::own::{OwnNode, now};

/// Leaves events at this node's object.
pub struct EventApi {
    connection: Arc<Connection>,
    node: Arc<OwnNode>,
}

/// An event was not left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// The agent's role does not allow it.
    #[error("the role of flanneld does not allow to create events: {0}")]
    Forbidden(String),
    /// The API server does not answer, or not as it should.
    #[error("{0}")]
    Failed(String),
}

impl EventApi {
    pub(super) fn new(connection: Arc<Connection>, node: Arc<OwnNode>) -> Self {
        Self { connection, node }
    }

    /// Leaves an event with this reason, one word in camel case.
    ///
    /// # Errors
    /// [`EventError`] when it was not left.
    pub async fn add(&self, warning: bool, reason: &str, message: &str) -> Result<(), EventError> {
        let failed = |failure: Failure| match failure.status {
            401 | 403 => EventError::Forbidden(failure.error.to_string()),
            _ => EventError::Failed(failure.error.to_string()),
        };
        let name = self.node.name(&self.connection).await.map_err(failed)?;
        // As the kubelet does: its events have the node's name in place of its uid.
        let event = event(&now(), name, name, warning, reason, message);
        leave(&self.connection, &event).await.map_err(failed)
    }
}
