//! Everything that pods send arrives as it was sent, with offloads and without.

use std::net::IpAddr;

use backends::datapath::counters::{Counter, Counters};
use backends::datapath::engine::Offload;
use backends::testing::{Pod, wait_for};

use crate::bed::{Cluster, LIMIT, UDP, UDP_BOTH, UDP_V6, show, total};
use crate::flows::{Datagrams, exchange};

const MEGABYTE: usize = 1 << 20;
const ALL: [(&str, Offload); 4] =
    [(UDP, Offload(true)), (UDP, Offload(false)), (UDP_V6, Offload(true)), (UDP_V6, Offload(false))];

fn ping(from: &Pod, to: IpAddr, size: &str) {
    show(from.namespace(), &format!("ping -n -c3 -i0.05 -W5 -s {size} {to}"));
}

fn everything_arrives(config: &str, offload: Offload) {
    let cluster = Cluster::new(2, config, offload);
    cluster.assert_reaches("at first");
    let (a, b) = (&cluster.pods[0], &cluster.pods[1]);
    for (near, far) in a.addresses().iter().zip(b.addresses()) {
        ping(a, far.addr(), "4000");
        ping(b, near.addr(), "56");
        exchange(a.namespace(), b.namespace(), far.addr(), 16 * MEGABYTE);
        Datagrams::new(b.namespace(), a.namespace(), near.addr(), 4).run(100, 12..=1400, 100);
    }
    cluster.assert_sound();
    let sites = &cluster.sites;
    // What the counters say of it, once the last batch is over.
    let counts = || {
        let of = |counter: fn(&Counters) -> &Counter| total(sites, counter);
        let sent =
            (of(|all| &all.sent_packets), of(|all| &all.sent_reads) - of(|all| &all.dropped_not_carried));
        (sent, (of(|all| &all.received_packets), of(|all| &all.received_writes)))
    };
    let as_it_was = |((packets, reads), (received, writes)): ((u64, u64), (u64, u64))| match offload {
        Offload(true) => packets == received && reads < packets && writes < received,
        Offload(false) => packets == received && reads == packets && writes == received,
    };
    if let Err(error) = wait_for("the counters", LIMIT, || as_it_was(counts())) {
        panic!("{error}: {:?}", counts());
    }
}

#[test]
fn everything_arrives_in_both_directions() {
    for config in [UDP, UDP_V6, UDP_BOTH] {
        everything_arrives(config, Offload(true));
    }
}

#[test]
fn everything_arrives_on_a_kernel_without_offloads_for_devices() {
    for config in [UDP, UDP_V6, UDP_BOTH] {
        everything_arrives(config, Offload(false));
    }
}

/// Most of them are sent in fragments, some are not.
#[test]
fn datagrams_of_every_size_keep_their_order() {
    for (config, offload) in ALL {
        let cluster = Cluster::new(2, config, offload);
        let (a, b) = (cluster.pods[0].namespace(), cluster.pods[1].namespace());
        Datagrams::new(a, b, cluster.pods[1].address(), 1).run(1000, 12..=20_000, 16);
        Datagrams::new(b, a, cluster.pods[0].address(), 7).run(100, 12..=9000, 40);
        cluster.assert_sound();
    }
}

#[test]
fn a_hundred_flows_at_once_keep_their_order() {
    for (config, offload) in ALL {
        let cluster = Cluster::new(2, config, offload);
        let (a, b) = (cluster.pods[0].namespace(), cluster.pods[1].namespace());
        let small = Datagrams::new(a, b, cluster.pods[1].address(), 100);
        small.run(60, 12..=1400, 250);
        // One length, as a kernel likes to merge it.
        small.run(60, 1000..=1000, 250);
        cluster.assert_sound();
    }
}

/// Answers are what a device with several queues goes by when it chooses one.
#[test]
fn flows_keep_their_order_while_answers_begin_to_come() {
    for config in [UDP, UDP_V6] {
        let cluster = Cluster::new(2, config, Offload(true));
        let (a, b) = (cluster.pods[0].namespace(), cluster.pods[1].namespace());
        for _ in 0..10 {
            let mut flows = Datagrams::new(a, b, cluster.pods[1].address(), 20);
            flows.answered = true;
            flows.run(60, 12..=100, 250);
        }
        cluster.assert_sound();
    }
}

#[test]
fn three_nodes_talk_each_to_each_at_the_same_time() {
    let cluster = Cluster::new(3, UDP_BOTH, Offload(true));
    let pods = &cluster.pods;
    let directions = [(0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2)];
    for (from, to) in directions {
        assert!(pods[from].namespace().reaches(pods[to].address()).unwrap(), "{from} → {to}");
    }
    std::thread::scope(|scope| {
        for (from, to) in directions {
            let (from, to) = (&pods[from], &pods[to]);
            scope.spawn(|| {
                Datagrams::new(from.namespace(), to.namespace(), to.address(), 8).run(100, 12..=1400, 60);
            });
        }
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            let (from, to) = (&pods[from], &pods[to]);
            for net in to.addresses() {
                scope.spawn(|| exchange(from.namespace(), to.namespace(), net.addr(), 2 * MEGABYTE));
            }
        }
    });
    cluster.assert_sound();
    for site in &cluster.sites {
        let counters = site.counters();
        assert_eq!(counters.refused_stranger.get() + counters.refused_source.get(), 0, "{counters}");
    }
}
