//! Datagrams of our own from one end to another, at a pace or as fast as it goes, counted at both ends.
//!
//! iperf3 needs a connection beside its datagrams, which a flood may end.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::testing::uninterrupted;
use backends::wg::cookie::initiation_of_a_stranger;
use backends::wg::identity::Identity;
use bench::iperf::End;
use nix::errno::Errno;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;
use subnet::Family;

use super::bed::Pair;

/// How many datagrams of which size, and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) size: usize,
    /// Datagrams at once, and the time until the next; as fast as it goes without.
    pub(crate) bursts: Option<(u32, Duration)>,
}

/// What a flow moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Moved {
    /// Datagrams a second that the kernel took.
    pub(crate) offered: f64,
    /// Datagrams a second that arrived.
    pub(crate) received: f64,
    /// How many arrived.
    pub(crate) count: u64,
}

/// Threads that send and receive until they are told to stop; they end on drop.
pub(crate) struct Flow {
    stop: Arc<AtomicBool>,
    start: Instant,
    sender: Option<JoinHandle<io::Result<u64>>>,
    receiver: Option<JoinHandle<io::Result<u64>>>,
}

impl Flow {
    /// Starts one from an end to another.
    pub(crate) fn start(ends: [End<'_>; 2], pace: Pace) -> anyhow::Result<Self> {
        let [from, to] =
            ends.map(|end| end.namespace.run(|| UdpSocket::bind(SocketAddr::new(end.address, 0))));
        let (from, to) = (from.context("no socket to send from")?, to.context("no socket to receive with")?);
        from.connect(to.local_addr()?)?;
        // So that it notices when it is to stop.
        to.set_read_timeout(Some(Duration::from_millis(100)))?;
        Ok(Self::run(from, vec![0x5a; pace.size], pace.bursts, Some(to)))
    }

    fn run(
        from: UdpSocket,
        payload: Vec<u8>,
        bursts: Option<(u32, Duration)>,
        to: Option<UdpSocket>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_sending, stop_receiving) = (Arc::clone(&stop), Arc::clone(&stop));
        let receiver = to.map(|to| thread::spawn(move || receive(&to, &stop_receiving)));
        let start = Instant::now();
        let sender = Some(thread::spawn(move || send(&from, &payload, bursts, &stop_sending)));
        Self { stop, start, sender, receiver }
    }

    /// Ends it and counts.
    pub(crate) fn finish(mut self) -> anyhow::Result<Moved> {
        self.stop.store(true, Ordering::Relaxed);
        let time = self.start.elapsed().as_secs_f64();
        let count = |thread: Option<JoinHandle<io::Result<u64>>>| {
            let joined = thread.map(|thread| thread.join().map_err(|_| anyhow!("a flow's thread panicked")));
            anyhow::Ok(joined.transpose()?.transpose()?.unwrap_or_default())
        };
        let (sent, received) = (count(self.sender.take())?, count(self.receiver.take())?);
        Ok(Moved { offered: sent as f64 / time, received: received as f64 / time, count: received })
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Handshake initiations a second.
const INITIATIONS: u32 = 100_000;
/// Of these in one call: the kernel makes datagrams of them.
const AT_ONCE: u32 = 50;
/// Where WireGuard listens.
const WIREGUARD: u16 = 51_820;

/// From whose address they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// One that the node does not know.
    Stranger,
    /// That of the near node, which is a peer.
    Peer,
}

impl Origin {
    fn address(self, pair: &Pair) -> anyhow::Result<IpAddr> {
        let [near, far] = pair.underlay();
        if self == Self::Peer {
            return Ok(near);
        }
        let (address, bits): (IpAddr, _) = match pair.family() {
            Family::V4 => ([198, 51, 100, 7].into(), 32),
            Family::V6 => (Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 7).into(), 128),
        };
        // The far node sends its answers back, as it would to any host.
        pair.near.node.namespace().ip(&format!("addr replace {address}/{bits} dev lo"))?;
        let back = format!("route replace {address}/{bits} via {near} dev eth0 src {far}");
        pair.far.node.namespace().ip(&back)?;
        Ok(address)
    }
}

/// Handshake initiations at a steady pace to an agent that encrypts in its process, each with a right first code and a second one
/// that is wrong, so that it takes the most to find out.
pub(crate) struct Initiations(Flow);

impl Initiations {
    /// Has the near node send them to the far one.
    pub(crate) fn start(pair: &Pair, origin: Origin) -> anyhow::Result<Self> {
        let key = std::fs::read_to_string(pair.far.node.dir().join("wgkey"));
        let key = Identity::from_text(&key.context("the far node has no key")?);
        let key = key.map_err(|_| anyhow!("the far node's key can't be read"))?;
        let message = initiation_of_a_stranger(key.public());
        let ([_, to], from) = (pair.underlay(), origin.address(pair)?);
        let socket = pair.near.node.namespace().run(|| UdpSocket::bind(SocketAddr::new(from, 0)));
        let socket = socket.context("no socket to send from")?;
        socket.connect(SocketAddr::new(to, WIREGUARD))?;
        setsockopt(&socket, UdpGsoSegment, &(message.len() as i32)).context("no segmentation offload")?;
        let pace = Some((1, Duration::from_secs(1) * AT_ONCE / INITIATIONS));
        Ok(Self(Flow::run(socket, message.repeat(AT_ONCE as usize), pace, None)))
    }

    /// Ends it. Gives how many a second were sent; an error if these are much fewer than they should be.
    pub(crate) fn finish(self) -> anyhow::Result<f64> {
        let rate = self.0.finish()?.offered * f64::from(AT_ONCE);
        ensure!(rate > 0.9 * f64::from(INITIATIONS), "only {rate:.0} initiations a second were sent");
        Ok(rate)
    }
}

/// Calls that the kernel took.
fn send(
    socket: &UdpSocket,
    payload: &[u8],
    bursts: Option<(u32, Duration)>,
    stop: &AtomicBool,
) -> io::Result<u64> {
    let mut sent = 0;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..bursts.map_or(64, |(count, _)| count) {
            match socket.send(payload) {
                Ok(_) => sent += 1,
                Err(error) if queue_is_full(&error) => {}
                // An answer that no socket listens any more.
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error),
            }
        }
        if let Some((_, interval)) = bursts {
            next += interval;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
    Ok(sent)
}

/// Whether a queue on the way out has no room.
pub(super) fn queue_is_full(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOBUFS as i32)
}

/// Counts until nothing has come for a moment after the end.
fn receive(socket: &UdpSocket, stop: &AtomicBool) -> io::Result<u64> {
    let mut buffer = [0; 2048];
    let mut received = 0;
    loop {
        match uninterrupted(|| socket.recv(&mut buffer)) {
            Ok(_) => received += 1,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(received);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backends::testing::Namespace;

    #[test]
    fn a_paced_flow_arrives_complete_at_its_pace() {
        let namespace = Namespace::new().unwrap();
        let end = End { namespace: &namespace, address: [127, 0, 0, 1].into() };
        let pace = Pace { size: 64, bursts: Some((5, Duration::from_millis(1))) };
        let flow = Flow::start([end, end], pace).unwrap();
        thread::sleep(Duration::from_millis(300));
        let moved = flow.finish().unwrap();
        assert!(moved.count > 0 && moved.offered < 5200.0, "{moved:?}");
        assert_eq!(moved.offered, moved.received);
    }
}
