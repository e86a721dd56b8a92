//! Two living nodes that write one lease: which of them goes on, so that one and only one does.
//!
//! A node can't see another one with its public address but by what that writes. The node that has held the lease
//! for a while answers by writing it again; a newcomer that is answered gives up. A node that was restarted is never
//! answered, because the process before it is gone.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Before this a node is a newcomer: an answer of the one that was there comes within a moment.
const SETTLED: Duration = Duration::from_secs(10);
/// So many answers within such a time: the other one goes on, and no answer will end that.
const ANSWERS: (usize, Duration) = (8, Duration::from_secs(600));

/// How well a node's hold on its lease is established.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    since: Option<Instant>,
    answered: VecDeque<Instant>,
}

impl Standing {
    /// The lease is held from now on, if it was not held already.
    pub(crate) fn taken(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }

    /// The lease is not held any more.
    pub(crate) fn lost(&mut self) {
        self.since = None;
    }

    /// Another node wrote the lease: whether to write it again. Otherwise that one has it.
    pub(crate) fn answers(&mut self) -> bool {
        let now = Instant::now();
        while self.answered.front().is_some_and(|at| now - *at > ANSWERS.1) {
            self.answered.pop_front();
        }
        let settled = self.since.is_some_and(|since| now - since >= SETTLED);
        let answers = settled && self.answered.len() < ANSWERS.0;
        if answers {
            self.answered.push_back(now);
        }
        answers
    }
}

/// A name for the writing of one process, different from every other's.
#[cfg(feature = "file")]
pub(crate) fn writer() -> String {
    use std::hash::{BuildHasher, Hasher};
    // RandomState is keyed by the operating system's randomness.
    let hash = std::collections::hash_map::RandomState::new().build_hasher().finish();
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_gives_up_and_a_settled_holder_answers_but_not_for_ever() {
        let mut standing = Standing::default();
        assert!(!standing.answers());
        standing.taken();
        advance(SETTLED / 2).await;
        standing.taken();
        assert!(!standing.answers());
        advance(SETTLED / 2).await;
        assert!((0..ANSWERS.0).all(|_| standing.answers()));
        assert!(!standing.answers());
        advance(ANSWERS.1 * 2).await;
        assert!(standing.answers());
        standing.lost();
        standing.taken();
        assert!(!standing.answers());
    }

    #[cfg(feature = "file")]
    #[test]
    fn no_two_writers_have_the_same_name() {
        assert_ne!(writer(), writer());
    }
}
