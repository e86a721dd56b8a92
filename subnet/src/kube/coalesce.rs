//! When a stream of events is read: what arrives alone at once, what arrives in quick succession together.
//!
//! Like the adaptive interrupt coalescing of network cards: to wake an idle processor costs several times what reading one
//! heartbeat does, and a cluster of 20,000 nodes sends 67 of them a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// How long what arrives stays in the socket while the stream is busy.
pub(super) const WINDOW: Duration = Duration::from_millis(50);
/// Each window that brings nothing new is followed by one that is twice as long, up to this.
pub(super) const LONGEST_WINDOW: Duration = Duration::from_millis(200);
/// Reads within this time belong to one arrival: a large object comes in several segments.
const ARRIVAL: Duration = Duration::from_millis(2);
/// So many arrivals in a row, each within a window of the one before, make a stream busy.
const BUSY_ARRIVALS: u8 = 3;

/// When a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadPace {
    /// As soon as something arrives, and nothing has arrived lately.
    Quiet,
    /// As soon as something arrives.
    Prompt(Recent),
    /// Not before this time, unless a lot has arrived.
    Deferred {
        /// The end of the window.
        until: Instant,
        /// How long the window is.
        window: Duration,
    },
}

/// What has arrived lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Recent {
    /// How many arrivals in a row, including the last one.
    arrivals: u8,
    /// When the last one began.
    began: Instant,
    /// When something was read last.
    read: Instant,
}

impl ReadPace {
    /// Something was read at this time; `more` if the buffer was too small for what there may be.
    pub(super) fn after_data(self, now: Instant, more: bool) -> Self {
        match self {
            Self::Prompt(recent) if now - recent.read <= WINDOW => recent.and(now),
            Self::Quiet | Self::Prompt(_) => Self::Prompt(Recent { arrivals: 1, began: now, read: now }),
            Self::Deferred { .. } if more => self,
            Self::Deferred { window, .. } => Self::deferred(now, LONGEST_WINDOW.min(2 * window)),
        }
    }

    /// What was read last has news.
    pub(super) fn after_news(self, now: Instant) -> Self {
        match self {
            Self::Deferred { until, .. } => Self::Deferred { until: until.min(now + WINDOW), window: WINDOW },
            Self::Quiet | Self::Prompt(_) => self,
        }
    }

    fn deferred(now: Instant, window: Duration) -> Self {
        Self::Deferred { until: now + window, window }
    }

    /// Nothing is to wait any longer. What has arrived meanwhile is still to be read.
    pub(super) fn hurried(self, now: Instant) -> Self {
        match self {
            Self::Deferred { until, window } => Self::Deferred { until: until.min(now), window },
            Self::Quiet | Self::Prompt(_) => Self::Quiet,
        }
    }

    pub(super) fn is_deferred(self) -> bool {
        matches!(self, Self::Deferred { .. })
    }
}

impl Recent {
    fn and(self, now: Instant) -> ReadPace {
        if now - self.began <= ARRIVAL {
            return ReadPace::Prompt(Self { read: now, ..self });
        }
        match self.arrivals + 1 {
            BUSY_ARRIVALS.. => ReadPace::deferred(now, WINDOW),
            arrivals => ReadPace::Prompt(Self { arrivals, began: now, read: now }),
        }
    }
}

/// Whether reads of a connection are coalesced, shared by the connection and the reader of what it brings.
#[derive(Clone, Debug, Default)]
pub(super) struct Coalescing(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    wanted: AtomicBool,
    deferred: AtomicBool,
    /// The reader has found news in what was read last.
    news: AtomicBool,
}

impl Coalescing {
    /// Whether busy streams may be read late.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::Relaxed)
    }

    /// Whether there was any news since this was asked last.
    pub(super) fn take_news(&self) -> bool {
        self.0.news.swap(false, Ordering::Relaxed)
    }

    /// Notes whether the stream is read late at the moment.
    pub(super) fn note(&self, reading: ReadPace) {
        self.0.deferred.store(reading.is_deferred(), Ordering::Relaxed);
    }
}

/// Has reads coalesced until it is dropped: a connection is used for other requests afterwards.
#[derive(Debug)]
pub(super) struct Coalesced(Coalescing);

impl Coalesced {
    pub(super) fn new(coalescing: Coalescing) -> Self {
        coalescing.0.wanted.store(true, Ordering::Relaxed);
        Self(coalescing)
    }

    /// Whether what comes has been collected for a window already.
    pub(super) fn is_deferred(&self) -> bool {
        self.0.0.deferred.load(Ordering::Relaxed)
    }

    /// What was read has news, so that what comes next is not to wait for long.
    pub(super) fn has_news(&self) {
        self.0.0.news.store(true, Ordering::Relaxed);
    }
}

impl Drop for Coalesced {
    fn drop(&mut self) {
        self.0.0.wanted.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What becomes of a stream that is read so many milliseconds after the start.
    fn after(reads: &[u64]) -> ReadPace {
        let start = Instant::now();
        let read =
            |reading: ReadPace, at: &u64| reading.after_data(start + Duration::from_millis(*at), false);
        reads.iter().fold(ReadPace::Quiet, read)
    }

    #[test]
    fn what_comes_alone_is_read_at_once() {
        for reads in [&[0][..], &[0, 51], &[0, 60, 120, 180, 240, 300], &[0, 10, 70, 80, 140, 150]] {
            assert!(!after(reads).is_deferred(), "{reads:?}");
        }
    }

    #[test]
    fn an_object_that_comes_in_several_pieces_is_one_arrival() {
        assert!(!after(&[0, 0, 0, 1, 1, 2, 2]).is_deferred());
        assert!(!after(&[0, 1, 2, 40, 41, 42]).is_deferred());
        assert!(after(&[0, 1, 2, 40, 41, 42, 80]).is_deferred());
    }

    #[test]
    fn the_third_arrival_in_a_row_makes_a_stream_busy() {
        assert!(!after(&[0, 50]).is_deferred());
        assert!(after(&[0, 50, 100]).is_deferred());
        assert!(after(&[0, 3, 6]).is_deferred());
        assert!(after(&(0..10).collect::<Vec<_>>()).is_deferred(), "also without a pause");
    }

    #[test]
    fn a_stream_in_a_hurry_waits_for_no_window() {
        let now = Instant::now();
        let ended = ReadPace::Deferred { until: now, window: WINDOW };
        assert_eq!(ReadPace::deferred(now, WINDOW).hurried(now), ended);
        assert_eq!(ended.hurried(now + WINDOW), ended);
        assert_eq!(after(&[0]).hurried(now), ReadPace::Quiet);
    }

    #[test]
    fn a_window_begins_at_the_last_read_and_what_does_not_fit_is_read_at_once() {
        let start = Instant::now();
        let deferred = ReadPace::Deferred { until: start, window: WINDOW };
        assert_eq!(deferred.after_data(start, true), deferred);
        assert_eq!(deferred.after_data(start, false), ReadPace::deferred(start, 2 * WINDOW));
    }

    #[test]
    fn windows_grow_while_there_is_no_news_and_news_ends_that() {
        let now = Instant::now();
        let mut reading = ReadPace::deferred(now, WINDOW);
        for factor in [2, 4, 4] {
            reading = reading.after_data(now, false);
            assert_eq!(reading, ReadPace::deferred(now, factor * WINDOW));
        }
        assert_eq!(reading.after_news(now), ReadPace::deferred(now, WINDOW));
        let nearly_over = now + LONGEST_WINDOW - Duration::from_millis(10);
        let until = now + LONGEST_WINDOW;
        assert_eq!(reading.after_news(nearly_over), ReadPace::Deferred { until, window: WINDOW });
        assert_eq!(ReadPace::Quiet.after_news(now), ReadPace::Quiet);
    }

    proptest! {
        #[test]
        fn nothing_is_deferred_for_longer_than_a_window_and_after_news_for_longer_than_the_shortest(
            steps in proptest::collection::vec((0_u64..220, any::<bool>(), any::<bool>()), 0..50)
        ) {
            let (mut now, mut reading) = (Instant::now(), ReadPace::Quiet);
            for (pause, more, news) in steps {
                now += Duration::from_millis(pause);
                reading = reading.after_data(now, more);
                if news {
                    reading = reading.after_news(now);
                }
                if let ReadPace::Deferred { until, window } = reading {
                    prop_assert!((WINDOW..=LONGEST_WINDOW).contains(&window));
                    let most = if news { WINDOW } else { LONGEST_WINDOW };
                    prop_assert!(until <= now + most);
                }
            }
        }
    }
}
