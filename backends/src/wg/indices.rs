//! The numbers by which packets and responses name sessions and handshakes of this node.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, PoisonError, RwLock};

use super::peer::DevicePeer;
use super::session::Session;

/// What a number stands for: a session, or a handshake that this node began.
#[derive(Clone, Debug)]
pub struct IndexEntry {
    /// Whose it is.
    pub peer: Arc<DevicePeer>,
    /// The session.
    pub session: Option<Arc<Session>>,
}

/// The entries by their numbers.
#[derive(Default)]
pub(super) struct Indices(RwLock<HashMap<u32, IndexEntry>>);

impl Indices {
    #[inline]
    pub(super) fn find(&self, index: u32) -> Option<IndexEntry> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&index).cloned()
    }

    /// How many entries there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.read().unwrap().len()
    }

    /// Files an entry under a number that can't be guessed.
    pub(super) fn file(&self, entry: IndexEntry) -> u32 {
        let mut indices = self.0.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            let index = u32::from_le_bytes(crate::random::bytes());
            if let Entry::Vacant(vacant) = indices.entry(index) {
                vacant.insert(entry);
                return index;
            }
        }
    }

    pub(super) fn replace(&self, index: u32, entry: IndexEntry) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(index, entry);
    }

    pub(super) fn remove(&self, index: u32) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&index);
    }

    pub(super) fn retire(&self, session: Option<Arc<Session>>) {
        session.into_iter().for_each(|session| self.remove(session.local));
    }
}
