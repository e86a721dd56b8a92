//! A map that is found entry by entry, in any order, where most of it is expected to be as in a map that there is already.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{MAX_PART, SharedMap};

/// One bit for each entry of a part.
type Marks = u128;
const _: () = assert!(MAX_PART <= Marks::BITS as usize, "a part has more entries than marks");

/// Collects what is found. What is as expected costs a mark, and the result shares it with the expected map.
#[derive(Debug)]
pub struct Recount<'a, K, V> {
    expected: &'a SharedMap<K, V>,
    /// The last key of each part.
    lasts: Vec<&'a K>,
    /// Which entries of each part were found as expected.
    marks: Vec<Marks>,
    /// What was found otherwise, or besides.
    others: BTreeMap<K, V>,
    /// Part and place of the entry that was looked up last: the next one is often beside it.
    recent: (usize, usize),
}

impl<'a, K: Ord + Clone, V: Clone + PartialEq> Recount<'a, K, V> {
    /// Nothing is found yet.
    pub fn new(expected: &'a SharedMap<K, V>) -> Self {
        let lasts = expected.parts.iter().filter_map(|part| part.last()).map(|(key, _)| key).collect();
        let marks = vec![0; expected.parts.len()];
        Self { expected, lasts, marks, others: BTreeMap::new(), recent: (0, 0) }
    }

    /// An entry is found. Of two with one key the later one counts.
    pub fn note(&mut self, key: K, value: V) {
        match self.find(&key) {
            Some((part, at)) if self.expected.parts[part][at].1 == value => {
                self.marks[part] |= 1 << at;
                if !self.others.is_empty() {
                    self.others.remove(&key);
                }
            }
            Some((part, at)) => {
                self.marks[part] &= !(1 << at);
                self.others.insert(key, value);
            }
            None => drop(self.others.insert(key, value)),
        }
    }

    /// Whether an entry with this key was found.
    pub fn has(&mut self, key: &K) -> bool {
        let expected = self.find(key).is_some_and(|(part, at)| self.marks[part] & 1 << at != 0);
        expected || self.others.contains_key(key)
    }

    /// Takes in what was found of the same map elsewhere.
    pub fn absorb(&mut self, elsewhere: Self) {
        for (key, value) in elsewhere.others {
            self.note(key, value);
        }
        for (index, (own, marks)) in self.marks.iter_mut().zip(elsewhere.marks).enumerate() {
            if !self.others.is_empty() && marks != 0 {
                let part = self.expected.parts[index].iter().enumerate();
                part.filter(|(at, _)| marks & 1 << at != 0).for_each(|(_, (key, _))| {
                    self.others.remove(key);
                });
            }
            *own |= marks;
        }
    }

    /// What was found.
    pub fn finish(self) -> SharedMap<K, V> {
        let whole = |(part, marks): (&Arc<Vec<(K, V)>>, &Marks)| marks.count_ones() as usize == part.len();
        let mut found = if self.expected.parts.iter().zip(&self.marks).all(whole) {
            self.expected.clone()
        } else {
            self.marked()
        };
        if found.is_empty() {
            return self.others.into_iter().collect();
        }
        found.extend(self.others);
        found
    }

    /// The expected entries that were found.
    fn marked(&self) -> SharedMap<K, V> {
        let mut parts = Vec::with_capacity(self.marks.len());
        for (part, marks) in self.expected.parts.iter().zip(&self.marks) {
            match marks.count_ones() as usize {
                0 => {}
                all if all == part.len() => parts.push(Arc::clone(part)),
                some => {
                    let mut left = Vec::with_capacity(some);
                    let marked = part.iter().enumerate().filter(|(at, _)| marks & 1 << at != 0);
                    left.extend(marked.map(|(_, entry)| entry.clone()));
                    parts.push(Arc::new(left));
                }
            }
        }
        let len = parts.iter().map(|part| part.len()).sum();
        SharedMap { parts: Arc::new(parts), len }
    }

    /// Part and place of the expected entry with this key.
    fn find(&mut self, key: &K) -> Option<(usize, usize)> {
        let found = self.beside(key).or_else(|| {
            let part = self.lasts.partition_point(|last| *last < key);
            let at = self.expected.parts.get(part)?.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
            Some((part, at))
        })?;
        self.recent = found;
        Some(found)
    }

    /// The same, if it is the entry of the last time, the next one or the one before.
    fn beside(&self, key: &K) -> Option<(usize, usize)> {
        let (part, at) = self.recent;
        let entries = self.expected.parts.get(part)?;
        let has = |(part, at): (usize, usize)| {
            let entry = self.expected.parts.get(part).and_then(|entries| entries.get(at));
            entry.is_some_and(|(known, _)| known == key)
        };
        let next = if at + 1 < entries.len() { (part, at + 1) } else { (part + 1, 0) };
        let before = match at.checked_sub(1) {
            Some(at) => Some((part, at)),
            None => part.checked_sub(1).map(|part| (part, self.expected.parts[part].len() - 1)),
        };
        [Some(next), Some((part, at)), before].into_iter().flatten().find(|place| has(*place))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Entries in random order, of which most are as in a map of this length, some otherwise, some besides, and some come twice.
    fn found(len: u16) -> impl Strategy<Value = Vec<(u16, u8)>> {
        let expected: Vec<(u16, u8)> = (0..len).map(|key| (2 * key, 0)).collect();
        let few = prop::collection::vec((0..2 * len + 3, 0u8..3), 0..9);
        let some = prop::sample::subsequence(expected.clone(), 0..=expected.len());
        let kept = prop_oneof![Just(expected), some];
        (kept, few, any::<bool>()).prop_flat_map(|(mut entries, few, shuffled)| {
            entries.extend(few);
            if shuffled { Just(entries).prop_shuffle().boxed() } else { Just(entries).boxed() }
        })
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_an_ordinary_map_would_have(
            (len, first, second) in (0u16..500).prop_flat_map(|len| (Just(len), found(len), found(len)))
        ) {
            let expected: SharedMap<u16, u8> = (0..len).map(|key| (2 * key, 0)).collect();
            let mut plain = BTreeMap::new();
            let (mut one, mut other) = (Recount::new(&expected), Recount::new(&expected));
            for (recount, entries) in [(&mut one, first), (&mut other, second)] {
                let mut own = BTreeMap::new();
                for (key, value) in entries {
                    prop_assert_eq!(recount.has(&key), own.contains_key(&key));
                    own.insert(key, value);
                    recount.note(key, value);
                }
                plain.extend(own);
            }
            one.absorb(other);
            let result = one.finish();
            prop_assert_eq!(result.len(), plain.len());
            prop_assert!(result.iter().eq(plain.iter()));
            let same = plain.iter().eq(expected.iter());
            prop_assert_eq!(same, result == expected);
            prop_assert!(!same || Arc::ptr_eq(&result.parts, &expected.parts), "equal maps share everything");
        }
    }

    #[test]
    fn parts_of_which_all_is_found_are_shared() {
        let expected: SharedMap<u16, u8> = (0..1000).map(|key| (key, 0)).collect();
        let mut recount = Recount::new(&expected);
        for key in (0..1000).rev().filter(|key| *key != 500) {
            recount.note(key, 0);
        }
        recount.note(1500, 7);
        let found = recount.finish();
        let kept = |part: &Arc<Vec<(u16, u8)>>| expected.parts.iter().any(|other| Arc::ptr_eq(part, other));
        assert_eq!(found.parts.iter().filter(|part| !kept(part)).count(), 2);
        assert_eq!(found.changes(&expected).count(), 2);
    }
}
