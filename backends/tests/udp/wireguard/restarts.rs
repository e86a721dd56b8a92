//! A process that ends, and what the next one finds.

use std::time::Duration;

use backends::datapath::engine::Offload;
use backends::testing::{Pinger, wait_for};
use subnet::Family;

use super::{DEVICE, Ours, Pair, Twins, secret};
use crate::bed::LIMIT;
use crate::flows::exchange;

#[test]
fn a_restart_of_either_side_is_noticed_at_once() {
    let mut pair = Pair::new(Family::V4, [secret(9), secret(9)]);
    pair.wait_for_echo("the first echo");
    // The other side goes on sending by a session that is gone; only it has something to send.
    let pinger = Pinger::start(pair.pods[1].namespace(), pair.pods[0].address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    pair.ours.restart();
    let before = pinger.received();
    wait_for("answers after the restart", LIMIT, || pinger.received() > before + 50).unwrap();
    let pings = pinger.finish().unwrap();
    // wireguard-go itself would have needed 15 seconds to notice, and took part in two handshakes.
    assert!(pings.longest_gap < Duration::from_secs(13), "{pings:?} {}", pair.ours.counters());
}

#[test]
fn a_device_that_was_left_is_used_by_the_next_process_with_and_without_offloads() {
    let mut twins = Twins::new(Family::V4, 1);
    let index = |ours: &Ours| ours.machine.namespace().show(&format!("ip -o link show {DEVICE}")).unwrap();
    let index = |ours: &Ours| index(ours).split(':').next().unwrap().to_owned();
    let before = index(&twins.nodes[0]);
    for offload in [true, false, true, false, false] {
        twins.nodes[0].restart_with(Offload(offload));
        assert_eq!(index(&twins.nodes[0]), before, "{offload}");
        let (near, far) = (twins.pods[0].namespace(), twins.pods[1].namespace());
        wait_for("an echo", LIMIT, || near.reaches(twins.to(1)).unwrap()).unwrap();
        // Merged segments and checksums that are still to be computed would be lost.
        exchange(near, far, twins.to(1), 4 << 20);
    }
}
