//! A list of peers that an earlier run saved may lack those that came last. What the kernel has for them stays until the store has
//! given a complete list.

use std::sync::Arc;

use crate::kernel::Scope;
use crate::state::diff::diff;
use crate::state::wireguard::WireguardPeers;
use crate::state::{KernelChange, KernelState, Route};

/// The changes that turn `actual` into `desired`, without those by which a peer would lose its way that is only not listed.
pub fn changes(desired: &KernelState, actual: &KernelState, scope: &Scope) -> Vec<KernelChange> {
    let all = diff(desired, actual);
    if !scope.recalled {
        return all;
    }
    all.into_iter().filter_map(|change| kept(change, desired, scope)).collect()
}

/// A change as it is made although there may be peers that are not listed.
fn kept(change: KernelChange, desired: &KernelState, scope: &Scope) -> Option<KernelChange> {
    let of_unlisted = match &change {
        KernelChange::DelRoute(route) => {
            !desired.routes.contains_key(&route.dst) && !is_for_own_pods(route, scope)
        }
        KernelChange::DelNeighbour(name, ip) => !desired.neighbours.contains_key(&(*name, *ip)),
        KernelChange::DelFdb(name, mac) => !desired.fdb.contains_key(&(*name, *mac)),
        // A route that stays may lead through it.
        KernelChange::DelNexthop(_) => true,
        KernelChange::SetWireguardPeers(name, peers) if !peers.remove.is_empty() => {
            let peers = WireguardPeers { upsert: peers.upsert.clone(), ..WireguardPeers::default() };
            return (!peers.is_empty()).then(|| KernelChange::SetWireguardPeers(*name, Arc::new(peers)));
        }
        _ => false,
    };
    (!of_unlisted).then_some(change)
}

fn is_for_own_pods(route: &Route, scope: &Scope) -> bool {
    scope.subnets.iter().any(|subnet| subnet.contains(&route.dst))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use subnet::Mac;
    use subnet::wireguard::PublicKey;

    use super::*;
    use crate::kernel::fake::FakeKernel;
    use crate::kernel::reconcile::{Settled, converge, converge_since};
    use crate::state::name::Name;
    use crate::state::wireguard::{WireguardDevice, WireguardEntry};
    use crate::state::{Link, LinkIdentity, LinkSettings};

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    /// What the kernel has for these peers.
    fn peers(numbers: &[u8]) -> KernelState {
        let link = Link { identity: LinkIdentity::Wireguard, settings: LinkSettings::plain(1420) };
        let mut state = KernelState { links: [(name("flannel-wg"), link)].into(), ..KernelState::default() };
        let mut device = WireguardDevice::default();
        for number in numbers {
            let (base, mac) = ([10, 1, *number, 0].into(), Mac([2, 0, 0, 0, 0, *number]));
            let dst = format!("10.1.{number}.0/24").parse().unwrap();
            let route =
                Route { via: Some(base), dev: Some(name("flannel-wg")), onlink: true, ..Route::ours(dst) };
            state.routes.insert(dst, route);
            state.neighbours.insert((name("flannel-wg"), base), mac);
            state.fdb.insert((name("flannel-wg"), mac), [192, 0, 2, *number].into());
            let entry = WireguardEntry {
                endpoint: ([192, 0, 2, *number], 51820).into(),
                allowed: [dst].into(),
                psk: None,
                keepalive: 0,
            };
            device.peers.insert(PublicKey::new([*number; 32]).unwrap(), entry);
        }
        state.wireguard.insert(name("flannel-wg"), Arc::new(device));
        state
    }

    fn recalled(recalled: bool) -> Scope {
        Scope { recalled, subnets: vec!["10.1.9.0/24".parse().unwrap()], ..Scope::default() }
    }

    #[test]
    fn nothing_is_taken_from_a_peer_that_a_recalled_list_lacks_until_the_list_is_complete() {
        let mut kernel = FakeKernel::new(peers(&[2, 3]));
        let desired = peers(&[2, 4]);
        let report = converge(&mut kernel, &desired, &recalled(true)).unwrap();
        assert!(report.settled && report.failed.is_empty(), "{report:?}");
        assert_eq!(kernel.state, peers(&[2, 3, 4]), "{:?}", kernel.log);
        // What is left is not known to be gone although nothing else has changed.
        let desired = Arc::new(desired);
        let settled = Settled::after(&report, &desired, &recalled(true)).unwrap();
        let report =
            converge_since(&mut kernel, Some(&settled), &desired, &recalled(false), &BTreeSet::new())
                .unwrap();
        assert!(report.settled, "{report:?}");
        assert_eq!(kernel.state, *desired, "{:?}", kernel.log);
    }

    #[test]
    fn a_peer_that_is_listed_is_as_in_the_list_and_this_nodes_pods_are_no_peers() {
        let other = |number: u8| Route {
            via: Some([192, 0, 2, 99].into()),
            ..peers(&[number]).routes.values().next().copied().unwrap()
        };
        let mut actual = peers(&[2, 9]);
        actual.routes = [other(2), other(9)].map(|route| (route.dst, route)).into();
        actual.shadowed_routes.insert(Route { metric: 7, ..other(2) });
        let texts: Vec<String> =
            changes(&peers(&[2]), &actual, &recalled(true)).iter().map(ToString::to_string).collect();
        assert!(texts.len() == 3, "{texts:?}");
        assert!(texts[0].starts_with("route del 10.1.2.0/24") && texts[0].contains("metric 7"), "{texts:?}");
        assert!(texts[1].starts_with("route replace 10.1.2.0/24 via 10.1.2.0"), "{texts:?}");
        assert!(texts[2].starts_with("route del 10.1.9.0/24"), "{texts:?}");
    }
}
