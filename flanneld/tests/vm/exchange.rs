//! A connection over which bytes that are known beforehand go both ways while things change around it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use backends::testing::{Namespace, uninterrupted};

use crate::bed::Member;
use crate::transfer;

const CHUNK: usize = 64 * 1024;

/// Time between two chunks of an end, so that an emulated machine has time for what the test is about, too.
const PAUSE: Duration = Duration::from_millis(50);

/// A connection in use; it is used until it is ended.
pub(crate) struct Exchange {
    ended: Arc<AtomicBool>,
    /// How many chunks have arrived at the client, and at the server.
    chunks: [Arc<AtomicU64>; 2],
    ends: Vec<JoinHandle<u64>>,
}

impl Exchange {
    /// Between a client that asks for `at` and a server that listens at `port` of all its addresses of that family.
    pub(crate) fn start(client: &Namespace, server: &Namespace, at: SocketAddr, port: u16) -> Self {
        Self::with_pause(client, server, at, port, PAUSE)
    }

    /// The same, as fast as the machine can.
    pub(crate) fn at_full_speed(client: &Namespace, server: &Namespace, at: SocketAddr, port: u16) -> Self {
        Self::with_pause(client, server, at, port, Duration::ZERO)
    }

    fn with_pause(
        client: &Namespace,
        server: &Namespace,
        at: SocketAddr,
        port: u16,
        pause: Duration,
    ) -> Self {
        let any = match at {
            SocketAddr::V4(_) => SocketAddr::from(([0; 4], port)),
            SocketAddr::V6(_) => SocketAddr::from(([0; 16], port)),
        };
        let listener = server.run(|| TcpListener::bind(any)).unwrap();
        let stream = client.run(|| TcpStream::connect_timeout(&at, transfer::SILENCE)).unwrap();
        let (other, _) = listener.accept().unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let chunks: [Arc<AtomicU64>; 2] = Default::default();
        let mut ends = Vec::new();
        for (stream, count) in [stream, other].into_iter().zip(&chunks) {
            let from = stream.try_clone().unwrap();
            let (count, stop) = (Arc::clone(count), Arc::clone(&ended));
            ends.push(thread::spawn(move || receive(from, &count)));
            ends.push(thread::spawn(move || send(stream, &stop, pause)));
        }
        Self { ended, chunks, ends }
    }

    /// How many chunks have arrived in both directions.
    fn arrived(&self) -> u64 {
        self.chunks.iter().map(|chunks| chunks.load(Ordering::Relaxed)).sum()
    }

    /// Waits until so many chunks have arrived at both ends. The ends fail where nothing moves.
    pub(crate) fn until_each_way(&self, chunks: u64) {
        while self.chunks.iter().any(|arrived| arrived.load(Ordering::Relaxed) < chunks) {
            assert!(self.ends.iter().all(|end| !end.is_finished()), "an end has failed");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until so much more has arrived that it came after this moment.
    pub(crate) fn goes_on(&self, member: &Member, after: &str) {
        let before = self.arrived();
        member.wait(&format!("further bytes after: {after}"), || self.arrived() >= before + 24);
    }

    /// Ends the connection; all that was sent has to have arrived.
    pub(crate) fn finish(self) {
        self.ended.store(true, Ordering::Relaxed);
        let counts: Vec<u64> = self.ends.into_iter().map(|end| end.join().unwrap()).collect();
        let [received, sent, received_there, sent_there] = counts[..] else { panic!("{counts:?}") };
        assert!(received == sent_there && received_there == sent && sent > 0, "{counts:?}");
    }
}

fn send(mut stream: TcpStream, ended: &AtomicBool, pause: Duration) -> u64 {
    stream.set_write_timeout(Some(transfer::SILENCE)).unwrap();
    let (mut buffer, mut sent) = (vec![0; CHUNK], 0);
    while !ended.load(Ordering::Relaxed) {
        transfer::fill(&mut buffer, sent * CHUNK as u64);
        stream.write_all(&buffer).unwrap();
        sent += 1;
        thread::sleep(pause);
    }
    stream.shutdown(Shutdown::Write).unwrap();
    sent
}

fn receive(mut stream: TcpStream, chunks: &AtomicU64) -> u64 {
    stream.set_read_timeout(Some(transfer::SILENCE)).unwrap();
    let (mut arrived, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut received = 0;
    loop {
        let first = uninterrupted(|| stream.read(&mut arrived)).unwrap();
        if first == 0 {
            return received;
        }
        stream.read_exact(&mut arrived[first..]).unwrap();
        transfer::fill(&mut expected, received * CHUNK as u64);
        assert!(arrived == expected, "chunk {received} was changed on the way");
        received += 1;
        chunks.fetch_add(1, Ordering::Relaxed);
    }
}
