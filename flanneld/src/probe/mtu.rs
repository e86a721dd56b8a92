//! The longest packet that a path carries, from the fate of packets that must not be fragmented; pure.

/// So many packets of full length are lost in a row, while short ones are answered, before it is the length.
const FULL_LOST: u8 = 3;
/// The same for the lengths that are tried afterwards.
const TRIED_LOST: u8 = 2;

/// What is known of the longest packet, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MtuState {
    /// No packet of full length has an outcome yet.
    Nothing,
    /// Packets of full length pass.
    Full,
    /// That many of full length were lost in a row.
    Suspected(u8),
    /// `low` passes and `high` doesn't; so many of those in between were lost in a row.
    Between { low: u16, high: u16, lost: u8 },
    /// Packets up to this length pass.
    Limited(u16),
}

/// The search for the longest packet of one path.
#[derive(Clone, Copy, Debug)]
pub(super) struct MtuSearch {
    /// The length that every packet may have.
    full: u16,
    /// A length that is taken to pass.
    least: u16,
    known: MtuState,
}

impl MtuSearch {
    /// For a path that is to carry packets of `full` bytes.
    pub(super) fn new(full: u16, least: u16) -> Self {
        Self { full: full.max(least), least, known: MtuState::Nothing }
    }

    /// The length to try next.
    pub(super) fn next(&self) -> u16 {
        match self.known {
            MtuState::Between { low, high, .. } => low + (high - low) / 2,
            MtuState::Nothing | MtuState::Full | MtuState::Suspected(_) | MtuState::Limited(_) => self.full,
        }
    }

    /// Whether to try soon: there is something to be found out.
    pub(super) fn is_urgent(&self) -> bool {
        matches!(self.known, MtuState::Nothing | MtuState::Suspected(_) | MtuState::Between { .. })
    }

    /// A packet of `size` bytes came back.
    pub(super) fn passed(&mut self, size: u16) {
        self.known = match self.known {
            _ if size >= self.full => MtuState::Full,
            MtuState::Between { low, high, .. } if size > low && size < high => found(size, high),
            known => known,
        };
    }

    /// A packet of `size` bytes was lost, although short ones pass.
    pub(super) fn lost(&mut self, size: u16) {
        self.known = match self.known {
            MtuState::Nothing | MtuState::Full if size >= self.full => MtuState::Suspected(1),
            MtuState::Suspected(lost) if size >= self.full && lost + 1 >= FULL_LOST => {
                found(self.least, self.full)
            }
            MtuState::Suspected(lost) if size >= self.full => MtuState::Suspected(lost + 1),
            MtuState::Between { low, high, lost } if size == self.next() => {
                if lost + 1 >= TRIED_LOST {
                    found(low, size)
                } else {
                    MtuState::Between { low, high, lost: lost + 1 }
                }
            }
            known => known,
        };
    }

    /// Whether packets of full length are lost.
    pub(super) fn is_limited(&self) -> bool {
        matches!(self.known, MtuState::Between { .. } | MtuState::Limited(_))
    }

    /// The longest packet that passes, once that is known.
    pub(super) fn found(&self) -> Option<u16> {
        match self.known {
            MtuState::Full => Some(self.full),
            MtuState::Limited(size) => Some(size),
            MtuState::Nothing | MtuState::Suspected(_) | MtuState::Between { .. } => None,
        }
    }

    pub(super) fn full(&self) -> u16 {
        self.full
    }
}

fn found(low: u16, high: u16) -> MtuState {
    if high - low <= 1 { MtuState::Limited(low) } else { MtuState::Between { low, high, lost: 0 } }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tries a path that passes packets up to `limit` until there is nothing to find out; gives how many it took.
    fn search(mtu: &mut MtuSearch, limit: u16) -> usize {
        let mut tries = 0;
        while mtu.is_urgent() && tries < 100 {
            let size = mtu.next();
            if size <= limit {
                mtu.passed(size)
            } else {
                mtu.lost(size)
            }
            tries += 1;
        }
        tries
    }

    #[test]
    fn a_path_that_carries_all_is_known_after_one_packet() {
        let mut mtu = MtuSearch::new(1450, 576);
        assert_eq!((search(&mut mtu, 1450), mtu.found(), mtu.is_limited()), (1, Some(1450), false));
    }

    #[test]
    fn one_lost_packet_is_no_limit() {
        let mut mtu = MtuSearch::new(1450, 576);
        mtu.passed(1450);
        mtu.lost(1450);
        mtu.lost(1450);
        assert!(!mtu.is_limited() && mtu.is_urgent() && mtu.found().is_none());
        mtu.passed(1450);
        assert_eq!((mtu.found(), mtu.is_urgent()), (Some(1450), false));
    }

    #[test]
    fn a_limit_that_is_gone_is_noticed_by_the_next_packet_of_full_length() {
        let mut mtu = MtuSearch::new(1450, 576);
        search(&mut mtu, 1350);
        assert_eq!((mtu.found(), mtu.next()), (Some(1350), 1450));
        mtu.lost(1450);
        assert_eq!(mtu.found(), Some(1350), "the limit stands");
        mtu.passed(1450);
        assert_eq!((mtu.found(), mtu.is_limited()), (Some(1450), false));
    }

    proptest! {
        #[test]
        fn every_limit_is_found_exactly(full in 576u16..9001, limit in 576u16..9001) {
            let mut mtu = MtuSearch::new(full, 576);
            let tries = search(&mut mtu, limit);
            prop_assert_eq!(mtu.found(), Some(limit.min(full)));
            prop_assert!(tries <= 3 + 2 * 14, "{}", tries);
        }

        #[test]
        fn any_order_of_outcomes_leaves_a_length_within_bounds(full: u16, outcomes: Vec<(u16, bool)>) {
            let mut mtu = MtuSearch::new(full, 576);
            for (size, passed) in outcomes {
                if passed { mtu.passed(size) } else { mtu.lost(size) }
                let next = mtu.next();
                if passed { mtu.passed(next) } else { mtu.lost(next) }
                prop_assert!((576..=mtu.full()).contains(&mtu.next()));
            }
        }
    }
}
