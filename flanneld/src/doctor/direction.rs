//! In which direction a tunnel loses packets, by what both ends say: this node sends echo requests into the tunnel, and the
//! peer's agent, asked at its public address, says how many arrived.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use backends::echo::{EchoSocket, MIN_PACKET};
use subnet::Family;

use crate::ask;
use crate::probe::Verdict;
use crate::status::{NodeStatus, PeerEntry};

/// So many peers are asked.
const MAX_PEERS: usize = 4;
/// Requests that are sent: many more than other nodes' probes meanwhile.
const REQUESTS: u16 = 200;
/// Time for what is under way.
const SETTLE: Duration = Duration::from_millis(300);

/// What of a tunnel is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// What this node sends does not arrive at the peer.
    Forth,
    /// What this node sends arrives, and the peer's answers don't.
    Back,
}

impl Direction {
    /// From the peer's counter of requests, before and after `sent` of them.
    fn of(sent: u16, before: u64, after: u64) -> Option<Self> {
        let (sent, arrived) = (u64::from(sent), after.checked_sub(before)?);
        if arrived * 10 >= sent * 9 {
            Some(Self::Back)
        } else if arrived * 2 < sent {
            Some(Self::Forth)
        } else {
            // Some are lost in either direction, or others ping the peer.
            None
        }
    }

    /// What is known besides the cause.
    pub(super) fn evidence(self) -> &'static str {
        match self {
            Self::Forth => "; what this node sends does not arrive there, by that node's own counters",
            Self::Back => {
                "; what this node sends arrives there, by that node's own counters, so only the way back is blocked"
            }
        }
    }
}

/// The direction for each peer, by subnet, whose public address answers and whose tunnel does not.
pub(super) fn find(peers: &[PeerEntry], port: u16) -> BTreeMap<String, Direction> {
    let blocked =
        |peer: &&PeerEntry| peer.probe.as_ref().is_some_and(|probe| probe.verdict == Verdict::PortBlocked);
    let blocked: Vec<&PeerEntry> =
        peers.iter().filter(blocked).filter(|peer| peer.public.is_some()).take(MAX_PEERS).collect();
    let addresses: Vec<_> = blocked.iter().filter_map(|peer| peer.public).collect();
    let found = ask::all(&addresses, |address| {
        let peer = blocked.iter().find(|peer| peer.public == Some(address)).ok_or("not known")?;
        measure(peer, SocketAddr::new(address, port))
    });
    let pairs = blocked.iter().zip(found);
    pairs.filter_map(|(peer, direction)| Some((peer.subnet.clone(), direction.ok()??))).collect()
}

/// Nothing, where the counters tell no direction.
fn measure(peer: &PeerEntry, agent: SocketAddr) -> Result<Option<Direction>, String> {
    let probe = peer.probe.as_ref().ok_or("not probed")?;
    let arrived = || {
        let status: NodeStatus = ask::value(agent, "/status")?;
        status.host.echo_requests.ok_or_else(|| "an older flanneld".to_owned())
    };
    let before = arrived()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|error| error.to_string())?;
    let sent = runtime.block_on(async {
        let socket = EchoSocket::open(Family::of(probe.tunnel_address))?;
        let token = backends::random::token();
        let send = |number| socket.send(probe.tunnel_address, number, &token, MIN_PACKET).is_ok();
        Ok::<_, std::io::Error>((1..=REQUESTS).filter(|number| send(*number)).count() as u16)
    });
    let sent = sent.map_err(|error| error.to_string())?;
    std::thread::sleep(SETTLE);
    // Where this host's own rules refuse to send, nothing was tried.
    Ok(if sent < REQUESTS / 2 { None } else { Direction::of(sent, before, arrived()?) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_counter_tells_the_direction_or_nothing() {
        for (before, after, direction) in [
            (1000, 1200, Some(Direction::Back)),
            (1000, 1230, Some(Direction::Back)),
            (1000, 1026, Some(Direction::Forth)),
            (1000, 1000, Some(Direction::Forth)),
            (1000, 1140, None),
            (1000, 3, None),
        ] {
            assert_eq!(Direction::of(200, before, after), direction, "{before} {after}");
        }
    }
}
