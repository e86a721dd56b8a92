//! What the probes found, as a value for everybody who shows it.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::path::PathState;
use super::verdict::Verdict;

/// Upper bounds of the buckets of round trips, in seconds; one more bucket is for all.
pub(crate) const RTT_BOUNDS: [f64; 9] = [0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1.0];

/// What the probes found until now.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Whether this node probes.
    pub(crate) mode: ProbeMode,
    /// Time between two rounds of one peer; it grows with their number.
    pub(crate) interval_seconds: f64,
    /// Each peer, by subnet; none in a brief report.
    pub(crate) peers: Vec<PeerReport>,
    /// The state of the way that pods' packets take to each peer, by subnet.
    #[serde(skip)]
    pub(crate) states: Vec<(IpNet, PathState)>,
    /// Counted since the start.
    pub(crate) totals: Totals,
    /// Answers with this agent's id that fit no request: another source, size, number or content.
    pub(crate) rejected: u64,
}

/// Whether this node probes its peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "probing", content = "why")]
pub(crate) enum ProbeMode {
    /// It does.
    On,
    /// The operator has switched it off (`--probe-interval=0`).
    #[default]
    Off,
    /// It can't, for this reason.
    Impossible(String),
}

/// What is known of one family of a peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PeerReport {
    /// Its pod subnet.
    pub(crate) subnet: IpNet,
    /// Its public address.
    pub(crate) underlay_address: IpAddr,
    /// Its address in the pod network that is probed.
    pub(crate) tunnel_address: IpAddr,
    /// The backend that leads to it, in words.
    pub(crate) way: String,
    /// The state of the way that pods' packets take.
    pub(crate) state: PathState,
    /// Since how long.
    pub(crate) state_seconds: f64,
    /// What is wrong.
    pub(crate) verdict: Verdict,
    /// What is wrong, in a sentence.
    pub(crate) cause: Option<String>,
    /// What to do about it.
    pub(crate) remedy: Option<String>,
    /// From node to node.
    pub(crate) underlay: PathReport,
    /// The way of the pods; a bridge without pods does not answer, which means nothing.
    pub(crate) tunnel: PathReport,
    /// MTU of the pods.
    pub(crate) mtu: u16,
    /// The longest packet that arrives; nothing while it is searched for.
    pub(crate) path_mtu: Option<u16>,
}

/// What is known of one path.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct PathReport {
    /// Its state.
    pub(crate) state: PathState,
    /// Probes of the last five minutes with an outcome, and those lost.
    pub(crate) sent: u32,
    /// Those of them that are lost.
    pub(crate) lost: u32,
    /// The share that is lost, 0 to 1.
    pub(crate) loss: f32,
    /// Smoothed.
    pub(crate) rtt_seconds: Option<f64>,
    /// Since how long every probe has been lost, if the last one is.
    pub(crate) failing_seconds: Option<f64>,
}

impl PeerReport {
    /// The path whose state is that of the peer.
    pub(crate) fn main(&self) -> &PathReport {
        let bridge =
            self.underlay.state == PathState::Unreachable && self.tunnel.state == PathState::Reachable;
        if self.is_tunnelled() || bridge { &self.tunnel } else { &self.underlay }
    }

    /// Whether packets go through a tunnel.
    pub(crate) fn is_tunnelled(&self) -> bool {
        self.tunnel_address == self.subnet.network()
    }
}

/// Counters by path.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Totals {
    /// To public addresses.
    pub(crate) underlay: PathTotals,
    /// To addresses inside the pod network.
    pub(crate) overlay: PathTotals,
    /// Of full length.
    pub(crate) large: PathTotals,
}

/// Counters of one path.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct PathTotals {
    /// Answered in time.
    pub(crate) answered: u64,
    /// Not answered in time.
    pub(crate) lost: u64,
    /// Answered after that.
    pub(crate) late: u64,
    /// Answered more than once.
    pub(crate) duplicate: u64,
    /// Round trips by [`RTT_BOUNDS`], not cumulated; the last is for longer ones.
    pub(crate) rtt_buckets: [u64; RTT_BOUNDS.len() + 1],
    /// Their sum.
    pub(crate) rtt_sum_seconds: f64,
}

impl PathTotals {
    pub(super) fn note_rtt(&mut self, rtt: f64) {
        self.answered += 1;
        self.rtt_sum_seconds += rtt;
        let bucket = RTT_BOUNDS.iter().position(|bound| rtt <= *bound).unwrap_or(RTT_BOUNDS.len());
        self.rtt_buckets[bucket] += 1;
    }
}
