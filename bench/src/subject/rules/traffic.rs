//! Datagrams with numbers from a pod to a host outside, and what became of each.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::testing::Namespace;

/// Between two datagrams of the connection that lasts.
const TICK: Duration = Duration::from_millis(1);
/// A new connection is opened once in so many ticks.
const NEW_EVERY: u64 = 100;
/// Sockets of new connections stay open for the 30 s that the kernel remembers them, so that none gets the
/// port of another one.
const OPEN: usize = 300;
/// What hasn't arrived when nothing arrives for so long never will.
const SILENCE: Duration = Duration::from_millis(500);

/// What was sent and what arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Datagrams of the connection that lasts.
    pub(crate) sent: u64,
    /// New connections, of one datagram each.
    pub(crate) opened: u64,
    /// Of both, those that did not arrive.
    pub(crate) lost: u64,
    /// Of both, those that arrived with another source address than the node's.
    pub(crate) strange: u64,
    /// Answers to the connection that lasts that did not come back.
    pub(crate) answers_lost: u64,
}

/// The kinds of datagrams, which are their first bytes; their numbers follow.
const LASTING: u8 = 0;
const NEW: u8 = 1;

/// Sends from `pod` to `target`, a port of `outside`, while `work` is done; each datagram should seem to
/// come from `node`, and is answered.
pub(crate) fn during<T>(
    pod: &Namespace,
    outside: &Namespace,
    target: SocketAddr,
    node: Ipv4Addr,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Tally)> {
    let open = |namespace: &Namespace, address: SocketAddr| -> anyhow::Result<UdpSocket> {
        let socket = namespace.run(|| UdpSocket::bind(address)).context("can't open a UDP socket")?;
        socket.set_read_timeout(Some(SILENCE))?;
        Ok(socket)
    };
    let receiver = open(outside, target)?;
    let sender = open(pod, any())?;
    let answers = sender.try_clone()?;
    let [stop, quiet] = [AtomicBool::new(false), AtomicBool::new(false)];
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(&receiver, &quiet));
        let answered = scope.spawn(|| count(&answers, &quiet));
        let sent = scope.spawn(|| pod.run(|| send(&sender, target, &stop)));
        let outcome = work();
        stop.store(true, Ordering::Relaxed);
        let sent = joined(sent)?;
        quiet.store(true, Ordering::Relaxed);
        let (received, answered) = (joined(received)?, joined(answered)?);
        let outcome = outcome?;
        for namespace in [pod, outside] {
            let dropped = overruns(namespace)?;
            ensure!(
                dropped == 0,
                "{dropped} datagrams arrived faster than they were read: the machine is too busy"
            );
        }
        let (sent, opened) = sent?;
        Ok((outcome, tally(sent, opened, &received?, answered?, node.into())))
    })
}

fn any() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> anyhow::Result<T> {
    thread.join().map_err(|_| anyhow!("a thread that sends or receives panicked"))
}

/// The datagrams by kind and number, each with the source of its first arrival.
type Received = BTreeMap<(u8, u64), IpAddr>;

fn tally(sent: u64, opened: u64, received: &Received, answered: u64, node: IpAddr) -> Tally {
    let all = (0..sent).map(|number| (LASTING, number)).chain((0..opened).map(|number| (NEW, number)));
    let sources: Vec<Option<&IpAddr>> = all.map(|key| received.get(&key)).collect();
    Tally {
        sent,
        opened,
        lost: sources.iter().filter(|source| source.is_none()).count() as u64,
        strange: sources.iter().flatten().filter(|source| ***source != node).count() as u64,
        answers_lost: sent.saturating_sub(answered),
    }
}

/// How many datagrams of each kind were sent. One that can't even be sent is lost: it counts as sent.
fn send(lasting: &UdpSocket, target: SocketAddr, stop: &AtomicBool) -> io::Result<(u64, u64)> {
    let (mut sent, mut opened, mut open) = (0, 0, VecDeque::with_capacity(OPEN));
    let start = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let _ = lasting.send_to(&datagram(LASTING, sent), target);
        sent += 1;
        if sent % NEW_EVERY == 0 {
            let socket = UdpSocket::bind(any())?;
            let _ = socket.send_to(&datagram(NEW, opened), target);
            opened += 1;
            open.push_back(socket);
            if open.len() > OPEN {
                open.pop_front();
            }
        }
        // A tick that comes too late doesn't delay the others.
        let due = start + TICK * u32::try_from(sent).unwrap_or(u32::MAX);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok((sent, opened))
}

fn datagram(kind: u8, number: u64) -> [u8; 9] {
    let mut bytes = [kind; 9];
    bytes[1..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// Receives and answers until nothing comes any more once it is to be `quiet`.
fn receive(socket: &UdpSocket, quiet: &AtomicBool) -> io::Result<Received> {
    let mut received = Received::new();
    let mut bytes = [0; 9];
    while let Some((len, from)) = next(socket, &mut bytes, quiet)? {
        if let (9, [kind, number @ ..]) = (len, bytes) {
            received.entry((kind, u64::from_be_bytes(number))).or_insert(from.ip());
            // An answer that can't be sent is missed at the other end.
            let _ = socket.send_to(&bytes, from);
        }
    }
    Ok(received)
}

fn count(socket: &UdpSocket, quiet: &AtomicBool) -> io::Result<u64> {
    let (mut bytes, mut count) = ([0; 9], 0);
    while next(socket, &mut bytes, quiet)?.is_some() {
        count += 1;
    }
    Ok(count)
}

/// The next datagram; `None` when it is to be quiet and none comes.
fn next(socket: &UdpSocket, bytes: &mut [u8], quiet: &AtomicBool) -> io::Result<Option<(usize, SocketAddr)>> {
    loop {
        // Read before: what was sent before it was set is received.
        let last = quiet.load(Ordering::Relaxed);
        match socket.recv_from(bytes) {
            Ok(received) => return Ok(Some(received)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && last => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Datagrams for which a socket of the namespace had no room: the last column of `/proc/net/udp`.
fn overruns(namespace: &Namespace) -> anyhow::Result<u64> {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/udp"));
    let text = text.context("can't read /proc/thread-self/net/udp")?;
    let counts =
        text.lines().skip(1).filter_map(|line| line.split_whitespace().next_back()?.parse::<u64>().ok());
    Ok(counts.sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);

    #[test]
    fn what_does_not_arrive_is_lost_and_what_has_another_source_is_strange() {
        let (node, pod) = (IpAddr::from(NODE), IpAddr::from([10, 244, 7, 2]));
        let received = [((LASTING, 0), node), ((LASTING, 2), pod), ((NEW, 0), node), ((NEW, 9), pod)].into();
        let expected = Tally { sent: 3, opened: 2, lost: 2, strange: 1, answers_lost: 1 };
        assert_eq!(tally(3, 2, &received, 2, node), expected);
    }

    #[test]
    fn all_arrives_in_one_namespace_and_none_where_nobody_listens() {
        let (pod, other) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, 9_000));
        let work = || {
            thread::sleep(NEW_EVERY as u32 * 3 * TICK);
            Ok(())
        };
        let ((), all) = during(&pod, &pod, target, Ipv4Addr::LOCALHOST, work).unwrap();
        assert!(all.sent > 0 && all.opened > 0, "{all:?}");
        assert_eq!((all.lost, all.strange, all.answers_lost), (0, 0, 0), "{all:?}");
        let ((), none) = during(&pod, &other, target, NODE, work).unwrap();
        assert_eq!((none.lost, none.answers_lost), (none.sent + none.opened, none.sent), "{none:?}");
    }
}
