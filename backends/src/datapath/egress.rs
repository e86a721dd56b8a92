//! From the device to the peers: reads what the kernel hands over, cuts it to packets, sends them in groups.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Cache};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use subnet::Family;

use super::buffer::AlignedBuffer;
use super::counters::Counters;
use super::icmp::IcmpError;
use super::icmp_sender::IcmpSender;
use super::outbox::{Group, Outbox};
use super::packet::{Header, Malformed, UDP, V6_HEADER, decrement_ttl};
use super::routing::Routing;
use super::seal::{Sealing, margin};
use super::shared::{Shared, Sockets};
use super::split::{max_segment_len, split};
use super::sys::{Tun, UdpSocket};
use super::vnet::{self, Vnet};
use crate::wg::Outgoing;

/// The device is read until so many bytes are to be sent, so many reads were made, or nothing is left.
const BATCH_BYTES: usize = 128 * 1024;
const BATCH_READS: u64 = 256;
/// Of these, a queue gets so much while others have packets, too.
const SHARE: usize = 2;
/// The longest packet with its offload header; IPv6 doesn't count its own header.
const LONGEST: usize = vnet::LEN + V6_HEADER + 65_535;
/// Where packets are read to, so that the payload of IPv4 and TCP with timestamps begins with a cache line: the
/// kernel copies headers apart from it.
const DISTANCE: usize = 2;
/// How long packets to a peer go one by one after the kernel refused to segment them.
const DISTRUST: Duration = Duration::from_secs(300);
/// How long the kernel may take to make room in the buffer of the socket.
const SEND_TIMEOUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How often the log is told of the same trouble.
const QUIET: Duration = Duration::from_secs(60);

pub(super) struct Egress {
    tun: Arc<Tun>,
    /// The queues of the device to read.
    queues: Range<u32>,
    sockets: Sockets,
    routing: Cache<Arc<ArcSwap<Routing>>, Arc<Routing>>,
    counters: Arc<Counters>,
    turns: u32,
    room: AlignedBuffer,
    outbox: Outbox,
    /// The queues that had more after the last turn.
    more: u32,
    /// A group waits in the outbox for what they have.
    held: bool,
    icmp_sender: IcmpSender,
    /// Peers whose packets go one by one, until then.
    distrusted: BTreeMap<IpAddr, Instant>,
    /// The MTU under which they were.
    mtu: u16,
    told: Option<Instant>,
    sealing: Option<Arc<Sealing>>,
    /// What it has to say itself; empty between turns.
    said: Vec<Outgoing>,
}

/// What a turn has read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EgressStats {
    pub(super) bytes: usize,
    /// Packets, merged ones counting as one.
    pub(super) reads: u64,
    /// The queues that may have more, a bit each.
    pub(super) more: u32,
}

impl Egress {
    pub(super) fn new(shared: &Shared) -> Self {
        let Shared { tun, queues, sockets, routing, counters, sealing } = shared;
        Self {
            turns: 0,
            tun: Arc::clone(tun),
            queues: queues.clone(),
            sockets: Arc::clone(sockets),
            routing: Cache::new(Arc::clone(routing)),
            counters: Arc::clone(counters),
            room: AlignedBuffer::new(LONGEST, DISTANCE),
            outbox: Outbox::with_capacity(BATCH_BYTES + 4 * LONGEST),
            more: 0,
            held: false,
            icmp_sender: IcmpSender::new(shared),
            distrusted: BTreeMap::new(),
            mtu: 0,
            told: None,
            sealing: sealing.clone(),
            said: Vec::new(),
        }
    }

    /// Sends a batch from the queues in `ready`, a bit each, and those that had more last time. As long as some
    /// have, the last group may wait for the next turn, which has to follow at once.
    ///
    /// # Errors
    /// The device is gone.
    pub(super) fn turn(&mut self, ready: u32) -> io::Result<EgressStats> {
        let routing = Arc::clone(self.routing.load());
        if routing.mtu != self.mtu {
            // What the kernel refused while the link changed, it may take now.
            self.mtu = routing.mtu;
            self.distrusted.clear();
            if self.sealing.is_some() {
                self.outbox.set_margin(margin(routing.mtu));
            }
        }
        if !self.held {
            self.outbox.clear();
        }
        let ready = ready | self.more;
        let share = if ready.count_ones() > 1 { SHARE } else { 1 };
        let Range { start: first, end } = self.queues;
        let count = end - first;
        self.turns = self.turns.wrapping_add(1);
        let mut went = EgressStats::default();
        for step in 0..count {
            // Not always the same one first.
            let queue = first + self.turns.wrapping_add(step) % count;
            if ready & (1 << queue) != 0 {
                let (reads, bytes, more) = self.queue(queue, &routing, share)?;
                went.reads += reads;
                went.bytes += bytes;
                went.more |= u32::from(more) << queue;
            }
        }
        self.counters.sent_reads.add(went.reads);
        self.more = went.more;
        // A send costs about as much for few packets as for many.
        self.held = went.more != 0 && self.outbox.hold_back();
        if let Some(sealing) = &self.sealing {
            sealing.seal(&mut self.outbox, &mut self.said, &self.counters);
            sealing.post(&mut self.said, &self.sockets);
        }
        self.flush(&routing);
        if self.held {
            self.outbox.resume();
        }
        Ok(went)
    }

    /// Reads a queue until it is empty or has had its share; gives the number of reads, the bytes, and whether
    /// there is more.
    fn queue(&mut self, queue: u32, routing: &Routing, share: usize) -> io::Result<(u64, usize, bool)> {
        let (mut reads, mut bytes) = (0, 0);
        let mut busy = true;
        while bytes < BATCH_BYTES / share && reads < BATCH_READS / share as u64 {
            match self.read(queue as usize) {
                Ok(len) => {
                    reads += 1;
                    bytes += len;
                    self.packet(routing, len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    busy = false;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok((reads, bytes, busy))
    }

    /// Reads one packet so that it is preceded by an offload header; gives the length of both.
    #[inline]
    fn read(&mut self, queue: usize) -> io::Result<usize> {
        if self.tun.vnet {
            return self.tun.read(queue, &mut self.room);
        }
        self.room[..vnet::LEN].fill(0);
        Ok(self.tun.read(queue, &mut self.room[vnet::LEN..])? + vnet::LEN)
    }

    #[inline]
    fn packet(&mut self, routing: &Routing, len: usize) {
        let counters = &*self.counters;
        let Some((head, packet)) = self.room[..len].split_first_chunk_mut::<{ vnet::LEN }>() else {
            return counters.dropped_malformed.add(1);
        };
        let vnet = Vnet::parse(head);
        let header = match Header::parse(packet) {
            Ok(header) => header,
            Err(Malformed::Version) => return counters.dropped_not_carried.add(1),
            Err(_) => return counters.dropped_malformed.add(1),
        };
        // A datagram of a tunnel that a route leads into it would come back for ever.
        if stays_on_link(header.src) || is_own_datagram(routing, &header, packet) {
            return counters.dropped_not_carried.add(1);
        }
        let Some(peer) = routing.peer_of(header.dst) else {
            if stays_on_link(header.dst) || routing.addresses.get(Family::of(header.dst)).is_none() {
                return counters.dropped_not_carried.add(1);
            }
            counters.dropped_no_peer.add(1);
            return self.complain(IcmpError::NetUnreachable, routing, &header, len);
        };
        if header.ttl <= 1 {
            counters.dropped_ttl.add(1);
            return self.complain(IcmpError::TimeExceeded, routing, &header, len);
        }
        if header.dont_fragment && max_segment_len(&vnet, &header, packet) > routing.mtu.into() {
            counters.dropped_too_long.add(1);
            return self.complain(IcmpError::TooBig(routing.mtu), routing, &header, len);
        }
        decrement_ttl(packet);
        if split(&vnet, &header, packet, &mut self.outbox.to(peer)).is_err() {
            counters.dropped_malformed.add(1);
        }
    }

    /// Tells the sender of the packet that was just read.
    fn complain(&mut self, trouble: IcmpError, routing: &Routing, header: &Header, len: usize) {
        self.icmp_sender.send(trouble, routing, header, &self.room[vnet::LEN..len]);
    }

    /// The socket for packets to this peer.
    fn socket(&self, to: IpAddr) -> Option<&UdpSocket> {
        self.sockets.iter().map(|socket| &**socket).find(|socket| socket.reaches(to))
    }

    fn flush(&mut self, routing: &Routing) {
        let port = routing.port;
        let mut from = 0;
        while from < self.outbox.groups().len() {
            let groups = &self.outbox.groups()[from..];
            let Some(socket) = self.socket(groups[0].to) else {
                // Its peers went before it.
                self.counters.dropped_unsent.add(groups[0].packets.into());
                from += 1;
                continue;
            };
            let together = |group: &&Group| socket.reaches(group.to) && !self.distrusts(group);
            let trusted = groups.iter().take_while(together).count();
            if trusted == 0 {
                self.send_singly(from, routing);
                from += 1;
                continue;
            }
            match socket.send(port, self.outbox.bytes(), &groups[..trusted]) {
                Ok(sent) => {
                    groups[..sent].iter().for_each(|group| self.count(routing, group));
                    from += sent;
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => wait(socket),
                    Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO) if groups[0].packets > 1 => {
                        self.distrust(groups[0].to, &error);
                        self.send_singly(from, routing);
                        from += 1;
                    }
                    _ => {
                        self.counters.dropped_unsent.add(groups[0].packets.into());
                        self.tell(groups[0].to, &error);
                        from += 1;
                    }
                },
            }
        }
    }

    #[inline]
    fn count(&self, routing: &Routing, group: &Group) {
        let bytes = group.extents.iter().map(|extent| extent.len() as u64).sum();
        self.counters.sent_groups.add(1);
        self.counters.sent_packets.add(group.packets.into());
        self.counters.sent_bytes.add(bytes);
        self.count_for(routing, group.to, bytes);
    }

    /// Sessions count for themselves, and for another address than where packets go.
    #[inline]
    fn count_for(&self, routing: &Routing, to: IpAddr, bytes: u64) {
        if self.sealing.is_none()
            && let Some(peer) = routing.bytes(to)
        {
            peer.sent.add(bytes);
        }
    }

    #[inline]
    fn distrusts(&self, group: &Group) -> bool {
        group.packets > 1 && !self.distrusted.is_empty() && self.distrusted.contains_key(&group.to)
    }

    fn distrust(&mut self, peer: IpAddr, error: &io::Error) {
        let now = Instant::now();
        self.distrusted.retain(|_, until| *until > now);
        self.distrusted.insert(peer, now + DISTRUST);
        if self.may_tell(now) {
            tracing::warn!(
                %peer,
                "the kernel doesn't segment packets for this peer ({error}): sending them one by one for {} s",
                DISTRUST.as_secs()
            );
        }
    }

    fn send_singly(&mut self, index: usize, routing: &Routing) {
        let group = &self.outbox.groups()[index];
        let Some(socket) = self.socket(group.to) else { return };
        self.counters.sent_fallbacks.add(1);
        let to = SocketAddr::new(group.to, group.port_or(routing.port));
        let mut trouble = None;
        for range in group.each() {
            let packet = &self.outbox.bytes()[range];
            let outcome = loop {
                match socket.send_one(to, packet) {
                    Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                        wait(socket);
                    }
                    outcome => break outcome,
                }
            };
            match outcome {
                Ok(()) => {
                    self.counters.sent_packets.add(1);
                    self.counters.sent_bytes.add(packet.len() as u64);
                    self.count_for(routing, group.to, packet.len() as u64);
                }
                Err(error) => {
                    self.counters.dropped_unsent.add(1);
                    trouble = Some(error);
                }
            }
        }
        let peer = group.to;
        let now = Instant::now();
        self.distrusted.retain(|_, until| *until > now);
        if let Some(error) = trouble {
            self.tell(peer, &error);
        }
    }

    fn tell(&mut self, peer: IpAddr, error: &io::Error) {
        if self.may_tell(Instant::now()) {
            tracing::warn!(%peer, "packets can't be sent and are dropped: {error}");
        }
    }

    fn may_tell(&mut self, now: Instant) -> bool {
        let may = self.told.is_none_or(|told| now - told >= QUIET);
        if may {
            self.told = Some(now);
        }
        may
    }
}

fn wait(socket: &UdpSocket) {
    let _ = poll(&mut [PollFd::new(socket.sender(), PollFlags::OUT)], Some(&SEND_TIMEOUT));
}

/// Whether the packet is a datagram from this node's tunnel to another one's.
#[inline]
fn is_own_datagram(routing: &Routing, header: &Header, packet: &[u8]) -> bool {
    let ports = || packet.get(header.header_len..)?.first_chunk::<4>();
    routing.local.get(Family::of(header.src)) == Some(header.src)
        && header.protocol == UDP
        && !header.later_fragment
        && ports().is_some_and(|ports| ports[2..] == routing.port.to_be_bytes())
}

/// Whether packets from or to this address never leave their link: what IPv6 says to neighbours and groups.
#[inline]
fn stays_on_link(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unspecified() || v6.is_unicast_link_local(),
    }
}
