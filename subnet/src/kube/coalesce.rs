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
/// Reads within this time belong to one arrival: a large object comes in several segments.
const ARRIVAL: Duration = Duration::from_millis(2);
/// So many arrivals in a row, each within a window of the one before, make a stream busy.
const BUSY_ARRIVALS: u8 = 3;

/// When a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// As soon as something arrives, and nothing has arrived lately.
    Quiet,
    /// As soon as something arrives.
    Prompt(Recent),
    /// Not before this time, unless a lot has arrived.
    Deferred {
        /// The end of the window.
        until: Instant,
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

impl Reading {
    /// Something was read at this time; `more` if the buffer was too small for what there may be.
    pub(super) fn after_data(self, now: Instant, more: bool) -> Self {
        match self {
            Self::Prompt(recent) if now - recent.read <= WINDOW => recent.and(now),
            Self::Quiet | Self::Prompt(_) => Self::Prompt(Recent { arrivals: 1, began: now, read: now }),
            Self::Deferred { .. } if more => self,
            Self::Deferred { .. } => Self::Deferred { until: now + WINDOW },
        }
    }

    /// Nothing is to wait any longer. What has arrived meanwhile is still to be read.
    pub(super) fn hurried(self, now: Instant) -> Self {
        match self {
            Self::Deferred { until } => Self::Deferred { until: until.min(now) },
            Self::Quiet | Self::Prompt(_) => Self::Quiet,
        }
    }

    pub(super) fn is_deferred(self) -> bool {
        matches!(self, Self::Deferred { .. })
    }
}

impl Recent {
    fn and(self, now: Instant) -> Reading {
        if now - self.began <= ARRIVAL {
            return Reading::Prompt(Self { read: now, ..self });
        }
        match self.arrivals + 1 {
            BUSY_ARRIVALS.. => Reading::Deferred { until: now + WINDOW },
            arrivals => Reading::Prompt(Self { arrivals, began: now, read: now }),
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
}

impl Coalescing {
    /// Whether busy streams may be read late.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.wanted.load(Ordering::Relaxed)
    }

    /// Notes whether the stream is read late at the moment.
    pub(super) fn note(&self, reading: Reading) {
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

    /// Whether what comes has been collected for up to a [`WINDOW`] already.
    pub(super) fn is_deferred(&self) -> bool {
        self.0.0.deferred.load(Ordering::Relaxed)
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
    fn after(reads: &[u64]) -> Reading {
        let start = Instant::now();
        let read = |reading: Reading, at: &u64| reading.after_data(start + Duration::from_millis(*at), false);
        reads.iter().fold(Reading::Quiet, read)
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
        let ended = Reading::Deferred { until: now };
        assert_eq!(Reading::Deferred { until: now + WINDOW }.hurried(now), ended);
        assert_eq!(ended.hurried(now + WINDOW), ended);
        assert_eq!(after(&[0]).hurried(now), Reading::Quiet);
    }

    #[test]
    fn a_window_begins_at_the_last_read_and_what_does_not_fit_is_read_at_once() {
        let start = Instant::now();
        let deferred = Reading::Deferred { until: start };
        assert_eq!(deferred.after_data(start, true), deferred);
        assert_eq!(deferred.after_data(start, false), Reading::Deferred { until: start + WINDOW });
    }

    proptest! {
        #[test]
        fn nothing_is_deferred_for_longer_than_a_window(pauses in proptest::collection::vec((0_u64..120, any::<bool>()), 0..50)) {
            let (mut now, mut reading) = (Instant::now(), Reading::Quiet);
            for (pause, more) in pauses {
                now += Duration::from_millis(pause);
                reading = reading.after_data(now, more);
                if let Reading::Deferred { until } = reading {
                    prop_assert!(until <= now + WINDOW);
                }
            }
        }
    }
}
