//! Moments of probes in four bytes: with thousands of peers an `Instant` of sixteen for each of ten is most of what is kept.

use std::num::NonZeroU32;
use std::ops::Add;
use std::time::{Duration, Instant};

/// Parts of a second.
const TICKS: u32 = 16;

/// A moment as the time since an origin, in 16ths of a second. It lasts for eight years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(NonZeroU32);

impl Moment {
    /// The origin.
    pub(super) const ORIGIN: Self = Self(NonZeroU32::MIN);

    /// The last one that is not after `at`.
    pub(super) fn of(at: Instant, origin: Instant) -> Self {
        Self::ORIGIN + at.saturating_duration_since(origin)
    }

    /// The first one that is not before `at`.
    pub(super) fn not_before(at: Instant, origin: Instant) -> Self {
        let early = Self::of(at, origin);
        if early.at(origin) < at { Self(early.0.saturating_add(1)) } else { early }
    }

    /// When that is.
    pub(super) fn at(self, origin: Instant) -> Instant {
        origin + self.saturating_duration_since(Self::ORIGIN)
    }

    /// The time since an earlier one.
    pub(super) fn saturating_duration_since(self, earlier: Self) -> Duration {
        Duration::from_secs(1) * self.0.get().saturating_sub(earlier.0.get()) / TICKS
    }

    /// The next multiple of `step` since the origin, which may be this one.
    pub(super) fn on_grid(self, step: Duration) -> Self {
        let (step, passed) = (ticks(step).max(1), self.0.get() - Self::ORIGIN.0.get());
        Self(Self::ORIGIN.0.saturating_add(passed.div_ceil(step).saturating_mul(step)))
    }

    /// The last multiple of `step` since the origin, which may be this one.
    pub(super) fn last_on_grid(self, step: Duration) -> Self {
        let (step, passed) = (ticks(step).max(1), self.0.get() - Self::ORIGIN.0.get());
        Self(Self::ORIGIN.0.saturating_add(passed - passed % step))
    }
}

fn ticks(time: Duration) -> u32 {
    (time.as_nanos() * u128::from(TICKS) / 1_000_000_000).try_into().unwrap_or(u32::MAX)
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(ticks(time)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_never_late_and_those_of_the_grid_are_exact() {
        let origin = Instant::now();
        for millis in [0, 1, 62, 63, 250, 999, 1000, 86_400_000 * 365] {
            let at = origin + Duration::from_millis(millis);
            let moment = Moment::of(at, origin);
            let early = at.saturating_duration_since(moment.at(origin));
            assert!(moment.at(origin) <= at && early < Duration::from_millis(63), "{millis}: {early:?}");
            let next = Moment::not_before(at, origin);
            assert!(
                next.at(origin) >= at && next.saturating_duration_since(moment) < Duration::from_millis(63)
            );
            for step in [250, 1000].map(Duration::from_millis) {
                let next = moment.on_grid(step);
                assert!(next >= moment && next.saturating_duration_since(moment) < step);
                assert_eq!(next.saturating_duration_since(Moment::ORIGIN).as_millis() % step.as_millis(), 0);
            }
        }
        assert_eq!(size_of::<Option<Moment>>(), 4);
    }
}
