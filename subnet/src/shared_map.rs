//! A sorted map whose versions share what they have in common (copy on write): to change one entry of a version that others have
//! too costs a small part of the map, and what differs between two versions is found without a look at the parts that they share.

mod recount;

use std::cmp::Ordering;
use std::fmt;
use std::iter::{FlatMap, Map};
use std::ops::Index;
use std::slice;
use std::sync::Arc;

pub use recount::Recount;

/// So many entries are in one part at most. A change copies one part and the list of parts.
const MAX_PART: usize = 128;
/// A part with fewer is joined with the next one, if there is room.
const MIN_PART: usize = MAX_PART / 4;
/// A part that no other version has grows by so many entries at a time.
const GROWTH: usize = 8;

type Part<K, V> = Arc<Vec<(K, V)>>;

/// The map. [`Clone`] costs a counter.
pub struct SharedMap<K, V> {
    /// None is empty; keys grow within each and from one to the next.
    parts: Arc<Vec<Part<K, V>>>,
    len: usize,
}

/// A set of which versions share what they have in common.
pub type SharedSet<K> = SharedMap<K, ()>;

/// Entries in the order of their keys.
pub type Iter<'a, K, V> =
    Map<FlatMap<slice::Iter<'a, Part<K, V>>, slice::Iter<'a, (K, V)>, Entries<'a, K, V>>, Borrowed<'a, K, V>>;

type Entries<'a, K, V> = fn(&'a Part<K, V>) -> slice::Iter<'a, (K, V)>;
type Borrowed<'a, K, V> = fn(&'a (K, V)) -> (&'a K, &'a V);

/// One key of two versions, with what the earlier and the later one have for it.
pub type Pair<'a, K, V> = (&'a K, Option<&'a V>, Option<&'a V>);

impl<K, V> SharedMap<K, V> {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries.
    pub fn iter<'a>(&'a self) -> Iter<'a, K, V> {
        let entries: Entries<'a, K, V> = |part| part.iter();
        let borrowed: Borrowed<'a, K, V> = |(key, value)| (key, value);
        self.parts.iter().flat_map(entries).map(borrowed)
    }

    /// All keys.
    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> + Clone {
        self.iter().map(|(key, _)| key)
    }

    /// All values, in the order of their keys.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> + Clone {
        self.iter().map(|(_, value)| value)
    }

    /// Removes all entries.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether nothing of it is there twice.
    #[cfg(test)]
    pub(crate) fn shares_all_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.parts, &other.parts)
    }

    /// The keys of either version, with what `before` and this one have for them. Parts that both share are left out if
    /// `unshared`.
    fn merged<'a>(&'a self, before: &'a Self, unshared: bool) -> Merged<'a, K, V> {
        let same = unshared && Arc::ptr_eq(&self.parts, &before.parts);
        let cursor = |map: &'a Self| Cursor { parts: if same { &[] } else { &map.parts }, at: 0 };
        Merged { before: cursor(before), now: cursor(self), unshared }
    }
}

impl<K: Ord, V> SharedMap<K, V> {
    /// In which part this key is, if it is in any, or else the number of parts.
    fn part_of(&self, key: &K) -> usize {
        self.parts.partition_point(|part| part.last().is_some_and(|(last, _)| last < key))
    }

    fn find(&self, key: &K) -> Option<(usize, usize)> {
        let index = self.part_of(key);
        let at = self.parts.get(index)?.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
        Some((index, at))
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Option<&V> {
        let (index, at) = self.find(key)?;
        Some(&self.parts[index][at].1)
    }

    /// Whether there is an entry for a key.
    pub fn contains_key(&self, key: &K) -> bool {
        self.find(key).is_some()
    }

    /// The last entry before this key.
    pub fn last_before(&self, key: &K) -> Option<(&K, &V)> {
        let index = self.part_of(key);
        let in_part = |index: usize| {
            let part = self.parts.get(index)?;
            let at = part.partition_point(|(known, _)| known < key);
            part.get(at.checked_sub(1)?)
        };
        let entry = in_part(index).or_else(|| in_part(index.checked_sub(1)?));
        entry.map(|(key, value)| (key, value))
    }

    /// The first entry after this key.
    pub fn first_after(&self, key: &K) -> Option<(&K, &V)> {
        let index = self.parts.partition_point(|part| part.last().is_some_and(|(last, _)| last <= key));
        let part = self.parts.get(index)?;
        let at = part.partition_point(|(known, _)| known <= key);
        part.get(at).map(|(key, value)| (key, value))
    }

    /// The keys of either version, with what `before` and this one have for them.
    pub fn side_by_side<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = Pair<'a, K, V>> {
        self.merged(before, false)
    }

    /// What is different from `before`. Costs as much as what the two versions do not share.
    pub fn changes<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = Pair<'a, K, V>>
    where
        V: PartialEq,
    {
        self.merged(before, true).filter(|(_, was, now)| was != now)
    }
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    /// A value to change.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let (index, at) = self.find(key)?;
        let part = &mut Arc::make_mut(&mut self.parts)[index];
        Some(&mut Arc::make_mut(part)[at].1)
    }

    /// All entries, with values to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        let parts = Arc::make_mut(&mut self.parts).iter_mut();
        parts.flat_map(|part| Arc::make_mut(part).iter_mut()).map(|(key, value)| (&*key, value))
    }

    /// All values to change.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.iter_mut().map(|(_, value)| value)
    }

    /// Sets the value of a key; gives the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let index = self.part_of(&key).min(self.parts.len().saturating_sub(1));
        let parts = Arc::make_mut(&mut self.parts);
        let Some(part) = parts.get_mut(index) else {
            parts.push(Arc::new(vec![(key, value)]));
            self.len = 1;
            return None;
        };
        let at = match part.binary_search_by(|(known, _)| known.cmp(&key)) {
            Ok(at) => return Some(std::mem::replace(&mut Arc::make_mut(part)[at].1, value)),
            Err(at) => at,
        };
        if part.len() < MAX_PART {
            insert_at(part, at, (key, value));
            self.len += 1;
            return None;
        }
        if at == part.len() {
            // Behind the last one: keys that come in their order fill the parts.
            parts.push(Arc::new(vec![(key, value)]));
            self.len += 1;
            return None;
        }
        let tail = part[MAX_PART / 2..].to_vec();
        *part = Arc::new(part[..MAX_PART / 2].to_vec());
        parts.insert(index + 1, Arc::new(tail));
        self.insert(key, value)
    }

    /// Removes the entry of a key; gives its value.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let (index, at) = self.find(key)?;
        let parts = Arc::make_mut(&mut self.parts);
        let (_, value) = Arc::make_mut(&mut parts[index]).remove(at);
        self.len -= 1;
        match parts[index].len() {
            0 => drop(parts.remove(index)),
            few if few < MIN_PART => {
                let first = index.min(parts.len().saturating_sub(2));
                if let [one, other, ..] = &mut parts[first..]
                    && one.len() + other.len() <= MAX_PART
                {
                    Arc::make_mut(one).extend(other.iter().cloned());
                    parts.remove(first + 1);
                }
            }
            _ => {}
        }
        Some(value)
    }

    /// Removes the entries of which `keep` says no.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &V) -> bool) {
        let mut parts = Vec::with_capacity(self.parts.len());
        for part in self.parts.iter() {
            let Some(first) = part.iter().position(|(key, value)| !keep(key, value)) else {
                parts.push(Arc::clone(part));
                continue;
            };
            let mut left = part[..first].to_vec();
            left.extend(part[first + 1..].iter().filter(|(key, value)| keep(key, value)).cloned());
            if !left.is_empty() {
                parts.push(Arc::new(left));
            }
        }
        self.len = parts.iter().map(|part| part.len()).sum();
        self.parts = Arc::new(parts);
    }

    /// Has each part filled, after many insertions.
    pub fn pack(&mut self) {
        *self = std::mem::take(self).into_iter().collect();
    }

    /// The same content, sharing with `before` what is the `same` there. For what was made without regard to that.
    #[must_use]
    pub fn sharing_with(&self, before: &Self, same: impl Fn(&V, &V) -> bool) -> Self {
        if before.is_empty() {
            return self.clone();
        }
        let mut shared = before.clone();
        for (key, was, now) in self.merged(before, true) {
            match (was, now) {
                (Some(was), Some(now)) if same(was, now) => {}
                (_, Some(now)) => drop(shared.insert(key.clone(), now.clone())),
                (_, None) => drop(shared.remove(key)),
            }
        }
        shared
    }
}

/// Inserts into a part that has room. One that other versions have is copied at its new length.
fn insert_at<K: Clone, V: Clone>(part: &mut Part<K, V>, at: usize, entry: (K, V)) {
    if let Some(entries) = Arc::get_mut(part) {
        if entries.len() == entries.capacity() {
            entries.reserve_exact(GROWTH.min(MAX_PART.saturating_sub(entries.len())).max(1));
        }
        entries.insert(at, entry);
        return;
    }
    let mut entries = Vec::with_capacity(part.len() + 1);
    entries.extend_from_slice(&part[..at]);
    entries.push(entry);
    entries.extend_from_slice(&part[at..]);
    *part = Arc::new(entries);
}

/// A place in a map.
struct Cursor<'a, K, V> {
    /// The parts from there on.
    parts: &'a [Part<K, V>],
    /// The place in the first of them.
    at: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn entry(&self) -> Option<&'a (K, V)> {
        self.parts.first().map(|part| &part[self.at])
    }

    fn take(&mut self) -> Option<&'a (K, V)> {
        let (part, rest) = self.parts.split_first()?;
        let entry = &part[self.at];
        self.at += 1;
        if self.at == part.len() {
            (self.parts, self.at) = (rest, 0);
        }
        Some(entry)
    }

    /// The part that begins here.
    fn part(&self) -> Option<&'a Part<K, V>> {
        self.parts.first().filter(|_| self.at == 0)
    }
}

/// Two versions side by side.
struct Merged<'a, K, V> {
    before: Cursor<'a, K, V>,
    now: Cursor<'a, K, V>,
    /// Parts that both have are passed over.
    unshared: bool,
}

impl<'a, K: Ord, V> Iterator for Merged<'a, K, V> {
    type Item = Pair<'a, K, V>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.unshared {
            while let (Some(was), Some(now)) = (self.before.part(), self.now.part())
                && Arc::ptr_eq(was, now)
            {
                self.before.parts = &self.before.parts[1..];
                self.now.parts = &self.now.parts[1..];
            }
        }
        let order = match (self.before.entry(), self.now.entry()) {
            (Some((was, _)), Some((now, _))) => was.cmp(now),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return None,
        };
        let was = if order.is_le() { self.before.take() } else { None };
        let now = if order.is_ge() { self.now.take() } else { None };
        let (key, _) = now.or(was)?;
        Some((key, was.map(|(_, value)| value), now.map(|(_, value)| value)))
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { parts: Arc::default(), len: 0 }
    }
}

impl<K, V> Clone for SharedMap<K, V> {
    fn clone(&self) -> Self {
        Self { parts: Arc::clone(&self.parts), len: self.len }
    }
}

impl<K: Ord, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.changes(other).next().is_none()
    }
}

impl<K: Ord, V: Eq> Eq for SharedMap<K, V> {}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord, V> Index<&K> for SharedMap<K, V> {
    type Output = V;

    fn index(&self, key: &K) -> &V {
        self.get(key).expect("there is an entry for the key")
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut entries: Vec<(K, V)> = entries.into_iter().collect();
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        // Of two with one key the later one counts.
        entries.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        let len = entries.len();
        let mut parts = Vec::with_capacity(len.div_ceil(MAX_PART));
        let mut entries = entries.into_iter();
        while entries.len() > 0 {
            parts.push(Arc::new(entries.by_ref().take(MAX_PART).collect::<Vec<_>>()));
        }
        Self { parts: Arc::new(parts), len }
    }
}

impl<K: Ord, V, const N: usize> From<[(K, V); N]> for SharedMap<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for SharedMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        entries.into_iter().for_each(|(key, value)| drop(self.insert(key, value)));
    }
}

impl<'a, K, V> IntoIterator for &'a SharedMap<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<K: Clone, V: Clone> SharedMap<K, V> {
    /// All values, in the order of their keys.
    pub fn into_values(self) -> impl Iterator<Item = V> {
        self.into_iter().map(|(_, value)| value)
    }
}

impl<K: Clone, V: Clone> IntoIterator for SharedMap<K, V> {
    type Item = (K, V);
    type IntoIter = std::vec::IntoIter<(K, V)>;

    fn into_iter(self) -> Self::IntoIter {
        let mut entries = Vec::with_capacity(self.len);
        entries.extend(self.iter().map(|(key, value)| (key.clone(), value.clone())));
        entries.into_iter()
    }
}

#[cfg(test)]
mod tests;
