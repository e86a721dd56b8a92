//! What is known of one path to a peer from the outcomes of its probes: state, loss and round trip; pure.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::moment::Moment;

/// Outcomes that are remembered one by one.
const HISTORY: u8 = 32;
/// Outcomes that decide on [`PathState::Degraded`], and how many of them are lost then.
const WINDOW: u8 = 20;
const DEGRADED_LOST: u32 = 8;
/// At most so many of [`HISTORY`] are lost when a path is taken for whole again.
const RECOVERED_LOST: u32 = 2;
/// So many lost in a row make a path unreachable.
const UNREACHABLE_RUN: u8 = 15;
/// So many answers in a row make an unreachable path whole.
const RECOVERED_RUN: u8 = 5;
/// A path without doubt has so many answers in a row.
const SETTLED_RUN: u8 = 6;

/// Loss is counted over so many buckets of so long: five minutes.
const BUCKETS: usize = 10;
const BUCKET: Duration = Duration::from_secs(30);

/// What an operator is told about a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PathState {
    /// No probe was answered yet, and too few were lost to say more.
    #[default]
    Unknown,
    /// Probes are answered.
    Reachable,
    /// Many are lost.
    Degraded,
    /// All are lost.
    Unreachable,
}

impl PathState {
    /// Its name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Reachable => "reachable",
            Self::Degraded => "degraded",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A path to a peer, as its probes show it.
#[derive(Clone, Debug)]
pub(super) struct Path {
    state: PathState,
    /// Since when it has been in this state.
    since: Moment,
    /// The last outcomes, the newest in the lowest bit; 1 is lost.
    history: u32,
    /// How many bits of it count.
    known: u8,
    /// Lost, or answered, in a row.
    lost_run: u8,
    answered_run: u8,
    /// Smoothed as that of TCP (RFC 6298), in nanoseconds.
    rtt: Option<NonZeroU32>,
    /// When the first probe of those now lost in a row was sent.
    failing_since: Option<Moment>,
    answered_ever: bool,
    loss: Loss,
}

impl Path {
    pub(super) fn new(now: Moment) -> Self {
        Self {
            state: PathState::Unknown,
            since: now,
            history: 0,
            known: 0,
            lost_run: 0,
            answered_run: 0,
            rtt: None,
            failing_since: None,
            answered_ever: false,
            loss: Loss::new(now),
        }
    }

    pub(super) fn answered(&mut self, now: Moment, rtt: Duration) {
        let smoothed = match self.rtt() {
            None => rtt,
            Some(before) => before.mul_f64(0.875) + rtt.mul_f64(0.125),
        };
        // An answer that takes a second is late.
        let nanoseconds = u32::try_from(smoothed.as_nanos()).unwrap_or(u32::MAX);
        self.rtt = NonZeroU32::new(nanoseconds.max(1));
        self.failing_since = None;
        self.answered_ever = true;
        (self.lost_run, self.answered_run) = (0, self.answered_run.saturating_add(1));
        self.note(now, false);
    }

    /// A probe that was sent at `sent` is lost.
    pub(super) fn lost(&mut self, now: Moment, sent: Moment) {
        self.failing_since.get_or_insert(sent);
        (self.lost_run, self.answered_run) = (self.lost_run.saturating_add(1), 0);
        self.note(now, true);
    }

    fn note(&mut self, now: Moment, lost: bool) {
        self.history = self.history << 1 | u32::from(lost);
        self.known = (self.known + 1).min(HISTORY);
        self.loss.note(now, lost);
        let next = self.next();
        if next == self.state {
            return;
        }
        if next == PathState::Reachable {
            // What was lost before says nothing about the path as it is now.
            self.known = self.answered_run.min(self.known);
            self.history = 0;
        }
        (self.state, self.since) = (next, now);
    }

    /// The state that follows from the outcomes. To leave one takes more than to stay, so that a path at a limit doesn't
    /// alternate.
    fn next(&self) -> PathState {
        let answered = self.answered_run > 0;
        match self.state {
            _ if self.lost_run >= UNREACHABLE_RUN => PathState::Unreachable,
            PathState::Unknown if answered => PathState::Reachable,
            // Losses without an answer in between are the begin of an outage, which is told as one.
            PathState::Reachable
                if self.lost_in(WINDOW) >= DEGRADED_LOST && u32::from(self.lost_run) < DEGRADED_LOST =>
            {
                PathState::Degraded
            }
            PathState::Degraded if self.known == HISTORY && self.lost_in(HISTORY) <= RECOVERED_LOST => {
                PathState::Reachable
            }
            PathState::Unreachable if self.answered_run >= RECOVERED_RUN => PathState::Reachable,
            PathState::Unreachable if !answered && self.answers_in(10) >= 3 => PathState::Degraded,
            state => state,
        }
    }

    fn lost_in(&self, last: u8) -> u32 {
        let counted = last.min(self.known);
        let mask = if counted == 32 { u32::MAX } else { (1 << counted) - 1 };
        (self.history & mask).count_ones()
    }

    fn answers_in(&self, last: u8) -> u32 {
        u32::from(last.min(self.known)) - self.lost_in(last)
    }

    /// Whether more probes than usual would soon tell more.
    pub(super) fn in_doubt(&self) -> bool {
        match self.state {
            PathState::Unknown => true,
            PathState::Reachable => self.lost_run > 0 || self.lost_in(SETTLED_RUN) > 0,
            PathState::Degraded => self.answered_run >= 3,
            PathState::Unreachable => self.answered_run > 0,
        }
    }

    /// Whether the last probe was answered, and few of those before it were lost: large ones are lost for their size then.
    /// An outage that is over does not count, although it is in [`Self::loss_ratio`] for five minutes.
    pub(super) fn is_clear(&self) -> bool {
        let few = self.lost_in(HISTORY) <= RECOVERED_LOST;
        self.state == PathState::Reachable && self.answered_run > 0 && few
    }

    pub(super) fn state(&self) -> PathState {
        self.state
    }

    /// How many were lost in a row until now.
    pub(super) fn lost_run(&self) -> u8 {
        self.lost_run
    }

    /// The share of the last outcomes, as many as decide on the state, that are lost.
    pub(super) fn recent_loss(&self) -> f32 {
        self.lost_in(WINDOW) as f32 / f32::from(self.known.clamp(1, WINDOW))
    }

    pub(super) fn since(&self) -> Moment {
        self.since
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt.map(|nanoseconds| Duration::from_nanos(nanoseconds.get().into()))
    }

    pub(super) fn failing_since(&self) -> Option<Moment> {
        self.failing_since
    }

    pub(super) fn answered_ever(&self) -> bool {
        self.answered_ever
    }

    /// Probes of the last five minutes that have an outcome, and how many of them are lost.
    pub(super) fn counts(&self, now: Moment) -> (u32, u32) {
        self.loss.counts(now)
    }

    /// The share of those that are lost.
    pub(super) fn loss_ratio(&self, now: Moment) -> f32 {
        let (sent, lost) = self.counts(now);
        if sent == 0 { 0.0 } else { lost as f32 / sent as f32 }
    }
}

/// Outcomes of the last five minutes, by half minutes.
#[derive(Clone, Debug)]
struct Loss {
    /// When the newest bucket began.
    began: Moment,
    /// Sent and lost, the newest first. In half a minute there are 120 probes of a path at most (`GRIDS`).
    buckets: [(u8, u8); BUCKETS],
}

impl Loss {
    fn new(now: Moment) -> Self {
        Self { began: now, buckets: Default::default() }
    }

    /// How many buckets have ended since the newest began.
    fn ended(&self, now: Moment) -> usize {
        let passed = now.saturating_duration_since(self.began).as_secs() / BUCKET.as_secs();
        usize::try_from(passed).unwrap_or(usize::MAX).min(BUCKETS)
    }

    fn note(&mut self, now: Moment, lost: bool) {
        let ended = self.ended(now);
        if ended == BUCKETS {
            *self = Self::new(now);
        } else if ended > 0 {
            self.buckets.rotate_right(ended);
            self.buckets[..ended].fill((0, 0));
            self.began = self.began + BUCKET * ended as u32;
        }
        let (sent, gone) = &mut self.buckets[0];
        *sent = sent.saturating_add(1);
        *gone = gone.saturating_add(lost.into());
    }

    fn counts(&self, now: Moment) -> (u32, u32) {
        let kept = &self.buckets[..BUCKETS - self.ended(now)];
        kept.iter().fold((0, 0), |sum, (sent, lost)| (sum.0 + u32::from(*sent), sum.1 + u32::from(*lost)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(1);

    /// A path with these outcomes, one a second: `.` is answered, `x` is lost.
    fn path(outcomes: &str) -> Path {
        let mut now = Moment::ORIGIN;
        let mut path = Path::new(now);
        for outcome in outcomes.chars().filter(|outcome| *outcome != ' ') {
            match outcome {
                '.' => path.answered(now, RTT),
                _ => path.lost(now, now),
            }
            now = now + Duration::from_secs(1);
        }
        path
    }

    #[test]
    fn states_follow_from_outcomes() {
        use PathState::*;
        let (lost, whole) = ("x".repeat(15), ".".repeat(32));
        for (outcomes, expected) in [
            ("", Unknown),
            ("xxxx xxxx xxxx xx", Unknown),
            ("xxxx xxxx xxxx xxx", Unreachable),
            (".", Reachable),
            (".... .x.. .x.. x... x...", Reachable),
            (".... .x.x .x.x .x.x .x.x", Degraded),
            // The begin of an outage is no loss of many.
            (".... xxxx xxxx xx", Reachable),
            (".... xxxx xxxx xx.", Degraded),
            (&format!(". {lost}"), Unreachable),
            (&format!("x.x.x.x.x.x.x.x.x.x. {lost}"), Unreachable),
            (&format!(". {lost} ...."), Unreachable),
            (&format!(". {lost} ....."), Reachable),
            (&format!(". {lost} .x.x."), Unreachable),
            (&format!(". {lost} .x.x.x"), Degraded),
            (&format!("x.x.x.x.x.x.x.x.x.x. {whole}"), Reachable),
            ("x.x.x.x.x.x.x.x.x.x. ......... .........", Degraded),
        ] {
            assert_eq!(path(outcomes).state(), expected, "{outcomes}");
        }
    }

    #[test]
    fn doubt_asks_for_more_probes_and_ends() {
        for (outcomes, expected) in [
            ("", true),
            (".", false),
            (".....x", true),
            (".....x.....", true),
            (".....x......", false),
            ("x.x.x.x.x.x.x.x.x.x.", false),
            ("x.x.x.x.x.x.x.x.x.x...", true),
            ("xxxxxxxxxxxxxxx", false),
            ("xxxxxxxxxxxxxxx.", true),
        ] {
            assert_eq!(path(outcomes).in_doubt(), expected, "{outcomes}");
        }
    }

    #[test]
    fn loss_is_that_of_the_last_five_minutes() {
        let start = Moment::ORIGIN;
        let mut path = Path::new(start);
        let at = |second: u64| start + Duration::from_secs(second);
        for second in 0..600 {
            if second < 300 && second % 2 == 0 {
                path.lost(at(second), at(second))
            } else {
                path.answered(at(second), RTT)
            }
            if second == 299 {
                assert_eq!(path.counts(at(299)), (300, 150));
            }
        }
        assert_eq!(path.counts(at(599)), (300, 0));
        assert_eq!(path.counts(at(599 + 150)), (150, 0), "silence is neither sent nor lost");
        assert_eq!(path.counts(at(2000)), (0, 0));
        path.lost(at(2000), at(2000));
        assert_eq!((path.counts(at(2000)), path.loss_ratio(at(2000))), ((1, 1), 1.0));
    }

    #[test]
    fn the_first_failure_is_that_of_the_outage_under_way() {
        let start = Moment::ORIGIN;
        let mut path = Path::new(start);
        let at = |second: u64| start + Duration::from_secs(second);
        path.lost(at(1), at(0));
        path.lost(at(2), at(1));
        assert_eq!(path.failing_since(), Some(at(0)));
        path.answered(at(3), RTT);
        assert_eq!(path.failing_since(), None);
        path.lost(at(5), at(4));
        assert_eq!(path.failing_since(), Some(at(4)));
    }

    #[test]
    fn the_round_trip_is_smoothed() {
        let now = Moment::ORIGIN;
        let mut path = Path::new(now);
        path.answered(now, Duration::from_millis(8));
        assert_eq!(path.rtt(), Some(Duration::from_millis(8)));
        path.answered(now, Duration::from_millis(16));
        assert_eq!(path.rtt(), Some(Duration::from_millis(9)));
    }
}
