//! What follows from leases alone is what a look at the kernel would give, after any history.

use proptest::prelude::*;

use super::*;
use crate::kernel::fake::FakeKernel;
use crate::state::PROTOCOL_KERNEL;
use crate::state::diff::tests::states;
use crate::state::host::{HostAddr, HostLink};
use crate::state::name::Name;
use subnet::Mac;

/// What happens besides another plan.
#[derive(Clone, Debug)]
enum Event {
    Nothing,
    /// Somebody changes the kernel, and that is heard before the next plan.
    Heard(KernelState),
    /// That is heard after the next plan was carried out.
    Unheard(KernelState),
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Nothing),
        1 => states(true).prop_map(Event::Heard),
        // An address that the host gets in a peer's subnet at this very moment is replaced after a look as well.
        1 => states(true).prop_map(|mut state| {
            state.routes.retain(|_, route| route.protocol != PROTOCOL_KERNEL);
            Event::Unheard(state)
        }),
    ]
}

/// A plan with the devices of `base`, on which peers have what `other` says.
fn plan(base: &KernelState, other: &KernelState) -> Arc<KernelState> {
    let there = |name: &Name| base.links.contains_key(name);
    let mut plan = base.clone();
    plan.fdb = other.fdb.iter().filter(|((name, _), _)| there(name)).map(|(key, dst)| (*key, *dst)).collect();
    let neighbours = other.neighbours.iter().filter(|((name, _), _)| there(name));
    plan.neighbours = neighbours.map(|(key, mac)| (*key, *mac)).collect();
    let routes = other.routes.iter().filter(|(_, route)| route.dev.is_some_and(|dev| there(&dev)));
    plan.routes = routes.map(|(dst, route)| (*dst, *route)).collect();
    Arc::new(plan)
}

/// The host's addresses, for which the kernel has routes.
fn see_addresses(kernel: &mut FakeKernel) {
    let connected = kernel.state.routes.values().filter(|route| route.protocol == PROTOCOL_KERNEL);
    let addresses = connected.map(|route| HostAddr {
        net: route.dst,
        deprecated: false,
        permanent: true,
        temporary: false,
    });
    let link = HostLink {
        index: 9,
        name: "cni0".parse().unwrap(),
        altnames: Vec::new(),
        mtu: 1500,
        up: true,
        carrier: true,
        bridge: true,
        controller: None,
        mac: Mac([2; 6]),
        addresses: addresses.collect(),
    };
    kernel.host.links = [(9, link)].into();
}

fn settled(kernel: &mut FakeKernel, desired: &Arc<KernelState>) -> Option<Settled> {
    let report = converge_but(kernel, desired, &Scope::default(), &BTreeSet::new()).unwrap();
    Settled::after(&report, desired, &Scope::default())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn plans_one_after_the_other_leave_what_a_look_at_each_would_leave(
        actual in states(true),
        base in states(false),
        steps in prop::collection::vec((states(false), events()), 1..6),
    ) {
        let mut kernel = FakeKernel::new(actual);
        see_addresses(&mut kernel);
        let mut since = settled(&mut kernel, &Arc::new(base.clone()));
        for (other, event) in steps {
            let desired = plan(&base, &other);
            let mut unheard = false;
            if let Event::Heard(state) | Event::Unheard(state) = &event {
                kernel.state = state.clone();
                see_addresses(&mut kernel);
                unheard = matches!(event, Event::Unheard(_));
                since = since.filter(|_| unheard);
            }
            let mut looked_at = kernel.clone();
            settled(&mut looked_at, &desired);
            let looks = kernel.observed;
            let known = since.is_some();
            let report =
                converge_since(&mut kernel, since.as_ref(), &desired, &Scope::default(), &BTreeSet::new()).unwrap();
            if unheard {
                since = settled(&mut kernel, &desired);
            } else {
                since = Settled::after(&report, &desired, &Scope::default());
            }
            prop_assert_eq!(&kernel.state, &looked_at.state);
            // Conflicts are only found by a look.
            let quiet = matches!(event, Event::Nothing) && known;
            prop_assert!(!quiet || kernel.observed == looks || !kernel.host.links[&9].addresses.is_empty());
        }
    }
}

#[test]
fn a_refused_change_has_the_kernel_looked_at() {
    let dst = "10.1.2.0/24".parse().unwrap();
    let dev = Some("eth0".parse().unwrap());
    let mut kernel = FakeKernel::default();
    let since = settled(&mut kernel, &Arc::default()).unwrap();
    let route = crate::state::Route { dev, ..crate::state::Route::ours(dst) };
    let desired = KernelState { routes: [(dst, route)].into(), ..KernelState::default() };
    kernel.failing.insert("route", 101);
    let (looks, none) = (kernel.observed, BTreeSet::new());
    let report = converge_since(&mut kernel, Some(&since), &desired, &Scope::default(), &none).unwrap();
    assert!(kernel.observed > looks && report.failed.len() == 1 && report.applied.is_empty());
    assert!(Settled::after(&report, &Arc::new(desired), &Scope::default()).is_none());
}

#[test]
fn what_a_new_record_makes_ours_has_the_kernel_looked_at_if_there_is_such_a_thing() {
    let mut kernel = FakeKernel::default();
    let since = settled(&mut kernel, &Arc::default()).unwrap();
    let scope = Scope { records: Arc::default(), ..Scope::default() };
    assert!(changes(&since, &KernelState::default(), &scope).is_some());
    let intruder = crate::state::Route::ours("10.1.9.0/24".parse().unwrap());
    kernel.host.intruders.push(intruder);
    let since = settled(&mut kernel, &Arc::default()).unwrap();
    assert!(changes(&since, &KernelState::default(), &scope).is_none());
    assert!(changes(&since, &KernelState::default(), &since.scope).is_some());
    let narrower = Scope { networks: vec!["10.1.0.0/16".parse().unwrap()], ..since.scope.clone() };
    assert!(changes(&since, &KernelState::default(), &narrower).is_none());
}
