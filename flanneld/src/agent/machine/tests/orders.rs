//! Random orders of events, and what holds after each of them.

use proptest::prelude::*;

use super::*;

/// Something that can happen at any time.
#[derive(Clone, Debug)]
enum Step {
    Peers(BTreeSet<u8>),
    StoreAway,
    Configure(usize),
    BadConfiguration,
    Granted,
    Lost(u8),
    RulesMoved,
    Refuses(&'static str),
    RefusesRules,
    RefusesNothing,
    Damage(u8),
    InterfaceGone,
    InterfaceBack,
    Time(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => proptest::collection::btree_set(2u8..8, 0..6).prop_map(Step::Peers),
        1 => Just(Step::StoreAway),
        3 => (0..CONFIGS.len()).prop_map(Step::Configure),
        1 => Just(Step::BadConfiguration),
        4 => Just(Step::Granted),
        1 => (0u8..3).prop_map(Step::Lost),
        1 => Just(Step::RulesMoved),
        2 => prop_oneof![Just("link"), Just("vxlan"), Just("route"), Just("address")].prop_map(Step::Refuses),
        1 => Just(Step::RefusesRules),
        2 => Just(Step::RefusesNothing),
        2 => (0u8..3).prop_map(Step::Damage),
        1 => Just(Step::InterfaceGone),
        2 => Just(Step::InterfaceBack),
        2 => (0u16..90).prop_map(Step::Time),
    ]
}

impl World {
    fn take(&mut self, step: &Step) {
        match step {
            Step::Peers(numbers) => self.peers(numbers.iter().copied()),
            Step::StoreAway => {
                let before = self.known.take().unwrap_or_else(|| self.machine.view.known.clone());
                self.known = Some(Known { trouble: Some("away".into()), ..before });
            }
            Step::Configure(index) => drop(self.configure(CONFIGS[*index])),
            Step::BadConfiguration => {
                self.drive(Event::Told(NewsItem::Configuration(Box::new(Err("no JSON".into())))));
            }
            Step::Granted => self.grant(),
            Step::Lost(kind) => {
                // A store says it once for each lease that it gave.
                let contested = self.machine.own.contest.loss().is_some();
                let Some(own) = self.machine.own.lease().filter(|_| !contested).cloned() else { return };
                let loss = match kind {
                    0 => Loss::Taken { subnets: own.subnets, holder: peer(9).public },
                    1 => Loss::Contested { subnets: own.subnets, public: own.public },
                    _ => Loss::Changed { subnets: own.subnets },
                };
                if *kind != 1 {
                    self.all.leases.remove(&own.subnets);
                }
                self.drive(Event::Lost(loss));
            }
            Step::RulesMoved => drop(self.drive(Event::RulesMoved)),
            Step::Refuses(object) => drop(self.kernel.failing.insert(object, 22)),
            Step::RefusesRules => self.no_rules = true,
            Step::RefusesNothing => {
                self.kernel.failing.clear();
                self.no_rules = false;
            }
            Step::Damage(0) => self.kernel.state.routes.clear(),
            Step::Damage(1) => self.kernel.state = KernelState::default(),
            Step::Damage(_) => self.kernel.state.neighbours.clear(),
            Step::InterfaceGone => drop(self.kernel.host.links.remove(&2)),
            Step::InterfaceBack => self.kernel.host.links.extend(host().links),
            Step::Time(seconds) => self.pass(Duration::from_secs((*seconds).into())),
        }
    }

    /// What has to be so after each turn. `living`: subnets of peers that were planned once and have been in the
    /// store's answers since.
    fn check(&self, living: &BTreeSet<IpNet>) {
        let machine = &self.machine;
        let planned = self.planned();
        let missing: Vec<&IpNet> = living.difference(&planned).collect();
        assert!(missing.is_empty(), "routes of living peers are planned: {missing:?}");
        let can_plan = machine.own.lease().is_some()
            && machine.underlay.external.is_some()
            && machine.view.known.leases.is_some();
        assert!(!machine.change.is_trial() || !can_plan, "a trial ends with the turn");
        let rest = machine.rest(self.now, RESYNC);
        assert!(rest <= RESYNC);
        assert!(!rest.is_zero() || self.hurries < 3, "nothing keeps the loop turning without a pause");
        if machine.status.health.ready().is_ok() {
            let lease = machine.own.lease().expect("ready only with a lease");
            let links = &self.kernel.host.links;
            let external = machine.underlay.external.as_ref().expect("ready only with an interface");
            assert!(links.contains_key(&external.index) && can_plan);
            assert!(machine.own.contest.loss().is_none(), "ready only if nobody else writes the lease");
            let own = machine.force.active.own_devices();
            for name in own {
                let wanted = machine.view.interest.desired.links.contains_key(&name);
                assert!(!wanted || self.kernel.state.links.contains_key(&name), "ready only with {name}");
            }
            let env = std::fs::read_to_string(&machine.settings.subnet_file).unwrap();
            let gateway = subnet::env_file::gateway(lease.subnets.iter().next().unwrap());
            assert!(env.contains(&format!("FLANNEL_SUBNET={gateway}/")), "{env}: {}", lease.subnets);
        }
    }
}

/// The subnets of peers in what the machine was told.
fn told(world: &World) -> BTreeSet<IpNet> {
    let leases = world.machine.view.known.leases.iter().flat_map(|all| all.leases.values());
    let peers = leases.filter(|lease| lease.created < 1000);
    peers.flat_map(|lease| lease.subnets.iter()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_in_whatever_order_living_peers_stay_planned_trials_end_and_readiness_is_true(
        steps in proptest::collection::vec((step(), proptest::bool::weighted(0.8)), 1..40)
    ) {
        let mut world = World::settled();
        let mut living = world.planned();
        for (step, turns) in &steps {
            world.take(step);
            if *turns {
                world.turn();
                living.retain(|subnet| told(&world).contains(subnet));
                world.check(&living);
                if world.machine.turn.sound {
                    living.extend(world.planned().intersection(&told(&world)).copied());
                } else {
                    // Without its own devices it reaches no peer, and what doesn't work is not kept.
                    living.clear();
                }
            }
        }
        // The host and the store are well again: so is the node, within its longest pause.
        world.take(&Step::InterfaceBack);
        world.take(&Step::RefusesNothing);
        world.take(&Step::Peers([2, 3].into()));
        living.clear();
        for _ in 0..40 {
            world.turn();
            world.grant();
            let rest = world.machine.rest(world.now, RESYNC);
            world.pass(rest.max(Duration::from_millis(100)));
        }
        world.turn();
        prop_assert_eq!(world.machine.status.health.ready(), Ok(()), "{:?}", steps);
        living.retain(|subnet| told(&world).contains(subnet));
        world.check(&living);
        prop_assert!(world.now.wall > world.start.wall);
    }
}
