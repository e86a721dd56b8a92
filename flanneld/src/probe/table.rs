//! All peers and their probes: what to send when, and what outcomes mean. It reads no clock and does no I/O.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use backends::echo::{Arrival, Token};
use ipnet::IpNet;
use subnet::SharedMap;

use super::moment::Moment;
use super::peer::{Peer, Rounds};
use super::pending::{Match, Pending, Purpose, Request};
use super::report::{Mode, PathTotals, Report, Totals};
use super::target::{Target, Targets};
use super::verdict::Verdict;

/// So many peers are probed in each interval; with more, rounds grow longer.
const PEERS_PER_INTERVAL: usize = 50;
/// Parts of a round, with so many peers and with more.
const PARTS: [u32; 2] = [4, 1];
/// Probes are sent together at multiples of this time, so that the process wakes seldom, with so many peers and with more.
const GRIDS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];
/// How often peers are probed more than usual in a second at most, with so many peers and with more.
const MAX_EXTRA: [u32; 2] = [20, 2];

/// A request to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) to: IpAddr,
    pub(super) sequence: u16,
    pub(super) token: Token,
    pub(super) packet: u16,
}

/// A verdict that is news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct News {
    /// The peer's pod subnet.
    pub(crate) subnet: IpNet,
    /// Its public address.
    pub(crate) underlay: IpAddr,
    /// What is so now.
    pub(crate) verdict: Verdict,
    /// What is wrong, in a sentence.
    pub(crate) cause: Option<String>,
    /// What to do about it.
    pub(crate) remedy: Option<String>,
}

/// Extra probes of one second.
struct Extra {
    began: Instant,
    asked: u32,
}

impl Extra {
    /// Whether one more may be sent; else how many seconds to wait, so that those who wait take turns.
    fn ask(&mut self, now: Instant, max: u32) -> Result<(), u32> {
        if now.saturating_duration_since(self.began) >= Duration::from_secs(1) {
            *self = Self { began: now, asked: 0 };
        }
        self.asked += 1;
        match (self.asked - 1) / max {
            0 => Ok(()),
            seconds => Err(seconds),
        }
    }
}

/// All peers and their probes.
pub(super) struct Table {
    /// Time between two rounds of one peer, if they are few.
    interval: Duration,
    /// The grid's origin.
    origin: Instant,
    targets: Targets,
    peers: SharedMap<IpNet, Peer>,
    /// When a peer may be due; the peer itself knows better.
    queue: BinaryHeap<Reverse<(Moment, IpNet)>>,
    pending: Pending,
    /// Extra probes of this second.
    extra: Extra,
    /// Peers whose verdict is to be told, and when: of thousands that fail, each wake-up looks at the moments alone.
    untold: BTreeMap<IpNet, Moment>,
    totals: Totals,
    rejected: u64,
}

impl Table {
    /// Without peers. `number` is the first request's.
    pub(super) fn new(interval: Duration, now: Instant, number: u16) -> Self {
        Self {
            interval,
            origin: now,
            targets: Targets::default(),
            peers: SharedMap::default(),
            queue: BinaryHeap::new(),
            pending: Pending::new(number),
            extra: Extra { began: now, asked: 0 },
            untold: BTreeMap::new(),
            totals: Totals::default(),
            rejected: 0,
        }
    }

    /// How often one peer is probed.
    fn rounds(&self) -> Rounds {
        let times = (self.peers.len() as f64 / PEERS_PER_INTERVAL as f64).max(1.0);
        Rounds { time: self.interval.mul_f64(times), parts: PARTS[usize::from(self.has_many())] }
    }

    fn has_many(&self) -> bool {
        self.peers.len() > PEERS_PER_INTERVAL
    }

    /// Takes over other peers. What is known of those that stay is kept. `random` spreads the first probes of the others.
    pub(super) fn set(&mut self, targets: &Targets, now: Instant, random: &mut dyn FnMut() -> u16) {
        let moment = self.moment(now);
        let before = std::mem::replace(&mut self.targets, targets.clone());
        let mut new = Vec::new();
        for subnet in targets.changes(&before) {
            let Some(target) = targets.get(&subnet) else {
                self.peers.remove(&subnet);
                self.untold.remove(&subnet);
                continue;
            };
            let known = before.get(&subnet).filter(|known| known.has_paths_of(&target));
            match (self.peers.get_mut(&subnet), known) {
                (Some(peer), Some(known)) if known.mtu != target.mtu => peer.resize(&target),
                (Some(_), Some(_)) => {}
                _ => {
                    new.push(subnet);
                    self.peers.insert(subnet, Peer::new(&target, moment, moment));
                    self.untold.remove(&subnet);
                }
            }
        }
        let Rounds { time, parts } = self.rounds();
        let spread = time / parts;
        for subnet in new {
            let due = self.on_grid(moment + spread.mul_f64(f64::from(random()) / 65_536.0));
            self.reschedule(subnet, due);
        }
    }

    fn grid(&self) -> Duration {
        GRIDS[usize::from(self.has_many())]
    }

    fn moment(&self, at: Instant) -> Moment {
        Moment::of(at, self.origin)
    }

    fn on_grid(&self, at: Moment) -> Moment {
        at.on_grid(self.grid())
    }

    fn reschedule(&mut self, subnet: IpNet, due: Moment) {
        if let Some(peer) = self.peers.get_mut(&subnet) {
            peer.due = due;
            self.queue.push(Reverse((due, subnet)));
        }
    }

    /// What is to be sent now. `token` gives random ones.
    pub(super) fn due(&mut self, now: Instant, token: &mut dyn FnMut() -> Token) -> Vec<Probe> {
        let (rounds, grid, moment) = (self.rounds(), self.grid(), self.moment(now));
        let max_extra = MAX_EXTRA[usize::from(self.has_many())];
        let mut probes = Vec::new();
        while let Some(Reverse((at, subnet))) =
            self.queue.peek().copied().filter(|Reverse((at, _))| *at <= moment)
        {
            self.queue.pop();
            // Entries of peers that are gone or were moved mean nothing.
            let Some(peer) = self.peers.get_mut(&subnet).filter(|peer| peer.due == at) else { continue };
            let Some(target) = self.targets.get(&subnet) else { continue };
            let extra = &mut self.extra;
            let mut turn = 0;
            let mut allowed = || extra.ask(now, max_extra).inspect_err(|seconds| turn = *seconds).is_ok();
            for purpose in peer.probe(moment, rounds, &mut allowed) {
                let (to, packet) = target.packet(purpose);
                let request = Request { peer: subnet, purpose, to, token: token(), packet, sent: now };
                let sequence = self.pending.add(request);
                probes.push(Probe { to, sequence, token: request.token, packet });
            }
            // With very many peers in doubt, each is looked at again when it is its turn, not at every step of the grid.
            let wait = grid.max(Duration::from_secs(turn.into()));
            let due = peer.next_due().max(moment + wait).min(peer.usual_due().max(moment + grid));
            let due = self.on_grid(due);
            self.reschedule(subnet, due);
        }
        probes
    }

    /// The kernel did not send the request of this number, so it is lost.
    pub(super) fn refused(&mut self, now: Instant, sequence: u16) {
        if let Some(request) = self.pending.refused(sequence) {
            self.lost(now, &request);
        }
    }

    /// Takes an answer.
    pub(super) fn answered(&mut self, now: Instant, arrival: &Arrival) {
        match self.pending.answered(now, arrival) {
            Match::Answer(request, rtt) => {
                self.totals(request.purpose).note_rtt(rtt.as_secs_f64());
                let moment = self.moment(now);
                self.judge(&request, |peer, target| peer.answered(target, moment, request.purpose, rtt));
            }
            Match::Late(request, waiting) => {
                self.totals(request.purpose).late += 1;
                if waiting {
                    self.lost(now, &request);
                }
            }
            Match::Duplicate(request) => self.totals(request.purpose).duplicate += 1,
            Match::Stranger => self.rejected += 1,
        }
    }

    /// Takes note of the requests whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some(request) = self.pending.expire(now) {
            self.lost(now, &request);
        }
    }

    fn lost(&mut self, now: Instant, request: &Request) {
        self.totals(request.purpose).lost += 1;
        let (now, sent) = (self.moment(now), self.moment(request.sent));
        self.judge(request, |peer, target| peer.lost(target, now, request.purpose, sent));
    }

    fn totals(&mut self, purpose: Purpose) -> &mut PathTotals {
        match purpose {
            Purpose::Underlay => &mut self.totals.underlay,
            Purpose::Inner => &mut self.totals.overlay,
            Purpose::Large(_) => &mut self.totals.large,
        }
    }

    /// Tells a peer of an outcome, unless it has moved since the request.
    fn judge(&mut self, request: &Request, tell: impl FnOnce(&mut Peer, &Target)) {
        let subnet = request.peer;
        let target = self.targets.get(&subnet).filter(|there| there.packet(request.purpose).0 == request.to);
        let Some((target, peer)) = target.zip(self.peers.get_mut(&subnet)) else { return };
        tell(peer, &target);
        let (due, before) = (peer.next_due(), peer.due);
        match peer.telling() {
            Some(at) => self.untold.insert(subnet, at),
            None => self.untold.remove(&subnet),
        };
        let due = self.on_grid(due);
        if due < before {
            self.reschedule(subnet, due);
        }
    }

    /// The verdicts that are to be told now.
    pub(super) fn news(&mut self, now: Instant) -> Vec<News> {
        let now = self.moment(now);
        let due: Vec<IpNet> =
            self.untold.iter().filter(|(_, at)| **at <= now).map(|(subnet, _)| *subnet).collect();
        let mut news = Vec::new();
        for subnet in due {
            self.untold.remove(&subnet);
            let Some((peer, target)) = self.peers.get_mut(&subnet).zip(self.targets.get(&subnet)) else {
                continue;
            };
            let (verdict, cause, remedy) = peer.tell(&target, now);
            news.push(News { subnet, underlay: target.underlay, verdict, cause, remedy });
        }
        news
    }

    /// When there is something to do though no answer comes.
    pub(super) fn wake(&self) -> Option<Instant> {
        let told = self.untold.values().copied();
        let expiry = self.pending.next_expiry().map(|at| self.on_grid(Moment::not_before(at, self.origin)));
        let due = self.queue.peek().map(|Reverse((at, _))| *at);
        told.chain(expiry).chain(due).min().map(|at| at.at(self.origin))
    }

    /// All that is known.
    pub(super) fn report(&self, mode: Mode, now: Instant) -> Report {
        let now = self.moment(now);
        let of_peer = |(subnet, peer): (&IpNet, &Peer)| Some(peer.report(&self.targets.get(subnet)?, now));
        Report { peers: self.peers.iter().filter_map(of_peer).collect(), ..self.brief(mode) }
    }

    /// The same without words about each peer: of thousands they take long.
    pub(super) fn brief(&self, mode: Mode) -> Report {
        Report {
            mode,
            interval_seconds: self.rounds().time.as_secs_f64(),
            peers: Vec::new(),
            states: self.peers.iter().map(|(subnet, peer)| (*subnet, peer.state())).collect(),
            totals: self.totals.clone(),
            rejected: self.rejected,
        }
    }
}

#[cfg(test)]
mod tests;
