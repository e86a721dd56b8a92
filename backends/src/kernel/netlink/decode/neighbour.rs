//! Entries of the neighbour tables and of FDBs, from the bytes of a message (`struct ndmsg`, include/uapi/linux/neighbour.h).

use std::net::{IpAddr, Ipv4Addr};

use subnet::{Family, Mac};

use super::{address_in, address_of};
use crate::netlink::wire::{attributes, native_u32};

const HEADER: usize = 12;

const NUD_INCOMPLETE: u16 = 0x01;
const NUD_FAILED: u16 = 0x20;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NTF_PROXY: u8 = 0x08;
const NTF_EXT_LEARNED: u8 = 0x10;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_PORT: u16 = 6;
const NDA_VNI: u16 = 7;
const NDA_IFINDEX: u16 = 8;

/// An entry of the neighbour table or of a device's FDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum NeighbourFacts {
    /// A neighbour (ARP, NDP). `answers` is unknown while the kernel asks for the first time.
    Neighbour { link: u32, ip: IpAddr, mac: Mac, permanent: bool, answers: Option<bool> },
    /// A forwarding entry that was configured, not learned. `dst` is unspecified where the entry says
    /// more than a destination, which ours never do.
    Fdb { link: u32, mac: Mac, dst: IpAddr },
}

/// An entry; `None` for proxies, learned and multicast forwarding entries, those of bridges, and what is malformed.
pub(in super::super) fn neighbour(payload: &[u8]) -> Option<NeighbourFacts> {
    let header: &[u8; HEADER] = payload.first_chunk()?;
    let [family, _, _, _, _, _, _, _, low, high, flags, _] = *header;
    let (link, state) = (native_u32(header, 4)?, u16::from_ne_bytes([low, high]));
    // Entries of an FDB don't say of which family the address is.
    let family = match i32::from(family) {
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    };
    let (mut dst, mut mac, mut plain) = (None, None, true);
    for (kind, value) in attributes(&payload[HEADER..]) {
        match kind {
            NDA_DST => {
                dst = match family {
                    Some(family) => Some(address_in(family, value)?),
                    None => address_of(value),
                };
            }
            NDA_LLADDR => mac = value.try_into().ok().map(Mac),
            NDA_PORT | NDA_VNI | NDA_IFINDEX => plain = false,
            _ => {}
        }
    }
    if i32::from(header[0]) == libc::AF_BRIDGE {
        let configured = state & (NUD_PERMANENT | NUD_NOARP) != 0;
        let own = flags & (NTF_SELF | NTF_EXT_LEARNED) == NTF_SELF;
        let mac = mac.filter(|mac: &Mac| configured && own && mac.is_unicast())?;
        let dst = dst.filter(|_| plain).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        return Some(NeighbourFacts::Fdb { link, mac, dst });
    }
    if flags & NTF_PROXY != 0 {
        return None;
    }
    let permanent = state == NUD_PERMANENT;
    let answers = match () {
        () if state & NUD_FAILED != 0 => Some(false),
        () if state == 0 || state & NUD_INCOMPLETE != 0 => None,
        () => Some(true),
    };
    Some(NeighbourFacts::Neighbour { link, ip: dst?, mac: mac.unwrap_or(Mac([0; 6])), permanent, answers })
}

#[cfg(test)]
mod tests;
