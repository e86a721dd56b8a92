//! What follows from a few leases is what a look at all of them gives.

use std::collections::BTreeSet;

use proptest::prelude::*;
use subnet::lease::parse_key;
use subnet::{Family, NetworkConfig, PublicAddrs, Subnets};

use super::*;
use crate::allocated::bytes_of;
use crate::plan::active::ActiveBackends;
use crate::plan::backend::{Macs, Node, PlanInput, Underlay};
use crate::plan::surroundings::Surroundings;
use crate::state::KernelState;
use crate::state::nexthop::NexthopSupport;
use subnet::Mac;

const BACKENDS: [&str; 4] = [
    r#"{"Type":"vxlan"}"#,
    r#"{"Type":"host-gw"}"#,
    r#"{"Type":"ipip"}"#,
    r#"{"Type":"vxlan","Fallback":"udp"}"#,
];

fn network(backend: usize, both: bool) -> NetworkConfig {
    let both = both && !BACKENDS[backend].contains("ipip");
    let families = if both { r#""EnableIPv6":true,"IPv6Network":"fd00:244::/48","# } else { "" };
    NetworkConfig::parse(&format!(
        r#"{{"Network":"10.244.0.0/16",{families}"Backend":{}}}"#,
        BACKENDS[backend]
    ))
    .unwrap()
}

/// What one node writes: mostly what it should, and sometimes what concerns others.
#[derive(Clone, Debug)]
struct Written {
    key: String,
    value: String,
    created: u64,
}

fn written() -> impl Strategy<Value = Written> {
    let odd = prop::option::weighted(0.25, 0u8..12);
    (2u8..40, 0u8..3, any::<bool>(), odd, 1u64..9).prop_map(|(number, moved, both, odd, created)| {
        let mac = if odd == Some(0) { 2 } else { number };
        let kind = match odd {
            Some(1) => "host-gw",
            Some(2) => "udp",
            Some(3) => "ipip",
            _ => "BACKEND",
        };
        let public = match odd {
            Some(4) => "192.0.2.1".to_owned(),
            Some(5) => format!("10.244.{number}.9"),
            Some(6) => "224.0.0.1".to_owned(),
            _ => format!("192.0.{}.{number}", 2 + moved),
        };
        let port = if odd == Some(7) { r#","Port":8473"# } else { "" };
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{moved:02x}:{mac:02x}"{port}}}"#);
        let data = if odd == Some(8) { "7".to_owned() } else { data };
        let value = format!(
            r#"{{"PublicIP":"{public}","PublicIPv6":"2001:db8::{moved}:{number}","BackendType":"{kind}","BackendData":{data},"BackendV6Data":{data}}}"#
        );
        let v4 = match odd {
            Some(9) => format!("10.244.{number}.0-25"),
            Some(10) => format!("10.99.{number}.0-24"),
            Some(11) => "10.244.1.0-24".to_owned(),
            _ => format!("10.244.{number}.0-24"),
        };
        let key = if both { format!("{v4}&fd00:244:0:{number:x}::-64") } else { v4 };
        Written { key, value, created }
    })
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Written>),
    Remove(prop::sample::Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => prop::collection::vec(written(), 1..3).prop_map(Step::Write),
        2 => any::<prop::sample::Index>().prop_map(Step::Remove),
    ];
    prop::collection::vec(step, 1..12)
}

/// One node, and what it knew and planned last.
struct World {
    network: NetworkConfig,
    active: ActiveBackends,
    own: Lease,
    node: Node,
    macs: Macs,
}

impl World {
    fn new(backend: usize, both: bool) -> Self {
        Self::of(network(backend, both), both)
    }

    fn of(network: NetworkConfig, both: bool) -> Self {
        let active = ActiveBackends::new(&network.backend, &network).unwrap();
        let public =
            PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: Some("2001:db8::1".parse().unwrap()) };
        let underlay = Underlay { index: 2, name: "eth0".parse().unwrap(), mtu: 1500 };
        let node = Node { underlay, public, local: public, source: public, direct: Default::default() };
        let mut macs = Macs::default();
        Family::BOTH.into_iter().for_each(|family| macs.set(family, Mac([2, 9, 0, 0, 0, 1])));
        let key = if both { "10.244.1.0-24&fd00:244:0:1::-64" } else { "10.244.1.0-24" };
        let subnets: Subnets = parse_key(key).unwrap();
        let own = Lease { subnets, public, attachment: active.attachment(&macs), created: 1, written: 1 };
        Self { network, active, own, node, macs }
    }

    fn context<'a>(
        &'a self,
        before: &'a KernelState,
        (surroundings, undecided): (&'a Surroundings, &'a BTreeSet<Mac>),
    ) -> PeerContext<'a> {
        let Self { network, active, own, .. } = self;
        PeerContext { network, former: &[], own, active, before, surroundings, undecided }
    }

    fn input<'a>(&'a self, peers: &'a [Peer]) -> PlanInput<'a> {
        PlanInput { node: &self.node, own: &self.own.subnets, macs: &self.macs, peers, all: peers }
    }

    fn plan(&self, peers: &Peers) -> KernelState {
        let peers: Vec<Peer> = peers.usable.values().copied().collect();
        self.active.plan(self.input(&peers))
    }

    fn leases(&self) -> Leases {
        let mut all = Leases::default();
        all.leases.insert(self.own.subnets, self.own.clone());
        all
    }
}

fn write(all: &mut Leases, Written { key, value, created }: &Written, kind: &str) {
    all.remove_entry(key);
    all.insert_written(key, value.replace("BACKEND", kind).as_bytes(), *created, *created);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn peers_and_plans_that_follow_are_those_of_all_leases(
        backend in 0..BACKENDS.len(),
        both in any::<bool>(),
        first in prop::collection::vec(written(), 0..20),
        steps in steps(),
    ) {
        let mut world = World::new(backend, both);
        let kind = world.network.backend.name().to_owned();
        let nothing = (&Surroundings::default(), &BTreeSet::new());
        let mut all = world.leases();
        first.iter().for_each(|one| write(&mut all, one, &kind));
        let now = std::time::Instant::now();
        let own = world.own.subnets;
        world.active.hear_ports(&all, &own, now);
        world.active.take_up(all.leases.values().map(|lease| &lease.attachment));
        let mut peers = Peers::choose(world.context(&KernelState::default(), nothing), &all);
        let mut plan = world.plan(&peers);
        for step in steps {
            let before = all.clone();
            match step {
                Step::Write(some) => some.iter().for_each(|one| write(&mut all, one, &kind)),
                Step::Remove(index) => {
                    let others: Vec<Subnets> = all.leases.keys().copied().filter(|one| *one != own).collect();
                    if !others.is_empty() {
                        all.leases.remove(index.get(&others));
                    }
                }
            }
            let followed = peers.follow(world.context(&plan, nothing), &before, &all);
            world.active.hear_ports(&all, &own, now);
            let taken = world.active.take_up(all.leases.values().map(|lease| &lease.attachment));
            let chosen = Peers::choose(world.context(&plan, nothing), &all);
            let whole = world.plan(&chosen);
            if let Some(followed) = &followed {
                prop_assert!(!taken, "a backend was to be taken up");
                prop_assert_eq!(followed, &chosen);
                let next = world.active.plan_since(world.input(&[]), &plan, &peers.usable, &followed.usable);
                prop_assert_eq!(next.as_ref(), Some(&whole));
            }
            (peers, plan) = (chosen, whole);
        }
    }
}

#[test]
fn one_of_many_is_followed_by_itself() {
    for backend in 0..3 {
        let world = World::new(backend, false);
        let kind = world.network.backend.name().to_owned();
        let mut all = world.leases();
        let peer = |number: u8| Written {
            key: format!("10.244.{number}.0-24"),
            value: format!(
                r#"{{"PublicIP":"192.0.2.{number}","BackendType":"{kind}","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{number:02x}"}}}}"#
            ),
            created: number.into(),
        };
        (2..200).for_each(|number| write(&mut all, &peer(number), ""));
        let nothing = (&Surroundings::default(), &BTreeSet::new());
        let none = KernelState::default();
        let mut peers = Peers::choose(world.context(&none, nothing), &all);
        let mut plan = world.plan(&peers);
        let usage = plan.use_nexthops(&NexthopSupport::default(), &none);
        let mut moved = peer(7);
        moved.value = moved.value.replace("192.0.2.7", "192.0.2.207");
        let removed = Written { value: "removed".into(), ..peer(9) };
        for change in [peer(201), moved, removed] {
            let before = all.clone();
            if change.value == "removed" {
                all.remove_entry(&change.key)
            } else {
                write(&mut all, &change, "")
            }
            let next =
                peers.follow(world.context(&plan, nothing), &before, &all).expect("it is an ordinary lease");
            let mut planned = world
                .active
                .plan_since(world.input(&[]), &plan, &peers.usable, &next.usable)
                .expect("a plan");
            assert!(planned.use_nexthops_since(&NexthopSupport::default(), &plan, &usage).is_some());
            assert_eq!(planned, world.plan(&next));
            assert_eq!(next.usable.len(), next.nodes);
            (peers, plan) = (next, planned);
        }
    }
}

#[test]
fn one_of_twenty_thousand_takes_no_memory_for_each_of_the_others() {
    let network = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
    let world = World::of(NetworkConfig::parse(network).unwrap(), false);
    let peer = |number: u16, moved: u8| {
        let [high, low] = number.to_be_bytes();
        let value = format!(
            r#"{{"PublicIP":"172.{}.{high}.{low}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:{moved:02x}:{high:02x}:{low:02x}"}}}}"#,
            20 + moved
        );
        Written { key: format!("10.{}.{low}.0-24", 1 + high), value, created: number.into() }
    };
    let mut all = world.leases();
    (0..20_000).for_each(|number| write(&mut all, &peer(number, 0), ""));
    all.pack();
    let nothing = (&Surroundings::default(), &BTreeSet::new());
    let none = KernelState::default();
    let support = NexthopSupport::default();
    let (whole, (mut peers, mut plan, mut usage)) = bytes_of(|| {
        let peers = Peers::choose(world.context(&none, nothing), &all);
        let mut plan = world.plan(&peers);
        let usage = plan.use_nexthops(&support, &none);
        (peers, plan, usage)
    });
    assert!(peers.usable.len() == 20_000 && plan.routes.len() == 20_000);
    for change in [peer(7, 1), peer(19_999, 1), peer(20_001, 0)] {
        let (bytes, after) = bytes_of(|| {
            let before = all.clone();
            write(&mut all, &change, "");
            let next = peers.follow(world.context(&plan, nothing), &before, &all)?;
            let mut planned =
                world.active.plan_since(world.input(&[]), &plan, &peers.usable, &next.usable)?;
            let used = planned.use_nexthops_since(&support, &plan, &usage)?;
            Some((next, planned, used))
        });
        (peers, plan, usage) = after.expect("it is an ordinary lease");
        println!("{bytes} bytes for one, {whole} for all");
        assert!(bytes < 200_000, "{bytes} bytes for one lease, {whole} for all");
    }
}
