//! What is known of each pod, in as few bytes as it takes, by number and by uid.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use subnet::Family;
use subnet::policy::Uid;

use super::groups::GroupId;
use super::slots::{SlotIndex, Slots};

/// All pods. Their addresses are apart from the rest, because most have one of one family.
#[derive(Debug, Default)]
pub(super) struct Pods {
    records: Slots<Record>,
    index: SlotIndex,
    v4: Column<Ipv4Addr>,
    v6: Column<Ipv6Addr>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Record {
    uid: [u8; 16],
    pub(super) created: u32,
    pub(super) group: GroupId,
    pub(super) ports: u32,
    pub(super) origin: PodSource,
}

/// Who says which addresses a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PodSource {
    /// Its object.
    Object,
    /// Our CNI plugin gave them to it, long before its object says so.
    Plugin,
    /// Our CNI plugin took them back, though its object goes on naming them.
    Released,
}

/// The addresses of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

/// The addresses of one family by the number of their pod, up to the last pod that has one.
#[derive(Debug)]
struct Column<T>(Vec<Option<T>>);

impl Record {
    pub(super) fn new(uid: Uid, created: u64, group: GroupId, ports: u32, origin: PodSource) -> Self {
        let created = u32::try_from(created).unwrap_or(u32::MAX);
        Self { uid: uid.0.to_be_bytes(), created, group, ports, origin }
    }

    pub(super) fn uid(&self) -> Uid {
        Uid(u128::from_be_bytes(self.uid))
    }

    pub(super) fn announced(&self) -> bool {
        self.origin == PodSource::Plugin
    }

    /// Who of two that claim an address has it: the one that our CNI plugin named, then the younger.
    pub(super) fn claim(&self) -> (bool, u32, [u8; 16]) {
        (self.announced(), self.created, self.uid)
    }
}

impl Addresses {
    /// The first of each family.
    pub(super) fn first_of(addresses: &[IpAddr]) -> Self {
        let v4 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        let v6 = addresses.iter().find_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        Self { v4, v6 }
    }

    pub(super) fn of(self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::from),
            Family::V6 => self.v6.map(IpAddr::from),
        }
    }

    pub(super) fn iter(self) -> impl Iterator<Item = IpAddr> {
        Family::BOTH.into_iter().filter_map(move |family| self.of(family))
    }
}

impl<T> Default for Column<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Column<T> {
    fn get(&self, number: u32) -> Option<T> {
        self.0.get(number as usize).copied().flatten()
    }

    fn set(&mut self, number: u32, address: Option<T>) {
        let at = number as usize;
        if at >= self.0.len() {
            if address.is_none() {
                return;
            }
            self.0.resize(at + 1, None);
        }
        self.0[at] = address;
    }
}

impl Pods {
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// The numbers of all pods, in no order.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.index.numbers()
    }

    pub(super) fn number(&self, uid: Uid) -> Option<u32> {
        let uid = uid.0.to_be_bytes();
        self.index.find(uid, |number| self.records[number].uid == uid)
    }

    /// The pod with this number, or the one that had it last.
    pub(super) fn get(&self, number: u32) -> &Record {
        &self.records[number]
    }

    pub(super) fn addresses(&self, number: u32) -> Addresses {
        Addresses { v4: self.v4.get(number), v6: self.v6.get(number) }
    }

    /// Every number that a pod with an address of this family has or had.
    pub(super) fn numbers_with(&self, family: Family) -> std::ops::Range<u32> {
        let len = match family {
            Family::V4 => self.v4.0.len(),
            Family::V6 => self.v6.0.len(),
        };
        0..len as u32
    }

    /// The number of a pod that was not known.
    pub(super) fn add(&mut self, record: Record, addresses: Addresses) -> u32 {
        let number = self.records.add(record);
        let records = &self.records;
        self.index.insert(number, |number| records[number].uid);
        self.set_addresses(number, addresses);
        number
    }

    /// The same pod is another way now.
    pub(super) fn replace(&mut self, number: u32, record: Record, addresses: Addresses) {
        self.records[number] = record;
        self.set_addresses(number, addresses);
    }

    /// A pod whose addresses the CNI plugin took back.
    pub(super) fn release(&mut self, number: u32) {
        self.records[number].origin = PodSource::Released;
        self.set_addresses(number, Addresses::default());
    }

    /// The number is another pod's as soon as one comes.
    pub(super) fn remove(&mut self, number: u32) {
        self.index.remove(number, self.records[number].uid);
        self.records.free(number);
    }

    fn set_addresses(&mut self, number: u32, addresses: Addresses) {
        self.v4.set(number, addresses.v4);
        self.v6.set(number, addresses.v6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: u128) -> Record {
        Record::new(Uid(uid), 0, 0, 0, PodSource::Object)
    }

    #[test]
    fn a_pod_takes_as_much_as_its_addresses_families_do() {
        assert_eq!((size_of::<Record>(), size_of::<Option<Ipv4Addr>>()), (32, 5));
        let mut pods = Pods::default();
        let addresses: [IpAddr; 2] = [[10, 0, 0, 1].into(), "fd00::1".parse().unwrap()];
        for uid in 0..9 {
            pods.add(record(uid), Addresses::first_of(&addresses[..1]));
        }
        assert_eq!((pods.v4.0.len(), pods.v6.0.len()), (9, 0));
        let both = pods.add(record(9), Addresses::first_of(&addresses));
        assert_eq!(pods.addresses(both).iter().collect::<Vec<_>>(), addresses);
        assert_eq!(pods.addresses(3).iter().collect::<Vec<_>>(), addresses[..1]);
    }

    #[test]
    fn a_pod_that_takes_the_place_of_another_has_only_its_own_addresses() {
        let mut pods = Pods::default();
        let both: [IpAddr; 2] = ["fd00::1".parse().unwrap(), [10, 0, 0, 1].into()];
        let first = pods.add(record(1), Addresses::first_of(&both));
        pods.remove(first);
        assert_eq!((pods.number(Uid(1)), pods.len()), (None, 0));
        let second = pods.add(record(2), Addresses::default());
        assert_eq!((second, pods.number(Uid(2))), (first, Some(second)));
        assert_eq!(pods.addresses(second), Addresses::default());
    }
}
