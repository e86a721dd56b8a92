//! Peers that are elsewhere than their leases say, by where they were heard.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{PoisonError, RwLock};

/// The numbers of these peers: at most one entry for each.
#[derive(Debug, Default)]
pub(super) struct Roaming(RwLock<HashMap<SocketAddr, u32>>);

impl Roaming {
    /// A peer was heard from another place than `before`.
    pub(super) fn moved(&self, number: u32, before: SocketAddr, now: SocketAddr) {
        let mut places = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if places.get(&before) == Some(&number) {
            places.remove(&before);
        }
        places.insert(now, number);
    }

    /// The peer that was heard from there last.
    pub(super) fn at(&self, from: SocketAddr) -> Option<u32> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&from).copied()
    }

    /// These are not peers any more.
    pub(super) fn keep(&self, is_peer: impl Fn(u32) -> bool) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|_, number| is_peer(*number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_in_one_place_and_none_when_it_is_gone() {
        let at = |port| SocketAddr::from(([192, 0, 2, 1], port));
        let roaming = Roaming::default();
        roaming.moved(1, at(1), at(2));
        roaming.moved(2, at(1), at(3));
        assert_eq!([1, 2, 3].map(|port| roaming.at(at(port))), [None, Some(1), Some(2)]);
        // The second one is heard from where the first one was, which then moves on.
        roaming.moved(2, at(3), at(2));
        roaming.moved(1, at(2), at(4));
        assert_eq!([2, 3, 4].map(|port| roaming.at(at(port))), [Some(2), None, Some(1)]);
        roaming.keep(|number| number == 1);
        assert_eq!([2, 4].map(|port| roaming.at(at(port))), [None, Some(1)]);
    }
}
