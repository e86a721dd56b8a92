//! The node's condition `NetworkUnavailable`, which keeps pods away until the network is there.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;

use super::Kube;
use super::connection::Failure;
use super::node::Own;
use super::own::now;
use crate::pace::Backoff;

const FALSE: &str = "False";

impl Kube {
    /// Says that the network is available, until it has been heard.
    pub(super) async fn announce(&self) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
        while let Err(failure) = self.say_available().await {
            if backoff.worth_saying() {
                tracing::warn!(
                    error = %failure.error,
                    "the condition NetworkUnavailable can't be set to False; trying again"
                );
            }
            backoff.wait().await;
        }
        self.announced.store(true, Ordering::Release);
    }

    /// Whether what this node has announced was taken back, by a cloud provider or because the node was
    /// registered again.
    pub(super) fn is_unavailable(&self, own: &Own) -> bool {
        let says_false = own.unavailable.as_ref().is_some_and(|(status, _)| status == FALSE);
        // Without a subnet pods can't be there yet.
        let has_subnet = own.subnets.as_ref().is_ok_and(|subnets| !subnets.is_empty());
        self.announced.load(Ordering::Acquire) && has_subnet && !says_false
    }

    /// The patch of contract §3.2.7. A condition that holds already keeps its time of transition.
    pub(super) async fn say_available(&self) -> Result<(), Failure> {
        let Some(own) = self.read_own().await?.own else {
            return Err(self.connection.away("it has no such node".into()));
        };
        let now = now();
        let since = match own.unavailable {
            Some((status, since)) if status == FALSE && !since.is_empty() => since,
            _ => now.clone(),
        };
        let patch = serde_json::to_vec(&Patch {
            status: Status { conditions: [Condition::available(&now, &since)] },
        })
        .unwrap_or_default();
        self.connection.patch(&self.status_path().await?, patch).await.map(drop)
    }
}

#[derive(Serialize)]
struct Patch<'a> {
    status: Status<'a>,
}

#[derive(Serialize)]
struct Status<'a> {
    conditions: [Condition<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Condition<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    status: &'a str,
    last_heartbeat_time: &'a str,
    last_transition_time: &'a str,
    reason: &'a str,
    message: &'a str,
}

impl<'a> Condition<'a> {
    fn available(now: &'a str, since: &'a str) -> Self {
        Self {
            kind: "NetworkUnavailable",
            status: FALSE,
            last_heartbeat_time: now,
            last_transition_time: since,
            reason: "FlannelIsUp",
            message: "Flannel is running on this node",
        }
    }
}
