//! The addresses behind selectors: found once when a set comes, then kept by each address that changes.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use subnet::Family;

use super::cluster::Cluster;
use super::demand::Demand;
use super::image::{Content, Delta, Image, MemberKey, MembersOf};
use super::keys::{self, Keys};
use super::pods::Record;
use super::selector::SelectorScope;

/// The smallest size of a set in the kernel.
const MIN_SIZE: u32 = 64;
/// Up to this size, the next one is four times as large; then twice, because the kernel clears as many places when it makes a set.
const MANY: u32 = 1024;

/// The members of all selectors that sets in the table are about.
#[derive(Debug, Default)]
pub(super) struct Members {
    of: HashMap<Arc<MemberKey>, Membership>,
}

#[derive(Debug)]
struct Membership {
    keys: Keys,
    /// That of the set in the kernel; it doesn't shrink, so that a set is not recreated again and again.
    size: u32,
}

impl MembersOf for Members {
    fn members(&self, key: &MemberKey) -> &Keys {
        static NONE: std::sync::LazyLock<Keys> = std::sync::LazyLock::new(|| Keys::new(4));
        self.of.get(key).map_or(&NONE, |membership| &membership.keys)
    }
}

impl Members {
    /// The size of the set of these members.
    pub(super) fn size(&self, key: &MemberKey) -> u32 {
        self.of.get(key).map_or(MIN_SIZE, |membership| membership.size)
    }

    /// Sets that an earlier run made larger than they need to be stay as large.
    pub(super) fn adopt_size(&mut self, key: &MemberKey, size: u32) {
        if let Some(membership) = self.of.get_mut(key) {
            membership.size = membership.size.max(size);
        }
    }

    /// The pods that have to be known for these sets.
    pub(super) fn demand(&self, cluster: &Cluster) -> Demand {
        let mut namespaces = BTreeSet::new();
        for key in self.of.keys() {
            match key.pods.as_deref().map(|pods| &pods.scope) {
                None => return Demand::Everything,
                Some(SelectorScope::Namespace(name)) => drop(namespaces.insert(name.to_string())),
                Some(SelectorScope::Matching(labels)) if labels.is_everything() => return Demand::Everything,
                Some(SelectorScope::Matching(labels)) => {
                    namespaces.extend(cluster.groups().namespaces_matching(labels))
                }
            }
        }
        Demand::of(namespaces)
    }

    /// How many addresses there are in all sets.
    pub(super) fn count(&self) -> usize {
        self.of.values().map(|membership| membership.keys.count()).sum()
    }

    /// The addresses in all sets, some of them several times.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.of.values().flat_map(|membership| membership.keys.iter()).filter_map(keys::address_of)
    }

    /// Keeps those of `wanted`, and finds those that are new.
    pub(super) fn set(&mut self, wanted: &HashSet<Arc<MemberKey>>, cluster: &Cluster) {
        self.of.retain(|key, _| wanted.contains(key));
        let mut new: Vec<_> = wanted.iter().filter(|key| !self.of.contains_key(*key)).cloned().collect();
        new.sort_unstable();
        for (key, keys) in find(&new, cluster) {
            let size = size_for(keys.count());
            self.of.insert(key, Membership { keys, size });
        }
    }

    /// Looks once more at what an address is; gives what changed, by set.
    ///
    /// The second value tells whether a set is too small now.
    pub(super) fn refresh<'a>(
        &mut self,
        addresses: impl Iterator<Item = &'a IpAddr> + Clone,
        cluster: &Cluster,
        image: &Image,
    ) -> (Vec<Delta>, bool) {
        let (mut deltas, mut too_small) = (Vec::new(), false);
        if addresses.clone().next().is_none() {
            return (deltas, too_small);
        }
        for (name, set) in &image.sets {
            let Content::Members(key) = &set.content else { continue };
            let Some(membership) = self.of.get_mut(key) else { continue };
            let mut delta = Delta::default();
            for address in addresses.clone().filter(|address| Family::of(**address) == key.family) {
                membership.refresh(key, *address, cluster, &mut delta);
            }
            if membership.keys.count() > membership.size as usize {
                membership.size = size_for(membership.keys.count());
                too_small = true;
            }
            if !delta.added.is_empty() || !delta.removed.is_empty() {
                deltas.push(Delta { set: name.clone(), ..delta });
            }
        }
        (deltas, too_small)
    }
}

impl Membership {
    fn refresh(&mut self, key: &MemberKey, address: IpAddr, cluster: &Cluster, delta: &mut Delta) {
        let owner = cluster.owner(address);
        let owner = owner.filter(|record| {
            key.pods.as_ref().is_none_or(|selector| cluster.groups().matches(record.group, selector))
        });
        let wanted: Vec<Vec<u8>> =
            owner.map(|record| entries(key, address, record, cluster)).unwrap_or_default();
        let prefix = keys::of_address(address);
        let stale: Vec<Vec<u8>> = self
            .keys
            .with_prefix(&prefix)
            .filter(|found| !wanted.iter().any(|want| want == found))
            .map(<[u8]>::to_vec)
            .collect();
        for stale in stale {
            self.keys.remove(&stale);
            delta.removed.push(stale);
        }
        for want in wanted {
            if self.keys.insert(&want) {
                delta.added.push(want);
            }
        }
    }
}

/// What a pod that a selector describes puts into the set.
fn entries(key: &MemberKey, address: IpAddr, record: &Record, cluster: &Cluster) -> Vec<Vec<u8>> {
    match &key.port {
        None => vec![keys::of_address(address)],
        Some((protocol, name)) => {
            let ports = cluster
                .ports_of(record)
                .iter()
                .filter(|port| (port.protocol, &port.name) == (*protocol, name));
            ports.map(|port| keys::of_endpoint(address, *protocol, port.port)).collect()
        }
    }
}

/// One pass over the groups for each selector, and one over the addresses of a family for all of them.
fn find(wanted: &[Arc<MemberKey>], cluster: &Cluster) -> Vec<(Arc<MemberKey>, Keys)> {
    if wanted.is_empty() {
        return Vec::new();
    }
    let groups = cluster.groups();
    let mut bytes: Vec<Vec<u8>> = vec![Vec::new(); wanted.len()];
    for family in Family::BOTH {
        let of_family: Vec<usize> = (0..wanted.len()).filter(|i| wanted[*i].family == family).collect();
        if of_family.is_empty() {
            continue;
        }
        let mut by_group: Vec<Vec<usize>> = vec![Vec::new(); groups.count()];
        let mut everywhere = Vec::new();
        for i in of_family {
            match &wanted[i].pods {
                None => everywhere.push(i),
                Some(selector) => {
                    groups.matching(selector).into_iter().for_each(|group| by_group[group as usize].push(i));
                }
            }
        }
        for (address, record) in cluster.owned(family) {
            for i in by_group[record.group as usize].iter().chain(&everywhere) {
                let (key, bytes) = (&wanted[*i], &mut bytes[*i]);
                match (address, &key.port) {
                    (IpAddr::V4(v4), None) => bytes.extend(v4.octets()),
                    (IpAddr::V6(v6), None) => bytes.extend(v6.octets()),
                    (_, Some(_)) => {
                        entries(key, address, record, cluster).iter().for_each(|entry| bytes.extend(entry));
                    }
                }
            }
        }
    }
    let found = wanted.iter().zip(bytes);
    found.map(|(key, bytes)| (Arc::clone(key), Keys::from_unsorted(key.key_len(), &bytes))).collect()
}

/// Room for twice as many.
fn size_for(count: usize) -> u32 {
    let needed = u32::try_from(count.saturating_mul(2)).unwrap_or(u32::MAX);
    let mut size = MIN_SIZE;
    while size < needed {
        size = size.saturating_mul(if size < MANY { 4 } else { 2 });
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_room_for_twice_as_many_and_a_large_one_for_less_than_four_times_as_many() {
        for count in (0..5000).chain([10_000, 16_384, 16_385, 150_000, 1 << 20]) {
            let size = size_for(count) as usize;
            assert!(size.is_power_of_two() && size >= 2 * count.max(32), "{count}: {size}");
            assert!(count <= 512 || size < 4 * count, "{count}: {size}");
        }
        assert_eq!([64, 256, 1024, 2048].map(|size| size_for(size / 2)), [64, 256, 1024, 2048]);
        assert!(size_for(usize::MAX) >= 1 << 31);
    }
}
