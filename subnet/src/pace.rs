//! How fast stores retry: soon at first, then ever more slowly, and never all nodes at once.

use std::time::Duration;

use tokio::time::Instant;

use crate::store::random_below;

/// What worked for this long was sound, and its failure is no reason to wait long.
const SOUND: Duration = Duration::from_secs(10);

/// Delays that double from a least to a most, each shortened at random by up to half.
#[derive(Debug)]
pub(crate) struct Backoff {
    least: Duration,
    most: Duration,
    next: Duration,
    said: Option<Instant>,
}

impl Backoff {
    /// Flannel's own for watches: 100 ms to 5 s (contract §3.1.6).
    pub(crate) fn watching() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }

    pub(crate) fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, next: least, said: None }
    }

    /// The next delay.
    pub(crate) fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(self.most);
        let jitter = random_below(500) as u32;
        delay - delay * jitter / 1000
    }

    /// Waits for the next delay.
    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.delay()).await;
    }

    /// Something worked: the next failure is retried soon.
    pub(crate) fn reset(&mut self) {
        self.next = self.least;
        self.said = None;
    }

    /// Like [`reset`](Self::reset), if what has failed now had worked for a while.
    pub(crate) fn reset_if_sound(&mut self, begun: Instant) {
        if begun.elapsed() >= SOUND {
            self.reset();
        }
    }

    /// Whether a failure that repeats should be logged now: at first and then once a minute.
    pub(crate) fn worth_saying(&mut self) -> bool {
        let now = Instant::now();
        let due = self.said.is_none_or(|said| now.duration_since(said) >= Duration::from_secs(60));
        if due {
            self.said = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_most_and_start_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(300));
        for most in [100, 200, 300, 300] {
            let delay = backoff.delay().as_millis();
            assert!((most / 2..=most).contains(&delay), "{delay} of {most}");
        }
        backoff.reset();
        assert!(backoff.delay() <= Duration::from_millis(100));
    }

    #[tokio::test(start_paused = true)]
    async fn a_repeated_failure_is_worth_saying_once_a_minute() {
        let mut backoff = Backoff::watching();
        assert!(backoff.worth_saying() && !backoff.worth_saying());
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(backoff.worth_saying() && !backoff.worth_saying());
    }
}
