//! Addresses of links.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Errno;
use super::message::{Message, Reply, attribute, number};
use super::socket::Socket;

/// `IFA_F_NODAD`: no probe asks whether the address is in use.
const NO_DAD: u8 = 0x02;
/// `IFA_F_TENTATIVE` and `IFA_F_DADFAILED`: not usable yet, or not at all.
const TENTATIVE: u32 = 0x40;
const DAD_FAILED: u32 = 0x08;

/// The bytes of an address.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An address of these bytes.
pub(crate) fn from_octets(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// The number of an address's family.
pub(crate) fn family(address: IpAddr) -> i32 {
    if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

fn fixed(address: IpNet, flags: u8, index: u32) -> Vec<u8> {
    let mut bytes = vec![family(address.addr()) as u8, address.prefix_len(), flags, 0];
    bytes.extend(index.to_ne_bytes());
    bytes
}

/// Adds an address, with the broadcast address of its network in IPv4; `detect`: whether duplicates are looked for.
pub(crate) fn add(index: u32, address: IpNet, detect: bool) -> Message {
    let flags = if address.addr().is_ipv6() && !detect { NO_DAD } else { 0 };
    let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL | libc::NLM_F_ACK;
    let message = about(libc::RTM_NEWADDR, create, address, flags, index);
    match address {
        IpNet::V4(v4) if v4.prefix_len() < 31 => message.with(libc::IFA_BROADCAST, &v4.broadcast().octets()),
        _ => message,
    }
}

/// Removes an address.
pub(crate) fn delete(index: u32, address: IpNet) -> Message {
    about(libc::RTM_DELADDR, libc::NLM_F_ACK, address, 0, index)
}

fn about(kind: u16, flags: i32, address: IpNet, ifa_flags: u8, index: u32) -> Message {
    let bytes = octets(address.addr());
    let message = Message::new(kind, flags, &fixed(address, ifa_flags, index));
    message.with(libc::IFA_LOCAL, &bytes).with(libc::IFA_ADDRESS, &bytes)
}

/// An address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Assigned {
    pub(crate) address: IpNet,
    pub(crate) state: State,
}

/// What the kernel's detection of duplicates says about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Usable,
    /// Not known yet.
    Tentative,
    /// Another machine has it.
    Duplicate,
}

/// How far the detection of duplicates is with all addresses of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detection {
    /// All can be used.
    Done,
    UnderWay,
    /// Another machine has this one.
    Duplicate(IpNet),
}

/// See [`Detection`].
pub(crate) fn detection(assigned: &[Assigned]) -> Detection {
    let in_state = |state: State| assigned.iter().find(|one| one.state == state);
    match (in_state(State::Duplicate), in_state(State::Tentative)) {
        (Some(one), _) => Detection::Duplicate(one.address),
        (None, Some(_)) => Detection::UnderWay,
        (None, None) => Detection::Done,
    }
}

/// The addresses of a link.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn of(socket: &mut Socket, index: u32) -> Result<Vec<Assigned>, Errno> {
    socket.ask(dump(libc::AF_UNSPEC, 0)).map(|replies| found(&replies, index))
}

/// Asks for the addresses of a family. On a socket that [asks strictly](Socket::ask_strictly) for those of the link alone.
pub(crate) fn dump(family: i32, index: u32) -> Message {
    let mut fixed = [0; 8];
    fixed[0] = family as u8;
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP, &fixed)
}

/// The addresses of a link in the answers to [`dump`].
pub(crate) fn found(replies: &[Reply], index: u32) -> Vec<Assigned> {
    replies.iter().filter_map(|reply| parse(reply, index)).collect()
}

/// All addresses in the answers to [`dump`], of all links.
pub(crate) fn all(replies: &[Reply]) -> Vec<IpAddr> {
    let address = |reply: &Reply| {
        let index = number(reply.payload.get(4..)?);
        Some(parse(reply, index)?.address.addr())
    };
    replies.iter().filter_map(address).collect()
}

fn parse(reply: &Reply, index: u32) -> Option<Assigned> {
    let (fixed, attributes) = reply.payload.split_at_checked(8)?;
    if number(&fixed[4..]) != index {
        return None;
    }
    let bytes = attribute(attributes, libc::IFA_LOCAL).or(attribute(attributes, libc::IFA_ADDRESS))?;
    let flags = attribute(attributes, libc::IFA_FLAGS).map_or(fixed[2].into(), number);
    let address = IpNet::new(from_octets(bytes)?, fixed[1]).ok()?;
    // A duplicate stays tentative.
    let state = match flags {
        _ if flags & DAD_FAILED != 0 => State::Duplicate,
        _ if flags & TENTATIVE != 0 => State::Tentative,
        _ => State::Usable,
    };
    Some(Assigned { address, state })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duplicate_ends_the_detection_and_all_others_have_to_be_usable() {
        let address = |text: &str, state| Assigned { address: text.parse().unwrap(), state };
        let usable = address("10.1.17.2/24", State::Usable);
        let tentative = address("fe80::2/64", State::Tentative);
        let duplicate = address("fc00::2/64", State::Duplicate);
        assert_eq!(detection(&[]), Detection::Done);
        assert_eq!(detection(&[usable]), Detection::Done);
        assert_eq!(detection(&[usable, tentative]), Detection::UnderWay);
        assert_eq!(detection(&[usable, tentative, duplicate]), Detection::Duplicate(duplicate.address));
    }

    #[test]
    fn the_state_of_an_address_is_in_its_flags() {
        let address: IpNet = "fc00::2/64".parse().unwrap();
        let state = |flags: u32| {
            let message = about(libc::RTM_NEWADDR, 0, address, 0, 7).with_u32(libc::IFA_FLAGS, flags);
            let payload = message.finished(1).split_off(16);
            parse(&Reply { kind: libc::RTM_NEWADDR, sequence: 1, payload }, 7).map(|one| one.state)
        };
        assert_eq!(state(0x80), Some(State::Usable));
        assert_eq!(state(0x80 | TENTATIVE), Some(State::Tentative));
        assert_eq!(state(0x80 | TENTATIVE | DAD_FAILED), Some(State::Duplicate));
    }
}
