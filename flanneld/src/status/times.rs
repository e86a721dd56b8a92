//! Times, counted by class: a histogram.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Times, counted by class.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Times {
    /// Upper bounds in seconds.
    pub(crate) bounds: [f64; 8],
    /// How many times lie between a bound and the one before.
    pub(crate) classes: [u64; 8],
    pub(crate) count: u64,
    /// In seconds.
    pub(crate) sum: f64,
}

impl Default for Times {
    fn default() -> Self {
        Self { bounds: [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0], classes: [0; 8], count: 0, sum: 0.0 }
    }
}

impl Times {
    /// Counts one more.
    pub(crate) fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(class) = self.bounds.iter().position(|bound| seconds <= *bound) {
            self.classes[class] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_first_class_that_it_fits_into() {
        let mut times = Times::default();
        for milliseconds in [1, 2, 3, 50, 90_000] {
            times.add(Duration::from_millis(milliseconds));
        }
        assert_eq!(times.classes, [1, 2, 0, 1, 0, 0, 0, 0]);
        assert_eq!((times.count, times.sum), (5, 90.056));
    }
}
