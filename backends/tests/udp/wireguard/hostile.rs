//! What is sent to a tunnel by others than its peers.

use std::net::UdpSocket;
use std::sync::atomic::AtomicBool;

use super::*;

#[test]
fn tens_of_thousands_of_random_datagrams_leave_a_tunnel_as_it_is() {
    let pair = Pair::new(Family::V4, [None, None]);
    pair.wait_for_echo("the first echo");
    let [near, far] = &pair.pods;
    let pinger = Pinger::start(near.namespace(), far.address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    let target = SocketAddr::new(pair.ours.machine.address().into(), PORT);
    let sent = pair.go.machine.namespace().run(|| {
        let socket = UdpSocket::bind((IpAddr::from(pair.go.machine.address()), 0)).unwrap();
        let (mut numbers, mut room) = (Numbers(18), [0; 1500]);
        for count in 0..60_000 {
            let len = match count % 6 {
                0 => 148,
                1 => 92,
                2 => 64,
                3 => 32,
                _ => numbers.within(0..=1400),
            };
            numbers.fill(&mut room[..len]);
            if count % 8 < 6 && len >= 4 {
                room[..4].copy_from_slice(&[(count % 4) as u8 + 1, 0, 0, 0]);
            }
            let _ = socket.send_to(&room[..len], target);
            if count % 100 == 0 {
                // The receive buffer holds some thousands.
                thread::sleep(Duration::from_millis(1));
            }
        }
        60_000
    });
    let counters = pair.ours.counters();
    let refused = || {
        [
            &counters.refused_malformed,
            &counters.refused_handshakes,
            &counters.dropped_handshakes,
            &counters.refused_session,
            &counters.refused_forged,
        ]
        .map(|counter| counter.get())
        .iter()
        .sum::<u64>()
    };
    wait_for("their refusal", LIMIT, || refused() > sent / 2).unwrap();
    let before = pinger.received();
    wait_for("further answers", LIMIT, || pinger.received() > before + 50).unwrap();
    assert_eq!(counters.handshakes.get(), 1, "{counters}");
    pair.assert_reaches(0);
    pair.assert_reaches(1);
}

#[test]
fn a_flood_of_initiations_of_a_stranger_leaves_pods_talking_and_peers_with_handshakes() {
    let mut twins = Twins::new(Family::V4, 1);
    let near = twins.pods[0].namespace();
    wait_for("an echo", LIMIT, || near.reaches(twins.to(1)).unwrap()).unwrap();
    let node = &twins.nodes[1];
    let target = SocketAddr::new(node.machine.address().into(), PORT);
    // Valid but for the key of its sender, which nobody knows.
    let stranger = Arc::new(Identity::generate().unwrap());
    let device = backends::wg::device::Device::new(Arc::clone(&stranger), 1420);
    let peer = PeerSettings { key: *node.settings.identity.public(), endpoint: target, allowed: Vec::new() };
    let settings = Settings { identity: stranger, psk: None, keepalive: 1, peers: vec![peer] };
    let now = |ms| backends::wg::Now { ms, unix: Duration::from_secs(1_700_000_000 + ms) };
    let mut out = Vec::new();
    device.configure(&settings, 1420, now(1), &mut out);
    device.tick(now(10_000), &mut out);
    let initiation = out.pop().unwrap().bytes;
    assert_eq!(initiation.len(), 148);
    let stranger = twins.fabric.node().unwrap();
    let stop = AtomicBool::new(false);
    let counters = node.counters();
    thread::scope(|scope| {
        scope.spawn(|| {
            stranger.namespace().run(|| {
                let socket = UdpSocket::bind((IpAddr::from(stranger.address()), 0)).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let _ = socket.send_to(&initiation, target);
                }
            });
        });
        let flooded = || counters.dropped_handshakes.get() > 1_000;
        let outcome = wait_for("the flood", LIMIT, flooded).and_then(|()| {
            wait_for("echoes beside it", LIMIT, || near.reaches(twins.pods[1].address()).unwrap())
        });
        stop.store(true, Ordering::Relaxed);
        if let Err(error) = outcome {
            panic!("{error}: {counters}");
        }
    });
    assert!(counters.handshakes_asked.get() > 0, "{counters}");
    // A new handshake of a peer is not kept out.
    twins.nodes[0].restart();
    let near = twins.pods[0].namespace();
    wait_for("an echo after a restart", LIMIT, || near.reaches(twins.pods[1].address()).unwrap()).unwrap();
}
