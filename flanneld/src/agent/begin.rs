//! The beginning: what was saved, the store's configuration, and what an earlier run left on this host.

use std::sync::Arc;

use backends::Kernel;
use subnet::env_file::{Previous, sweep};
use subnet::saved::Saved;
use subnet::{BackendConfig, Engine, LeaseStore, Leases, NetworkConfig, PublicAddrs, StoreError, Subnets};
use tokio::time::Instant;

use super::claim::{self, Beginning};
use super::machine::{Machine, Start};
use super::{Settings, condition, recall};
use crate::serve::Health;

/// What an agent goes on with until its store answers: the leases that were saved, its own subnets, and why the store
/// does not answer.
pub(super) type Recalled = (Leases, Subnets, StoreError);

/// Whether a backend that was in use is one of WireGuard, by the kernel or in process.
fn had_wireguard(saved: &Saved) -> bool {
    let either = |config: &BackendConfig| matches!(config, BackendConfig::Wireguard(config) if config.engine == Engine::Auto);
    saved.former.iter().chain([&saved.network.backend]).any(either)
}

/// The machine of an agent that begins, as soon as there is a configuration.
pub(super) async fn machine<S: LeaseStore>(
    store: &Arc<S>,
    settings: Settings,
    health: Health,
    kernel: &mut impl Kernel,
) -> (Machine, Option<Recalled>) {
    if settings.cni_conf.is_some() {
        health.set(condition::CNI_CONF, Err("not written yet".to_owned()));
    }
    for path in [&settings.subnet_file, &settings.state_file] {
        sweep(path);
    }
    let saved = recall::read(&settings.state_file, &store.describe(), &health);
    let stores = store.endpoints().await;
    let (network, active, recalled) = match claim::configuration(&**store, saved.clone(), &health).await {
        Beginning::Configured(network, active) => (network, active, None),
        Beginning::Refused(saved, active) => (saved.network.clone(), active, None),
        Beginning::Recalled(saved, active, why) => {
            let recalled = (saved.leases.clone(), saved.own, why);
            (saved.network.clone(), active, Some(recalled))
        }
    };
    let given = match recalled {
        None => claim::node_public(&**store, &health).await,
        Some(_) => PublicAddrs::default(),
    };
    // Asked only then, since the question loads the module. What was in force before is in use at first, too.
    let asks = active.may_encrypt_in_process() || saved.as_ref().is_some_and(had_wireguard);
    let wireguard = !asks || kernel.has_wireguard();
    let of_store = Arc::clone(store);
    let start = Start {
        previous: Previous::read(&settings.subnet_file),
        settings,
        health,
        network,
        active,
        saved,
        recalled: recalled.is_some(),
        stores,
        given,
        wireguard,
        admits: Arc::new(move |next: &NetworkConfig, held: &Subnets| of_store.admits(next, held)),
    };
    (Machine::new(start, Instant::now()), recalled)
}
