//! Many pods at once: 200 on one node, 16 of them at a time.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::support::{Namespace, Node, Pod, V4};

const PODS: usize = 200;
const AT_A_TIME: usize = 16;

/// Runs `work` for each number below [`PODS`], and gives the results in any order.
fn crowd<T: Send>(work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let one_after_the_other = || {
        let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
        numbers.take_while(|number| *number < PODS).map(&work).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(one_after_the_other)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn two_hundred_pods_that_come_at_once_have_addresses_of_their_own_and_leave_nothing_behind() {
    let node = Node::with_namespace(V4);
    let network = node.network("n", "1.0.0", json!({"isDefaultGateway": true}));
    let namespaces = crowd(|number| (number, Namespace::new()));
    let mut paths = vec![String::new(); PODS];
    for (number, namespace) in &namespaces {
        paths[*number] = namespace.path();
    }
    let call = |verb: &str, number: usize| {
        let container = format!("pod-{number}");
        node.call(verb, Pod { container: &container, ifname: "eth0", netns: &paths[number] }, &network)
    };
    let address = |result: Value| result["ips"][0]["address"].as_str().unwrap().to_owned();
    let addresses: BTreeSet<_> = crowd(|number| address(call("ADD", number).result())).into_iter().collect();
    assert_eq!(addresses.len(), PODS);
    assert_eq!((node.kept().len(), node.reserved("n").len()), (PODS, PODS));
    let ports = |node: &Node| node.host().links().iter().filter(|link| link.starts_with("veth")).count();
    assert_eq!(ports(&node), PODS);
    let (_, last) = namespaces.last().unwrap();
    for address in [addresses.first().unwrap(), addresses.last().unwrap()] {
        assert!(last.reaches(address.trim_end_matches("/24")), "{address}");
    }

    crowd(|number| call("DEL", number).result());
    assert_eq!((node.kept(), node.reserved("n")), (vec![], vec![]));
    assert_eq!(node.host().links(), ["lo", "cni0"]);
}
