//! Bytes to and from each peer, if they are counted.

use std::collections::{BTreeMap, BTreeSet};

use backends::{NftError, PeerCounters, PeerTraffic};
use ipnet::IpNet;

/// Whether the bytes of peers are counted (`--peer-counters`).
#[derive(Default)]
pub(crate) enum TrafficCounts {
    /// It was not asked for.
    #[default]
    Off,
    On(PeerCounters),
    /// The kernel refused; the log says why.
    Refused,
}

impl TrafficCounts {
    /// Counts from now on, in the network namespace of this thread.
    pub(crate) fn switch_on(&mut self) {
        *self = PeerCounters::open().map_or_else(|error| refused(&error), Self::On);
    }

    /// What was counted of these peers since each was first asked for; nothing where nothing is counted.
    pub(super) fn of(&mut self, subnets: &BTreeSet<IpNet>) -> BTreeMap<IpNet, PeerTraffic> {
        let Self::On(counters) = self else { return BTreeMap::new() };
        if let Err(error) = counters.count(subnets) {
            *self = refused(&error);
            return BTreeMap::new();
        }
        counters.read().unwrap_or_else(|error| {
            tracing::debug!(%error, "bytes of peers can't be read");
            BTreeMap::new()
        })
    }
}

fn refused(error: &NftError) -> TrafficCounts {
    tracing::warn!(
        "bytes to and from peers are not counted: {error}; --peer-counters needs Linux 5.12, CAP_NET_ADMIN and nf_tables"
    );
    TrafficCounts::Refused
}
