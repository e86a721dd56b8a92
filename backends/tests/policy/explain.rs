//! Explanations say what the evaluator says.

use std::net::IpAddr;
use std::sync::Arc;

use backends::testing::policy::{Packet, Random, World};
use subnet::policy::Protocol;
use subnet::policy::explain::{End, Party, PolicyContext, Question, explain};

fn end(world: &World, address: IpAddr) -> End {
    let party = match world.pod(address) {
        Some(pod) => Party::Pod(Box::new(pod.clone())),
        None if world.settings.nodes.contains(&address) => Party::Node,
        None => Party::Address,
    };
    End { party, address: Some(address), node: None }
}

fn question(world: &World, packet: &Packet) -> Option<Question> {
    let protocol = Protocol::ALL.into_iter().find(|protocol| *protocol as u8 == packet.protocol)?;
    let (source, destination) = (end(world, packet.source), end(world, packet.destination));
    Some(Question { source, destination, protocol, port: packet.destination_port })
}

#[test]
fn an_explanation_allows_what_the_evaluator_allows() {
    let (mut allowed, mut denied) = (0, 0);
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let mut world = random.world();
        // An explanation is about both ends, whichever node judges them.
        world.pods.iter_mut().for_each(|pod| pod.local = true);
        let context = PolicyContext {
            policies: world.policies.iter().cloned().map(Arc::new).collect(),
            namespaces: world.namespaces.clone(),
            networks: world.settings.networks.clone(),
            nodes: world.settings.nodes.clone(),
        };
        for _ in 0..40 {
            let packet = random.packet(&world);
            let Some(question) = question(&world, &packet) else { continue };
            let explained = explain(&context, &question);
            assert_eq!(
                explained.allowed,
                world.allows(&packet),
                "seed {seed}: {packet:?}\n{}",
                explained.text
            );
            *if explained.allowed { &mut allowed } else { &mut denied } += 1;
        }
    }
    assert!(allowed > 1000 && denied > 1000, "{allowed} allowed, {denied} denied");
}
