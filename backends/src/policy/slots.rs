//! Values by number, and numbers by what their values are found by.

use std::hash::{BuildHasher, Hash, RandomState};
use std::ops::{Index, IndexMut};

use hashbrown::HashTable;

/// Values, each with a number. A number that was given back is used again.
#[derive(Debug)]
pub(super) struct Slots<T> {
    values: Vec<T>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { values: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// The number that `value` has from now on.
    pub(super) fn add(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self[number] = value;
                number
            }
            None => {
                self.values.push(value);
                self.values.len() as u32 - 1
            }
        }
    }

    /// Gives a number back. Its value stays until another one takes its place.
    pub(super) fn free(&mut self, number: u32) {
        self.free.push(number);
    }

    /// How many numbers there are, with those that were given back.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.values.iter_mut()
    }
}

impl<T> Index<u32> for Slots<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        &self.values[number as usize]
    }
}

impl<T> IndexMut<u32> for Slots<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        &mut self.values[number as usize]
    }
}

/// Numbers by a key that is part of what has the number. The key is not stored once more, so that one of a large cluster's
/// many entries takes five bytes.
#[derive(Debug, Default)]
pub(super) struct SlotIndex {
    numbers: HashTable<u32>,
    state: RandomState,
}

impl SlotIndex {
    /// The number with this key; `is` tells whether a number has it.
    pub(super) fn find<K: Hash>(&self, key: K, is: impl Fn(u32) -> bool) -> Option<u32> {
        self.numbers.find(self.state.hash_one(key), |number| is(*number)).copied()
    }

    /// Adds a number that isn't there; `key` gives the key of each number.
    pub(super) fn insert<K: Hash>(&mut self, number: u32, key: impl Fn(u32) -> K) {
        let hash = |number: &u32| self.state.hash_one(key(*number));
        self.numbers.insert_unique(hash(&number), number, hash);
    }

    /// Removes a number with this key, which has to be the one that it was added with.
    pub(super) fn remove<K: Hash>(&mut self, number: u32, key: K) {
        if let Ok(entry) = self.numbers.find_entry(self.state.hash_one(key), |one| *one == number) {
            entry.remove();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.numbers.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_are_found_by_the_key_of_their_value_until_they_are_removed(
            steps in proptest::collection::vec((any::<bool>(), 0_u8..40), 0..400),
        ) {
            let (mut slots, mut index) = (Slots::default(), SlotIndex::default());
            let mut known: BTreeMap<String, u32> = BTreeMap::new();
            for (comes, key) in steps {
                let key = format!("key-{key}");
                match (comes, known.get(&key).copied()) {
                    (true, None) => {
                        let number = slots.add(key.clone());
                        index.insert(number, |number| slots[number].as_str());
                        known.insert(key, number);
                    }
                    (false, Some(number)) => {
                        index.remove(number, key.as_str());
                        slots.free(number);
                        known.remove(&key);
                    }
                    (true, Some(_)) | (false, None) => {}
                }
                prop_assert_eq!(index.len(), known.len());
                prop_assert!(slots.len() <= 40);
                for key in (0..40).map(|key| format!("key-{key}")) {
                    let found = index.find(key.as_str(), |number| slots[number] == key);
                    prop_assert_eq!(found, known.get(&key).copied());
                }
            }
        }
    }
}
