//! From the peers to the device: takes datagrams in batches, checks who sent what, and writes what follows
//! each other at once.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};
use subnet::Family;

use super::coalesce::{Added, Coalescer, LONGEST_HEAD, MAX_PARTS, SuperPacket};
use super::counters::Counters;
use super::icmp::IcmpError;
use super::icmp_sender::IcmpSender;
use super::packet::Header;
use super::routing::Routing;
use super::seal::{self, Sealing, handle};
use super::shared::Shared;
use super::sys::{Datagram, Receiver, Tun, UdpSocket};
use crate::wg::device::Heard;
use crate::wg::indices::IndexEntry;
use crate::wg::message::{HEADER, WireguardMessage};
use crate::wg::session::PacketRefusal;
use crate::wg::{Now, Outgoing};

pub(super) struct Ingress {
    tun: Arc<Tun>,
    sockets: Arc<[Arc<UdpSocket>]>,
    routing: Cache<Arc<ArcSwap<Routing>>, Arc<Routing>>,
    counters: Arc<Counters>,
    receiver: Receiver,
    coalescer: Coalescer,
    icmp_sender: IcmpSender,
    sealing: Option<Arc<Sealing>>,
    /// What it has to say itself; empty between turns.
    said: Vec<Outgoing>,
}

impl Ingress {
    pub(super) fn new(shared: &Shared) -> Self {
        let Shared { tun, sockets, routing, counters, sealing, .. } = shared;
        let coalescer = Coalescer::new(tun.vnet, tun.vnet && tun.udp);
        Self {
            tun: Arc::clone(tun),
            sockets: Arc::clone(sockets),
            routing: Cache::new(Arc::clone(routing)),
            counters: Arc::clone(counters),
            receiver: Receiver::new(),
            coalescer,
            icmp_sender: IcmpSender::new(shared),
            sealing: sealing.clone(),
            said: Vec::new(),
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
        match self.sealing.clone() {
            None => self.plain(&routing, &mut stats),
            Some(sealing) => self.sealed(&sealing, &routing, &mut stats),
        }
        let (datagrams, _) = self.receiver.batch();
        let bytes = datagrams.iter().map(|datagram| datagram.len).sum();
        self.counters.received_datagrams.add(datagrams.len() as u64);
        stats.publish(&self.counters);
        self.write()?;
        Ok(bytes)
    }

    /// Takes the packets of a batch.
    fn plain(&mut self, routing: &Routing, stats: &mut IngressStats) {
        let (datagrams, bytes) = self.receiver.batch();
        for datagram in datagrams {
            if !routing.knows(datagram.from) {
                stats.strangers += 1;
                continue;
            }
            stats.malformed += u64::from(datagram.len == 0);
            let end = datagram.start + datagram.len;
            let (mut start, before) = (datagram.start, stats.bytes);
            while start < end {
                let next = end.min(start + datagram.segment);
                let expired = take(&mut self.coalescer, routing, datagram.from, bytes, start..next, stats);
                if let Some(header) = expired {
                    let packet = &bytes[start..next];
                    self.icmp_sender.send(IcmpError::TimeExceeded, routing, &header, packet);
                }
                start = next;
            }
            if let Some(peer) = routing.bytes(datagram.from) {
                peer.received.add(stats.bytes - before);
            }
        }
    }

    /// Takes the packets of a batch out of what they are wrapped in.
    fn sealed(&mut self, sealing: &Sealing, routing: &Routing, stats: &mut IngressStats) {
        let now = sealing.now();
        let (datagrams, bytes) = self.receiver.batch();
        for datagram in datagrams {
            let mut opener = Opener { sealing, routing, datagram, now, last: None, heard: None };
            let end = datagram.start + datagram.len;
            let mut start = datagram.start;
            while start < end {
                let next = end.min(start + datagram.segment);
                match WireguardMessage::parse(&bytes[start..next]) {
                    Some(WireguardMessage::Data { receiver, counter }) => {
                        let said = &mut self.said;
                        let packet = opener.open(&mut bytes[start..next], (receiver, counter), said, stats);
                        if let Some((len, header)) = packet {
                            let range = start + HEADER..start + HEADER + len;
                            let expired = add(&mut self.coalescer, bytes, range.clone(), header, stats);
                            if let Some(header) = expired {
                                let packet = &bytes[range];
                                self.icmp_sender.send(IcmpError::TimeExceeded, routing, &header, packet);
                            }
                        }
                    }
                    Some(message) => {
                        let from = seal::sender(datagram);
                        let outcome =
                            sealing.device.handshake(&bytes[start..next], from, now, &mut self.said);
                        seal::count(&message, outcome, &self.counters);
                    }
                    None => stats.malformed += 1,
                }
                start = next;
            }
            opener.tell(&mut self.said);
        }
        sealing.post(&mut self.said, &self.sockets);
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
    add(coalescer, bytes, range, header, stats)
}

/// Hands the packet that begins at `range` to the coalescer; gives its header if its sender is to be told that its time
/// to live is over.
#[inline]
fn add(
    coalescer: &mut Coalescer,
    bytes: &mut [u8],
    range: Range<usize>,
    header: Header,
    stats: &mut IngressStats,
) -> Option<Header> {
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

/// Opens the packets of one datagram, which nearly always are of one session.
struct Opener<'a> {
    sealing: &'a Sealing,
    routing: &'a Routing,
    datagram: &'a Datagram,
    now: Now,
    /// The session that was looked up last, if there is one.
    last: Option<(u32, Option<IndexEntry>)>,
    /// What of it was valid, if something was.
    heard: Option<Heard>,
}

impl Opener<'_> {
    /// The packet in a datagram, as its length with padding and its header.
    #[inline]
    fn open(
        &mut self,
        datagram: &mut [u8],
        (receiver, counter): (u32, u64),
        said: &mut Vec<Outgoing>,
        stats: &mut IngressStats,
    ) -> Option<(usize, Header)> {
        if self.last.as_ref().is_none_or(|(known, _)| *known != receiver) {
            self.tell(said);
            self.last = Some((receiver, self.sealing.device.find(receiver)));
        }
        let entry = self.last.as_ref().and_then(|(_, entry)| entry.as_ref());
        let session = entry.and_then(|entry| entry.session.as_ref());
        let (Some(entry), Some(session)) =
            (entry, session.filter(|session| session.can_receive(self.now.ms)))
        else {
            stats.sessions += 1;
            self.sealing.device.unknown_session(seal::sender(self.datagram), self.now, said);
            return None;
        };
        let bytes = datagram.len();
        let len = match session.open(datagram, counter) {
            Ok(len) => len,
            Err(PacketRefusal::Forged) => {
                stats.forged += 1;
                return None;
            }
            Err(PacketRefusal::Replayed) => {
                stats.replayed += 1;
                return None;
            }
        };
        let heard = self.heard.get_or_insert_default();
        heard.packets |= len > 0;
        heard.bytes += bytes;
        if len == 0 {
            return None;
        }
        let Ok(header) = Header::parse(&datagram[HEADER..HEADER + len]) else {
            stats.malformed += 1;
            return None;
        };
        let sender = handle(entry.peer.number, Family::of(header.src));
        if self.routing.peer_of(header.src) != Some(sender) {
            stats.sources += 1;
            return None;
        }
        Some((len, header))
    }

    /// Tells the protocol that the peer was heard.
    fn tell(&mut self, said: &mut Vec<Outgoing>) {
        if let (Some(heard), Some((_, Some(entry)))) = (self.heard.take(), &self.last) {
            let from = seal::sender(self.datagram);
            self.sealing.device.heard(entry, from, heard, self.now, said);
        }
    }
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
    sessions: u64,
    forged: u64,
    replayed: u64,
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
        counters.refused_session.add(self.sessions);
        counters.refused_forged.add(self.forged);
        counters.refused_replayed.add(self.replayed);
    }
}
