//! Asking the store for what the agent can't live without, for as long as it takes.

use std::sync::Arc;
use std::time::Duration;

use backends::Backend;
use backends::backend::{choose_mac, select};
use subnet::{Attachment, Claim, Family, Lease, LeaseStore, Mac, NetworkConfig, PublicAddrs, Subnets};
use tokio::time::sleep;

use super::{RETRY, condition};
use crate::serve::Health;

/// Contract §3.1 and §13: the configuration is asked for every second.
const CONFIGURATION_RETRY: Duration = Duration::from_secs(1);

/// What makes this node recognisable to its peers.
#[derive(Clone)]
pub(super) struct Identity {
    /// The node's name or its machine's id.
    pub(super) name: String,
    pub(super) backend: Arc<dyn Backend>,
    /// The MAC of the tunnel device: that of the living one at first, then the announced one.
    pub(super) living: Option<Mac>,
}

impl Identity {
    /// What to announce, given the lease that this node holds already.
    fn attachment(&self, known: Option<&Lease>, public: &PublicAddrs) -> Attachment {
        let announced = known.and_then(|lease| lease.attachment.vtep(Family::V4)).map(|vtep| vtep.mac);
        let mac = choose_mac(self.living, announced, self.backend.seed(), &self.name, public);
        self.backend.attachment(mac)
    }
}

/// The network's configuration and the backend that it asks for, as soon as there is one that can be
/// carried out: a wrong one is not the end, since its correction needs no restart.
pub(super) async fn configuration<S: LeaseStore>(
    store: &S,
    health: &Health,
) -> (NetworkConfig, Arc<dyn Backend>) {
    let mut said = String::new();
    loop {
        health.beat();
        let why = match store.network().await {
            Ok(network) => match select(&network) {
                Ok(backend) => {
                    health.set(condition::CONFIGURATION, Ok(()));
                    let networks = network.networks();
                    tracing::info!(network = %networks, backend = network.backend.name(), "configuration read");
                    return (network, Arc::from(backend));
                }
                Err(error) => format!("network configuration: {error}"),
            },
            Err(error) => error.to_string(),
        };
        if said != why {
            tracing::error!("waiting for a configuration: {why}");
            health.set(condition::CONFIGURATION, Err(why.clone()));
            said = why;
        }
        sleep(CONFIGURATION_RETRY).await;
    }
}

/// This node's lease, as soon as there is one.
pub(super) async fn obtain<S: LeaseStore>(
    store: Arc<S>,
    network: NetworkConfig,
    identity: Identity,
    public: PublicAddrs,
    previous: Subnets,
    health: Health,
) -> Lease {
    let attach = |known: Option<&Lease>| identity.attachment(known, &public);
    let mut said = String::new();
    let mut pause = RETRY.0;
    loop {
        health.beat();
        let error = match store.acquire(&network, &Claim { public, previous, attach: &attach }).await {
            Ok(lease) => return lease,
            Err(error) => error.to_string(),
        };
        if said != error {
            tracing::error!("no lease yet: {error}");
            health.set(condition::LEASE, Err(error.clone()));
            said = error;
        }
        sleep(pause).await;
        pause = RETRY.1.min(pause * 2);
    }
}
