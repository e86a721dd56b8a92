//! Which counters of a session have been seen: each is taken once, out of order too (RFC 6479).

/// No packet has this counter or a greater one.
pub const MAX_COUNTER: u64 = u64::MAX - (1 << 13);
const WORDS: usize = 128;
/// How far behind the greatest counter another one may be. Several queues and merged datagrams overtake each other by
/// hundreds.
pub const SIZE: u64 = (WORDS as u64 - 1) * 64;

/// The counters that were taken, as far as they matter.
#[derive(Debug)]
pub struct Window {
    /// One more than the greatest.
    next: u64,
    /// A ring: 64 counters a word.
    words: [u64; WORDS],
}

impl Default for Window {
    fn default() -> Self {
        Self { next: 0, words: [0; WORDS] }
    }
}

impl Window {
    /// Takes a counter; `false` if it was taken before, or is too old for that to be known.
    #[inline]
    pub fn take(&mut self, counter: u64) -> bool {
        if counter >= MAX_COUNTER || counter.saturating_add(SIZE) < self.next {
            return false;
        }
        let word = counter / 64;
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) / 64;
            for step in 1..=(word - newest).min(WORDS as u64) {
                self.words[(newest + step) as usize % WORDS] = 0;
            }
            self.next = counter + 1;
        }
        let (bits, bit) = (&mut self.words[word as usize % WORDS], 1 << (counter % 64));
        let new = *bits & bit == 0;
        *bits |= bit;
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The same, slowly.
    #[derive(Default)]
    struct Model(BTreeSet<u64>);

    impl Model {
        fn take(&mut self, counter: u64) -> bool {
            let old = self.0.last().is_some_and(|greatest| counter.saturating_add(SIZE) <= *greatest);
            counter < MAX_COUNTER && !old && self.0.insert(counter)
        }
    }

    #[test]
    fn the_edges_of_the_window_and_of_the_counter_are_where_they_should_be() {
        let mut window = Window::default();
        assert!(window.take(0) && !window.take(0));
        assert!(window.take(SIZE) && !window.take(0) && window.take(1) && !window.take(1));
        assert!(window.take(SIZE + 1) && !window.take(1) && window.take(2));
        assert!(!window.take(MAX_COUNTER) && !window.take(u64::MAX));
        assert!(window.take(MAX_COUNTER - 1) && !window.take(MAX_COUNTER - 1));
        assert!(window.take(MAX_COUNTER - SIZE) && !window.take(MAX_COUNTER - SIZE - 1));
    }

    proptest! {
        #[test]
        fn every_counter_is_taken_once_as_a_set_of_all_of_them_says(
            start in prop_oneof![Just(0), Just(MAX_COUNTER - 40_000), any::<u32>().prop_map(u64::from)],
            steps in prop::collection::vec((prop_oneof![0u64..200, 8000u64..8300, 0u64..20_000], any::<bool>()), 1..300),
        ) {
            let (mut window, mut model, mut at) = (Window::default(), Model::default(), start);
            for (step, forward) in steps {
                at = if forward { at.saturating_add(step) } else { at.saturating_sub(step) };
                prop_assert_eq!(window.take(at), model.take(at), "{}", at);
            }
        }
    }
}
