//! Which entries of the store can't be read, and which of them are why a lease lacks something: those count once.

use std::collections::{BTreeMap, BTreeSet};

use subnet::lease::Malformed;
use subnet::{Lease, Leases, Subnets};

use super::SkipReason;

/// What can't be read of leases whose rest could be read.
pub(super) struct Flaws<'a> {
    all: BTreeMap<Subnets, &'a Malformed>,
    /// Those that are the reason for which a lease is left out.
    told: BTreeSet<Subnets>,
}

impl<'a> Flaws<'a> {
    pub(super) fn of(all: &'a Leases) -> Self {
        let flawed = all.malformed.values().filter_map(|malformed| Some((malformed.lease?, malformed)));
        Self { all: flawed.collect(), told: BTreeSet::new() }
    }

    /// What could not be read, if that is why a lease lacks something.
    pub(super) fn behind(&mut self, reason: SkipReason, lease: &Lease) -> Option<&'a Malformed> {
        let lacking = matches!(reason, SkipReason::Mac | SkipReason::Key | SkipReason::Address);
        let flaw = self.all.get(&lease.subnets).filter(|_| lacking)?;
        self.told.insert(lease.subnets);
        Some(flaw)
    }

    /// Everything else that can't be read, by its key.
    pub(super) fn others<'b>(&'b self, all: &'b Leases) -> impl Iterator<Item = (&'b String, &'b Malformed)> {
        let told = |malformed: &Malformed| malformed.lease.is_some_and(|lease| self.told.contains(&lease));
        all.malformed.iter().filter(move |(_, malformed)| !told(malformed))
    }
}
