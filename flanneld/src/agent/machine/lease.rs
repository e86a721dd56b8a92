//! The own lease as a value: whether this node has one, whether it asks for one, and who else says that it is theirs.

use std::sync::Arc;

use subnet::{Attachment, Lease, PublicAddrs, Subnets, Tenure};

use super::Admits;
use super::contest::Contest;
use super::dispute::Disputes;
use super::standing::StoreTrouble;
use crate::agent::claim::Identity;

/// Whether this node has a lease.
pub(super) enum LeaseState {
    /// Not since the start, or the last one was lost.
    Unclaimed,
    /// That of an earlier run, while the store does not answer.
    Recalled(Lease),
    /// It is in the store.
    Held(Lease),
}

/// What a node publishes for its peers.
pub(super) type Announced = (PublicAddrs, Attachment);

/// Whether the store is being asked for a lease, and with what.
pub(super) enum Claiming {
    Never,
    Running(Announced),
    /// The store has answered, or it is asked no more.
    Ended(Announced),
}

impl Claiming {
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running(_))
    }

    /// What was published last, or is being published.
    pub(super) fn announced(&self) -> Option<&Announced> {
        match self {
            Self::Never => None,
            Self::Running(announced) | Self::Ended(announced) => Some(announced),
        }
    }

    pub(super) fn end(&mut self) {
        *self = match std::mem::replace(self, Self::Never) {
            Self::Running(announced) => Self::Ended(announced),
            other => other,
        };
    }
}

/// Everything about the own lease.
pub(super) struct OwnLease {
    pub(super) state: LeaseState,
    pub(super) claiming: Claiming,
    /// Whether another node writes it.
    pub(super) contest: Contest,
    /// Subnets that were ours and on which pods may still be.
    pub(super) lost: Vec<Subnets>,
    pub(super) identity: Identity,
    /// MACs that several nodes announce.
    pub(super) disputes: Disputes,
    /// How the lease stands in the store, and what is wrong with that, if anything.
    pub(super) tenure: Tenure,
    pub(super) trouble: Option<StoreTrouble>,
    /// It ended, or is about to, while it can't be renewed.
    pub(super) lapsed: bool,
    /// The store has let this process in, whose leases are followed since then.
    pub(super) followed: bool,
    /// The store's rules for going on in another network.
    pub(super) admits: Arc<Admits>,
}

impl OwnLease {
    pub(super) fn new(identity: Identity, recalled: Option<Lease>, admits: Arc<Admits>) -> Self {
        Self {
            state: recalled.map_or(LeaseState::Unclaimed, LeaseState::Recalled),
            claiming: Claiming::Never,
            contest: Contest::default(),
            lost: Vec::new(),
            identity,
            disputes: Disputes::default(),
            tenure: Tenure::default(),
            trouble: None,
            lapsed: false,
            followed: false,
            admits,
        }
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        match &self.state {
            LeaseState::Unclaimed => None,
            LeaseState::Recalled(lease) | LeaseState::Held(lease) => Some(lease),
        }
    }

    /// Whether this node runs on what was saved, since the store does not answer.
    pub(super) fn is_recalled(&self) -> bool {
        matches!(self.state, LeaseState::Recalled(_))
    }

    /// The store has given this lease. The one before is handed back.
    pub(super) fn hold(&mut self, lease: Lease) -> Option<Lease> {
        let before = std::mem::replace(&mut self.state, LeaseState::Held(lease));
        self.claiming.end();
        match before {
            LeaseState::Unclaimed => None,
            LeaseState::Recalled(lease) | LeaseState::Held(lease) => Some(lease),
        }
    }

    /// The store answers: what was recalled is held until the store says something else.
    pub(super) fn reconnected(&mut self) {
        if let LeaseState::Recalled(lease) = std::mem::replace(&mut self.state, LeaseState::Unclaimed) {
            self.state = LeaseState::Held(lease);
        }
    }
}
