//! Which ADDs share one reading of their namespace's policies, so that a node that starts a hundred pods at once does not read
//! them a hundred times.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// The readings that are under way, by namespace.
#[derive(Debug, Default)]
pub(super) struct Readings(HashMap<String, Reading>);

#[derive(Debug, Default)]
struct Reading {
    /// The ADDs that it is for, by number.
    serves: Vec<u64>,
    /// Those that came after it began: the API may have read its policies before.
    next: Vec<u64>,
}

impl Readings {
    /// An ADD needs the policies that its namespace has from now on. Says whether a reading has to begin now.
    pub(super) fn need(&mut self, namespace: &str, adding: u64) -> bool {
        match self.0.entry(namespace.to_owned()) {
            Entry::Vacant(place) => {
                place.insert(Reading { serves: vec![adding], next: Vec::new() });
                true
            }
            Entry::Occupied(reading) => {
                reading.into_mut().next.push(adding);
                false
            }
        }
    }

    /// A namespace's reading has ended. Gives the ADDs that it was for, and whether another one has to begin now.
    pub(super) fn ended(&mut self, namespace: &str) -> (Vec<u64>, bool) {
        let Some(Reading { serves, next }) = self.0.remove(namespace) else { return Default::default() };
        let more = !next.is_empty();
        if more {
            self.0.insert(namespace.to_owned(), Reading { serves: next, next: Vec::new() });
        }
        (serves, more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_during_a_reading_shares_the_next_one() {
        let mut readings = Readings::default();
        assert!(readings.need("shop", 1));
        assert!(!readings.need("shop", 2) && !readings.need("shop", 3));
        assert!(readings.need("bank", 4), "another namespace waits for nobody");
        assert_eq!(readings.ended("shop"), (vec![1], true));
        assert!(!readings.need("shop", 5));
        assert_eq!(readings.ended("shop"), (vec![2, 3], true));
        assert_eq!(readings.ended("shop"), (vec![5], false));
        assert_eq!(readings.ended("shop"), (vec![], false));
        assert!(readings.need("shop", 6));
        assert_eq!(readings.ended("bank"), (vec![4], false));
    }
}
