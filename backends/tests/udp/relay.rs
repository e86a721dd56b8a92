//! A wire that damages, drops, repeats and reorders what it carries, and adds datagrams of its own: the nodes know
//! it as each other's address.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use backends::datapath::engine::Offload;
use backends::testing::{Fabric, Node as Machine, Numbers, Pod, uninterrupted, wait_for};

use crate::bed::{LIMIT, Site, TRUSTING, UDP as CONFIG, checksum_errors, total};
use crate::flows::{Datagrams, exchange};
use crate::packets::UDP;
use crate::wire::PORT;

/// How many of a thousand datagrams suffer what.
#[derive(Clone, Copy, Default)]
struct Mischief {
    flipped: usize,
    cut: usize,
    repeated: usize,
    late: usize,
    invented: usize,
}

/// What the relay did.
#[derive(Default)]
struct Done {
    stop: AtomicBool,
    flipped: AtomicU64,
    /// Flips that a datapath can't know of: of the length of a UDP datagram.
    unnoticed: AtomicU64,
    cut: AtomicU64,
    repeated: AtomicU64,
    late: AtomicU64,
    invented: AtomicU64,
}

struct Relay {
    done: Arc<Done>,
    thread: Option<JoinHandle<()>>,
    _machine: Machine,
}

impl Relay {
    fn start(machine: Machine, ends: [Ipv4Addr; 2], mischief: Mischief) -> Self {
        let at = (machine.address(), PORT);
        let socket = machine.namespace().run(|| UdpSocket::bind(at).unwrap());
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 8 << 20).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let done = Arc::new(Done::default());
        let shared = Arc::clone(&done);
        let thread = std::thread::spawn(move || carry(&socket, ends, mischief, &shared));
        Self { done, thread: Some(thread), _machine: machine }
    }

    /// Ends it, so that what it did is known and all of it was sent.
    fn stop(&mut self) -> &Done {
        self.done.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        &self.done
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.done.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn carry(socket: &UdpSocket, ends: [Ipv4Addr; 2], mischief: Mischief, done: &Done) {
    let mut numbers = Numbers(2026);
    let mut waiting: VecDeque<(SocketAddr, Vec<u8>)> = VecDeque::new();
    let mut room = [0; 65_536];
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let send = |to: SocketAddr, bytes: &[u8]| assert_eq!(socket.send_to(bytes, to).unwrap(), bytes.len());
    loop {
        let Ok((len, from)) = uninterrupted(|| socket.recv_from(&mut room)) else {
            waiting.drain(..).for_each(|(to, bytes)| send(to, &bytes));
            if done.stop.load(Ordering::Relaxed) {
                return;
            }
            continue;
        };
        let other = if from.ip() == ends[0] { ends[1] } else { ends[0] };
        let to = SocketAddr::from((other, PORT));
        let bytes = &mut room[..len];
        let mut choose = |of_thousand: usize| numbers.within(0..=999) < of_thousand;
        let (flip, cut, repeat) = (choose(mischief.flipped), choose(mischief.cut), choose(mischief.repeated));
        let (late, invent) = (choose(mischief.late), choose(mischief.invented));
        if invent {
            let garbage = garbage(&mut numbers);
            count(&done.invented);
            send(to, &garbage);
        }
        if cut {
            count(&done.cut);
            send(to, &bytes[..numbers.within(0..=len - 1)]);
        } else if flip {
            let at = numbers.within(0..=len - 1);
            // A changed byte never hides from a sum of 16-bit words, as two changed ones may.
            let by = numbers.within(1..=255) as u8;
            if is_erasure(bytes, at, by) {
                send(to, bytes);
                continue;
            }
            bytes[at] ^= by;
            count(&done.flipped);
            if bytes[9] == UDP && (24..26).contains(&at) {
                count(&done.unnoticed);
            }
            send(to, bytes);
        } else if late {
            count(&done.late);
            waiting.push_back((to, bytes.to_vec()));
        } else {
            send(to, bytes);
            if repeat {
                count(&done.repeated);
                send(to, bytes);
            }
        }
        if waiting.len() > numbers.within(0..=8) {
            waiting.pop_front().into_iter().for_each(|(to, bytes)| send(to, &bytes));
        }
    }
}

fn garbage(numbers: &mut Numbers) -> Vec<u8> {
    let mut garbage = vec![0; numbers.within(1..=1472)];
    numbers.fill(&mut garbage);
    // One in two looks like the beginning of a packet.
    if garbage.len() > 20 && numbers.within(0..=1) == 0 {
        let len = garbage.len() as u16;
        garbage[0] = 0x45;
        garbage[2..4].copy_from_slice(&len.to_be_bytes());
    }
    garbage
}

/// Whether the change would make the checksum of a UDP datagram 0, which means that there is none.
fn is_erasure(bytes: &[u8], at: usize, by: u8) -> bool {
    let mut sum = [bytes[26], bytes[27]];
    if bytes[9] == UDP && (26..28).contains(&at) {
        sum[at - 26] ^= by;
        return sum == [0, 0];
    }
    false
}

/// Two nodes that reach each other through a relay only.
struct Setup {
    sites: [Site; 2],
    pods: [Pod; 2],
    relay: Relay,
    _fabric: Fabric,
}

impl Setup {
    fn new(config: &str, mischief: Mischief) -> Self {
        let fabric = Fabric::new().unwrap();
        let mut sites = [0, 1].map(|_| Site::new(&fabric, config, Offload(true)));
        let machine = fabric.node().unwrap();
        let between = machine.address();
        let relay = Relay::start(machine, [0, 1].map(|at| sites[at].machine.address()), mischief);
        for site in &mut sites {
            site.peers = vec![(3 - site.number(), between)];
            site.converge();
        }
        let pods = [0, 1].map(|at| sites[at].pod());
        Self { sites, pods, relay, _fabric: fabric }
    }

    fn datagrams(&self, flows: usize) -> Datagrams {
        let [a, b] = &self.pods;
        Datagrams::new(a.namespace(), b.namespace(), b.address(), flows)
    }

    /// After a bad time everything works as before.
    fn assert_alive(&self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (&self.pods[from], &self.pods[to]);
            let reached = (0..50).any(|_| from.namespace().reaches(to.address()).unwrap());
            assert!(reached, "{from:?} → {to:?}");
        }
    }
}

#[test]
fn a_good_relay_changes_nothing() {
    let mut setup = Setup::new(CONFIG, Mischief::default());
    let [a, b] = &setup.pods;
    exchange(a.namespace(), b.namespace(), b.address(), 4 << 20);
    setup.datagrams(10).run(50, 12..=1400, 100);
    setup.relay.stop();
    let sent = || total(&setup.sites, |counters| &counters.sent_packets);
    let received = || total(&setup.sites, |counters| &counters.received_packets);
    wait_for("the counters", LIMIT, || sent() == received()).unwrap();
}

#[test]
fn a_damaged_datagram_is_counted_by_the_tunnel_and_by_the_kernel_and_reaches_nobody() {
    let mischief = Mischief { flipped: 300, cut: 50, ..Mischief::default() };
    let mut setup = Setup::new(CONFIG, mischief);
    const COUNT: u32 = 300;
    let arrived = setup.datagrams(20).run_over_a_bad_wire(COUNT, 12..=1400, 100, true);
    let done = setup.relay.stop();
    let [flipped, unnoticed, cut] =
        [&done.flipped, &done.unnoticed, &done.cut].map(|counter| counter.load(Ordering::Relaxed));
    let counters = setup.sites[1].counters();
    let told =
        format!("flipped {flipped}, of these {unnoticed} unnoticed, cut {cut}; {arrived:?}; {counters}");
    assert!(flipped > 1000 && cut > 100, "{told}");
    assert_eq!(setup.sites[0].counters().sent_packets.get(), arrived.sent as u64, "{told}");
    assert_eq!((arrived.different as u64) + flipped + cut, arrived.sent as u64, "{told}");
    assert_eq!((arrived.repeated, arrived.overtaken), (0, 0), "{told}");
    let refused = counters.refused_malformed.get() + counters.refused_source.get();
    assert_eq!(refused + counters.received_unsound.get() + unnoticed, flipped + cut, "{told}");
    // What was let through for the kernel to find, it found.
    let (node, pod) =
        (checksum_errors(setup.sites[1].machine.namespace()), checksum_errors(setup.pods[1].namespace()));
    let found = node.ip + pod.ip + pod.udp;
    assert!(found >= counters.received_unsound.get(), "{node:?} {pod:?} {told}");
    assert!(found <= counters.received_unsound.get() + unnoticed, "{node:?} {pod:?} {told}");
    assert!(node.ip > 0 && pod.udp > 0, "{node:?} {pod:?} {told}");
}

#[test]
fn repeated_late_and_invented_datagrams_hurt_nobody() {
    for config in [CONFIG, TRUSTING] {
        let mischief = Mischief { repeated: 100, late: 200, invented: 200, ..Mischief::default() };
        let mut setup = Setup::new(config, mischief);
        const COUNT: u32 = 100;
        let arrived = setup.datagrams(20).run_over_a_bad_wire(COUNT, 12..=1400, 100, false);
        setup.assert_alive();
        let done = setup.relay.stop();
        let [repeated, late, invented] =
            [&done.repeated, &done.late, &done.invented].map(|counter| counter.load(Ordering::Relaxed));
        let counters = setup.sites.each_ref().map(Site::counters);
        let seen = || {
            counters
                .iter()
                .map(|all| {
                    all.refused_malformed.get() + all.refused_source.get() + all.received_packets.get()
                })
                .sum::<u64>()
        };
        let wanted = || total(&setup.sites, |all| &all.sent_packets) + repeated + invented;
        let told = format!(
            "repeated {repeated}, late {late}, invented {invented}; {arrived:?}; {}; {}",
            counters[0], counters[1]
        );
        assert_eq!(arrived.different, arrived.sent, "{told}");
        assert!(arrived.repeated > 50 && arrived.overtaken > 0 && late > 100, "{told}");
        wait_for("the last batch", LIMIT, || seen() == wanted())
            .unwrap_or_else(|error| panic!("{error}: {told}"));
        let refused: u64 = counters
            .iter()
            .map(|counters| {
                counters.refused_malformed.get()
                    + counters.refused_source.get()
                    + counters.received_unsound.get()
            })
            .sum();
        assert_eq!(refused, invented, "{told}");
    }
}

#[test]
fn a_connection_survives_everything_at_once() {
    let mischief = Mischief { flipped: 5, cut: 5, repeated: 10, late: 10, invented: 20 };
    let mut setup = Setup::new(CONFIG, mischief);
    let [a, b] = &setup.pods;
    exchange(a.namespace(), b.namespace(), b.address(), 2 << 20);
    // Datagrams in fragments, whose damage only the last kernel can find.
    let arrived = setup.datagrams(5).run_over_a_bad_wire(60, 12..=9000, 20, true);
    assert!(arrived.different > 100, "{arrived:?}");
    setup.assert_alive();
    let done = setup.relay.stop();
    for counter in [&done.flipped, &done.cut, &done.repeated, &done.late, &done.invented] {
        assert!(counter.load(Ordering::Relaxed) > 0);
    }
    let counters = setup.sites[1].counters();
    assert!(counters.received_unsound.get() > 0 && counters.refused_malformed.get() > 0, "{counters}");
}
