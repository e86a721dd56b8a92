//! Settings of the network stack that netlink tells. The files of /proc/sys/net tell them too, but there the kernel
//! looks a name up among those of all namespaces.

use super::message::{Message, Reply, attribute, number};

/// `RTM_GETNETCONF`'s attributes, from <linux/netconf.h>.
const IFINDEX: u16 = 1;
const FORWARDING: u16 = 2;
/// `NETCONFA_IFINDEX_ALL`: not of one link, but of the namespace.
const ALL: i32 = -1;

/// Asks for the settings of a family that hold for the whole namespace.
pub(crate) fn look(ipv6: bool) -> Message {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    let message = Message::new(libc::RTM_GETNETCONF, libc::NLM_F_ACK, &[family as u8]);
    message.with(IFINDEX, &ALL.to_ne_bytes())
}

/// Whether the answer to [`look`] says that packets are forwarded.
pub(crate) fn forwards(replies: &[Reply]) -> bool {
    let attributes = replies.first().and_then(|reply| reply.payload.get(4..));
    attributes.and_then(|bytes| attribute(bytes, FORWARDING)).is_some_and(|value| number(value) != 0)
}
