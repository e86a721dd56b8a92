//! What the kernel refuses at once is sent packet by packet.

use backends::datapath::engine::Offload;
use backends::testing::Pod;
use subnet::Family;

use crate::bed::{Cluster, UDP, UDP_V6};
use crate::flows::{Datagrams, exchange};
use crate::sockets::{bound, without_checksums};
use crate::wire::PORT;

/// The way to the peer carries less than the link: the kernel then refuses to segment (EMSGSIZE), but
/// fragments single datagrams.
#[test]
fn packets_go_one_by_one_where_the_way_is_narrower_than_the_link() {
    for (config, offload) in [(UDP, true), (UDP, false), (UDP_V6, true), (UDP_V6, false)] {
        let cluster = Cluster::new(3, config, Offload(offload));
        let pod = |number: usize| -> &Pod { &cluster.pods[number] };
        let (narrow, wide) = (&cluster.sites[1], &cluster.sites[2]);
        let address = narrow.node.local.get(Family::of(pod(1).address())).unwrap();
        cluster.sites[0].ip(&format!("route add {address} dev eth0 mtu 1300"));
        let send = |to: usize| Datagrams::new(pod(0).namespace(), pod(to).namespace(), pod(to).address(), 3);
        // Many at once, of one length, so that they are one group.
        send(1).run(200, 1400..=1400, 200);
        let counters = cluster.sites[0].counters();
        let (fallbacks, groups) = (counters.sent_fallbacks.get(), counters.sent_groups.get());
        assert!(fallbacks > 0, "{counters}");
        // The other peer's packets still go in groups.
        send(2).run(200, 1400..=1400, 200);
        cluster.sites[0]
            .wait_for("groups", |counters| (1..600).contains(&(counters.sent_groups.get() - groups)));
        assert_eq!(counters.sent_fallbacks.get(), fallbacks, "{counters}");
        exchange(pod(0).namespace(), pod(1).namespace(), pod(1).address(), 1 << 20);
        assert_eq!(counters.dropped_unsent.get(), 0, "{counters}");
        wide.wait_for("all", |counters| counters.received_packets.get() >= 600);
        cluster.assert_sound();
    }
}

/// A kernel that refuses to segment (EINVAL).
#[test]
fn packets_go_one_by_one_where_the_kernel_does_not_segment_at_all() {
    for (config, table) in [(UDP, "udp"), (UDP_V6, "udp6")] {
        let cluster = Cluster::new(2, config, Offload(true));
        let [a, b] = [0, 1].map(|at| cluster.pods[at].namespace());
        let counters = cluster.sites[0].counters();
        exchange(a, b, cluster.pods[1].address(), 4 << 20);
        assert_eq!(counters.sent_fallbacks.get(), 0, "{counters}");
        for site in &cluster.sites {
            without_checksums(&bound(site.machine.namespace(), table, PORT));
        }
        exchange(a, b, cluster.pods[1].address(), 4 << 20);
        assert!(counters.sent_fallbacks.get() > 0, "{counters}");
        Datagrams::new(a, b, cluster.pods[1].address(), 3).run(200, 1400..=1400, 200);
        assert_eq!(counters.dropped_unsent.get(), 0, "{counters}");
        cluster.assert_sound();
    }
}

/// A link that shrinks before anybody tells the tunnel.
#[test]
fn packets_arrive_while_the_tunnel_does_not_know_that_its_link_shrank() {
    for (config, overhead) in [(UDP, 28), (UDP_V6, 48)] {
        shrink(Cluster::new(2, config, Offload(true)), overhead);
    }
}

fn shrink(mut cluster: Cluster, overhead: u32) {
    let [a, b] = [0, 1].map(|at| cluster.pods[at].namespace());
    exchange(a, b, cluster.pods[1].address(), 1 << 20);
    for site in &cluster.sites {
        site.machine.set_mtu(1350).unwrap();
    }
    exchange(a, b, cluster.pods[1].address(), 1 << 20);
    let counters = cluster.sites[0].counters();
    assert!(counters.sent_fallbacks.get() > 0, "{counters}");
    for site in &mut cluster.sites {
        site.node.underlay.mtu = 1350;
        assert_eq!(site.converge()[0], format!("link set flannel0 mtu {}", 1350 - overhead));
    }
    // Now that it knows, they go in groups again.
    let [a, b] = [0, 1].map(|at| cluster.pods[at].namespace());
    let fallbacks = counters.sent_fallbacks.get();
    exchange(a, b, cluster.pods[1].address(), 1 << 20);
    assert_eq!(counters.sent_fallbacks.get(), fallbacks, "{counters}");
    cluster.assert_sound();
}
