//! The walk over connections that takes old generations off their marks, before a number comes round; and the end of those of an
//! address that a pod gets.

use std::io;
use std::net::Ipv4Addr;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink::socket::NetlinkSocket;
use crate::netlink::wire::{Head, Message, Writer, find, find_u32};

// `nfnetlink.h`, `nfnetlink_conntrack.h`.
const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = NFNL_SUBSYS_CTNETLINK << 8;
const IPCTNL_MSG_CT_GET: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 1;
const IPCTNL_MSG_CT_DELETE: u16 = NFNL_SUBSYS_CTNETLINK << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_MARK: u16 = 8;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_FILTER: u16 = 25;
/// In a tuple, and in that the source.
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
/// `CTA_FILTER_F_CTA_IP_SRC`.
const MATCH_SOURCE: u32 = 1;

/// So many connections are changed with one system call.
const BATCH: usize = 256;

/// A connection whose mark is to be taken off.
struct Stale {
    family: u8,
    tuple: Vec<u8>,
    zone: Option<Vec<u8>>,
}

/// The connections of one network namespace.
pub(super) struct Conntrack {
    socket: NetlinkSocket,
}

impl Conntrack {
    /// Those of the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: NetlinkSocket::open(NETLINK_NETFILTER)? })
    }

    /// Takes marks in these bits off all connections but those that `keeps` keeps; gives how many there were.
    /// Connections that end meanwhile need nothing.
    pub(super) fn forget_marks(&mut self, mask: u32, keeps: impl Fn(u32) -> bool) -> io::Result<usize> {
        let socket = &mut self.socket;
        let mut dump = Writer::default();
        let head = |kind, flags, sequence, family| Head {
            kind,
            flags: NLM_F_REQUEST | flags,
            sequence,
            own: [family, 0, 0, 0],
        };
        dump.message(head(IPCTNL_MSG_CT_GET, NLM_F_DUMP, socket.next_sequence(), 0), |_| {});
        let mut stale = Vec::new();
        // An entry that is missed because the list changes meanwhile is found by the next walk, long before the number is
        // used again.
        socket.dump(dump.bytes(), |message| stale.extend(read(message, mask, &keeps)))?;
        for batch in stale.chunks(BATCH) {
            let mut bytes = Writer::default();
            for (i, one) in batch.iter().enumerate() {
                let sequence = socket.next_sequence().wrapping_add(i as u32);
                bytes.message(head(IPCTNL_MSG_CT_NEW, 0, sequence, one.family), |w| {
                    w.nest(CTA_TUPLE_ORIG, |w| w.raw(&one.tuple));
                    if let Some(zone) = &one.zone {
                        w.bytes_attribute(CTA_ZONE, zone);
                    }
                    w.u32(CTA_MARK, 0);
                    w.u32(CTA_MARK_MASK, mask);
                });
            }
            socket.batch(bytes.bytes(), batch.len(), None, |_, refusal| {
                tracing::debug!(error = %refusal.error, "a connection's mark stays");
            })?;
        }
        Ok(stale.len())
    }

    /// Has the kernel forget all connections of these addresses: those that others began with them, and those that they began. Not of IPv6: there the
    /// filter means all others (`ctnetlink_filter_match_tuple` of Linux 6.18 compares the wrong way round).
    ///
    /// # Errors
    /// The kernel's. Linux 6.1 takes the part of a tuple for a whole one and refuses it.
    pub(super) fn forget_addresses(&mut self, addresses: &[Ipv4Addr]) -> io::Result<()> {
        let (mut bytes, mut count) = (Writer::default(), 0);
        for address in addresses {
            for tuple in [CTA_TUPLE_ORIG, CTA_TUPLE_REPLY] {
                let head = Head {
                    kind: IPCTNL_MSG_CT_DELETE,
                    flags: NLM_F_REQUEST,
                    sequence: self.socket.next_sequence().wrapping_add(count as u32),
                    own: [libc::AF_INET as u8, 0, 0, 0],
                };
                bytes.message(head, |w| {
                    w.nest(tuple, |w| {
                        w.nest(CTA_TUPLE_IP, |w| w.bytes_attribute(CTA_IP_V4_SRC, &address.octets()))
                    });
                    // Its flags are numbered as the tuples are, and in the host's order.
                    w.nest(CTA_FILTER, |w| w.bytes_attribute(tuple, &MATCH_SOURCE.to_ne_bytes()));
                });
                count += 1;
            }
        }
        let mut outcome = Ok(());
        self.socket.batch(bytes.bytes(), count, None, |_, refusal| outcome = Err(refusal.error))?;
        outcome
    }
}

fn read(message: &Message<'_>, mask: u32, keeps: impl Fn(u32) -> bool) -> Option<Stale> {
    let attributes = message.attributes();
    find_u32(attributes, CTA_MARK).filter(|mark| mark & mask != 0 && !keeps(*mark))?;
    Some(Stale {
        family: message.family(),
        tuple: find(attributes, CTA_TUPLE_ORIG)?.to_owned(),
        zone: find(attributes, CTA_ZONE).map(<[u8]>::to_owned),
    })
}
