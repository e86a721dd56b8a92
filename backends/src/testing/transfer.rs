//! A TCP stream of which every byte is known beforehand.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use super::namespace::Namespace;
use super::numbers::Numbers;
use super::uninterrupted;

/// Bytes that are made and compared at once.
const PIECE: usize = 64 * 1024;

/// What became of a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transfer {
    /// Pieces of it that arrived otherwise than they were sent.
    pub wrong: u64,
    /// From before its receiver listens until the last byte is compared.
    pub time: Duration,
}

/// Sends so many bytes from one namespace to an address in another one, and compares what arrives; an error if nothing moves
/// for as long as `silence`.
pub fn transfer(
    from: &Namespace,
    to: (&Namespace, IpAddr),
    bytes: u64,
    silence: Duration,
) -> anyhow::Result<Transfer> {
    let listener = to.0.run(|| TcpListener::bind(SocketAddr::new(to.1, 0)));
    let listener = listener.context("no socket to receive the stream with")?;
    let at = listener.local_addr()?;
    let start = Instant::now();
    let wrong = thread::scope(|scope| {
        let sender = scope.spawn(move || -> anyhow::Result<()> {
            let stream = from.run(|| TcpStream::connect_timeout(&at, silence));
            let mut stream = stream.context("no connection")?;
            stream.set_write_timeout(Some(silence))?;
            for piece in pieces(bytes) {
                stream.write_all(&piece).context("the stream breaks")?;
            }
            Ok(())
        });
        let received = receive(&listener, bytes, silence);
        sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        received
    })?;
    Ok(Transfer { wrong, time: start.elapsed() })
}

/// How many pieces arrived otherwise than they were sent.
fn receive(listener: &TcpListener, bytes: u64, silence: Duration) -> anyhow::Result<u64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(silence))?;
    let (mut room, mut wrong) = (vec![0; PIECE], 0);
    for (number, piece) in pieces(bytes).enumerate() {
        let arrived = &mut room[..piece.len()];
        stream.read_exact(arrived).with_context(|| format!("the stream ends after {number} pieces"))?;
        wrong += u64::from(*arrived != piece[..]);
    }
    ensure!(uninterrupted(|| stream.read(&mut room))? == 0, "more arrives than was sent");
    Ok(wrong)
}

/// The stream, piece by piece.
fn pieces(bytes: u64) -> impl Iterator<Item = Vec<u8>> {
    let (mut content, piece) = (Numbers(1), PIECE as u64);
    let lengths = (0..bytes.div_ceil(piece)).map(move |number| piece.min(bytes - number * piece));
    lengths.map(move |len| content.bytes(len as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_the_length_that_was_asked_for_and_its_ends_agree_on_it() {
        for bytes in [0, 1, PIECE as u64, PIECE as u64 + 7] {
            assert_eq!(pieces(bytes).map(|piece| piece.len() as u64).sum::<u64>(), bytes);
            assert!(pieces(bytes).eq(pieces(bytes)));
        }
        let mut two = pieces(2 * PIECE as u64);
        assert_ne!(two.next(), two.next());
    }
}
