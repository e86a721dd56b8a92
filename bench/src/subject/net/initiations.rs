//! Handshake initiations at a steady pace to an agent that encrypts in its process, each with a right first code and a second one
//! that is wrong, so that it takes the most to find out.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use backends::wg::cookie::initiation_of_a_stranger;
use backends::wg::identity::Identity;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;

use subnet::Family;

use super::bed::Pair;

/// Initiations a second.
pub(crate) const RATE: u32 = 100_000;
/// In one call: the kernel makes datagrams of them.
const AT_ONCE: u32 = 50;
/// Where WireGuard listens.
const PORT: u16 = 51_820;

/// From whose address they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nobody's who is known to the node.
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
        pair.far
            .node
            .namespace()
            .ip(&format!("route replace {address}/{bits} via {near} dev eth0 src {far}"))?;
        Ok(address)
    }
}

/// The flood under way; it ends on drop.
pub(crate) struct Initiations {
    stop: Arc<AtomicBool>,
    start: Instant,
    sender: Option<JoinHandle<io::Result<u64>>>,
}

impl Initiations {
    /// Has the near node send them to the far one.
    pub(crate) fn start(pair: &Pair, origin: Origin) -> anyhow::Result<Self> {
        let key =
            std::fs::read_to_string(pair.far.node.dir().join("wgkey")).context("the far node has no key")?;
        let key = Identity::from_text(&key).map_err(|_| anyhow!("the far node's key can't be read"))?;
        let message = initiation_of_a_stranger(key.public());
        let ([_, to], from) = (pair.underlay(), origin.address(pair)?);
        let socket = pair.near.node.namespace().run(|| UdpSocket::bind(SocketAddr::new(from, 0)));
        let socket = socket.context("no socket to send from")?;
        socket.connect(SocketAddr::new(to, PORT))?;
        setsockopt(&socket, UdpGsoSegment, &(message.len() as i32)).context("no segmentation offload")?;
        let payload = message.repeat(AT_ONCE as usize);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let start = Instant::now();
        let sender = Some(thread::spawn(move || send(&socket, &payload, &stopped)));
        Ok(Self { stop, start, sender })
    }

    /// Ends it. Gives how many a second were sent; an error if these are much fewer than [`RATE`].
    pub(crate) fn finish(mut self) -> anyhow::Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        let time = self.start.elapsed().as_secs_f64();
        let thread = self.sender.take().context("it has ended before")?;
        let sent = thread.join().map_err(|_| anyhow!("the flood's thread panicked"))??;
        let rate = sent as f64 / time;
        ensure!(rate > 0.9 * f64::from(RATE), "only {rate:.0} initiations a second were sent");
        Ok(rate)
    }
}

impl Drop for Initiations {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn send(socket: &UdpSocket, payload: &[u8], stop: &AtomicBool) -> io::Result<u64> {
    let interval = Duration::from_secs(1) * AT_ONCE / RATE;
    let (mut sent, mut next) = (0, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        socket.send(payload)?;
        sent += u64::from(AT_ONCE);
        next += interval;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(sent)
}
