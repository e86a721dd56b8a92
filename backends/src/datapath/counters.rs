//! What the datapath counts: written by its threads once a batch, read by other threads.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident),* $(,)?) => {
        /// The counters of all datapaths of this process, since its start.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[doc = $doc])+ pub $name: Counter,)* }

        impl Counters {
            /// All counters by their names.
            pub fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.get()),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Packets sent to peers.
    sent_packets,
    /// Bytes of these packets, without outer headers.
    sent_bytes,
    /// Reads from the device: each is one packet or many segments at once.
    sent_reads,
    /// Groups handed to the kernel: packets by groups is the segments per send.
    sent_groups,
    /// Groups that the kernel refused to segment, sent packet by packet.
    sent_fallbacks,
    /// Packets for which there is no peer.
    dropped_no_peer,
    /// Packets whose time to live was over.
    dropped_ttl,
    /// Packets that are too long and may not be fragmented.
    dropped_too_long,
    /// Packets from the device that no tunnel carries: of a family that the network doesn't have, and of IPv6
    /// those that stay on their link, such as router solicitations.
    dropped_not_carried,
    /// Packets from the device that are malformed.
    dropped_malformed,
    /// Packets that the kernel refused to send.
    dropped_unsent,
    /// Packets that found no session with their peer, and waited too long or were too many.
    dropped_without_session,
    /// Handshakes that were carried out.
    handshakes,
    /// Those of them that this node began.
    handshakes_begun,
    /// Initiations of this node that were not answered within five seconds.
    handshakes_unanswered,
    /// Of the refused handshake messages, those that answer this node: responses and cookies.
    handshakes_misanswered,
    /// Handshake messages answered by a demand for a proof of the sender's address.
    handshakes_asked,
    /// Such demands of peers.
    handshakes_proving,
    /// Handshake messages that were not looked at, because there were too many.
    dropped_handshakes,
    /// ICMP errors sent.
    icmp_errors,
    /// ICMP errors not sent because there were too many.
    icmp_limited,
    /// Packets received from peers and given to the device.
    received_packets,
    /// Bytes of these packets.
    received_bytes,
    /// Datagrams as the kernel merged them.
    received_datagrams,
    /// Writes to the device: packets by writes is the segments per write.
    received_writes,
    /// Packets with a wrong checksum, given to the device as they are, so that the kernel counts them.
    received_unsound,
    /// Datagrams from addresses that are no peer's.
    refused_stranger,
    /// Packets whose source is not the sender's subnet or address.
    refused_source,
    /// Datagrams that are no packets of the family that carried them.
    refused_malformed,
    /// Packets whose time to live was over.
    refused_ttl,
    /// Handshake messages that are not valid, or not from a peer.
    refused_handshakes,
    /// Packets of a session that this node doesn't have.
    refused_session,
    /// Packets that were not encrypted by the peer, or were changed.
    refused_forged,
    /// Packets that were received before, or may have been.
    refused_replayed,
    /// Packets that the device refused.
    refused_by_device,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    #[inline]
    pub(crate) fn add(&self, number: u64) {
        if number != 0 {
            self.0.fetch_add(number, Ordering::Relaxed);
        }
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Counters {
    /// All of them, as `name=value`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (name, value)) in self.all().enumerate() {
            let space = if position == 0 { "" } else { " " };
            write!(f, "{space}{name}={value}")?;
        }
        Ok(())
    }
}
