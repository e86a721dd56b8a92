//! A lease that another node writes: given up for a while, then taken up again.
//!
//! The other one may be a second agent that somebody started by mistake and ended soon after. Nothing says that it
//! is gone; but it answers if it lives (`subnet/src/standing.rs`). So the lease is claimed again after a pause, which
//! doubles as long as there is an answer: a mistake of seconds costs a quarter of a minute, and a real twin is
//! disturbed once in ten minutes at most.

use std::time::Duration;

use subnet::Loss;
use tokio::time::Instant;

/// The first pause, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(600));

/// Whether this node may write its lease.
#[derive(Debug, Default)]
pub(super) enum Contest {
    /// No other node writes it, as far as is known.
    #[default]
    None,
    /// Somebody else does, for this reason. It is claimed again at that time.
    Lost { loss: Loss, again: Instant, pause: Duration },
    /// It was claimed again after such a pause, at that time.
    Claimed { since: Instant, pause: Duration },
}

impl Contest {
    /// Somebody else writes the lease.
    pub(super) fn lost_at(&mut self, loss: Loss, now: Instant) {
        let pause = match self {
            Self::Claimed { since, pause } if now - *since < PAUSE.1 => PAUSE.1.min(*pause * 2),
            _ => PAUSE.0,
        };
        *self = Self::Lost { loss, again: now + pause, pause };
    }

    /// The lease was obtained.
    pub(super) fn claimed_at(&mut self, now: Instant) {
        if let Self::Lost { pause, .. } = self {
            *self = Self::Claimed { since: now, pause: *pause };
        }
    }

    /// Why this node may not write its lease, if it may not.
    pub(super) fn loss(&self) -> Option<&Loss> {
        match self {
            Self::Lost { loss, .. } => Some(loss),
            Self::None | Self::Claimed { .. } => None,
        }
    }

    /// The sentence for log and readiness.
    pub(super) fn reason(&self) -> Option<String> {
        let Self::Lost { loss, pause, .. } = self else { return None };
        Some(format!("{loss}; this node writes it no more, and claims it again after {} s", pause.as_secs()))
    }

    /// When to claim it again.
    pub(super) fn again(&self) -> Option<Instant> {
        match self {
            Self::Lost { again, .. } => Some(*again),
            Self::None | Self::Claimed { .. } => None,
        }
    }

    /// After how long to claim it again.
    pub(super) fn wait_at(&self, now: Instant) -> Option<Duration> {
        match self {
            Self::Lost { again, .. } => Some(again.saturating_duration_since(now)),
            Self::None | Self::Claimed { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use subnet::Subnets;

    #[test]
    fn pauses_double_while_the_other_answers_and_begin_anew_after_peace() {
        let (mut contest, mut now) = (Contest::default(), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            contest.lost_at(Loss::Rewritten { subnets: Subnets::default() }, now);
            assert!(contest.loss().is_some());
            pauses.push(contest.wait_at(now).unwrap().as_secs());
            now += contest.wait_at(now).unwrap();
            assert_eq!(contest.wait_at(now), Some(Duration::ZERO));
            contest.claimed_at(now);
            assert!(contest.loss().is_none());
        }
        assert_eq!(pauses, [15, 30, 60, 120, 240, 480, 600, 600]);
        now += PAUSE.1;
        contest.lost_at(Loss::Rewritten { subnets: Subnets::default() }, now);
        assert_eq!(contest.wait_at(now), Some(PAUSE.0));
    }
}
