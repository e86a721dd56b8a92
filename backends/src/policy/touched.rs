//! What changed in the cluster since somebody looked.

use std::collections::BTreeSet;
use std::net::IpAddr;

/// What changed.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Addresses whose pod, or what is known of it, is another.
    pub(super) addresses: TouchedAddresses,
    /// Whether an address passed from one pod to another.
    pub(super) passed: bool,
    /// Policies.
    pub(super) policies: bool,
    /// Pods of this node.
    pub(super) locals: bool,
}

/// Addresses that changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TouchedAddresses {
    /// These.
    Some(BTreeSet<IpAddr>),
    /// So many that all are looked at: to list a large cluster's would take more memory than all else that is known of them.
    Any,
}

/// So many are listed in any case.
const FEW: usize = 4096;

impl Default for TouchedAddresses {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

impl TouchedAddresses {
    /// Adds one, where pods have `owned` addresses in all. More than half of those are not listed: to look at all is then
    /// not much more work than to look at those that changed.
    pub(super) fn insert(&mut self, address: IpAddr, owned: usize) {
        let Self::Some(addresses) = self else { return };
        addresses.insert(address);
        if addresses.len() > FEW.max(owned / 2) {
            *self = Self::Any;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::policy::{Engine, Plan};
    use crate::testing::policy::Random;

    fn insert(touched: &mut TouchedAddresses, count: u32, owned: usize) {
        (0..count).for_each(|number| touched.insert(IpAddr::from(number.to_be_bytes()), owned));
    }

    #[test]
    fn addresses_are_listed_until_they_are_more_than_half_of_very_many() {
        let mut touched = TouchedAddresses::default();
        insert(&mut touched, 4096, 10);
        assert!(matches!(&touched, TouchedAddresses::Some(addresses) if addresses.len() == 4096));
        insert(&mut touched, 4097, 10);
        assert_eq!(touched, TouchedAddresses::Any);
        let mut touched = TouchedAddresses::default();
        insert(&mut touched, 50_000, 100_000);
        assert!(matches!(&touched, TouchedAddresses::Some(addresses) if addresses.len() == 50_000));
        insert(&mut touched, 50_001, 100_000);
        assert_eq!(touched, TouchedAddresses::Any);
    }

    #[test]
    fn a_plan_is_the_same_whether_the_changed_addresses_or_all_are_looked_at() {
        let mut with_changes = 0;
        for seed in 0..120 {
            let start = Instant::now();
            let plans = [false, true].map(|any| plans(seed, start, any));
            assert_eq!(plans[0], plans[1], "seed {seed}");
            with_changes += plans[0].iter().filter(|plan| !plan.is_empty()).count();
        }
        assert!(with_changes > 200, "{with_changes}");
    }

    /// What has to change at each step of a random cluster.
    fn plans(seed: u64, mut now: Instant, any: bool) -> Vec<Plan> {
        let mut random = Random::new(seed);
        let mut world = random.world();
        let mut engine = Engine::new(world.settings.clone(), 24, 42);
        world.tell(&mut engine.cluster);
        engine.adopt(None, now);
        let mut plans = Vec::new();
        for _ in 0..10 {
            for _ in 0..=random.below(3) {
                random.change(&mut world, &mut engine.cluster);
            }
            if any {
                engine.cluster.touched.addresses = TouchedAddresses::Any;
            }
            now += Duration::from_secs(2);
            plans.push(engine.plan(now).unwrap());
        }
        plans
    }
}
