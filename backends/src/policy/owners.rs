//! Which pod an address belongs to, also while two objects claim it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The pod of each address, by its number.
#[derive(Debug, Default)]
pub(super) struct Owners {
    v4: HashMap<Ipv4Addr, u32>,
    v6: HashMap<Ipv6Addr, u32>,
    /// All that claim an address which several do.
    contested: BTreeMap<IpAddr, Vec<u32>>,
}

impl Owners {
    pub(super) fn get(&self, address: IpAddr) -> Option<u32> {
        match address {
            IpAddr::V4(v4) => self.v4.get(&v4),
            IpAddr::V6(v6) => self.v6.get(&v6),
        }
        .copied()
    }

    /// How many addresses have a pod.
    pub(super) fn count(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// A pod has the address, or claims it again with another claim; the greatest `claim` has it.
    pub(super) fn claim<K: Ord>(&mut self, address: IpAddr, pod: u32, claim: impl Fn(u32) -> K) {
        let owner = self.get(address).filter(|owner| *owner != pod);
        if owner.is_none() && !self.contested.contains_key(&address) {
            return self.set(address, Some(pod));
        }
        let claimants = self.contested.entry(address).or_insert_with(|| owner.into_iter().collect());
        if !claimants.contains(&pod) {
            claimants.push(pod);
        }
        let best = claimants.iter().copied().max_by_key(|pod| claim(*pod));
        self.set(address, best);
    }

    /// A pod doesn't have the address any more.
    pub(super) fn leave<K: Ord>(&mut self, address: IpAddr, pod: u32, claim: impl Fn(u32) -> K) {
        let Some(claimants) = self.contested.get_mut(&address) else {
            if self.get(address) == Some(pod) {
                self.set(address, None);
            }
            return;
        };
        claimants.retain(|one| *one != pod);
        let best = claimants.iter().copied().max_by_key(|pod| claim(*pod));
        if claimants.len() < 2 {
            self.contested.remove(&address);
        }
        self.set(address, best);
    }

    fn set(&mut self, address: IpAddr, pod: Option<u32>) {
        match (address, pod) {
            (IpAddr::V4(v4), Some(pod)) => drop(self.v4.insert(v4, pod)),
            (IpAddr::V6(v6), Some(pod)) => drop(self.v6.insert(v6, pod)),
            (IpAddr::V4(v4), None) => drop(self.v4.remove(&v4)),
            (IpAddr::V6(v6), None) => drop(self.v6.remove(&v6)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_that_claim_an_address_the_best_has_it_until_it_leaves() {
        let address: IpAddr = [10, 0, 0, 1].into();
        let mut owners = Owners::default();
        for pod in [2, 5, 3] {
            owners.claim(address, pod, |pod| pod);
        }
        assert_eq!(owners.get(address), Some(5));
        owners.leave(address, 5, |pod| pod);
        assert_eq!(owners.get(address), Some(3));
        owners.leave(address, 2, |pod| pod);
        owners.leave(address, 7, |pod| pod);
        assert_eq!(owners.get(address), Some(3));
        owners.leave(address, 3, |pod| pod);
        assert_eq!(owners.get(address), None);
        assert!(owners.contested.is_empty());
    }
}
