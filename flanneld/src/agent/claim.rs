//! Asking the store for what the agent can't live without, for as long as it takes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backends::backend::choose_mac;
use backends::{ActiveBackends, Macs, random};
use ipnet::IpNet;
use subnet::saved::Saved;
use subnet::{
    Attachment, BackendConfig, Claim, Family, Lease, LeaseStore, Leases, Mac, NetworkConfig, PublicAddrs,
    StoreError, Subnets,
};
use tokio::time::{sleep, timeout};

use super::{RETRY, condition};
use crate::extension::{self, Hooks};
use crate::log::moment;
use crate::serve::Health;

/// Contract §3.1 and §13: the configuration is asked for every second.
const CONFIGURATION_RETRY: Duration = Duration::from_secs(1);
/// After this long without an answer something is said.
const SOON: Duration = Duration::from_secs(1);
/// How long a store may take to answer where there is something else to start with.
const SAVED_PATIENCE: Duration = Duration::from_secs(2);

/// What makes this node recognisable to its peers.
#[derive(Clone)]
pub(super) struct Identity {
    /// The MAC of each tunnel device: that of the living one at first, then the announced one.
    pub(super) macs: Macs,
    /// For devices of which nothing is known, and for those whose MAC another node announces.
    new: Macs,
    /// What this machine held before it was restarted.
    former: Option<SavedLease>,
}

/// The own lease as it was saved.
#[derive(Clone)]
struct SavedLease {
    lease: Lease,
    /// Of the external interface.
    hardware: Option<Mac>,
}

impl Identity {
    pub(super) fn new(saved: Option<&Saved>) -> Self {
        let lease = saved.and_then(|saved| saved.leases.leases.get(&saved.own));
        let former = lease.map(|lease| SavedLease {
            lease: lease.clone(),
            hardware: saved.and_then(|saved| saved.hardware),
        });
        Self { macs: Macs::default(), new: random_macs(), former }
    }

    /// The lease that was saved, unless it was on another machine: a disk that was copied makes no second owner.
    pub(super) fn former(&self, hardware: Option<Mac>) -> Option<&Lease> {
        let former = self.former.as_ref()?;
        (former.hardware.is_none() || former.hardware == hardware).then_some(&former.lease)
    }

    /// Every MAC of a tunnel device that this node has or had.
    pub(super) fn known_macs(&self, former: Option<&Lease>) -> Vec<Mac> {
        let announced = |family| former.and_then(|lease| lease.attachment.vtep(family)).map(|vtep| vtep.mac);
        let macs = Family::BOTH.into_iter().flat_map(|family| [self.macs.get(family), announced(family)]);
        macs.flatten().filter(|mac| mac.is_unicast()).collect()
    }

    /// Gives up the MAC of the devices of a family.
    pub(super) fn renounce(&mut self, family: Family) {
        self.new = random_macs();
        if let Some(new) = self.new.get(family) {
            self.macs.set(family, new);
        }
    }

    /// The MAC of each tunnel device of any way, given the leases that this node has or had, best first, and
    /// which MACs are other nodes'.
    pub(super) fn macs(
        &self,
        active: &ActiveBackends,
        own: &[&Lease],
        foreign: impl Fn(Family, Mac) -> bool,
    ) -> Macs {
        let mut macs = Macs::default();
        for backend in active.backends() {
            for (family, _) in backend.devices() {
                // One MAC for all devices of a family: peers that follow a change of the VNI late can't miss.
                let (None, Some(new)) = (macs.get(family), self.new.get(family)) else { continue };
                let announced = own.iter().filter_map(|lease| lease.attachment.vtep(family));
                let known = self.macs.get(family).into_iter().chain(announced.map(|vtep| vtep.mac));
                macs.set(family, choose_mac(known, |mac| foreign(family, mac), new));
            }
        }
        macs
    }
}

fn random_macs() -> Macs {
    let mut macs = Macs::default();
    Family::BOTH.into_iter().for_each(|family| macs.set(family, random::mac()));
    macs
}

/// Whether a node with this address, other than by `known`, announces this MAC.
fn is_foreign(all: &Leases, known: Option<&Lease>, public: &PublicAddrs, family: Family, mac: Mac) -> bool {
    all.leases.values().any(|lease| {
        lease.attachment.vtep(family).is_some_and(|vtep| vtep.mac == mac)
            && !lease.public.same_node(public)
            && known.is_none_or(|known| known.subnets != lease.subnets)
    })
}

/// The configuration that an agent begins with.
pub(super) enum Beginning {
    /// The store's.
    Configured(NetworkConfig, ActiveBackends),
    /// The saved one: the store answers, with a configuration that can't be used.
    Refused(Box<Saved>, ActiveBackends),
    /// The saved one, with the saved lease and peers: the store does not answer.
    Recalled(Box<Saved>, ActiveBackends, StoreError),
}

/// The network's configuration and the backend that it asks for, as soon as there is one that can be
/// carried out: a wrong one is not the end, since its correction needs no restart.
///
/// Where something was saved, that is in force until the store has something better: a store that doesn't
/// answer is not waited for, and a configuration that was refused before a restart is refused after it.
pub(super) async fn configuration<S: LeaseStore>(
    store: &S,
    saved: Option<Saved>,
    health: &Health,
) -> Beginning {
    let in_force = saved.and_then(|saved| {
        let active = ActiveBackends::new(&saved.network.backend, &saved.network).ok()?;
        Some((Box::new(saved), active))
    });
    let mut said = String::new();
    loop {
        health.beat();
        let answer = match &in_force {
            Some(_) => timeout(SAVED_PATIENCE, answered(store)).await.unwrap_or_else(|_| {
                Err(StoreError::Unreachable { store: store.describe(), why: "no answer yet".into() })
            }),
            None if said.is_empty() => {
                patiently(store, health, condition::CONFIGURATION, store.network()).await
            }
            None => store.network().await,
        };
        let why = match answer {
            Ok(network) => match ActiveBackends::new(&network.backend, &network) {
                Ok(active) => {
                    health.set(condition::CONFIGURATION, Ok(()));
                    heed(health, &network);
                    let networks = network.networks();
                    tracing::info!(network = %networks, backend = network.backend.name(), "configuration read");
                    return Beginning::Configured(network, active);
                }
                Err(error) => format!("network configuration: {error}"),
            },
            Err(error) if is_away(&error) => match in_force {
                Some((saved, active)) => {
                    health.set(condition::CONFIGURATION, Ok(()));
                    return Beginning::Recalled(saved, active, error);
                }
                None => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        if let Some((saved, active)) = in_force {
            health.set(condition::CONFIGURATION, Ok(()));
            return Beginning::Refused(saved, active);
        }
        if said != why {
            tracing::error!("waiting for a configuration: {why}");
            health.set(condition::CONFIGURATION, Err(why.clone()));
            said = why;
        }
        sleep(CONFIGURATION_RETRY).await;
    }
}

/// Whether an error says nothing about the configuration.
pub(super) fn is_away(error: &StoreError) -> bool {
    matches!(error, StoreError::Unreachable { .. } | StoreError::Denied { .. })
}

/// Tells the operator which keys of the configuration have no effect.
pub(super) fn heed(health: &Health, network: &NetworkConfig) {
    let warnings: Vec<String> =
        network.warnings.0.iter().map(|warning| format!("network configuration: {warning}")).collect();
    health.warn("configuration-keys", &warnings);
}

/// The configuration from a store that answers. With leases in Kubernetes the configuration is a file, and
/// having read that says nothing about the API server; what is asked about this node does.
async fn answered<S: LeaseStore>(store: &S) -> Result<NetworkConfig, StoreError> {
    store.node_public().await?;
    store.network().await
}

/// Says that there is no answer yet, if there is none soon: a name server that is silent keeps everything waiting.
async fn patiently<T, S: LeaseStore>(
    store: &S,
    health: &Health,
    condition: &'static str,
    answer: impl Future<Output = T>,
) -> T {
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => return answer,
        () = sleep(SOON) => {
            let why = format!("{}: no answer yet", store.describe());
            tracing::warn!("{why}");
            health.set(condition, Err(why));
        }
    }
    answer.await
}

/// Tells that this node runs on what was saved, and why. A store that refuses this node is another matter than one
/// that is away: somebody has to change something, so the node is not ready.
pub(super) fn without_store(health: &Health, own: &Subnets, since: SystemTime, error: &StoreError) {
    let since = moment(since);
    let saved = format!("{own} and its peers are as they were saved");
    match error {
        StoreError::Denied { why, .. } => {
            let text = format!("the store refuses this node since {since} ({why}); {saved}");
            tracing::error!("{error}; {saved}, and this node is not ready until the store lets it in");
            health.note("store", vec![text.clone()]);
            health.set(condition::STORE, Err(text));
        }
        error => {
            tracing::warn!("{error}; {saved}");
            health.note("store", vec![format!("store unreachable since {since} ({error}); {saved}")]);
            health.set(condition::STORE, Ok(()));
        }
    }
}

/// Waits until the store answers again, while the node runs on what was saved. What it says about the
/// configuration, good or bad, is heard like any other change.
pub(super) async fn reconnected<S: LeaseStore>(
    store: &S,
    health: &Health,
    own: Subnets,
    mut said: StoreError,
) {
    let since = SystemTime::now();
    without_store(health, &own, since, &said);
    loop {
        match answered(store).await {
            Err(error) if is_away(&error) => {
                if error.to_string() != said.to_string() {
                    without_store(health, &own, since, &error);
                    said = error;
                }
            }
            Ok(_) | Err(_) => return,
        }
        sleep(CONFIGURATION_RETRY).await;
    }
}

/// The public addresses that an operator gave to this node in the store, as soon as it answers.
pub(super) async fn node_public<S: LeaseStore>(store: &S, health: &Health) -> PublicAddrs {
    let mut said = String::new();
    loop {
        health.beat();
        let answer = match said.is_empty() {
            true => patiently(store, health, condition::STORE, store.node_public()).await,
            false => store.node_public().await,
        };
        let why = match answer {
            Ok(public) => {
                health.set(condition::STORE, Ok(()));
                return public;
            }
            Err(error) => error.to_string(),
        };
        if said != why {
            tracing::error!("waiting for what the store says about this node: {why}");
            health.set(condition::STORE, Err(why.clone()));
            said = why;
        }
        tokio::select! {
            () = sleep(CONFIGURATION_RETRY) => {}
            () = store.stirred() => {}
        }
    }
}

/// What a node knows of itself when it asks for a lease.
pub(super) struct ClaimFacts {
    pub(super) network: NetworkConfig,
    pub(super) identity: Identity,
    pub(super) active: ActiveBackends,
    pub(super) public: PublicAddrs,
    pub(super) previous: Subnets,
    /// What this machine held before it was restarted.
    pub(super) before: Option<Lease>,
    pub(super) reserved: Vec<IpNet>,
    pub(super) lans: Vec<IpNet>,
    /// Subnets of earlier networks in which pods still are.
    pub(super) left: Vec<IpNet>,
    /// The store has not let this process in before.
    pub(super) first: bool,
    /// Who runs the commands of the `extension` backend.
    pub(super) hooks: Option<Hooks>,
}

/// What the `extension` backend's command says of this node, as soon as it may be run and succeeds.
async fn prepared(network: &NetworkConfig, hooks: Option<&Hooks>, health: &Health) -> Option<Box<str>> {
    let BackendConfig::Extension(config) = &network.backend else { return None };
    let mut said = String::new();
    let mut pause = RETRY.0;
    loop {
        health.beat();
        let permitted = Hooks::permit(hooks, config);
        let outcome = match &permitted {
            Ok(()) => extension::prepare(config).await,
            Err(why) => Err(why.clone()),
        };
        let why = match outcome {
            Ok(text) => {
                health.set(extension::CONDITION, Ok(()));
                return text;
            }
            Err(why) => why,
        };
        if said != why {
            tracing::error!("no lease is asked for: {why}");
            health.set(extension::CONDITION, Err(why.clone()));
            said = why;
        }
        // Only another configuration can permit what is not, and then this is over.
        if permitted.is_err() {
            std::future::pending::<()>().await;
        }
        sleep(pause).await;
        pause = RETRY.1.min(pause * 2);
    }
}

/// This node's lease, as soon as there is one.
pub(super) async fn obtain<S: LeaseStore>(store: Arc<S>, facts: ClaimFacts, health: Health) -> Lease {
    let ClaimFacts {
        network,
        identity,
        active,
        public,
        previous,
        before,
        reserved,
        lans,
        left,
        first,
        hooks,
    } = facts;
    let said = prepared(&network, hooks.as_ref(), &health).await;
    let attach = |known: Option<&Lease>, all: &Leases| {
        let own: Vec<&Lease> = known.into_iter().chain(&before).collect();
        let foreign = |family, mac| is_foreign(all, known, &public, family, mac);
        match active.attachment(&identity.macs(&active, &own, foreign)) {
            Attachment::Extension(_) => Attachment::Extension(said.clone()),
            other => other,
        }
    };
    let macs = identity.known_macs(before.as_ref());
    let claim = Claim {
        macs: &macs,
        before: before.as_ref(),
        reserved: &reserved,
        lans: &lans,
        left: &left,
        ..Claim::new(public, previous, &attach)
    };
    let mut said = String::new();
    let mut pause = RETRY.0;
    loop {
        health.beat();
        let (refused, error) = match store.acquire(&network, &claim).await {
            Ok(lease) => return lease,
            Err(error) => (matches!(error, StoreError::Denied { .. }), error.to_string()),
        };
        if said != error {
            tracing::error!("no lease yet: {error}");
            health.set(condition::LEASE, Err(error.clone()));
            if first {
                health.set(condition::STORE, if refused { Err(error.clone()) } else { Ok(()) });
            }
            said = error;
        }
        tokio::select! {
            () = sleep(pause) => pause = RETRY.1.min(pause * 2),
            // What stood in the way may be gone: a subnet was given to this node, for instance.
            () = store.stirred() => pause = RETRY.0,
        }
    }
}
