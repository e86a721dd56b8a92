//! Noticing that the network's configuration was written again.

use std::sync::PoisonError;

use etcd_client::WatchOptions;
use tokio::time::Instant;

use super::Etcd;
use super::follow::EtcdWatchEnd;

impl Etcd {
    /// Resolves when the key was changed after it was read last; and also, at a slow pace, when the server can't
    /// tell: history may be gone, or the server. Then it has to be read again.
    pub(super) async fn watch_config(&self) {
        let begun = Instant::now();
        let Err(ended) = self.heard_of_config().await else { return };
        let delay = {
            let mut pace = self.config_pace.lock().unwrap_or_else(PoisonError::into_inner);
            pace.reset_if_sound(begun);
            if let EtcdWatchEnd::Failed(error) = ended {
                tracing::debug!(%error, "the configuration can't be watched; it will be read again");
            }
            pace.delay()
        };
        tokio::time::sleep(delay).await;
    }

    async fn heard_of_config(&self) -> Result<(), EtcdWatchEnd> {
        let configured = *self.configured.lock().unwrap_or_else(PoisonError::into_inner);
        let from = configured.ok_or(EtcdWatchEnd::Outdated)? + 1;
        let mut watch = self.watch(self.keys.config(), WatchOptions::new(), from).await?;
        loop {
            // Reports of progress have no events.
            if !self.heard(&mut watch).await?.events().is_empty() {
                return Ok(());
            }
        }
    }
}
