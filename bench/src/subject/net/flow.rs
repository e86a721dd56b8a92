//! Datagrams of our own from one end to another, at a pace or as fast as it goes, counted at both ends.
//!
//! iperf3 needs a connection beside its datagrams, which a flood may end.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use backends::testing::uninterrupted;

use anyhow::{Context, anyhow};

use super::bed::End;

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

/// A flow under way; it ends on drop.
pub(crate) struct Flow {
    stop: Arc<AtomicBool>,
    start: Instant,
    sender: Option<JoinHandle<io::Result<u64>>>,
    receiver: Option<JoinHandle<io::Result<u64>>>,
}

impl Flow {
    /// Starts it.
    pub(crate) fn start(ends: [End<'_>; 2], pace: Pace) -> anyhow::Result<Self> {
        let [from, to] =
            ends.map(|end| end.namespace.run(|| UdpSocket::bind(SocketAddr::new(end.address, 0))));
        let (from, to) = (from.context("no socket to send from")?, to.context("no socket to receive with")?);
        from.connect(to.local_addr()?)?;
        // So that it notices when it is to stop.
        to.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_sending, stop_receiving) = (Arc::clone(&stop), Arc::clone(&stop));
        let receiver = Some(thread::spawn(move || receive(&to, &stop_receiving)));
        let start = Instant::now();
        let sender = Some(thread::spawn(move || send(&from, pace, &stop_sending)));
        Ok(Self { stop, start, sender, receiver })
    }

    /// Ends it and counts.
    pub(crate) fn finish(mut self) -> anyhow::Result<Moved> {
        self.stop.store(true, Ordering::Relaxed);
        let time = self.start.elapsed().as_secs_f64();
        let count = |thread: Option<JoinHandle<io::Result<u64>>>| -> anyhow::Result<u64> {
            let thread = thread.context("it was counted before")?;
            Ok(thread.join().map_err(|_| anyhow!("a thread of a flow panicked"))??)
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

fn send(socket: &UdpSocket, pace: Pace, stop: &AtomicBool) -> io::Result<u64> {
    let payload = vec![0x5a; pace.size];
    let mut sent = 0;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..pace.bursts.map_or(64, |(count, _)| count) {
            match socket.send(&payload) {
                Ok(_) => sent += 1,
                // A full queue, and an answer that no socket listens any more.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error),
            }
        }
        if let Some((_, interval)) = pace.bursts {
            next += interval;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
    Ok(sent)
}

/// Errno of a full queue on Linux.
const ENOBUFS: i32 = 105;

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
