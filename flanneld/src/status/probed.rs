//! What probes found, in the shape of the status.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::model::{PeerCounts, PeerEntry, ProbeStatus, ProbedPath, ProbedPeer};
use crate::probe::{PathState, PathTotals, PeerReport, ProbeMode, RTT_BOUNDS, Report};

/// What was found of each peer, by its subnet.
pub(super) type Found = BTreeMap<IpNet, PeerReport>;

/// Takes the peers out of a report, by subnet.
pub(super) fn by_subnet(report: &mut Report) -> Found {
    std::mem::take(&mut report.peers).into_iter().map(|peer| (peer.subnet, peer)).collect()
}

/// All peers together, and each of `peers` with its name.
pub(super) fn summary<'a>(
    report: &Report,
    peers: impl Iterator<Item = (String, &'a PeerReport)>,
) -> ProbeStatus {
    let totals = &report.totals;
    let paths = [("underlay", &totals.underlay), ("overlay", &totals.overlay), ("large", &totals.large)];
    let mut peers: Vec<ProbedPeer> = peers.map(|(name, peer)| probed(name, peer)).collect();
    // A node with both families is one peer.
    peers.sort_by(|one, other| one.peer.cmp(&other.peer));
    peers.dedup_by(|next, kept| next.peer == kept.peer && kept.merge(next));
    ProbeStatus {
        off: match &report.mode {
            ProbeMode::On => None,
            ProbeMode::Off => Some("--probe-interval=0".to_owned()),
            ProbeMode::Impossible(why) => Some(why.clone()),
        },
        interval_seconds: report.interval_seconds,
        rejected: report.rejected,
        paths: paths.into_iter().map(|(name, of)| (name.to_owned(), path(of))).collect(),
        peers,
    }
}

fn path(of: &PathTotals) -> ProbedPath {
    let PathTotals { answered, lost, late, duplicate, rtt_buckets, rtt_sum_seconds: sum } = of.clone();
    let classes = RTT_BOUNDS.into_iter().zip(rtt_buckets).collect();
    ProbedPath { answered, lost, late, duplicate, classes, sum }
}

fn probed(name: String, peer: &PeerReport) -> ProbedPeer {
    let main = peer.main();
    ProbedPeer {
        peer: name,
        up: peer.state != PathState::Unreachable,
        loss: main.loss.into(),
        rtt_seconds: main.rtt_seconds,
        path_mtu: peer.path_mtu.map(u32::from),
    }
}

impl ProbedPeer {
    /// Takes over what is worse about the other family of this peer.
    fn merge(&mut self, other: &Self) -> bool {
        self.up &= other.up;
        self.loss = self.loss.max(other.loss);
        self.rtt_seconds = self.rtt_seconds.into_iter().chain(other.rtt_seconds).reduce(f64::max);
        self.path_mtu = self.path_mtu.into_iter().chain(other.path_mtu).min();
        true
    }
}

/// Adds what was found of a peer until `at`, in seconds since 1970.
pub(super) fn complete(entry: &mut PeerEntry, peer: &PeerReport, at: u64) {
    let main = peer.main();
    // What the kernel lacks is told first.
    if entry.state == "programmed" && peer.state != PathState::Unknown {
        entry.state = peer.state.word().to_owned();
        entry.since = Some(at.saturating_sub(peer.state_seconds as u64));
    }
    entry.cause.clone_from(&peer.cause);
    entry.remedy.clone_from(&peer.remedy);
    entry.loss = (main.sent > 0).then(|| main.loss.into());
    entry.rtt_seconds = main.rtt_seconds;
    entry.path_mtu = peer.path_mtu.map(u32::from);
    entry.probe = Some(peer.clone());
}

/// Counts nodes by the worst state of their families.
pub(super) fn count(counts: &mut PeerCounts, nodes: impl Iterator<Item = PathState>) {
    let [mut reachable, mut degraded, mut unreachable] = [0; 3];
    for state in nodes {
        match state {
            PathState::Unknown => {}
            PathState::Reachable => reachable += 1,
            PathState::Degraded => degraded += 1,
            PathState::Unreachable => unreachable += 1,
        }
    }
    (counts.reachable, counts.degraded, counts.unreachable) =
        (Some(reachable), Some(degraded), Some(unreachable));
}
