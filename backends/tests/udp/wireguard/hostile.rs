//! What is sent to a tunnel by others than its peers.

use std::net::UdpSocket;
use std::sync::atomic::AtomicBool;

use subnet::wireguard::PublicKey;

use super::*;

#[test]
fn tens_of_thousands_of_random_datagrams_leave_a_tunnel_as_it_is() {
    let pair = Pair::new(Family::V4, [None, None]);
    pair.wait_for_echo("the first echo");
    let [near, far] = &pair.pods;
    let pinger = Pinger::start(near.namespace(), far.address()).unwrap();
    pinger.wait_for_reply(LIMIT).unwrap();
    let target = SocketAddr::new(pair.ours.machine.address().into(), PORT);
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
            // The receive buffer holds some thousands. What a busy machine lets it lose is not waited for long.
            let mut waited = 0;
            while count % 100 == 0 && waited < 20 && refused() + 1_000 < count {
                waited += 1;
                thread::sleep(Duration::from_millis(1));
            }
        }
        60_000
    });
    wait_for("their refusal", LIMIT, || refused() > sent / 2).unwrap();
    let before = pinger.received();
    wait_for("further answers", LIMIT, || pinger.received() > before + 50).unwrap();
    assert_eq!(counters.handshakes.get(), 1, "{counters}");
    pair.assert_reaches(0);
    pair.assert_reaches(1);
}

/// Handshake messages that a node takes note of.
fn judged(counters: &Counters) -> u64 {
    [
        &counters.handshakes,
        &counters.handshakes_asked,
        &counters.handshakes_proving,
        &counters.refused_handshakes,
        &counters.dropped_handshakes,
    ]
    .map(|counter| counter.get())
    .iter()
    .sum()
}

/// Sends these messages from an address of a machine, in turns, as fast as the node judges them, until told to stop. A
/// faster flood would tell how busy this machine is: what a node can't take in time fills its queue, and packets of pods wait
/// behind it.
fn flood(from: &Machine, target: SocketAddr, messages: &[[u8; 148]], counters: &Counters, stop: &AtomicBool) {
    const AT_ONCE: u64 = 32;
    /// So few messages are never lost in the queue. After this time without one that is judged, they were elsewhere.
    const LOST: Duration = Duration::from_secs(5);
    let socket =
        from.namespace().run(|| UdpSocket::bind((IpAddr::from(from.address()), 0))).expect("a socket");
    let mut sent = judged(counters);
    let (mut last, mut since) = (sent, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let now = judged(counters);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        if now + 2 * AT_ONCE < sent && since.elapsed() < LOST {
            thread::sleep(Duration::from_micros(200));
            continue;
        }
        if since.elapsed() >= LOST {
            (sent, since) = (now, Instant::now());
        }
        for message in messages.iter().cycle().take(AT_ONCE as usize) {
            let _ = socket.send_to(message, target);
        }
        sent += AT_ONCE;
    }
}

/// Initiations for the node with this key that cost it something: valid but for the key of their sender, which no peer
/// has; and with a second code, which is wrong.
fn initiations(key: &PublicKey) -> [[u8; 148]; 2] {
    let stranger = Arc::new(Identity::generate().unwrap());
    let device = backends::wg::device::Device::new(Arc::clone(&stranger), 1420);
    let nowhere = SocketAddr::from(([192, 0, 2, 1], PORT));
    let peer = PeerSettings { key: *key, endpoint: nowhere, allowed: Vec::new(), opening: Opening::Either };
    let settings = WireguardSettings { identity: stranger, psk: None, keepalive: 1, peers: vec![peer] };
    let now = |ms| backends::wg::Now { ms, unix: Duration::from_secs(1_700_000_000 + ms) };
    let mut out = Vec::new();
    device.configure(&settings, 1420, now(1), &mut out);
    device.tick(now(10_000), &mut out);
    let initiation = out.pop().unwrap().bytes.try_into().unwrap();
    [initiation, backends::wg::cookie::initiation_of_a_stranger(key)]
}

/// While a node is flooded from a machine's address, pods go on talking, and the other node gets a new session after a restart.
fn assert_a_flood_changes_nothing(from: impl Fn(&Twins) -> Arc<Machine>) {
    let mut twins = Twins::new(Family::V4, 1);
    let far = twins.to(1);
    wait_for("an echo", LIMIT, || twins.pods[0].namespace().reaches(far).unwrap()).unwrap();
    let (from, counters) = (from(&twins), twins.nodes[1].counters());
    let target = SocketAddr::new(twins.nodes[1].machine.address().into(), PORT);
    let messages = initiations(twins.nodes[1].settings.identity.public());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| flood(&from, target, &messages, &counters, &stop));
        let before = judged(&counters);
        let mut steps = || -> anyhow::Result<()> {
            let near = twins.pods[0].namespace();
            // More than any budget lets through in one moment.
            wait_for("the flood", LIMIT, || judged(&counters) > before + 1_000)?;
            wait_for("echoes beside it", LIMIT, || near.reaches(far).unwrap())?;
            let handshakes = counters.handshakes.get();
            twins.nodes[0].restart();
            let near = twins.pods[0].namespace();
            wait_for("an echo by a new session", LIMIT, || near.reaches(far).unwrap())?;
            anyhow::ensure!(counters.handshakes.get() > handshakes, "there was no other handshake");
            Ok(())
        };
        let outcome = steps();
        stop.store(true, Ordering::Relaxed);
        if let Err(error) = outcome {
            panic!("{error}: {counters}");
        }
    });
    assert!(counters.handshakes_asked.get() > 0, "{counters}");
    assert!(counters.dropped_handshakes.get() + counters.refused_handshakes.get() > 0, "{counters}");
}

#[test]
fn a_flood_of_initiations_of_a_stranger_leaves_pods_talking_and_peers_with_handshakes() {
    assert_a_flood_changes_nothing(|twins| Arc::new(twins.fabric.node().unwrap()));
}

#[test]
fn a_flood_of_initiations_from_a_peers_address_leaves_even_that_peer_with_its_handshakes() {
    assert_a_flood_changes_nothing(|twins| Arc::clone(&twins.nodes[0].machine));
}
