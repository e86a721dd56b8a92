//! Traffic whose every byte is known beforehand: what arrives is compared, not hashed, so that a failure says
//! where the first wrong byte is.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use backends::testing::{Namespace, Numbers, uninterrupted};

use crate::bed::LIMIT;

const CHUNK: usize = 64 * 1024;
/// So many times of silence in a row mean that nothing comes any more: one of them may be a machine that stood still.
const SILENCES: usize = 4;

fn send(mut to: &TcpStream, seed: u64, bytes: usize) {
    let (mut numbers, mut sizes) = (Numbers(seed), Numbers(!seed));
    let mut room = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK {
        numbers.fill(&mut room);
        let mut rest = &room[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(sizes.within(1..=CHUNK).min(rest.len()));
            to.write_all(now).unwrap();
            rest = later;
        }
    }
    to.shutdown(Shutdown::Write).unwrap();
}

fn check(mut from: &TcpStream, seed: u64, bytes: usize) {
    let mut numbers = Numbers(seed);
    let (mut room, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    for chunk in 0..bytes / CHUNK {
        from.read_exact(&mut room).unwrap();
        numbers.fill(&mut wanted);
        let wrong = room.iter().zip(&wanted).position(|(found, wanted)| found != wanted);
        assert_eq!(wrong, None, "wrong byte in chunk {chunk}");
    }
    assert_eq!(uninterrupted(|| from.read(&mut room)).unwrap(), 0, "more than was sent");
}

/// One TCP connection that carries so many bytes in each direction at once.
pub(crate) fn exchange(a: &Namespace, b: &Namespace, to: IpAddr, bytes: usize) {
    exchange_by(a, b, to, bytes, |_| ());
}

/// The same with a near end that was prepared.
pub(crate) fn exchange_by(
    a: &Namespace,
    b: &Namespace,
    to: IpAddr,
    bytes: usize,
    prepare: impl Fn(&TcpStream),
) {
    let listener = b.run(|| TcpListener::bind((to, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let near = a.run(|| TcpStream::connect_timeout(&address, LIMIT).unwrap());
    let (far, _) = listener.accept().unwrap();
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
    }
    prepare(&near);
    thread::scope(|scope| {
        scope.spawn(|| send(&near, 1, bytes));
        scope.spawn(|| send(&far, 2, bytes));
        scope.spawn(|| check(&near, 2, bytes));
        check(&far, 1, bytes);
    });
}

/// UDP flows between two namespaces.
pub(crate) struct Datagrams {
    sources: Vec<UdpSocket>,
    sink: UdpSocket,
    to: SocketAddr,
    /// Whether each datagram is answered.
    pub(crate) answered: bool,
}

/// Flow, number, and bytes that follow from both.
fn datagram(flow: usize, number: u32, room: &mut [u8]) {
    Numbers((flow as u64) << 32 | u64::from(number)).fill(&mut room[8..]);
    room[..4].copy_from_slice(&(flow as u32).to_be_bytes());
    room[4..8].copy_from_slice(&number.to_be_bytes());
}

/// What became of datagrams on a bad wire.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arrived {
    /// Datagrams that were sent.
    pub(crate) sent: usize,
    /// Of these so many arrived.
    pub(crate) different: usize,
    /// Datagrams that had arrived before.
    pub(crate) repeated: usize,
    /// Datagrams that came after one with a larger number.
    pub(crate) overtaken: usize,
}

impl Datagrams {
    pub(crate) fn new(a: &Namespace, b: &Namespace, to: IpAddr, flows: usize) -> Self {
        let sink = b.run(|| UdpSocket::bind((to, 0)).unwrap());
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&sink, 8 << 20).unwrap();
        sink.set_read_timeout(Some(LIMIT)).unwrap();
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let source = || UdpSocket::bind((any, 0)).unwrap();
        let sources = a.run(|| (0..flows).map(|_| source()).collect());
        let to = sink.local_addr().unwrap();
        Self { sources, sink, to, answered: false }
    }

    /// Sends `count` datagrams of random sizes in each flow, `window` at once, and checks that all of them
    /// arrive as they were sent, each flow in its order.
    pub(crate) fn run(&self, count: u32, sizes: RangeInclusive<usize>, window: usize) {
        let total = self.sources.len() * count as usize;
        let arrived = AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| self.send(count, sizes, window, &arrived));
            let mut next = vec![0; self.sources.len()];
            for _ in 0..total {
                let received = self.receive();
                if received.is_none_or(|(flow, number)| number != next[flow]) {
                    // The sender need not wait for the rest.
                    arrived.store(usize::MAX, Ordering::Relaxed);
                }
                let (flow, number) = received.expect("every datagram arrives");
                if number != next[flow] {
                    self.sink.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
                    let more: Vec<u32> = std::iter::from_fn(|| self.receive())
                        .filter_map(|(other, number)| (other == flow).then_some(number))
                        .take(20)
                        .collect();
                    panic!("flow {flow}: {number} instead of {}, and then {more:?}", next[flow]);
                }
                next[flow] += 1;
                arrived.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    /// The same over a wire that does what it likes: what arrives is as it was sent. At the end, more is sent
    /// until something of it arrives in each flow; on a wire that drops nothing, all has to arrive.
    pub(crate) fn run_over_a_bad_wire(
        &self,
        count: u32,
        sizes: RangeInclusive<usize>,
        window: usize,
        drops: bool,
    ) -> Arrived {
        let (arrived, sent) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        let open: Vec<AtomicBool> = self.sources.iter().map(|_| AtomicBool::new(true)).collect();
        // Silence means something only once all is sent.
        self.sink.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut all: BTreeMap<(usize, u32), usize> = BTreeMap::new();
        let mut newest = vec![0; self.sources.len()];
        let mut outcome = Arrived::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                if drops {
                    self.send_patiently(count, sizes, window, &arrived);
                } else {
                    self.send(count, sizes, window, &arrived);
                }
                let more = self.send_more(count, &open);
                sent.store(count as usize * self.sources.len() + more, Ordering::Relaxed);
            });
            let (start, mut silences) = (Instant::now(), 0);
            loop {
                let Some((flow, number)) = self.receive() else {
                    let sent = sent.load(Ordering::Relaxed);
                    silences += usize::from(sent != usize::MAX);
                    let late = start.elapsed() > LIMIT;
                    if all.len() == sent || (drops || late) && silences >= SILENCES {
                        break;
                    }
                    continue;
                };
                silences = 0;
                let times = all.entry((flow, number)).or_default();
                *times += 1;
                outcome.repeated += usize::from(*times > 1);
                outcome.overtaken += usize::from(number < newest[flow]);
                newest[flow] = newest[flow].max(number);
                if number >= count {
                    open[flow].store(false, Ordering::Relaxed);
                }
                arrived.fetch_add(1, Ordering::Relaxed);
            }
        });
        outcome.sent = sent.into_inner();
        outcome.different = all.len();
        outcome
    }

    /// Sends in each flow until it is closed; gives how many that took.
    fn send_more(&self, first: u32, open: &[AtomicBool]) -> usize {
        let (mut number, mut sent) = (first, 0);
        while open.iter().any(|open| open.load(Ordering::Relaxed)) {
            for (flow, source) in self.sources.iter().enumerate() {
                if open[flow].load(Ordering::Relaxed) {
                    let mut room = [0; 12];
                    datagram(flow, number, &mut room);
                    source.send_to(&room, self.to).unwrap();
                    sent += 1;
                }
            }
            number += 1;
            assert!(number - first < 10_000, "nothing arrives any more");
            thread::sleep(Duration::from_millis(5));
        }
        sent
    }

    fn send(&self, count: u32, sizes: RangeInclusive<usize>, window: usize, arrived: &AtomicUsize) {
        self.send_while(count, sizes, |sent| {
            let start = Instant::now();
            while sent.saturating_sub(arrived.load(Ordering::Relaxed)) >= window {
                assert!(start.elapsed() < LIMIT, "only {} of {sent} arrive", arrived.load(Ordering::Relaxed));
                thread::sleep(Duration::from_micros(50));
            }
        });
    }

    /// Goes on after a while without those that will never arrive. After a long while: on a busy machine the
    /// device's queue would overflow with what is sent too early.
    fn send_patiently(&self, count: u32, sizes: RangeInclusive<usize>, window: usize, arrived: &AtomicUsize) {
        let given_up = Cell::new(0);
        self.send_while(count, sizes, |sent| {
            let start = Instant::now();
            let missing = || sent.saturating_sub(arrived.load(Ordering::Relaxed) + given_up.get());
            while missing() >= window {
                thread::sleep(Duration::from_micros(50));
                if start.elapsed() > Duration::from_millis(100) {
                    given_up.set(given_up.get() + missing());
                }
            }
        });
    }

    fn send_while(&self, count: u32, sizes: RangeInclusive<usize>, wait: impl Fn(usize)) {
        let mut numbers = Numbers(count.into());
        let mut room = vec![0; *sizes.end()];
        let mut sent = 0;
        for number in 0..count {
            for (flow, source) in self.sources.iter().enumerate() {
                wait(sent);
                let len = numbers.within(sizes.clone());
                datagram(flow, number, &mut room[..len]);
                source.send_to(&room[..len], self.to).unwrap();
                sent += 1;
            }
        }
    }

    /// The next datagram, whose every byte was compared: flow and number. Nothing after silence.
    fn receive(&self) -> Option<(usize, u32)> {
        let mut room = vec![0; 65_536];
        let (len, from) = match uninterrupted(|| self.sink.recv_from(&mut room)) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(len >= 12, "{len} bytes were never sent");
        let field = |at: usize| u32::from_be_bytes([room[at], room[at + 1], room[at + 2], room[at + 3]]);
        let (flow, number) = (field(0) as usize, field(4));
        let mut wanted = vec![0; len];
        datagram(flow, number, &mut wanted);
        assert!(room[..len] == wanted, "a byte of datagram {number} of flow {flow} is wrong");
        if self.answered {
            self.sink.send_to(b"yes", from).unwrap();
        }
        Some((flow, number))
    }
}
