//! WireGuard in the datapath: groups are sealed just before they are sent, datagrams opened just after they came.
//!
//! The rest of the datapath knows peers by addresses. Here such an address is a peer's *handle*: its number in the
//! device's table, which stays the same while its endpoint moves.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use subnet::Family;

use super::counters::Counters;
use super::outbox::{Margin, Outbox};
use super::packet::V6_HEADER;
use super::sys::UdpSocket;
use crate::wg::answers::HandshakeOutcome;
use crate::wg::device::Device;
use crate::wg::message::{HEADER, PADDING, TAG, WireguardMessage};
use crate::wg::peer::DevicePeer;
use crate::wg::{Now, Outgoing};

/// When the process began to need the time.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
/// Timers are looked at no more often than this, and while there are any at least so often.
const TIMERS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The time now.
fn now() -> Now {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Some time has passed already, so that there is one before this.
    Now { ms: EPOCH.elapsed().as_millis() as u64 + 1_000_000_000, unix }
}

/// The address by which the datapath knows a peer, for packets of one family.
#[inline]
pub(super) fn handle(number: u32, family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(number.into()),
        Family::V6 => IpAddr::V6(u128::from(number).into()),
    }
}

#[inline]
fn number(handle: IpAddr) -> u32 {
    match handle {
        IpAddr::V4(v4) => v4.to_bits(),
        IpAddr::V6(v6) => v6.to_bits() as u32,
    }
}

/// A node's WireGuard, as the threads of a datapath share it.
pub(super) struct Sealing {
    pub(super) device: Arc<Device>,
    /// Wakes the thread that keeps the time.
    alarm: OwnedFd,
}

impl Sealing {
    pub(super) fn new(device: Arc<Device>) -> io::Result<Self> {
        Ok(Self { device, alarm: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// The time now, for this node's sessions.
    pub(super) fn now(&self) -> Now {
        self.device.shifted(now())
    }

    /// Seals the groups that are to be sent, and sets where they go. Those of peers without a session wait for one
    /// elsewhere, and are taken out.
    pub(super) fn seal(&self, outbox: &mut Outbox, out: &mut Vec<Outgoing>, counters: &Counters) {
        let (device, now) = (&*self.device, self.now());
        let mut lost = 0;
        outbox.retain(|group, bytes| {
            let Some(peer) = device.peer(number(group.to)) else {
                counters.dropped_no_peer.add(group.packets.into());
                return false;
            };
            let Some(session) = peer.session(now.ms) else {
                for range in group.each() {
                    lost += u64::from(stage(device, &peer, &bytes[range], now, out));
                }
                return false;
            };
            let mut sealed = 0;
            for range in group.each() {
                sealed += range.len();
                let datagram = &mut bytes[range];
                clear_padding(datagram);
                if session.seal(datagram).is_err() {
                    lost += u64::from(group.packets);
                    return false;
                }
            }
            device.sent(&peer, &session, sealed, now, out);
            let endpoint = peer.endpoint();
            (group.to, group.port) = (endpoint.ip(), endpoint.port());
            true
        });
        counters.dropped_without_session.add(lost);
    }

    /// Sends what the protocol itself has to say, and wakes the thread that keeps the time if it waits for that.
    pub(super) fn post(&self, out: &mut Vec<Outgoing>, sockets: &[Arc<UdpSocket>]) {
        send(out, sockets);
        if self.device.wakes() {
            let _ = rustix::io::write(&self.alarm, &1u64.to_ne_bytes());
        }
    }

    /// Does what is due by time, until told to stop.
    pub(super) fn keep_time(
        &self,
        sockets: &[Arc<UdpSocket>],
        counters: &Counters,
        stop: &OwnedFd,
    ) -> io::Result<()> {
        let mut out = Vec::new();
        loop {
            let timeout = self.do_what_is_due(&mut out, sockets, counters).map(|next| {
                let next = next.clamp(TIMERS.0, TIMERS.1);
                Timespec { tv_sec: next.as_secs() as _, tv_nsec: next.subsec_nanos().into() }
            });
            let mut files = [PollFd::new(stop, PollFlags::IN), PollFd::new(&self.alarm, PollFlags::IN)];
            match poll(&mut files, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                outcome => outcome?,
            };
            if !files[0].revents().is_empty() {
                return Ok(());
            }
            let _ = rustix::io::read(&self.alarm, &mut [0; 8]);
        }
    }

    /// Does what is due now. The result is when the next is; `None`: nothing is, and the thread waits for the alarm.
    fn do_what_is_due(
        &self,
        out: &mut Vec<Outgoing>,
        sockets: &[Arc<UdpSocket>],
        counters: &Counters,
    ) -> Option<Duration> {
        let mut next = self.device.tick(self.now(), out);
        if next.is_none() {
            self.device.sleeps();
            // What came meanwhile has woken no thread.
            next = self.device.tick(self.now(), out);
        }
        // Without the alarm, which would wake this thread at once, again and again.
        send(out, sockets);
        counters.handshakes_unanswered.add(self.device.take_unanswered());
        next
    }
}

/// Sends messages of the protocol. What is lost is repeated.
fn send(out: &mut Vec<Outgoing>, sockets: &[Arc<UdpSocket>]) {
    for Outgoing { to, bytes } in out.drain(..) {
        if let Some(socket) = sockets.iter().find(|socket| socket.reaches(to.ip())) {
            let _ = socket.send_one(to, &bytes);
        }
    }
}

/// The room around packets that are to be sealed.
pub(super) fn margin(mtu: u16) -> Margin {
    Margin { head: HEADER, tail: TAG, padding: PADDING - 1, longest: mtu.into() }
}

/// The length of a packet, which its header says.
fn len(packet: &[u8]) -> usize {
    let field = |at: usize| {
        packet.get(at..at + 2).map_or(0, |field| usize::from(field[0]) << 8 | usize::from(field[1]))
    };
    let len = match packet.first().map(|first| first >> 4) {
        Some(6) => field(4) + V6_HEADER,
        _ => field(2),
    };
    len.min(packet.len())
}

/// The memory has been used for packets of others.
#[inline]
fn clear_padding(datagram: &mut [u8]) {
    let end = datagram.len() - TAG;
    let padded = &mut datagram[HEADER..end];
    let len = len(padded);
    padded[len..].fill(0);
}

fn stage(
    device: &Device,
    peer: &Arc<DevicePeer>,
    datagram: &[u8],
    now: Now,
    out: &mut Vec<Outgoing>,
) -> bool {
    let padded = &datagram[HEADER..datagram.len() - TAG];
    device.stage(peer, &padded[..len(padded)], now, out)
}

/// Counts what a handshake message came to.
pub(super) fn count(message: &WireguardMessage<'_>, outcome: HandshakeOutcome, counters: &Counters) {
    let counter = match outcome {
        HandshakeOutcome::Answered => &counters.handshakes,
        HandshakeOutcome::Established => {
            counters.handshakes_begun.add(1);
            &counters.handshakes
        }
        HandshakeOutcome::Asked => &counters.handshakes_asked,
        HandshakeOutcome::Proving => &counters.handshakes_proving,
        HandshakeOutcome::Refused => {
            counters
                .handshakes_misanswered
                .add(u64::from(!matches!(message, WireguardMessage::Initiation(_))));
            &counters.refused_handshakes
        }
        HandshakeOutcome::Dropped => &counters.dropped_handshakes,
    };
    counter.add(1);
}

/// The sender of a datagram.
#[inline]
pub(super) fn sender(datagram: &super::sys::Datagram) -> SocketAddr {
    SocketAddr::new(datagram.from, datagram.port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::identity::Identity;

    #[test]
    fn a_handle_is_the_number_of_a_peer_in_either_family() {
        for peer in [0, 1, 77, u32::MAX] {
            for family in Family::BOTH {
                let handle = handle(peer, family);
                assert_eq!((number(handle), Family::of(handle)), (peer, family));
            }
        }
    }

    #[test]
    fn the_thread_that_keeps_the_time_waits_while_nothing_is_due_and_is_woken_by_the_others() {
        let identity = Arc::new(Identity::generate().unwrap());
        let sealing = Sealing::new(Arc::new(Device::new(identity, 1420))).unwrap();
        let rings = || {
            let mut files = [PollFd::new(&sealing.alarm, PollFlags::IN)];
            poll(&mut files, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
        };
        for _ in 0..3 {
            assert_eq!(sealing.do_what_is_due(&mut Vec::new(), &[], &Counters::default()), None);
            assert!(!rings(), "it would wake itself, again and again");
        }
        sealing.post(&mut Vec::new(), &[]);
        assert!(rings());
    }

    #[test]
    fn padding_is_what_is_behind_the_packet() {
        let mut datagram = vec![9; HEADER + 32 + TAG];
        datagram[HEADER] = 0x45;
        datagram[HEADER + 2..HEADER + 4].copy_from_slice(&20_u16.to_be_bytes());
        clear_padding(&mut datagram);
        assert_eq!(datagram[HEADER + 19..HEADER + 33], [&[9][..], &[0; 12], &[9]].concat());
        for bad in [&[][..], &[0x45], &[0x60, 0, 0, 0, 0xff, 0xff], &[0x45, 0, 0xff, 0xff]] {
            assert!(len(bad) <= bad.len());
        }
    }
}
