//! Transfers between pods of which every byte is known beforehand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use backends::testing::{Pod, uninterrupted};

const PORT: u16 = 7070;
const CHUNK: usize = 64 * 1024;
/// A connection on which nothing moves for this long is broken.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);

/// Pages begin with their place in the stream.
const PAGE: usize = 4096;

/// The bytes of a stream from `offset` on: those of a block, in which each page begins with its place. Bytes that are lost, changed
/// or elsewhere are seen, and that costs an emulated machine little.
pub(crate) fn fill(buffer: &mut [u8], offset: u64) {
    static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(block);
    buffer.copy_from_slice(&BLOCK[..buffer.len()]);
    for (index, page) in buffer.chunks_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&(offset + (index * PAGE) as u64).to_le_bytes());
    }
}

/// Each word is a hash of its place (splitmix64).
fn block() -> Vec<u8> {
    let mut block = vec![0; CHUNK];
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        let mut hash = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(hash ^ (hash >> 31)).to_le_bytes());
    }
    block
}

/// Sends `chunks` × 64 KiB over one TCP connection from a pod to another and compares what arrives.
pub(crate) fn tcp(from: &Pod, to: &Pod, chunks: u64) {
    let address = SocketAddr::new(to.address(), PORT);
    let listener = to.namespace().run(|| TcpListener::bind(address)).unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener, chunks));
        let mut stream = from.namespace().run(|| TcpStream::connect_timeout(&address, SILENCE)).unwrap();
        stream.set_write_timeout(Some(SILENCE)).unwrap();
        let mut buffer = vec![0; CHUNK];
        for chunk in 0..chunks {
            fill(&mut buffer, chunk * CHUNK as u64);
            stream.write_all(&buffer).unwrap();
        }
        drop(stream);
        assert_eq!(receiver.join().unwrap(), chunks, "chunks that arrived unchanged");
    });
}

/// The same in both directions at once.
pub(crate) fn both_ways(one: &Pod, other: &Pod, chunks: u64) {
    thread::scope(|scope| {
        scope.spawn(|| tcp(one, other, chunks));
        tcp(other, one, chunks);
    });
}

/// How many chunks arrived as they were sent.
fn receive(listener: &TcpListener, chunks: u64) -> u64 {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    let (mut arrived, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    for chunk in 0..chunks {
        if stream.read_exact(&mut arrived).is_err() {
            return chunk;
        }
        fill(&mut expected, chunk * CHUNK as u64);
        assert!(arrived == expected, "chunk {chunk} of {chunks} was changed on the way");
    }
    assert_eq!(uninterrupted(|| stream.read(&mut arrived)).unwrap(), 0, "more arrived than was sent");
    chunks
}
