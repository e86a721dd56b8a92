//! All peers and their probes: what to send when, and what outcomes mean. It reads no clock and does no I/O.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use backends::echo::{Arrival, Token};
use ipnet::IpNet;
use subnet::SharedMap;

use super::moment::Moment;
use super::peer::{ProbedFamily, Rounds};
use super::pending::{Match, Pending, ProbeRequest, Purpose};
use super::report::{PathTotals, ProbeMode, Report, Totals};
use super::target::{Target, Targets};
use super::verdict::Verdict;

/// So many peers are probed in each interval; with more, rounds grow longer.
const PEERS_PER_INTERVAL: usize = 50;
/// Parts of a round, with so many peers and with more.
const PARTS: [u32; 2] = [4, 1];
/// Probes are sent together at multiples of this time, so that the process wakes seldom: with so many peers, with more, and where
/// a round takes [`LONG_ROUND`].
const GRIDS: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(4)];
/// With rounds of so long, as among a thousand peers, some seconds more or less between two probes of one peer tell nothing.
const LONG_ROUND: Duration = Duration::from_secs(200);
/// Paths in doubt are probed at multiples of this time at most, however many peers there are.
const DOUBT_GRID: Duration = Duration::from_secs(1);
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
pub(crate) struct VerdictChange {
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

/// Peers that are probed more than usual: so many in a slot of time, the others after them in their order.
struct Extra {
    /// When the slot began.
    slot: Moment,
    sent: u32,
    /// Those whose turn has not come yet.
    waiting: VecDeque<IpNet>,
}

/// Why a peer is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LookReason {
    /// It may be due.
    Usual,
    /// It is the first of those that wait for an extra probe.
    Waited,
}

impl Extra {
    /// Whether one more may be sent in the slot that it is now.
    fn has_room(&mut self, now: Moment, length: Duration, max: u32) -> bool {
        let slot = now.last_on_grid(length);
        if slot != self.slot {
            (self.slot, self.sent) = (slot, 0);
        }
        self.sent < max
    }
}

/// All peers and their probes.
pub(super) struct Table {
    /// Time between two rounds of one peer, if they are few.
    interval: Duration,
    /// The grid's origin.
    origin: Instant,
    targets: Targets,
    peers: SharedMap<IpNet, ProbedFamily>,
    /// When a peer may be due; the peer itself knows better.
    queue: BinaryHeap<Reverse<(Moment, IpNet)>>,
    pending: Pending,
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
            extra: Extra { slot: Moment::ORIGIN, sent: 0, waiting: VecDeque::new() },
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
                    self.peers.insert(subnet, ProbedFamily::new(&target, moment, moment));
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
        match (self.has_many(), self.rounds().time >= LONG_ROUND) {
            (false, _) => GRIDS[0],
            (true, false) => GRIDS[1],
            (true, true) => GRIDS[2],
        }
    }

    /// How long the slots of extra probes are, and how many are sent in each.
    fn slots(&self) -> (Duration, u32) {
        let length = self.grid().max(DOUBT_GRID);
        (length, MAX_EXTRA[usize::from(self.has_many())].saturating_mul(length.as_secs() as u32))
    }

    fn moment(&self, at: Instant) -> Moment {
        Moment::of(at, self.origin)
    }

    fn on_grid(&self, at: Moment) -> Moment {
        at.on_grid(self.grid())
    }

    /// For what is to be known soon, also with many peers.
    fn on_doubt_grid(&self, at: Moment) -> Moment {
        at.on_grid(self.grid().min(DOUBT_GRID))
    }

    /// When to look at a peer, of which more may be known before its usual time.
    fn on_either_grid(&self, due: Moment, usual: Moment) -> Moment {
        if due < usual { self.on_doubt_grid(due) } else { self.on_grid(due) }
    }

    fn reschedule(&mut self, subnet: IpNet, due: Moment) {
        if let Some(peer) = self.peers.get_mut(&subnet) {
            peer.due = due;
            self.queue.push(Reverse((due, subnet)));
        }
    }

    /// What is to be sent now. `token` gives random ones.
    pub(super) fn due(&mut self, now: Instant, token: &mut dyn FnMut() -> Token) -> Vec<Probe> {
        let moment = self.moment(now);
        let mut probes = Vec::new();
        while let Some(Reverse((at, subnet))) =
            self.queue.peek().copied().filter(|Reverse((at, _))| *at <= moment)
        {
            self.queue.pop();
            // Entries of peers that are gone or were moved mean nothing.
            if self.peers.get(&subnet).is_some_and(|peer| peer.due == at) {
                self.look(subnet, LookReason::Usual, now, token, &mut probes);
            }
        }
        let (slot, max) = self.slots();
        // Each once: one that was probed a moment ago waits on behind the others.
        for _ in 0..self.extra.waiting.len() {
            if !self.extra.has_room(moment, slot, max) {
                break;
            }
            let Some(subnet) = self.extra.waiting.pop_front() else { break };
            if let Some(peer) = self.peers.get_mut(&subnet).filter(|peer| peer.waiting) {
                peer.waiting = false;
                self.look(subnet, LookReason::Waited, now, token, &mut probes);
            }
        }
        probes
    }

    /// Looks at a peer that may be due.
    fn look(
        &mut self,
        subnet: IpNet,
        reason: LookReason,
        now: Instant,
        token: &mut dyn FnMut() -> Token,
        probes: &mut Vec<Probe>,
    ) {
        let (rounds, grid, moment, (slot, max)) =
            (self.rounds(), self.grid(), self.moment(now), self.slots());
        let first = reason == LookReason::Waited || self.extra.waiting.is_empty();
        let room = self.extra.has_room(moment, slot, max) && first;
        let Some((peer, target)) = self.peers.get_mut(&subnet).zip(self.targets.get(&subnet)) else { return };
        let (mut asked, mut waits) = (false, false);
        let mut allowed = || {
            (asked, waits) = (room, !room);
            room
        };
        for purpose in peer.probe(moment, rounds, &mut allowed) {
            let (to, packet) = target.packet(purpose);
            let request = ProbeRequest { peer: subnet, purpose, to, token: token(), packet, sent: now };
            let sequence = self.pending.add(request);
            probes.push(Probe { to, sequence, token: request.token, packet });
        }
        self.extra.sent += u32::from(asked);
        // Behind those that wait, without another look when a second is over.
        waits |= !self.extra.waiting.is_empty() && peer.wants_more();
        if waits && !peer.waiting {
            peer.waiting = true;
            self.extra.waiting.push_back(subnet);
        }
        let usual = peer.usual_due();
        let due = peer.next_due().max(moment + grid.min(DOUBT_GRID)).min(usual.max(moment + grid));
        let due = self.on_either_grid(due, usual);
        self.reschedule(subnet, due);
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

    fn lost(&mut self, now: Instant, request: &ProbeRequest) {
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
    fn judge(&mut self, request: &ProbeRequest, tell: impl FnOnce(&mut ProbedFamily, &Target)) {
        let subnet = request.peer;
        let target = self.targets.get(&subnet).filter(|there| there.packet(request.purpose).0 == request.to);
        let Some((target, peer)) = target.zip(self.peers.get_mut(&subnet)) else { return };
        tell(peer, &target);
        let (due, usual, before) = (peer.next_due(), peer.usual_due(), peer.due);
        match peer.telling() {
            Some(at) => self.untold.insert(subnet, at),
            None => self.untold.remove(&subnet),
        };
        let due = self.on_either_grid(due, usual);
        if due < before {
            self.reschedule(subnet, due);
        }
    }

    /// The verdicts that are to be told now.
    pub(super) fn news(&mut self, now: Instant) -> Vec<VerdictChange> {
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
            news.push(VerdictChange { subnet, underlay: target.underlay, verdict, cause, remedy });
        }
        news
    }

    /// When there is something to do though no answer comes.
    pub(super) fn wake(&self) -> Option<Instant> {
        let told = self.untold.values().copied();
        let expiry = self.pending.next_expiry().map(|at| Moment::not_before(at, self.origin));
        // Where peers wait for their turn anyway, one loss more can wait until the next probes are sent.
        let waits = !self.extra.waiting.is_empty();
        let expiry = expiry.map(|at| if waits { self.on_grid(at) } else { self.on_doubt_grid(at) });
        let slot = waits.then(|| self.extra.slot + self.slots().0);
        let due = self.queue.peek().map(|Reverse((at, _))| *at);
        told.chain(expiry).chain(slot).chain(due).min().map(|at| at.at(self.origin))
    }

    /// All that is known.
    pub(super) fn report(&self, mode: ProbeMode, now: Instant) -> Report {
        let now = self.moment(now);
        let of_peer =
            |(subnet, peer): (&IpNet, &ProbedFamily)| Some(peer.report(&self.targets.get(subnet)?, now));
        Report { peers: self.peers.iter().filter_map(of_peer).collect(), ..self.brief(mode) }
    }

    /// The same without words about each peer: of thousands they take long.
    pub(super) fn brief(&self, mode: ProbeMode) -> Report {
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
