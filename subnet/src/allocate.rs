//! Which subnet a node without a lease takes; pure, so that every store allocates alike.

use crate::config::{NetworkConfig, Range};
use crate::net::{Family, Subnets, addr_of, bits_of, overlap};
use ipnet::IpNet;

/// How many free subnets are considered. Picking among the first hundred, as Flannel does, keeps nodes
/// that start at once from racing for the same one while low subnets still fill up first.
const CANDIDATES: usize = 100;

/// Completes `kept` with a free subnet of each enabled family that it has none of, with `random` choosing
/// among the first hundred.
///
/// `random` is given the number of candidates, at least 1, and returns an index below it.
/// `None` when a family has no free subnet left.
pub fn allocate(
    config: &NetworkConfig,
    kept: Subnets,
    taken: impl IntoIterator<Item = Subnets>,
    mut random: impl FnMut(usize) -> usize,
) -> Option<Subnets> {
    let taken: Vec<Subnets> = taken.into_iter().collect();
    let mut picked = kept;
    for range in config.ranges() {
        let family = Family::of(range.network.addr());
        if kept.get(family).is_some() {
            continue;
        }
        let candidates = free(range, taken.iter().filter_map(|subnets| subnets.get(family)));
        let index = random(candidates.len().max(1));
        picked.set(*candidates.get(index)?);
    }
    Some(picked)
}

/// The first free subnets of `range`, lowest first.
fn free(range: &Range, taken: impl Iterator<Item = IpNet>) -> Vec<IpNet> {
    let family = Family::of(range.network.addr());
    let step = range.step();
    let mut busy: Vec<(u128, u128)> = taken
        .filter(|net| overlap(*net, range.network))
        .map(|net| (bits_of(net.network()), bits_of(net.broadcast())))
        .collect();
    busy.sort_unstable();

    let mut found = Vec::new();
    let (mut next, last) = (bits_of(range.min), bits_of(range.max));
    let mut busy = busy.into_iter().peekable();
    while next <= last && found.len() < CANDIDATES {
        let end = next + (step - 1);
        while busy.next_if(|(_, to)| *to < next).is_some() {}
        match busy.peek() {
            // A busy prefix that contains this one may cover many steps: go on behind it at once.
            Some((from, to)) if *from <= end => {
                let Some(behind) = (to / step + 1).checked_mul(step) else { break };
                next = next.max(behind).max(end.saturating_add(1));
            }
            _ => {
                if let Ok(net) = IpNet::new(addr_of(family, next), range.subnet_len) {
                    found.push(net);
                }
                let Some(following) = end.checked_add(1) else { break };
                next = following;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONE: Subnets = Subnets { v4: None, v6: None };

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
    }

    fn subnets(text: &str) -> Subnets {
        [text.parse::<IpNet>().unwrap()].into_iter().collect()
    }

    #[test]
    fn the_lowest_free_subnets_are_candidates() {
        let config = config(r#"{"Network":"10.3.0.0/16"}"#);
        let taken = ["10.3.1.0/24", "10.3.2.128/25", "10.3.4.0/23"].map(subnets);
        assert_eq!(allocate(&config, NONE, taken, |_| 0), Some(subnets("10.3.3.0/24")));
        assert_eq!(allocate(&config, NONE, taken, |_| 1), Some(subnets("10.3.6.0/24")));
        let mut among = 0;
        allocate(&config, NONE, taken, |count| {
            among = count;
            count - 1
        });
        assert_eq!(among, CANDIDATES);
    }

    #[test]
    fn a_full_network_gives_nothing() {
        let config = config(r#"{"Network":"10.3.0.0/24"}"#);
        assert_eq!(allocate(&config, NONE, ["10.3.0.0/16"].map(subnets), |_| 0), None);
        assert_eq!(allocate(&config, NONE, ["10.3.0.64/26", "10.3.0.128/25"].map(subnets), |_| 0), None);
    }

    #[test]
    fn both_families_are_picked_independently() {
        let config = config(r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
        let picked = allocate(&config, NONE, [subnets("10.3.1.0/24")], |_| 0).unwrap();
        assert_eq!(picked.to_string(), "10.3.2.0/24 and fc00:0:0:1::/64");
        let picked = allocate(&config, subnets("10.3.77.0/24"), [picked], |_| 0).unwrap();
        assert_eq!(picked.to_string(), "10.3.77.0/24 and fc00:0:0:2::/64");
    }

    #[test]
    fn the_last_subnet_of_the_address_space_is_no_problem() {
        // Not from a configuration: pods can't have such addresses.
        let config = serde_json::to_string(&config(r#"{"Network":"10.3.0.0/24","SubnetMin":"10.3.0.192"}"#));
        let config: NetworkConfig =
            serde_json::from_str(&config.unwrap().replace("10.3.0.", "255.255.255.")).unwrap();
        assert_eq!(allocate(&config, NONE, [], |_| 0), Some(subnets("255.255.255.192/26")));
        assert_eq!(allocate(&config, NONE, [subnets("255.255.255.255/32")], |_| 0), None);
    }

    /// The slow and obvious way: try every step against every taken prefix.
    fn model(range: &Range, taken: &[Subnets]) -> Vec<IpNet> {
        let (mut found, mut base) = (Vec::new(), bits_of(range.min));
        while base <= bits_of(range.max) && found.len() < CANDIDATES {
            let net = IpNet::new(addr_of(Family::V4, base), range.subnet_len).unwrap();
            if !taken.iter().any(|held| held.overlaps(&[net].into_iter().collect())) {
                found.push(net);
            }
            base += range.step();
        }
        found
    }

    proptest! {
        #[test]
        fn candidates_equal_the_slow_model(
            len in 18u8..29, held in prop::collection::vec((0u32..0x1_0000, 12u8..=32), 0..60),
        ) {
            let config = config(&format!(r#"{{"Network":"10.3.0.0/16","SubnetLen":{len}}}"#));
            let range = config.range(Family::V4).unwrap();
            let held: Vec<Subnets> = held
                .into_iter()
                .map(|(low, len)| {
                    let addr = std::net::Ipv4Addr::from(0x0a03_0000 | low);
                    [IpNet::new(addr.into(), len.max(17)).unwrap()].into_iter().collect()
                })
                .collect();
            let fast = free(range, held.iter().filter_map(|subnets| subnets.get(Family::V4)));
            prop_assert_eq!(&fast, &model(range, &held));
            for net in fast {
                prop_assert!(range.allows(net));
            }
        }
    }
}
