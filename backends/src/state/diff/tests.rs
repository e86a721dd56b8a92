//! Properties of `diff` over random states: from each of them, the changes lead to the desired one.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::LazyLock;

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use subnet::wireguard::PublicKey;
use subnet::{Family, Mac, PublicAddrs};

use super::*;
use crate::kernel::fake::FakeKernel;
use crate::kernel::reconcile::converge;
use crate::kernel::{Kernel, Scope};
use crate::state::forwarding::Forwarding;
use crate::state::nexthop::NexthopId;
use crate::state::wireguard::{WireguardDevice, WireguardEntry};
use crate::state::{Link, LinkIdentity, LinkSettings, PROTOCOL_BOOT, ROUTE_PROTOCOL, Route, VxlanIdentity};
use crate::wg::identity::Identity;

fn name(number: u8) -> Name {
    format!("flannel.{number}").parse().unwrap()
}

fn names() -> impl Strategy<Value = Name> {
    (1u8..4).prop_map(name)
}

fn macs() -> impl Strategy<Value = Mac> {
    (0u8..6).prop_map(|last| Mac([2, 0, 0, 0, 0, last]))
}

fn addrs() -> impl Strategy<Value = IpAddr> {
    (0u8..6).prop_map(|last| Ipv4Addr::new(10, 1, last, 0).into())
}

fn nets() -> impl Strategy<Value = IpNet> {
    (0u8..8, 24u8..26)
        .prop_map(|(third, len)| IpNet::new(Ipv4Addr::new(10, 1, third, 0).into(), len).unwrap())
}

/// Without the settings that are unknown where they can't be read.
fn plain(mtu: u32) -> LinkSettings {
    LinkSettings { accept_ra: None, accept_local: None, ..LinkSettings::plain(mtu) }
}

fn links(actual: bool) -> impl Strategy<Value = Link> {
    let vxlan =
        (1u32..3, prop::option::of(8472u16..8474), any::<bool>()).prop_map(move |(vni, port, gbp)| {
            let port = if actual { port.or(Some(8472)) } else { port };
            LinkIdentity::Vxlan(VxlanIdentity { vni, port, gbp, family: Family::V4, foreign_modes: false })
        });
    let vxlan_or_tun =
        prop_oneof![4 => vxlan, 1 => Just(LinkIdentity::Tun), 1 => Just(LinkIdentity::Wireguard)];
    let other = prop::sample::select(vec!["veth", "tun"]).prop_map(|kind| LinkIdentity::Other(kind.into()));
    let identity =
        if actual { prop_oneof![4 => vxlan_or_tun, 1 => other].boxed() } else { vxlan_or_tun.boxed() };
    (identity, any::<bool>(), 1400u32..1402, macs(), 1u32..3, addrs(), any::<bool>()).prop_map(
        move |(identity, up, mtu, mac, lower, local, learning)| {
            let settings = LinkSettings { up: up || !actual, mac, lower, local, learning, ..plain(mtu) };
            Link { identity, settings }
        },
    )
}

fn forwardings() -> impl Strategy<Value = Arc<Forwarding>> {
    (8285u16..8287, 0u8..3).prop_map(|(port, peer)| {
        Arc::new(Forwarding {
            local: PublicAddrs { v4: Some([192, 0, 2, 1].into()), v6: None },
            port,
            addresses: PublicAddrs { v4: Some([10, 1, 0, 0].into()), v6: None },
            mtu: 1472,
            check_sources: true,
            workers: 1,
            peers: vec![("10.1.2.0/24".parse().unwrap(), [192, 0, 2, peer].into())],
            wireguard: None,
        })
    })
}

/// What WireGuard of the kernel does: peers whose addresses don't overlap, with two ports and two keys.
fn wireguards() -> impl Strategy<Value = Arc<WireguardDevice>> {
    static KEYS: LazyLock<[Arc<Identity>; 2]> =
        LazyLock::new(|| [(); 2].map(|()| Arc::new(Identity::generate().unwrap())));
    let peer = (1u16..3, any::<bool>(), any::<bool>());
    let peers = prop::collection::btree_map(2u8..8, peer, 0..4);
    (peers, 51820u16..51822, any::<bool>(), any::<bool>()).prop_map(|(peers, port, other, shifted)| {
        let peers = peers.into_iter().map(|(number, (port, secret, wide))| {
            let net = |third| IpNet::new(Ipv4Addr::new(10, 2, third, 0).into(), 24).unwrap();
            // An address may go from one peer to another.
            let third = if shifted { number ^ 1 } else { number };
            let entry = WireguardEntry {
                endpoint: ([192, 0, 2, number], port).into(),
                allowed: [net(third)].into_iter().chain(wide.then(|| net(third + 100))).collect(),
                psk: secret.then(|| [number; 32].into()),
                keepalive: port,
            };
            (PublicKey::new([number; 32]).unwrap(), entry)
        });
        let identity = Some(Arc::clone(&KEYS[usize::from(other)]));
        Arc::new(WireguardDevice { port, identity, peers: peers.collect() })
    })
}

fn routes(protocols: &'static [u8]) -> impl Strategy<Value = Route> {
    let via = prop::option::of(addrs());
    let object = prop::option::of(nexthops());
    (nets(), via, names(), any::<bool>(), object, prop::sample::select(protocols), any::<bool>()).prop_map(
        |(dst, via, dev, onlink, object, protocol, foreign)| Route {
            dst,
            via,
            dev: Some(dev),
            onlink,
            nexthop: object
                .filter(|id| via.is_some() && id.is_for(dst) && !foreign && protocol != PROTOCOL_KERNEL),
            protocol,
            metric: 0,
            foreign,
        },
    )
}

/// The ids of objects for these destinations, each with a second one that is used where another program has the first.
fn nexthops() -> impl Strategy<Value = NexthopId> {
    (0x46u32..0x48, nets()).prop_map(|(region, net)| {
        let IpNet::V4(net) = net else { unreachable!("they are of IPv4") };
        let number = u32::from(net.network()) >> (32 - u32::from(net.prefix_len()));
        NexthopId::new(region << 24 | number & 0x00ff_ffff).unwrap()
    })
}

fn is_second(routes: &BTreeMap<IpNet, Route>, route: &Route) -> bool {
    routes.get(&route.dst).is_some_and(|first| first != route)
}

/// The objects on devices that exist through which no route leads.
fn orphans(
    objects: BTreeMap<NexthopId, Name>,
    links: &BTreeMap<Name, Link>,
    routes: &BTreeMap<IpNet, Route>,
) -> BTreeMap<NexthopId, Option<Name>> {
    let uses = |id| routes.values().any(|route| route.nexthop == Some(id));
    let all = objects.into_iter().filter(|(id, dev)| links.contains_key(dev) && !uses(*id));
    all.map(|(id, dev)| (id, Some(dev))).collect()
}

/// States that a kernel can be in: everything hangs on a device that exists.
pub(crate) fn states(actual: bool) -> impl Strategy<Value = KernelState> {
    const WANTED: &[u8] = &[ROUTE_PROTOCOL];
    const FOUND: &[u8] = &[ROUTE_PROTOCOL, ROUTE_PROTOCOL, PROTOCOL_BOOT, PROTOCOL_KERNEL, 4];
    let parts = (
        btree_map(names(), links(actual), 0..4),
        btree_map(names(), forwardings(), 0..4),
        prop::collection::vec(wireguards(), 4),
        btree_set((names(), nets()), 0..5),
        btree_map((names(), macs()), addrs(), 0..8),
        btree_map((names(), addrs()), macs(), 0..8),
        prop::collection::vec(routes(if actual { FOUND } else { WANTED }), 0..10),
        btree_set(routes(WANTED), 0..if actual { 3 } else { 1 }),
        btree_map(nexthops(), names(), if actual { 0..4 } else { 0..1 }),
        btree_set(nets(), 0..3),
    );
    parts.prop_map(
        move |(
            links,
            forwarding,
            wireguards,
            addresses,
            fdb,
            neighbours,
            routes,
            shadowed_routes,
            objects,
            blackholes,
        )| {
            let exists = |name: &Name| links.contains_key(name);
            let routed = |route: &Route| route.dev.is_some_and(|dev| exists(&dev));
            let routes: BTreeMap<_, _> = routes
                .into_iter()
                .filter(routed)
                .map(|route| (route.dst, Route { foreign: route.foreign && actual, ..route }))
                .collect();
            let is_tun = |name: &Name| links.get(name).is_some_and(|link| link.identity == LinkIdentity::Tun);
            let of_kernel = links.iter().filter(|(_, link)| link.identity == LinkIdentity::Wireguard);
            KernelState {
                wireguard: of_kernel.map(|(name, _)| *name).zip(wireguards).collect(),
                forwarding: forwarding.into_iter().filter(|(name, _)| is_tun(name)).collect(),
                addresses: addresses.into_iter().filter(|(name, _)| exists(name)).collect(),
                fdb: fdb.into_iter().filter(|((name, _), _)| exists(name)).collect(),
                neighbours: neighbours.into_iter().filter(|((name, _), _)| exists(name)).collect(),
                orphaned_nexthops: orphans(objects, &links, &routes),
                // With the object of the first route they would lead where it leads.
                shadowed_routes: shadowed_routes
                    .into_iter()
                    .map(|route| Route { nexthop: None, ..route })
                    .filter(|route| actual && routed(route) && is_second(&routes, route))
                    .collect(),
                routes: routes.into_iter().collect(),
                blackholes,
                links,
            }
        },
    )
}

/// `desired` as a kernel shows it that had `actual` before: where any port will do, the one that is
/// there, and the kernel's own routes where they are in the way or of no concern.
fn expected(desired: &KernelState, actual: &KernelState) -> KernelState {
    // Devices that are renamed live on.
    let mut renamed = actual.clone();
    renames(desired, actual).iter().for_each(|change| renamed.apply(change));
    let actual = &renamed;
    let mut expected = desired.clone();
    for (name, link) in &mut expected.links {
        if let LinkIdentity::Vxlan(want) = &mut link.identity {
            let kept =
                actual.links.get(name).filter(|have| desired.links[name].identity.accepts(&have.identity));
            want.port = match kept.map(|have| &have.identity) {
                Some(LinkIdentity::Vxlan(have)) => have.port,
                _ => want.port.or(Some(8472)),
            };
        }
    }
    for (dst, route) in actual.routes.iter().filter(|(_, route)| route.protocol == PROTOCOL_KERNEL) {
        let stays = route.dev.is_some_and(|dev| {
            let (want, have) = (desired.links.get(&dev), &actual.links[&dev]);
            want.is_some_and(|want| want.identity.accepts(&have.identity))
        });
        if stays {
            expected.routes.insert(*dst, *route);
        }
    }
    expected
}

fn applied(mut state: KernelState, changes: &[KernelChange]) -> KernelState {
    for change in changes {
        state.apply(change);
    }
    for link in state.links.values_mut() {
        if let LinkIdentity::Vxlan(vxlan) = &mut link.identity {
            vxlan.port = vxlan.port.or(Some(8472));
        }
    }
    state
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn applying_the_changes_gives_what_is_wanted(desired in states(false), actual in states(true)) {
        let after = applied(actual.clone(), &diff(&desired, &actual));
        prop_assert_eq!(&after, &expected(&desired, &actual));
        prop_assert_eq!(diff(&desired, &after), vec![]);
    }

    #[test]
    fn a_crash_at_any_step_is_made_good_by_the_next_run(
        desired in states(false), actual in states(true), step: prop::sample::Index,
    ) {
        let changes = diff(&desired, &actual);
        let crashed = applied(actual, &changes[..step.index(changes.len() + 1)]);
        let after = applied(crashed.clone(), &diff(&desired, &crashed));
        prop_assert_eq!(after, expected(&desired, &crashed));
    }

    #[test]
    fn a_kernel_with_side_effects_converges_after_any_damage(
        desired in states(false), actual in states(true), strangers in states(true),
    ) {
        // Strangers live on devices of other names and routes of other destinations.
        let mut kernel = FakeKernel::new(actual.clone());
        kernel.strangers = strangers.clone();
        let report = converge(&mut kernel, &desired, &Scope::default()).unwrap();
        prop_assert!(report.failed.is_empty());
        prop_assert!(report.settled, "{:?}", report.applied);
        let now = kernel.observe(&desired, &Scope::default()).unwrap().state;
        prop_assert_eq!(diff(&desired, &now), vec![]);
        prop_assert_eq!(&kernel.strangers, &strangers);
        let again = converge(&mut kernel, &desired, &Scope::default()).unwrap();
        prop_assert_eq!(again.applied.len(), 0);
    }

    #[test]
    fn wanting_nothing_removes_everything_but_the_kernels_own(actual in states(true)) {
        let after = applied(actual.clone(), &diff(&KernelState::default(), &actual));
        prop_assert!(after.is_empty(), "{after:?}");
    }
}

#[test]
fn a_new_route_comes_before_the_stale_one_and_the_stale_device_goes_last() {
    let link = Link {
        identity: LinkIdentity::Other("vxlan".into()),
        settings: LinkSettings {
            up: true,
            mtu: 1450,
            mac: Mac([2; 6]),
            lower: 1,
            local: Ipv4Addr::LOCALHOST.into(),
            learning: false,
            ..plain(1450)
        },
    };
    let route = |third: u8, dev: &str| {
        let dst = IpNet::new(Ipv4Addr::new(10, 1, third, 0).into(), 24).unwrap();
        let dev = Some(dev.parse().unwrap());
        (dst, Route { dev, ..Route::ours(dst) })
    };
    let actual = KernelState {
        links: [(name(1), link)].into(),
        routes: [route(1, "flannel.1"), route(2, "eth0")].into(),
        ..KernelState::default()
    };
    let desired =
        KernelState { routes: [route(1, "eth0"), route(3, "eth0")].into(), ..KernelState::default() };
    let order: Vec<String> = diff(&desired, &actual).iter().map(ToString::to_string).collect();
    assert_eq!(
        order,
        [
            "route replace 10.1.1.0/24 dev eth0 proto 70",
            "route replace 10.1.3.0/24 dev eth0 proto 70",
            "route del 10.1.2.0/24 dev eth0 proto 70",
            "link del flannel.1",
        ]
    );
}

#[test]
fn an_address_of_the_host_in_a_peers_subnet_is_reported_and_left_alone() {
    let dst: IpNet = "10.1.2.0/24".parse().unwrap();
    let kernel = Route {
        dst,
        via: None,
        dev: Some("cni0".parse().unwrap()),
        onlink: false,
        nexthop: None,
        protocol: PROTOCOL_KERNEL,
        metric: 0,
        foreign: true,
    };
    let ours =
        Route { dev: Some("eth0".parse().unwrap()), protocol: ROUTE_PROTOCOL, foreign: false, ..kernel };
    let state = |route| KernelState { routes: [(dst, route)].into(), ..KernelState::default() };
    assert_eq!(diff(&state(ours), &state(kernel)), vec![]);
    let words = conflicts(&state(ours), &state(kernel)).join("");
    assert!(words.contains("10.1.2.0/24") && words.contains("cni0"), "{words}");
    assert_eq!(conflicts(&state(ours), &state(ours)), Vec::<String>::new());
}

#[test]
fn what_a_device_remembers_of_its_former_ipv6_address_is_made_again() {
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let state = |local: &str, peer: &str| {
        let local: IpAddr = local.parse().unwrap();
        let identity = LinkIdentity::Vxlan(VxlanIdentity {
            vni: 1,
            port: Some(8472),
            gbp: false,
            family: Family::of(local),
            foreign_modes: false,
        });
        let link = Link { identity, settings: LinkSettings { local, ..plain(1450) } };
        KernelState {
            links: [(name(1), link)].into(),
            fdb: [((name(1), mac), peer.parse().unwrap())].into(),
            ..KernelState::default()
        }
    };
    let changes = diff(&state("fd31::77", "fd31::2"), &state("fd31::1", "fd31::2"));
    assert!(matches!(changes[0], KernelChange::SetLink(..)), "{changes:?}");
    let again =
        [KernelChange::DelFdb(name(1), mac), KernelChange::SetFdb(name(1), mac, "fd31::2".parse().unwrap())];
    assert_eq!(changes[1..], again);
    // Another destination replaces what the entry remembers, and IPv4's routes are forgotten with the address.
    let elsewhere = diff(&state("fd31::77", "fd31::3"), &state("fd31::1", "fd31::2"));
    assert!(matches!(elsewhere[..], [KernelChange::SetLink(..), KernelChange::SetFdb(..)]), "{elsewhere:?}");
    let v4 = diff(&state("192.0.2.77", "192.0.2.2"), &state("192.0.2.1", "192.0.2.2"));
    assert!(matches!(v4[..], [KernelChange::SetLink(..)]), "{v4:?}");
}
