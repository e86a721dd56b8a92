//! Which connections are in flowtables, by connection tracking.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;
use subnet::Family;

use super::uapi::{NFPROTO_IPV4, NFPROTO_IPV6};
use crate::netlink::socket::NetlinkSocket;
use crate::netlink::wire::{Head, Writer, find_u32};

/// `IPCTNL_MSG_CT_GET` of the subsystem `NFNL_SUBSYS_CTNETLINK`.
const GET: u16 = 1 << 8 | 1;
const CTA_STATUS: u16 = 3;
const CTA_STATUS_MASK: u16 = 26;
/// The connection is in a flowtable.
const IPS_OFFLOAD: u32 = 1 << 14;

/// Whether any connection of this family in the calling thread's network namespace is in a flowtable. Kernels that can't choose
/// connections by their state tell of all.
///
/// # Errors
/// The kernel's, as when it has no module `nf_conntrack_netlink`.
pub(crate) fn any_offloaded(family: Family) -> io::Result<bool> {
    let mut socket = NetlinkSocket::open(NETLINK_NETFILTER)?;
    let family = match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    };
    let (mut dump, mut any) = (Writer::default(), false);
    let sequence = socket.next_sequence();
    let head = Head { kind: GET, flags: NLM_F_REQUEST | NLM_F_DUMP, sequence, own: [family, 0, 0, 0] };
    dump.message(head, |w| {
        w.u32(CTA_STATUS, IPS_OFFLOAD);
        w.u32(CTA_STATUS_MASK, IPS_OFFLOAD);
    });
    socket.dump(dump.bytes(), |message| {
        any |= find_u32(message.attributes(), CTA_STATUS).is_some_and(|status| status & IPS_OFFLOAD != 0);
    })?;
    Ok(any)
}
