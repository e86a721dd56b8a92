//! Links: looked at, made, changed, removed.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::Errno;
use super::message::{Message, Reply, attribute, number, text};
use super::socket::{Socket, Told};

/// `IFLA_INFO_KIND` and `IFLA_INFO_DATA`, in `IFLA_LINKINFO`.
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
/// `VETH_INFO_PEER`.
const PEER: u16 = 1;
/// `IFLA_BRPORT_MODE` is hairpin mode, `IFLA_BRPORT_ISOLATED` keeps isolated ports apart.
const BRPORT_MODE: u16 = 4;
const BRPORT_ISOLATED: u16 = 33;
/// `IFLA_NUM_TX_QUEUES` and `IFLA_NUM_RX_QUEUES`.
const TX_QUEUES: u16 = 31;
const RX_QUEUES: u16 = 32;
/// `IFLA_INET6_ADDR_GEN_MODE` and `IN6_ADDR_GEN_MODE_NONE`.
const ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
/// `IFLA_INET_CONF` and, from <linux/ip.h>, `IPV4_DEVCONF_ARP_NOTIFY`.
const INET_CONF: u16 = 1;
const ARP_NOTIFY: u16 = 22;
/// `RTEXT_FILTER_SKIP_STATS`, for `IFLA_EXT_MASK`: counters are half of what the kernel would tell about a link.
const SKIP_STATS: u32 = 1 << 3;
/// `IF_OPER_UP`.
const OPER_UP: u8 = 6;

/// What is known about a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mac: Vec<u8>,
    pub(crate) mtu: u32,
    /// `bridge`, `veth`, …; empty for a physical one.
    pub(crate) kind: String,
    /// The bridge that it is a port of; 0 for none.
    pub(crate) master: u32,
    /// The index of a veth's other end, in that one's namespace.
    pub(crate) peer: u32,
    pub(crate) promiscuous: bool,
    /// Whether it carries traffic, by its operational state.
    pub(crate) running: bool,
    /// Whether it is set up.
    pub(crate) up: bool,
    /// `ifalias`: a text that a link carries, which `ip link` shows.
    pub(crate) alias: String,
}

impl Link {
    /// The MAC as Go prints it.
    pub(crate) fn mac_text(&self) -> String {
        mac_text(&self.mac)
    }

    fn parse(reply: &Reply) -> Option<Self> {
        let (fixed, attributes) = reply.payload.split_at_checked(16)?;
        let get = |kind: u16| attribute(attributes, kind);
        let get_u32 = |kind| get(kind).map_or(0, number);
        let info = get(libc::IFLA_LINKINFO).and_then(|info| attribute(info, INFO_KIND));
        let flags = number(&fixed[8..12]);
        Some(Self {
            index: number(&fixed[4..8]),
            name: get(libc::IFLA_IFNAME).map(text).unwrap_or_default(),
            mac: get(libc::IFLA_ADDRESS).unwrap_or_default().to_vec(),
            mtu: get_u32(libc::IFLA_MTU),
            kind: info.map(text).unwrap_or_default(),
            master: get_u32(libc::IFLA_MASTER),
            peer: get_u32(libc::IFLA_LINK),
            promiscuous: get_u32(libc::IFLA_PROMISCUITY) != 0,
            running: get(libc::IFLA_OPERSTATE).is_some_and(|state| state.first() == Some(&OPER_UP)),
            up: flags & libc::IFF_UP as u32 != 0,
            alias: get(libc::IFLA_IFALIAS).map(text).unwrap_or_default(),
        })
    }
}

/// A MAC as Go prints it.
pub(crate) fn mac_text(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// The fixed part of messages about links.
fn fixed(family: i32, index: u32, flags: u32, change: u32) -> Vec<u8> {
    let numbers = [index, flags, change];
    let mut bytes = vec![family as u8, 0, 0, 0];
    bytes.extend(numbers.into_iter().flat_map(u32::to_ne_bytes));
    bytes
}

/// The link of this name; `None` if there is none.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn by_name(socket: &mut Socket, name: &str) -> Result<Option<Link>, Errno> {
    found(socket.ask(look(name)))
}

/// Asks for the link of this name.
pub(crate) fn look(name: &str) -> Message {
    without_counters(0).with_text(libc::IFLA_IFNAME, name)
}

/// Asks for the link of this index.
pub(crate) fn look_at(index: u32) -> Message {
    without_counters(index)
}

fn without_counters(index: u32) -> Message {
    let message = Message::new(libc::RTM_GETLINK, libc::NLM_F_ACK, &fixed(libc::AF_UNSPEC, index, 0, 0));
    message.with_u32(libc::IFLA_EXT_MASK, SKIP_STATS)
}

/// The link in the answer to [`look`] or [`look_at`]; `None` if there is none.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn found(told: Told) -> Result<Option<Link>, Errno> {
    match told {
        Ok(replies) => Ok(replies.first().and_then(Link::parse)),
        Err(Errno::NO_DEVICE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The name of a link.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn name_of(socket: &mut Socket, index: u32) -> Result<Option<String>, Errno> {
    let message = Message::new(libc::RTM_GETLINK, libc::NLM_F_ACK, &fixed(libc::AF_UNSPEC, index, 0, 0));
    Ok(socket.ask(message)?.first().and_then(Link::parse).map(|link| link.name))
}

/// A new bridge.
pub(crate) fn new_bridge(name: &str, mtu: u32) -> Message {
    let message = new(name, mtu, 0);
    message.nested(libc::IFLA_LINKINFO, |info| info.with_text(INFO_KIND, "bridge"))
}

/// The end of a new pair that goes into a pod.
pub(crate) struct PodEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) namespace: BorrowedFd<'a>,
}

/// A new pair: one end here, up and a port of the bridge, the other one in a pod. Each has one queue. Without a number the
/// kernel makes one for each processor that the machine may have, with its files in sysfs, and takes all but the first away
/// again.
///
/// Kernels since 6.2 answer with the [link](found) as it is before it becomes a port. To look at it would have the kernel note at
/// once that it has no carrier: the bridge takes the port down, and the kernel waits until no other processor sends by it.
pub(crate) fn new_pair(name: &str, mtu: u32, bridge: u32, pod: &PodEnd<'_>) -> Message {
    let one_queue = |link: Message| link.with_u32(TX_QUEUES, 1).with_u32(RX_QUEUES, 1);
    let port = new(name, mtu, libc::IFF_UP as u32).echoed().with_u32(libc::IFLA_MASTER, bridge);
    one_queue(port).nested(libc::IFLA_LINKINFO, |info| {
        info.with_text(INFO_KIND, "veth").nested(INFO_DATA, |data| {
            data.nested(PEER, |peer| {
                let peer =
                    peer.with_raw(&fixed(libc::AF_UNSPEC, 0, 0, 0)).with_text(libc::IFLA_IFNAME, pod.name);
                let mut peer = one_queue(peer);
                if mtu != 0 {
                    peer = peer.with_u32(libc::IFLA_MTU, mtu);
                }
                if let Some(mac) = pod.mac {
                    peer = peer.with(libc::IFLA_ADDRESS, &mac);
                }
                peer.with_u32(libc::IFLA_NET_NS_FD, pod.namespace.as_raw_fd() as u32)
            })
        })
    })
}

/// Has a port get no link-local address when it gets its carrier: it can't be reached, since a bridge takes all that its ports
/// receive. Refused where the kernel has no IPv6.
pub(crate) fn without_link_local(index: u32) -> Message {
    set_flags(index, 0).nested(libc::IFLA_AF_SPEC, |families| {
        families.nested(libc::AF_INET6 as u16, |inet6| inet6.with(ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]))
    })
}

/// A new link of a kind that needs nothing but a name.
pub(crate) fn new_plain(name: &str, mtu: u32, kind: &str) -> Message {
    let message = new(name, mtu, libc::IFF_UP as u32);
    message.nested(libc::IFLA_LINKINFO, |info| info.with_text(INFO_KIND, kind))
}

fn new(name: &str, mtu: u32, flags: u32) -> Message {
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL | libc::NLM_F_ACK;
    let message = Message::new(libc::RTM_NEWLINK, create, &fixed(libc::AF_UNSPEC, 0, flags, flags));
    let message = message.with_text(libc::IFLA_IFNAME, name);
    // 0 is the kernel's default.
    if mtu == 0 { message } else { message.with_u32(libc::IFLA_MTU, mtu) }
}

/// Sets flags such as `IFF_UP`.
pub(crate) fn set_flags(index: u32, flags: i32) -> Message {
    let flags = flags as u32;
    Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, &fixed(libc::AF_UNSPEC, index, flags, flags))
}

/// Sets a link up that announces its IPv4 addresses from then on (`arp_notify`), when its MAC is set for example.
pub(crate) fn set_up_announcing(index: u32) -> Message {
    set_flags(index, libc::IFF_UP).nested(libc::IFLA_AF_SPEC, |families| {
        families.nested(libc::AF_INET as u16, |inet| {
            inet.nested(INET_CONF, |switches| switches.with_u32(ARP_NOTIFY, 1))
        })
    })
}

/// Clears flags such as `IFF_UP`.
pub(crate) fn clear_flags(index: u32, flags: i32) -> Message {
    let fixed = fixed(libc::AF_UNSPEC, index, 0, flags as u32);
    Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, &fixed)
}

/// Sets the MAC. With the one that it has, the kernel announces the addresses of the link again.
pub(crate) fn set_mac(index: u32, mac: &[u8]) -> Message {
    let message = Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, &fixed(libc::AF_UNSPEC, index, 0, 0));
    message.with(libc::IFLA_ADDRESS, mac)
}

/// Gives a link its alias.
pub(crate) fn set_alias(name: &str, alias: &str) -> Message {
    let message = Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, &fixed(libc::AF_UNSPEC, 0, 0, 0));
    message.with_text(libc::IFLA_IFNAME, name).with(libc::IFLA_IFALIAS, alias.as_bytes())
}

/// All links of a kind.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn of_kind(socket: &mut Socket, kind: &str) -> Result<Vec<Link>, Errno> {
    let message = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &fixed(libc::AF_UNSPEC, 0, 0, 0));
    let message = message.nested(libc::IFLA_LINKINFO, |info| info.with_text(INFO_KIND, kind));
    let mut links: Vec<_> = socket.ask(message)?.iter().filter_map(Link::parse).collect();
    // Kernels before 4.17 do not filter.
    links.retain(|link| link.kind == kind);
    Ok(links)
}

/// Makes the link a port of a bridge.
pub(crate) fn set_master(index: u32, bridge: u32) -> Message {
    set_flags(index, 0).with_u32(libc::IFLA_MASTER, bridge)
}

/// Sets what a port may do: get back what it sent, and reach other isolated ports.
pub(crate) fn set_port(index: u32, hairpin: bool, isolated: bool) -> Message {
    let message = Message::new(libc::RTM_SETLINK, libc::NLM_F_ACK, &fixed(libc::AF_BRIDGE, index, 0, 0));
    message.nested(libc::IFLA_PROTINFO, |port| {
        let port = port.with(BRPORT_MODE, &[u8::from(hairpin)]);
        // Older kernels do not know it, and off is the default.
        if isolated { port.with(BRPORT_ISOLATED, &[1]) } else { port }
    })
}

/// Removes the link, and with it the other end of a pair.
pub(crate) fn delete(name: &str) -> Message {
    let message = Message::new(libc::RTM_DELLINK, libc::NLM_F_ACK, &fixed(libc::AF_UNSPEC, 0, 0, 0));
    message.with_text(libc::IFLA_IFNAME, name)
}
