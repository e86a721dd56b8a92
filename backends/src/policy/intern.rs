//! Strings that occur very often, each kept once and counted, so that unused ones go.

use std::ops::Range;

use super::slots::{SlotIndex, Slots};

/// The number of a string.
pub(super) type Id = u32;

/// So many unused bytes are left in any case: closing the gaps is about all strings.
const GAPS: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Interner {
    texts: Texts,
    index: SlotIndex,
}

/// The strings in one buffer: an allocation for each would take several times as much as most of them.
#[derive(Debug, Default)]
struct Texts {
    entries: Slots<Entry>,
    buffer: String,
    /// Bytes of `buffer` that no entry uses any more.
    gaps: usize,
}

#[derive(Debug)]
struct Entry {
    start: usize,
    len: u32,
    uses: u32,
}

impl Interner {
    /// The number of `text`, used once more.
    pub(super) fn acquire(&mut self, text: &str) -> Id {
        if let Some(id) = self.find(text) {
            self.texts.entries[id].uses += 1;
            return id;
        }
        let id = self.texts.add(text);
        let texts = &self.texts;
        self.index.insert(id, |id| texts.get(id));
        id
    }

    /// Uses a string once less.
    pub(super) fn release(&mut self, id: Id) {
        let entry = &mut self.texts.entries[id];
        entry.uses -= 1;
        if entry.uses > 0 {
            return;
        }
        self.index.remove(id, self.texts.get(id));
        self.texts.remove(id);
    }

    /// The number of `text`, if anybody uses it.
    pub(super) fn find(&self, text: &str) -> Option<Id> {
        self.index.find(text, |id| self.texts.get(id) == text)
    }

    pub(super) fn text(&self, id: Id) -> &str {
        self.texts.get(id)
    }
}

impl Texts {
    fn add(&mut self, text: &str) -> Id {
        let entry = Entry { start: self.buffer.len(), len: text.len() as u32, uses: 1 };
        self.buffer.push_str(text);
        self.entries.add(entry)
    }

    fn get(&self, id: Id) -> &str {
        &self.buffer[self.entries[id].range()]
    }

    fn remove(&mut self, id: Id) {
        self.gaps += std::mem::take(&mut self.entries[id].len) as usize;
        self.entries.free(id);
        if self.gaps > GAPS && self.gaps > self.buffer.len() / 2 {
            self.close_gaps();
        }
    }

    /// Entries that are not used are empty.
    fn close_gaps(&mut self) {
        let mut buffer = String::with_capacity(self.buffer.len() - self.gaps);
        for entry in self.entries.values_mut() {
            let start = buffer.len();
            buffer.push_str(&self.buffer[entry.range()]);
            entry.start = start;
        }
        (self.buffer, self.gaps) = (buffer, 0);
    }
}

impl Entry {
    fn range(&self) -> Range<usize> {
        self.start..self.start + self.len as usize
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

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
        assert_eq!(interner.texts.entries.len(), 2, "the place is used again");
    }

    #[test]
    fn the_buffer_stays_in_proportion_to_the_strings_that_are_used() {
        let mut interner = Interner::default();
        let kept = interner.acquire("kept");
        for number in 0..10_000 {
            let id = interner.acquire(&format!("a value that is used by one pod: {number}"));
            interner.release(id);
        }
        assert!(interner.texts.buffer.len() < 2 * GAPS, "{}", interner.texts.buffer.len());
        assert_eq!((interner.text(kept), interner.find("kept")), ("kept", Some(kept)));
    }

    proptest! {
        #[test]
        fn all_strings_that_are_used_are_found_and_no_others(
            steps in proptest::collection::vec((any::<bool>(), 0_usize..12), 0..200),
        ) {
            let text = |number: usize| "ä".repeat(number * 150);
            let mut interner = Interner::default();
            let mut used: BTreeMap<usize, Vec<Id>> = BTreeMap::new();
            for (acquired, number) in steps {
                if acquired {
                    used.entry(number).or_default().push(interner.acquire(&text(number)));
                } else if let Some(id) = used.get_mut(&number).and_then(Vec::pop) {
                    interner.release(id);
                }
                for number in 0..12 {
                    let ids = used.get(&number).map(Vec::as_slice).unwrap_or_default();
                    prop_assert_eq!(interner.find(&text(number)), ids.first().copied());
                    for id in ids {
                        prop_assert_eq!(interner.text(*id), text(number));
                    }
                }
            }
        }
    }
}
