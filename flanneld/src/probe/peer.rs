//! One peer: its paths, when to probe them, and the verdict; pure.

use std::time::Duration;

use super::moment::Moment;
use super::mtu::MtuSearch;
use super::path::{Path, PathState};
use super::pending::Purpose;
use super::report::{PathReport, PeerReport};
use super::target::{Inner, Target};
use super::verdict::{Paths, Verdict};

/// A packet of full length is sent in every so many rounds.
const LARGE_ROUNDS: u32 = 10;
/// Time between probes of a path in doubt.
pub(super) const DOUBT_INTERVAL: Duration = Duration::from_secs(1);
/// So many more probes than usual are sent to a peer in a row; each part of a round allows one again.
const MAX_EXTRA: u8 = 60;
/// A verdict is told once it has lasted so long …
const SETTLED: Duration = Duration::from_secs(3);
/// … and trouble not more often than this.
const QUIET: Duration = Duration::from_secs(60);

/// A length that every path is taken to carry: what every host has to accept of IPv4 (RFC 1122), and the least MTU of IPv6.
const LEAST: [u16; 2] = [576, 1280];

/// How often a peer is probed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rounds {
    /// Time between two rounds.
    pub(super) time: Duration,
    /// Parts of a round. The way of the pods is probed in each, the other one in the first.
    pub(super) parts: u32,
}

/// What is known of one family of a peer. Where it is, its target says.
#[derive(Clone, Debug)]
pub(super) struct ProbedFamily {
    /// Pods' packets go through a tunnel.
    tunnelled: bool,
    underlay: Path,
    inner: Path,
    mtu: MtuSearch,
    /// Parts of rounds since the begin.
    part: u32,
    /// When the next part begins.
    part_due: Moment,
    /// When to look at it again: then, or earlier if a path is in doubt.
    pub(super) due: Moment,
    /// When it was probed last.
    probed: Moment,
    /// Extra probes that are left.
    extra: u8,
    /// It is one of those that wait for an extra probe.
    pub(super) waiting: bool,
    verdict: Verdict,
    /// Since when.
    changed: Moment,
    /// The verdict that was told last, and when.
    told: Verdict,
    told_at: Option<Moment>,
}

impl ProbedFamily {
    pub(super) fn new(target: &Target, now: Moment, due: Moment) -> Self {
        let mtu = search(target);
        let (underlay, inner) = (Path::new(now), Path::new(now));
        let (verdict, told) = (Verdict::Unknown, Verdict::Unknown);
        Self {
            tunnelled: matches!(target.inner, Inner::Tunnel(_)),
            underlay,
            inner,
            mtu,
            part: 0,
            part_due: due,
            due,
            probed: now,
            extra: MAX_EXTRA,
            waiting: false,
            verdict,
            changed: now,
            told,
            told_at: None,
        }
    }

    /// Packets of another length are to arrive than before.
    pub(super) fn resize(&mut self, target: &Target) {
        self.mtu = search(target);
    }

    fn main(&self) -> &Path {
        if self.tunnelled { &self.inner } else { &self.underlay }
    }

    /// The path whose state is that of the peer. A host without a tunnel may refuse echo requests and still forward: then its
    /// bridge answers.
    fn deciding(&self) -> &Path {
        let bridge =
            self.main().state() == PathState::Unreachable && self.inner.state() == PathState::Reachable;
        if bridge { &self.inner } else { self.main() }
    }

    /// The state of the way that pods' packets take.
    pub(super) fn state(&self) -> PathState {
        self.deciding().state()
    }

    fn paths(&self) -> Paths<'_> {
        Paths { underlay: &self.underlay, inner: &self.inner, mtu: &self.mtu }
    }

    /// Whether more probes than usual would soon tell more.
    fn in_doubt(&self) -> bool {
        let other = if self.tunnelled { &self.underlay } else { &self.inner };
        self.main().in_doubt() || self.main().state() == PathState::Unreachable && other.in_doubt()
    }

    /// Whether it may be probed more than usual.
    pub(super) fn wants_more(&self) -> bool {
        self.extra > 0 && self.in_doubt()
    }

    /// When to look at the peer again.
    pub(super) fn next_due(&self) -> Moment {
        let doubt = !self.waiting && self.wants_more();
        if doubt { self.part_due.min(self.probed + DOUBT_INTERVAL) } else { self.part_due }
    }

    /// When its next part of a round begins, in doubt or not.
    pub(super) fn usual_due(&self) -> Moment {
        self.part_due
    }

    /// What to send now. `extra_allowed` is asked before it is more than usual.
    pub(super) fn probe(
        &mut self,
        now: Moment,
        rounds: Rounds,
        extra_allowed: &mut dyn FnMut() -> bool,
    ) -> Vec<Purpose> {
        let doubt = self.in_doubt();
        let usual = now >= self.part_due;
        let extra_due = || doubt && self.extra > 0 && now >= self.probed + DOUBT_INTERVAL;
        if !usual && (!extra_due() || !extra_allowed()) {
            return Vec::new();
        }
        let (main, other) = match self.tunnelled {
            true => (Purpose::Inner, Purpose::Underlay),
            false => (Purpose::Underlay, Purpose::Inner),
        };
        let first = usual && self.part.is_multiple_of(rounds.parts);
        let large_due = first && (self.part / rounds.parts).is_multiple_of(LARGE_ROUNDS);
        let mut purposes = vec![main];
        if first || doubt {
            purposes.push(other);
        }
        if self.main().is_clear() && (self.mtu.is_urgent() || large_due) {
            purposes.push(Purpose::Large(self.mtu.next()));
        }
        self.probed = now;
        if usual {
            self.extra = (self.extra + 1).min(MAX_EXTRA);
            self.part = self.part.wrapping_add(1);
            self.part_due = now + rounds.time / rounds.parts;
        } else {
            self.extra -= 1;
        }
        purposes
    }

    pub(super) fn answered(&mut self, target: &Target, now: Moment, purpose: Purpose, rtt: Duration) {
        match purpose {
            Purpose::Underlay => self.underlay.answered(now, rtt),
            Purpose::Inner => self.inner.answered(now, rtt),
            Purpose::Large(size) => self.mtu.passed(size),
        }
        self.judge(target, now);
    }

    pub(super) fn lost(&mut self, target: &Target, now: Moment, purpose: Purpose, sent: Moment) {
        match purpose {
            Purpose::Underlay => self.underlay.lost(now, sent),
            Purpose::Inner => self.inner.lost(now, sent),
            Purpose::Large(size) if self.main().is_clear() => self.mtu.lost(size),
            Purpose::Large(_) => {}
        }
        self.judge(target, now);
    }

    fn judge(&mut self, target: &Target, now: Moment) {
        if let Some(verdict) = Verdict::of(target, &self.paths())
            && verdict != self.verdict
        {
            (self.verdict, self.changed) = (verdict, now);
        }
    }

    /// When the verdict is to be told, if it is news.
    pub(super) fn telling(&self) -> Option<Moment> {
        let news = self.verdict != self.told && (self.verdict.is_trouble() || self.told.is_trouble());
        let news = news && self.verdict != Verdict::Unknown;
        let settled = self.changed + SETTLED;
        // The end of a trouble is told as soon as it has lasted; the next one has to wait.
        let quiet = self.told_at.filter(|_| self.verdict.is_trouble()).map(|at| at + QUIET);
        news.then(|| quiet.map_or(settled, |at| settled.max(at)))
    }

    /// The verdict with its cause and its remedy, which counts as told.
    pub(super) fn tell(&mut self, target: &Target, now: Moment) -> (Verdict, Option<String>, Option<String>) {
        (self.told, self.told_at) = (self.verdict, Some(now));
        (self.verdict, self.cause(target, now), self.verdict.remedy(target, &self.mtu))
    }

    fn cause(&self, target: &Target, now: Moment) -> Option<String> {
        self.verdict.cause(target, &self.paths(), now)
    }

    pub(super) fn report(&self, target: &Target, now: Moment) -> PeerReport {
        let Target { subnet, underlay, inner, mtu, .. } = *target;
        PeerReport {
            subnet,
            underlay_address: underlay,
            tunnel_address: inner.addr(),
            way: target.way.to_string(),
            state: self.state(),
            state_seconds: now.saturating_duration_since(self.deciding().since()).as_secs_f64(),
            verdict: self.verdict,
            cause: self.cause(target, now),
            remedy: self.verdict.remedy(target, &self.mtu),
            underlay: path_report(&self.underlay, now),
            tunnel: path_report(&self.inner, now),
            mtu,
            path_mtu: self.mtu.found(),
        }
    }
}

/// The search for the longest packet that arrives.
fn search(target: &Target) -> MtuSearch {
    MtuSearch::new(target.mtu, LEAST[usize::from(target.underlay.is_ipv6())])
}

fn path_report(path: &Path, now: Moment) -> PathReport {
    let (sent, lost) = path.counts(now);
    PathReport {
        state: path.state(),
        sent,
        lost,
        loss: path.loss_ratio(now),
        rtt_seconds: path.rtt().map(|rtt| rtt.as_secs_f64()),
        failing_seconds: path.failing_since().map(|since| now.saturating_duration_since(since).as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_peer_is_about_140_bytes() {
        assert!(
            size_of::<ProbedFamily>() <= 144,
            "{} bytes, of which {} for a path",
            size_of::<ProbedFamily>(),
            size_of::<Path>()
        );
    }
}
