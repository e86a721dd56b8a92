//! Which changes of leases are planned by themselves. That the plan is the right one is asked in `increment` each time.

use super::*;

#[test]
fn one_lease_more_or_less_is_planned_without_the_others() {
    let mut world = World::settled();
    // The device is this process's from now on.
    world.turn();
    let mut followed = world.machine.planner.followed;
    for (numbers, planned) in [(vec![7, 8, 9, 10], 4), (vec![7, 8, 10], 3), (vec![10, 11, 12], 3)] {
        let looks = world.kernel.observed;
        world.peers(numbers);
        world.turn();
        followed += 1;
        assert_eq!((world.planned().len(), world.machine.planner.followed), (planned, followed));
        let (there, desired) = (&world.kernel.state, &world.machine.view.interest.desired);
        assert_eq!(
            (&there.routes, &there.neighbours, &there.fdb),
            (&desired.routes, &desired.neighbours, &desired.fdb)
        );
        assert_eq!(world.kernel.observed, looks, "the kernel is not read");
    }
}

#[test]
fn a_lease_that_concerns_this_node_or_others_has_all_leases_looked_at() {
    type Odd = fn(&Lease, &mut Lease);
    let odd: [(&str, Odd); 5] = [
        ("public address", |own, lease| lease.public = own.public),
        ("MAC of this node", |own, lease| lease.attachment = own.attachment.clone()),
        ("MAC of a peer", |_, lease| lease.attachment = peer(7).attachment),
        ("backend", |_, lease| lease.attachment = Attachment::HostGw),
        ("subnet", |_, lease| lease.subnets = ["10.244.7.0/25".parse().unwrap()].into_iter().collect()),
    ];
    for (what, make) in odd {
        let mut world = World::settled();
        let followed = world.machine.planner.followed;
        let mut lease = peer(20);
        make(&world.machine.own.lease().unwrap().clone(), &mut lease);
        world.all.leases.insert(lease.subnets, lease);
        world.snapshot();
        world.turn();
        assert_eq!(world.machine.planner.followed, followed, "{what}");
    }
}

#[test]
fn time_that_passes_after_a_lease_has_gone_is_no_reason_to_read_the_kernel_and_a_minute_is() {
    let mut world = World::settled();
    // The device is this process's from now on.
    world.turn();
    world.pass(Duration::from_secs(1));
    world.peers([7, 8]);
    world.turn();
    let gone: IpAddr = [192, 0, 2, 9].into();
    let admits = |world: &World| world.machine.rules.peers[0].contains_key(&gone);
    let (looks, mut turns) = (world.kernel.observed, 0);
    assert!(admits(&world), "for a moment");
    let mut passed = Duration::ZERO;
    // The address is no longer admitted, and the saved state is brought up to date.
    while passed < Duration::from_secs(30) {
        let rest = world.machine.rest(world.now, RESYNC);
        if passed + rest > Duration::from_secs(30) {
            break;
        }
        world.pass(rest);
        passed += rest;
        turns += 1;
        assert!(turns < 10, "the loop rests");
        world.drive(Event::Turn { known: None, tenure: Tenure::default(), cause: Cause::Timer });
        assert_eq!(world.kernel.observed, looks, "after {passed:?}");
    }
    assert!(turns > 0 && !admits(&world));
    world.pass(world.machine.rest(world.now, RESYNC));
    world.drive(Event::Turn { known: None, tenure: Tenure::default(), cause: Cause::Timer });
    assert_eq!(world.kernel.observed, looks + 1);
}

#[test]
fn what_the_kernel_told_is_looked_at_also_when_time_has_passed() {
    let mut world = World::settled();
    world.turn();
    world.peers([7, 8]);
    world.turn();
    world.pass(Duration::from_secs(5));
    let looks = world.kernel.observed;
    world.drive(Event::Turn { known: None, tenure: Tenure::default(), cause: Cause::Kernel });
    assert!(world.kernel.observed > looks);
}

#[test]
fn among_thousands_of_peers_the_kernel_is_read_once_in_several_minutes_and_at_once_when_it_tells_of_something()
 {
    const PEERS: u32 = 2 * PEERS_PER_MINUTE as u32 + 1;
    let mut world = World::new(r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#);
    world.turn();
    world.grant();
    let mut lease = peer(7);
    for number in 0..PEERS {
        let [_, high, middle, low] = number.to_be_bytes();
        lease.subnets = [format!("10.{}.{low}.0/24", 100 + middle).parse().unwrap()].into_iter().collect();
        lease.public = PublicAddrs { v4: Some([172, 20, middle, low].into()), v6: None };
        let mac = subnet::Mac([2, 0, 0, high, middle, low]);
        lease.attachment = Attachment::Vxlan { v4: Some(subnet::Vtep { vni: 1, mac, port: None }), v6: None };
        world.all.leases.insert(lease.subnets, lease.clone());
    }
    world.snapshot();
    world.turn();
    // The device is this process's from now on.
    world.turn();
    assert_eq!(world.machine.planner.peers.usable.len(), PEERS as usize);
    let (mut looks, mut passed, mut turns) = (world.kernel.observed, Duration::ZERO, Vec::new());
    while passed < 7 * RESYNC {
        let rest = world.machine.rest(world.now, RESYNC);
        assert!(rest <= RESYNC && rest >= Duration::from_secs(1));
        world.pass(rest);
        passed += rest;
        world.drive(Event::Turn { known: None, tenure: Tenure::default(), cause: Cause::Timer });
        turns.push((passed.as_secs() / 60, world.kernel.observed - looks));
        looks = world.kernel.observed;
    }
    let minutes: Vec<u64> = turns.iter().filter(|(_, looks)| *looks > 0).map(|(minute, _)| *minute).collect();
    assert_eq!(minutes, [3, 6], "{turns:?}");
    assert!((1..=7).all(|minute| turns.iter().any(|(turned, _)| *turned == minute)), "{turns:?}");
    world.drive(Event::Turn { known: None, tenure: Tenure::default(), cause: Cause::Kernel });
    assert_eq!(world.kernel.observed, looks + 1);
    assert_eq!(world.machine.minutes_between_looks(), 3);
    let desired = Arc::make_mut(&mut world.machine.view.interest.desired);
    desired.wireguard.insert("flannel-wg".parse().unwrap(), Arc::default());
    assert_eq!(world.machine.minutes_between_looks(), 1, "nothing tells of its peers");
}
