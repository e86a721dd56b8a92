//! The peers are those that an earlier run saved: others may have come since.

use super::*;

#[test]
fn nothing_is_taken_from_peers_that_a_recalled_list_lacks_until_the_store_gives_a_complete_one() {
    let mut world = World::settled();
    let routes = |world: &World| world.kernel.state.routes.len();
    assert_eq!(routes(&world), 3);
    world.peers([7]);
    let known = world.known.take().unwrap();
    world.known = Some(Known { recalled: true, ..known.clone() });
    world.turn();
    assert_eq!((world.planned().len(), routes(&world)), (1, 3));
    assert_eq!(world.machine.status.health.ready(), Ok(()));
    world.pass(Duration::from_secs(60));
    let saves = world.saves;
    world.turn();
    assert_eq!((routes(&world), world.saves), (3, saves), "nor is what was saved saved again");
    // The store has the same leases: what was left is of nobody.
    world.known = Some(known);
    world.turn();
    assert_eq!((routes(&world), world.saves), (1, saves + 1));
}

#[test]
fn the_filter_of_tunnels_is_told_whether_the_peers_are_all() {
    let mut world = World::settled();
    let recalled = |world: &World| world.machine.wanted_filters().iter().all(|filter| filter.recalled);
    assert!(!recalled(&world));
    world.known = Some(Known { recalled: true, ..world.machine.view.known.clone() });
    world.turn();
    assert!(recalled(&world));
}
