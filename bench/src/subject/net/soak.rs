//! Much of everything, looked at byte by byte: a stream whose content the receiver knows, and datagrams that
//! say which they are.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use backends::testing::{Numbers, Pod, transfer, uninterrupted};
use bench::iperf::End;

use super::bed::Pair;
use super::counted::Counted;
use super::flow::queue_is_full;
use super::plan::Place;
use super::results::{Quantity, Value};

/// Bytes of the stream.
pub(crate) const BYTES: u64 = 10_000_000_000;
/// Datagrams that have to arrive.
const DATAGRAMS: u64 = 10_000_000;
/// Flows that they are in.
const FLOWS: usize = 8;
/// Payloads in bytes; the first two words say which datagram it is.
const SIZES: [usize; 4] = [64, 700, 200, 1400];
/// When nothing has come for so long, nothing will.
const SILENCE: Duration = Duration::from_secs(10);

/// Sends all of it from one pod to another.
pub(crate) fn take(pair: &Pair, place: Place) -> anyhow::Result<Vec<Value>> {
    let (counted, wrong) = (Counted::now(pair), checksum_errors(pair)?);
    let [from, to] = pair.ends(place);
    let stream = transfer(from.namespace, (to.namespace, to.address), BYTES, SILENCE)?;
    let datagrams = datagrams(pair.ends(place))?;
    let unsound = match (counted, Counted::now(pair)) {
        (Some(before), Some(now)) => now.unsound().saturating_sub(before.unsound()),
        _ => 0,
    };
    let wrong = checksum_errors(pair)?.saturating_sub(wrong) + unsound;
    Ok(vec![
        Quantity::Volume.of(BYTES as f64 / 1e9),
        Quantity::Rate.of(BYTES as f64 * 8.0 / 1e9 / stream.time.as_secs_f64()),
        Quantity::Arrived.of(datagrams.arrived as f64 / 1e6),
        Quantity::Received.of(datagrams.rate / 1e3),
        Quantity::Corrupt.of((stream.wrong + datagrams.corrupt) as f64),
        Quantity::Disordered.of(datagrams.disordered as f64),
        Quantity::ChecksumErrors.of(wrong as f64),
    ])
}

/// What became of the datagrams. Lost ones are no failure: they are sent as fast as it goes.
#[derive(Debug, Default)]
struct Arrivals {
    arrived: u64,
    corrupt: u64,
    disordered: u64,
    rate: f64,
}

fn datagrams([from, to]: [End<'_>; 2]) -> anyhow::Result<Arrivals> {
    let bind = |end: End<'_>| end.namespace.run(|| UdpSocket::bind(SocketAddr::new(end.address, 0)));
    let sink = bind(to).context("no socket to receive datagrams with")?;
    sink.set_read_timeout(Some(SILENCE))?;
    let mut sources = Vec::new();
    for _ in 0..FLOWS {
        let source = bind(from).context("no socket to send datagrams with")?;
        source.connect(sink.local_addr()?)?;
        sources.push(source);
    }
    let done = AtomicBool::new(false);
    let start = Instant::now();
    let mut all = thread::scope(|scope| {
        let sender = scope.spawn(|| send(&sources, &done));
        let received = receive(&sink);
        done.store(true, Ordering::Relaxed);
        sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        received
    })?;
    all.rate = all.arrived as f64 / start.elapsed().as_secs_f64();
    Ok(all)
}

fn send(sources: &[UdpSocket], done: &AtomicBool) -> anyhow::Result<()> {
    let mut room = vec![0; SIZES.into_iter().max().unwrap_or_default()];
    for number in 0u64.. {
        for (flow, source) in sources.iter().enumerate() {
            if done.load(Ordering::Relaxed) {
                return Ok(());
            }
            let datagram = &mut room[..SIZES[(number as usize + flow) % SIZES.len()]];
            compose(datagram, flow as u64, number);
            match source.send(datagram) {
                Ok(_) => {}
                Err(error) if queue_is_full(&error) => {}
                Err(error) => return Err(error).context("a datagram can't be sent"),
            }
        }
    }
    Ok(())
}

fn compose(datagram: &mut [u8], flow: u64, number: u64) {
    datagram[..8].copy_from_slice(&flow.to_le_bytes());
    datagram[8..16].copy_from_slice(&number.to_le_bytes());
    Numbers(flow << 40 ^ number).fill(&mut datagram[16..]);
}

fn receive(sink: &UdpSocket) -> anyhow::Result<Arrivals> {
    let mut all = Arrivals::default();
    let mut next = [0; FLOWS];
    let (mut room, mut expected) = (vec![0; 2048], vec![0; 2048]);
    while all.arrived < DATAGRAMS {
        let len = match uninterrupted(|| sink.recv(&mut room)) {
            Ok(len) => len,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                anyhow::bail!("after {} datagrams none has come for {SILENCE:?}", all.arrived);
            }
            Err(error) => return Err(error).context("datagrams can't be received"),
        };
        all.arrived += 1;
        let word =
            |at: usize| room.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let (Some(flow), Some(number)) = (word(0), word(8)) else {
            all.corrupt += 1;
            continue;
        };
        let Some(next) = usize::try_from(flow).ok().and_then(|flow| next.get_mut(flow)) else {
            all.corrupt += 1;
            continue;
        };
        let size = SIZES[(number as usize).wrapping_add(flow as usize) % SIZES.len()];
        compose(&mut expected[..size], flow, number);
        if room[..len] != expected[..size] {
            all.corrupt += 1;
            continue;
        }
        all.disordered += u64::from(number < *next);
        *next = (*next).max(number + 1);
    }
    Ok(all)
}

/// What the kernel counted of wrong checksums, of any protocol, on both nodes and in both pods.
fn checksum_errors(pair: &Pair) -> anyhow::Result<u64> {
    let sides = [&pair.near, &pair.far].into_iter();
    let all = sides.flat_map(|side| side.pods.iter().map(Pod::namespace).chain([side.node.namespace()]));
    all.map(|namespace| Ok(namespace.checksum_errors()?.sum())).sum()
}

/// That the receiver would notice.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_the_same_for_both_ends_and_differs_between_datagrams() {
        let of = |flow, number| {
            let mut datagram = vec![0; 64];
            compose(&mut datagram, flow, number);
            datagram
        };
        assert_eq!(of(1, 7), of(1, 7));
        assert_ne!(of(1, 7)[16..], of(1, 8)[16..]);
        assert_ne!(of(1, 7)[16..], of(2, 7)[16..]);
    }
}
