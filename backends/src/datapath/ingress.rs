//! From the peers to the device: takes datagrams in batches, checks who sent what, and writes what follows
//! each other at once.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

use super::coalesce::{Added, Coalescer, LONGEST_HEAD, MAX_PARTS, SuperPacket};
use super::counters::Counters;
use super::icmp::IcmpError;
use super::icmp_sender::IcmpSender;
use super::packet::Header;
use super::routing::Routing;
use super::shared::Shared;
use super::sys::{Receiver, Tun, UdpSocket};

pub(super) struct Ingress {
    tun: Arc<Tun>,
    sockets: Arc<[Arc<UdpSocket>]>,
    routing: Cache<Arc<ArcSwap<Routing>>, Arc<Routing>>,
    counters: Arc<Counters>,
    receiver: Receiver,
    coalescer: Coalescer,
    icmp_sender: IcmpSender,
}

impl Ingress {
    pub(super) fn new(shared: &Shared) -> Self {
        let Shared { tun, sockets, routing, counters, .. } = shared;
        let coalescer = Coalescer::new(tun.vnet, tun.vnet && tun.udp);
        Self {
            tun: Arc::clone(tun),
            sockets: Arc::clone(sockets),
            routing: Cache::new(Arc::clone(routing)),
            counters: Arc::clone(counters),
            receiver: Receiver::new(),
            coalescer,
            icmp_sender: IcmpSender::new(shared),
        }
    }

    /// Takes a batch from each socket in `ready`, a bit each; gives their bytes.
    ///
    /// # Errors
    /// The device is gone, or a socket can't be read any more.
    pub(super) fn turn(&mut self, ready: u32) -> io::Result<usize> {
        let mut bytes = 0;
        for number in (0..self.sockets.len()).filter(|number| ready & (1 << number) != 0) {
            bytes += self.batch(number)?;
        }
        Ok(bytes)
    }

    fn batch(&mut self, number: usize) -> io::Result<usize> {
        match self.receiver.receive(&self.sockets[number]) {
            Ok(()) => {}
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT) => Err(error),
                    // Others tell of a packet that was sent, and are told once.
                    _ => Ok(0),
                };
            }
        }
        let routing = Arc::clone(self.routing.load());
        self.coalescer.clear();
        let mut stats = IngressStats::default();
        let (datagrams, bytes) = self.receiver.batch();
        for datagram in datagrams {
            if !routing.knows(datagram.from) {
                stats.strangers += 1;
                continue;
            }
            stats.malformed += u64::from(datagram.len == 0);
            let end = datagram.start + datagram.len;
            let mut start = datagram.start;
            while start < end {
                let next = end.min(start + datagram.segment);
                let expired =
                    take(&mut self.coalescer, &routing, datagram.from, bytes, start..next, &mut stats);
                if let Some(header) = expired {
                    let packet = &bytes[start..next];
                    self.icmp_sender.send(IcmpError::TimeExceeded, &routing, &header, packet);
                }
                start = next;
            }
        }
        let bytes = datagrams.iter().map(|datagram| datagram.len).sum();
        self.counters.received_datagrams.add(datagrams.len() as u64);
        stats.publish(&self.counters);
        self.write()?;
        Ok(bytes)
    }

    fn write(&mut self) -> io::Result<()> {
        let (_, bytes) = self.receiver.batch();
        let bytes = &*bytes;
        let (mut writes, mut refused) = (0, 0);
        for item in self.coalescer.items() {
            match write(&self.tun, item, bytes) {
                Ok(()) => writes += 1,
                Err(error) => match error.raw_os_error() {
                    Some(EBADFD) => return Err(error),
                    // The device refuses the merged packet, but not what it was merged from.
                    Some(libc::EINVAL) if item.packets() > 1 => {
                        for range in item.each() {
                            match self.tun.write_plain(&bytes[range]) {
                                Ok(()) => writes += 1,
                                Err(_) => refused += 1,
                            }
                        }
                    }
                    // For instance EIO, as long as the device is down.
                    _ => refused += item.packets() as u64,
                },
            }
        }
        self.counters.received_writes.add(writes);
        self.counters.refused_by_device.add(refused);
        Ok(())
    }
}

/// The device is gone (drivers/net/tun.c); libc has no name for it on all targets.
const EBADFD: i32 = 77;

/// Checks the packet at `range` and hands it to the coalescer; gives its header if its sender is to be told
/// that its time to live is over.
#[inline]
fn take(
    coalescer: &mut Coalescer,
    routing: &Routing,
    sender: IpAddr,
    bytes: &mut [u8],
    range: Range<usize>,
    stats: &mut IngressStats,
) -> Option<Header> {
    let header = match Header::parse(&bytes[range.clone()]) {
        Ok(header) if header.is_v6() == sender.is_ipv6() => header,
        _ => {
            stats.malformed += 1;
            return None;
        }
    };
    if !routing.owns(sender, header.src) {
        stats.sources += 1;
        return None;
    }
    let range = range.start..range.start + header.total_len;
    let len = header.total_len as u64;
    match coalescer.add(bytes, range, &header) {
        Added::Sound => {}
        Added::Unsound => stats.unsound += 1,
        Added::Expired => {
            stats.expired += 1;
            return Some(header);
        }
    }
    stats.packets += 1;
    stats.bytes += len;
    None
}

#[inline]
fn write(tun: &Tun, item: &SuperPacket, bytes: &[u8]) -> io::Result<()> {
    if !tun.vnet {
        let one = |part: &Range<usize>| tun.write(&[IoSlice::new(&bytes[part.clone()])]);
        return item.parts().iter().try_for_each(one);
    }
    let mut head = [0; LONGEST_HEAD];
    let len = item.head(&mut head);
    let mut parts = [IoSlice::new(&[]); MAX_PARTS + 1];
    parts[0] = IoSlice::new(&head[..len]);
    let mut count = 1;
    for (slice, part) in parts[1..].iter_mut().zip(item.parts()) {
        *slice = IoSlice::new(&bytes[part.clone()]);
        count += 1;
    }
    tun.write(&parts[..count])
}

/// What a batch adds to the counters.
#[derive(Default)]
struct IngressStats {
    packets: u64,
    bytes: u64,
    unsound: u64,
    strangers: u64,
    sources: u64,
    malformed: u64,
    expired: u64,
}

impl IngressStats {
    fn publish(&self, counters: &Counters) {
        counters.received_packets.add(self.packets);
        counters.received_bytes.add(self.bytes);
        counters.received_unsound.add(self.unsound);
        counters.refused_stranger.add(self.strangers);
        counters.refused_source.add(self.sources);
        counters.refused_malformed.add(self.malformed);
        counters.refused_ttl.add(self.expired);
    }
}
