//! A raw socket for echo messages of one family.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use subnet::Family;
use tokio::io::unix::AsyncFd;

use super::message::{self, ECHO_REPLY_V6, Token};
use super::sys;

/// Bytes of an answer that are read: the longest IPv4 header, the ICMP header and the token.
const HEAD: usize = 60 + 8 + 16;

/// Sends requests and receives what answers them. Needs CAP_NET_RAW.
///
/// The kernel drops everything but answers to this socket's id, so other programs' pings don't wake the process.
#[derive(Debug)]
pub struct EchoSocket {
    socket: AsyncFd<Socket>,
    family: Family,
    id: u16,
}

/// An answer with this socket's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Who sent it.
    pub from: IpAddr,
    /// The request that it answers.
    pub sequence: u16,
    /// What its data begins with.
    pub token: Token,
    /// Bytes of the IP packet.
    pub packet: usize,
    /// How long ago the kernel received it.
    pub age: Duration,
}

impl EchoSocket {
    /// A socket of the calling thread's network namespace with a random id. Needs a running tokio reactor.
    ///
    /// # Errors
    /// The kernel's refusal: `PermissionDenied` without CAP_NET_RAW.
    pub fn open(family: Family) -> io::Result<Self> {
        let (domain, protocol) = match family {
            Family::V4 => (Domain::IPV4, Protocol::ICMPV4),
            Family::V6 => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
        socket.set_nonblocking(true)?;
        let id = crate::random::id();
        socket.attach_filter(&filter(family, id))?;
        // Don't-fragment is set, and what the kernel believes of the path is not asked: it is to be found out.
        match family {
            Family::V4 => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?,
            Family::V6 => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?,
        }
        sys::stamp_arrivals(&socket)?;
        Ok(Self { socket: sys::watch(socket)?, family, id })
    }

    /// Which family it is of.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Sends one request that makes a packet of `packet` bytes.
    ///
    /// # Errors
    /// What the kernel says: no route, a packet longer than the device's MTU, a rule that refuses it.
    pub fn send(&self, to: IpAddr, sequence: u16, token: &Token, packet: u16) -> io::Result<()> {
        let mut request = Vec::new();
        message::write_request(&mut request, self.family, (self.id, sequence), token, packet);
        self.socket.get_ref().send_to(&request, &SocketAddr::new(to, 0).into()).map(drop)
    }

    /// Waits for an answer.
    ///
    /// # Errors
    /// When the reactor is gone.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// The next answer that is there, if one is.
    ///
    /// # Errors
    /// When the socket fails; errors of single packets are passed over.
    pub fn receive(&self) -> io::Result<Option<Arrival>> {
        loop {
            let mut head = [0; HEAD];
            let received = match sys::receive(self.socket.get_ref(), &mut head) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.forget_readiness();
                    return Ok(None);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let bytes = &head[..received.len.min(HEAD)];
            let answer = message::read_answer(self.family, bytes, received.len);
            if let Some(answer) = answer.filter(|answer| answer.id == self.id) {
                let from = received.from.unwrap_or(message::any(self.family));
                let message::Answer { sequence, token, packet, .. } = answer;
                let from = message::plain(from);
                return Ok(Some(Arrival { from, sequence, token, packet, age: received.age }));
            }
        }
    }

    /// The reactor is to be asked again, because nothing is there any more.
    fn forget_readiness(&self) {
        let _ = self.socket.try_io(tokio::io::Interest::READABLE, |_| {
            Err::<(), _>(io::Error::from(io::ErrorKind::WouldBlock))
        });
    }
}

/// A classic BPF program: only echo answers with this id. IPv4 packets come with their IP header.
fn filter(family: Family, id: u16) -> Vec<SockFilter> {
    const ALL: u32 = 0x4_0000;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE_INDEXED: u16 = 0x50;
    const LOAD_HALF_INDEXED: u16 = 0x48;
    const LOAD_HEADER_LENGTH: u16 = 0xb1;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let (mut program, byte, half, reply) = match family {
        Family::V4 => {
            let skip_header = vec![SockFilter::new(LOAD_HEADER_LENGTH, 0, 0, 0)];
            (skip_header, LOAD_BYTE_INDEXED, LOAD_HALF_INDEXED, 0)
        }
        Family::V6 => (Vec::new(), LOAD_BYTE, LOAD_HALF, u32::from(ECHO_REPLY_V6)),
    };
    program.extend([
        SockFilter::new(byte, 0, 0, 0),
        SockFilter::new(JUMP_EQUAL, 0, 3, reply),
        SockFilter::new(half, 0, 0, 4),
        SockFilter::new(JUMP_EQUAL, 0, 1, id.into()),
        SockFilter::new(RETURN, 0, 0, ALL),
        SockFilter::new(RETURN, 0, 0, 0),
    ]);
    program
}
