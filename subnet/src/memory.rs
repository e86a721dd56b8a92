//! A store in memory: for tests, and the shortest description of what every store does.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::claim::{Choice, Verdict, choose, exhausted, judge, rival, still_used};
use crate::config::NetworkConfig;
use crate::lease::{Attachment, Lease, Leases};
use crate::net::Subnets;
use crate::store::{Claim, Feed, LeaseStore, Loss, StoreError};

/// The shared half: what would be the server. Cheap to clone; one for all nodes of a cluster.
#[derive(Clone, Debug)]
pub struct Cluster(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: watch::Sender<String>,
    leases: watch::Sender<Leases>,
    /// What `trouble` was called with last; while it is set the store does not answer.
    trouble: watch::Sender<Option<String>>,
}

impl Cluster {
    /// A cluster with this `net-conf.json` and no lease.
    pub fn new(config: &str) -> Self {
        Self(Arc::new(Inner {
            config: watch::Sender::new(config.to_owned()),
            leases: watch::Sender::new(Leases::default()),
            trouble: watch::Sender::new(None),
        }))
    }

    /// A node's view of this cluster.
    pub fn node(&self) -> Memory {
        Memory { cluster: self.clone(), held: Mutex::new(None), configured: Mutex::new(None) }
    }

    /// Changes the leases by hand, as an operator or another node would.
    pub fn edit(&self, change: impl FnOnce(&mut Leases)) {
        self.0.leases.send_modify(change);
    }

    /// Changes the configuration, as an operator would.
    pub fn configure(&self, config: &str) {
        self.0.config.send_replace(config.to_owned());
    }

    /// All leases at this moment.
    pub fn leases(&self) -> Leases {
        self.0.leases.borrow().clone()
    }

    /// Makes the store stop answering, with this reason, or answer again.
    pub fn trouble(&self, why: Option<&str>) {
        self.0.trouble.send_replace(why.map(str::to_owned));
    }

    fn answering(&self) -> Result<(), StoreError> {
        match &*self.0.trouble.borrow() {
            Some(why) => {
                Err(StoreError::Unreachable { store: "the store in memory".into(), why: why.clone() })
            }
            None => Ok(()),
        }
    }
}

/// One node's end of the store in memory.
#[derive(Debug)]
pub struct Memory {
    cluster: Cluster,
    held: Mutex<Option<Lease>>,
    /// The configuration as it was read last.
    configured: Mutex<Option<String>>,
}

impl Memory {
    fn held(&self) -> MutexGuard<'_, Option<Lease>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LeaseStore for Memory {
    fn describe(&self) -> String {
        "the store in memory".into()
    }

    async fn network(&self) -> Result<NetworkConfig, StoreError> {
        self.cluster.answering()?;
        let config = self.cluster.0.config.borrow().clone();
        *self.configured.lock().unwrap_or_else(PoisonError::into_inner) = Some(config.clone());
        NetworkConfig::parse(&config).map_err(|source| StoreError::BadConfig { at: "memory".into(), source })
    }

    async fn network_changed(&self) {
        let last = self.configured.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut config = self.cluster.0.config.subscribe();
        // The sender lives as long as the cluster, of which this is a part.
        let _ = config.wait_for(|config| Some(config) != last.as_ref()).await;
    }

    async fn acquire(&self, network: &NetworkConfig, claim: &Claim<'_>) -> Result<Lease, StoreError> {
        self.cluster.answering()?;
        let held = self.held().clone();
        let mut result = Err(exhausted(network, &self.cluster.leases()));
        self.cluster.0.leases.send_modify(|leases| {
            let Some(choice) = choose(network, claim, held.as_ref(), leases) else { return };
            let attachment: Attachment = (claim.attach)(choice.known.as_ref(), leases);
            let used: Vec<Subnets> = still_used(claim, &choice, leases).map(|lease| lease.subnets).collect();
            for (_, lease) in leases.leases.iter_mut().filter(|(subnets, _)| used.contains(subnets)) {
                (lease.public, lease.attachment) = (claim.public, attachment.clone());
            }
            let Choice { subnets, known, replaces } = choice;
            if let Some(old) = known.as_ref().filter(|_| replaces) {
                leases.leases.remove(&old.subnets);
            }
            let created = known.filter(|old| old.subnets == subnets).map_or_else(
                || 1 + leases.leases.values().map(|lease| lease.created).max().unwrap_or(0),
                |old| old.created,
            );
            let written = 1 + leases.leases.values().map(|lease| lease.written).max().unwrap_or(0);
            let lease = Lease { subnets, public: claim.public, attachment, created, written };
            leases.leases.insert(subnets, lease.clone());
            // Before `hold` can see the new leases: it must not take our writing for another's.
            *self.held() = Some(lease.clone());
            result = Ok(lease);
        });
        result
    }

    async fn hold(&self) -> Loss {
        let mut leases = self.cluster.0.leases.subscribe();
        loop {
            let verdict = {
                let all = leases.borrow_and_update();
                let mine = self.held().clone();
                mine.map(|mine| (judge(&mine, all.leases.get(&mine.subnets)), mine))
            };
            match verdict {
                Some((Verdict::Lost(loss), _)) => {
                    *self.held() = None;
                    return loss;
                }
                Some((Verdict::Deleted, mine)) => {
                    let mut taken = None;
                    self.cluster.edit(|all| {
                        taken = rival(&mine, all);
                        if taken.is_none() {
                            all.malformed.retain(|_, entry| entry.subnets != Some(mine.subnets));
                            all.leases.insert(mine.subnets, mine);
                        }
                    });
                    if let Some(loss) = taken {
                        *self.held() = None;
                        return loss;
                    }
                    continue;
                }
                Some((Verdict::Kept, _)) | None => {}
            }
            if leases.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn follow(&self, feed: &Feed) -> Infallible {
        let (mut leases, mut trouble) =
            (self.cluster.0.leases.subscribe(), self.cluster.0.trouble.subscribe());
        loop {
            let answering = self.cluster.answering();
            trouble.mark_unchanged();
            match answering {
                Ok(()) => feed.snapshot(&leases.borrow_and_update()),
                Err(error) => feed.trouble(&error),
            }
            tokio::select! {
                _ = leases.changed() => {}
                _ = trouble.changed() => {}
            }
        }
    }
}
