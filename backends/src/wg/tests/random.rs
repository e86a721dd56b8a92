//! Loss, delay, repetition and order of a network, as properties.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn whatever_the_network_does_packets_arrive_once_and_unchanged_and_later_ones_arrive(
        steps in prop::collection::vec((0u8..8, any::<prop::sample::Index>(), 0u64..40_000), 1..120),
    ) {
        let mut world = World::new();
        let mut number = 0;
        for (step, index, ms) in steps {
            let some = (!world.wire.is_empty()).then(|| index.index(world.wire.len().max(1)));
            match (step, some) {
                (0 | 1, _) => {
                    number += 1;
                    world.send(usize::from(step), &packet(number));
                }
                (2 | 3, Some(index)) => world.deliver(index),
                (4, Some(index)) => drop(world.wire.remove(index)),
                (5, Some(index)) => {
                    let again = world.wire[index].clone();
                    world.wire.push(again);
                }
                (6, Some(index)) => {
                    let bytes = &mut world.wire[index].2.bytes;
                    let at = ms as usize % bytes.len();
                    bytes[at] ^= 1;
                }
                _ => {
                    world.pass(ms);
                    world.tick();
                }
            }
        }
        world.settle();
        for node in [0, 1] {
            let mut got = world.got(node);
            let all = got.len();
            prop_assert!(got.iter().all(|one| (1..=number).any(|number| *one == packet(number))));
            got.sort();
            got.dedup();
            prop_assert_eq!(got.len(), all, "once");
        }
        // From here on nothing is lost.
        world.run(100_000);
        for from in [0, 1] {
            world.send(from, &packet(u16::MAX));
        }
        world.run(30_000);
        for from in [0, 1] {
            world.send(from, &packet(u16::MAX - 1));
        }
        world.run(100);
        for node in [0, 1] {
            prop_assert!(world.got(node).contains(&packet(u16::MAX - 1)));
            prop_assert!(world.nodes[node].sessions() <= 5);
        }
    }

    #[test]
    fn arbitrary_datagrams_change_nothing(
        datagrams in prop::collection::vec((0u8..6, prop::collection::vec(any::<u8>(), 0..200), any::<bool>()), 1..50),
    ) {
        let mut world = World::new();
        world.send(0, &packet(0));
        world.settle();
        for (kind, mut bytes, from_peer) in datagrams {
            if kind < 5 && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            }
            let source = if from_peer { at(0) } else { at(99) };
            let out = world.nodes[1].receive(bytes, source, world.now);
            prop_assert_eq!(out, vec![]);
        }
        world.got(1);
        world.send(0, &packet(1));
        world.send(1, &packet(2));
        world.settle();
        prop_assert_eq!((world.got(0), world.got(1)), (vec![packet(2)], vec![packet(1)]));
    }
}
