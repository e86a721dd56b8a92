//! Strings that occur very often, each kept once and counted, so that unused ones go.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// The number of a string.
pub(super) type Id = u32;

#[derive(Debug, Default)]
pub(super) struct Interner {
    entries: Vec<Entry>,
    free: Vec<Id>,
    /// The first entry of each hash; others follow by [`Entry::next`].
    heads: HashMap<u64, Id>,
    state: RandomState,
}

#[derive(Debug)]
struct Entry {
    text: Box<str>,
    uses: u32,
    next: Option<Id>,
}

impl Interner {
    /// The number of `text`, used once more.
    pub(super) fn acquire(&mut self, text: &str) -> Id {
        let hash = self.state.hash_one(text);
        let known = self.chain(hash).find(|id| *self.entries[*id as usize].text == *text);
        if let Some(id) = known {
            self.entries[id as usize].uses += 1;
            return id;
        }
        let entry = Entry { text: text.into(), uses: 1, next: self.heads.get(&hash).copied() };
        let id = match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as Id - 1
            }
        };
        self.heads.insert(hash, id);
        id
    }

    /// Uses a string once less.
    pub(super) fn release(&mut self, id: Id) {
        let entry = &mut self.entries[id as usize];
        entry.uses -= 1;
        if entry.uses > 0 {
            return;
        }
        let (text, next) = (std::mem::take(&mut entry.text), entry.next.take());
        let hash = self.state.hash_one(&*text);
        let before = self.chain(hash).find(|one| self.entries[*one as usize].next == Some(id));
        match (before, next) {
            (Some(before), next) => self.entries[before as usize].next = next,
            (None, Some(next)) => drop(self.heads.insert(hash, next)),
            (None, None) => drop(self.heads.remove(&hash)),
        }
        self.free.push(id);
    }

    /// The number of `text`, if anybody uses it.
    pub(super) fn find(&self, text: &str) -> Option<Id> {
        self.chain(self.state.hash_one(text)).find(|id| *self.entries[*id as usize].text == *text)
    }

    pub(super) fn text(&self, id: Id) -> &str {
        &self.entries[id as usize].text
    }

    fn chain(&self, hash: u64) -> impl Iterator<Item = Id> + '_ {
        std::iter::successors(self.heads.get(&hash).copied(), |id| self.entries[*id as usize].next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_is_kept_once_for_as_long_as_it_is_used() {
        let mut interner = Interner::default();
        let (a, b) = (interner.acquire("a"), interner.acquire("b"));
        assert_ne!(a, b);
        assert_eq!(interner.acquire("a"), a);
        interner.release(a);
        assert_eq!(interner.find("a"), Some(a));
        interner.release(a);
        assert_eq!((interner.find("a"), interner.find("b")), (None, Some(b)));
        let c = interner.acquire("c");
        assert_eq!(interner.text(c), "c");
        assert_eq!(interner.entries.len(), 2, "the place is used again");
    }
}
