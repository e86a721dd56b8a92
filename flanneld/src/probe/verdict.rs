//! What the paths to a peer say together: the fault, its object and its remedy; pure.

use serde::{Deserialize, Serialize};

use super::moment::Moment;
use super::mtu::MtuSearch;
use super::path::{Path, PathState};
use super::target::{Inner, Target};

/// So many lost in a row may be the begin of an outage.
const OUTAGE_RUN: u8 = 3;

/// What is wrong with the way to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// Not known yet.
    #[default]
    Unknown,
    /// Packets arrive.
    Fine,
    /// The network between the nodes loses packets.
    LossyNetwork,
    /// The tunnel loses packets that the network between the nodes doesn't.
    LossyTunnel,
    /// The peer's public address answers, the tunnel doesn't.
    PortBlocked,
    /// Neither answers any more.
    Down,
    /// Neither has ever answered.
    Silent,
    /// Packets of full length are lost.
    PathMtu,
}

/// What is known of the ways to a peer.
pub(super) struct Paths<'a> {
    pub(super) underlay: &'a Path,
    /// Also that of a bridge.
    pub(super) inner: &'a Path,
    pub(super) mtu: &'a MtuSearch,
}

impl Verdict {
    /// What these paths say about the way to `target`; nothing while one of them is about to change.
    pub(super) fn of(target: &Target, paths: &Paths<'_>) -> Option<Self> {
        use PathState::{Degraded, Reachable, Unknown, Unreachable};
        let Paths { underlay, inner, mtu } = *paths;
        let tunnel = matches!(target.inner, Inner::Tunnel(_));
        let main = if tunnel { inner } else { underlay };
        let (below, inside) = (underlay.recent_loss(), inner.recent_loss());
        let same_loss = below > 0.0 && below >= inside / 2.0;
        let ever = underlay.answered_ever() || inner.answered_ever();
        Some(match (main.state(), underlay.state()) {
            (Reachable, _) if mtu.is_limited() => Self::PathMtu,
            (Reachable, _) => Self::Fine,
            (Degraded, _) if tunnel && !same_loss => Self::LossyTunnel,
            (Degraded, _) => Self::LossyNetwork,
            // A host without a tunnel may answer by its bridge alone.
            (Unreachable, _) if !tunnel && inner.state() == Reachable => Self::Fine,
            (Unreachable, Unreachable) if ever => Self::Down,
            (Unreachable, Unreachable) => Self::Silent,
            (Unreachable, Reachable | Degraded) if underlay.lost_run() < OUTAGE_RUN => Self::PortBlocked,
            (Unreachable, _) => return None,
            (Unknown, _) => Self::Unknown,
        })
    }

    /// Whether an operator has to do something.
    pub(crate) fn is_trouble(self) -> bool {
        !matches!(self, Self::Unknown | Self::Fine)
    }

    /// What is wrong, about which object.
    pub(super) fn cause(self, target: &Target, paths: &Paths<'_>, now: Moment) -> Option<String> {
        let Target { subnet, underlay, mtu, .. } = target;
        let inner = target.inner.addr();
        let percent = |path: &Path| format!("{:.0} %", 100.0 * path.loss_ratio(now));
        Some(match self {
            Self::Unknown | Self::Fine => return None,
            Self::LossyNetwork => {
                format!("the network to {underlay} loses {} of the packets", percent(paths.underlay))
            }
            Self::LossyTunnel => format!(
                "the tunnel to {underlay} ({subnet}) loses {} of the packets, the network below it {}",
                percent(paths.inner),
                percent(paths.underlay)
            ),
            Self::PortBlocked => format!(
                "{underlay} answers, but its tunnel address {inner} ({}) does not: {} is dropped between the nodes, or \
                 the agent of that node has not set its tunnel up",
                target.way,
                carrier(&target.way)
            ),
            Self::Down => format!(
                "{underlay} and its address {inner} no longer answer: the node or the network is down"
            ),
            Self::Silent => format!(
                "neither {underlay} nor its address {inner} has answered so far: the node or the network is down, or the \
                 node ignores ICMP echo requests"
            ),
            Self::PathMtu => {
                let passes =
                    paths.mtu.found().map_or_else(String::new, |size| format!(", those of {size} arrive"));
                format!(
                    "packets of {mtu} bytes to {subnet} over {underlay} are lost, short ones arrive{passes}"
                )
            }
        })
    }

    /// What to do about it.
    pub(super) fn remedy(self, target: &Target, mtu: &MtuSearch) -> Option<String> {
        let underlay = target.underlay;
        Some(match self {
            Self::Unknown | Self::Fine => return None,
            Self::LossyNetwork => format!(
                "look for errors and drops of both hosts' network cards (ip -s link) and of the switches between them; ping {underlay} shows the same loss"
            ),
            Self::LossyTunnel => format!(
                "look for rate limits on {} between the nodes, for drops in /proc/net/softnet_stat of {underlay} and for checksum errors (nstat -az UdpInCsumErrors)",
                carrier(&target.way)
            ),
            Self::PortBlocked => format!(
                "allow {} both ways between this node and {underlay} (cloud security group, firewall of either host); on \
                 {underlay}, see that flanneld is ready",
                carrier(&target.way)
            ),
            Self::Down => format!(
                "see whether {underlay} runs and is connected; delete its lease if it is gone for good"
            ),
            Self::Silent => format!(
                "see whether {underlay} runs and is connected; if it does, allow ICMP echo between the nodes or switch the \
                 probes off with --probe-interval=0"
            ),
            Self::PathMtu => {
                let short = mtu.found().map_or(0, |size| mtu.full().saturating_sub(size));
                let lower = match short {
                    0 => "set Backend.MTU of the network configuration to what the path carries".to_owned(),
                    short => format!(
                        "lower the MTU of the pods by {short} (Backend.MTU of the network configuration)"
                    ),
                };
                format!("raise the MTU of what is between this node and {underlay}, or {lower}")
            }
        })
    }
}

/// What carries a tunnel, as a firewall has to know it: from the words of a backend.
fn carrier(way: &str) -> String {
    let port = way.rsplit_once("port ").map(|(_, port)| port.split([' ', ',']).next().unwrap_or(port));
    match port {
        Some(port) => format!("UDP port {port}"),
        None => format!("the tunnel's protocol ({})", way.split(' ').next().unwrap_or(way)),
    }
}
