//! The kernel refuses a device of this node: what does not depend on it goes on.

use super::*;

/// Its device is gone, and the kernel makes no other.
fn refuse(world: &mut World) {
    world.kernel.failing.insert("link", 17);
    world.kernel.state = KernelState::default();
}

#[test]
fn traffic_rules_are_looked_at_while_a_device_is_refused() {
    let mut world = World::settled();
    refuse(&mut world);
    world.turn();
    assert!(world.reasons().contains("kernel") && !world.reasons().contains("rules"), "{}", world.reasons());
    world.no_rules = true;
    world.drive(Event::RulesMoved);
    world.turn();
    assert!(world.reasons().contains("replacing them"), "they were asked for: {}", world.reasons());
    world.no_rules = false;
    world.turn();
    assert!(world.reasons().contains("kernel") && !world.reasons().contains("rules"), "{}", world.reasons());
}

#[test]
fn a_node_that_starts_without_its_device_has_rules_and_saves_its_state_but_takes_no_pods() {
    let mut world = World::new(VXLAN);
    refuse(&mut world);
    world.turn();
    world.grant();
    world.peers([7]);
    world.turn();
    let reasons = world.reasons();
    assert!(reasons.contains("kernel") && !reasons.contains("rules"), "{reasons}");
    assert!(
        reasons.contains("it is written once the node's devices and addresses are in place"),
        "{reasons}"
    );
    assert!(!world.machine.settings.subnet_file.exists());
    assert_eq!(world.saves, 1);
    world.kernel.failing.clear();
    world.turn();
    assert_eq!(world.machine.status.health.ready(), Ok(()));
    assert!(world.machine.settings.subnet_file.exists());
}

#[test]
fn a_device_that_goes_is_heard_of_as_long_as_one_of_this_node_is_refused() {
    let mut world = World::settled();
    assert!(!world.machine.view.interest.refused);
    refuse(&mut world);
    world.turn();
    assert!(world.machine.view.interest.refused);
    world.kernel.failing.clear();
    world.turn();
    assert!(!world.machine.view.interest.refused);
}

#[test]
fn what_was_written_for_the_plugin_is_kept_whole_while_a_device_is_refused() {
    let mut world = World::settled();
    let path = world.machine.settings.subnet_file.clone();
    let before = std::fs::read_to_string(&path).unwrap();
    refuse(&mut world);
    std::fs::remove_file(&path).unwrap();
    world.turn();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
    // Another MTU is for pods that reach others by it.
    world.kernel.host.links.get_mut(&2).unwrap().mtu = 1400;
    world.turn();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), before);
    world.kernel.failing.clear();
    world.turn();
    assert_ne!(std::fs::read_to_string(&path).unwrap(), before);
}
