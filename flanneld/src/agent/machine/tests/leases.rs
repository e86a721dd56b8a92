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
