//! System calls of the datapath that have no safe interface: making a TUN device, many datagrams a call.

#![expect(unsafe_code, reason = "ioctl, sendmmsg and recvmmsg take pointers")]

use std::io::{self, IoSlice};
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use socket2::{Domain, Protocol, Socket, Type};

use super::buffer::AlignedBuffer;
use super::outbox::Group;
use super::queue_steering;
use super::vnet::{self, Vnet};
use crate::state::name::Name;
use address::Address;

mod address;

const TUN_FILE: &str = "/dev/net/tun";
/// Bytes of the buffers of the socket. The usual 208 KiB lose pings under load.
const BUFFER: usize = 8 << 20;
/// Datagrams a receive takes at most, merged ones counting as one.
pub(super) const BATCH: usize = 8;
/// The largest merged datagram, rounded up.
pub(super) const ROOM: usize = 1 << 16;

/// A TUN device, which exists as long as this does, or longer if it [stays](Self::stays).
#[derive(Debug)]
pub(super) struct Tun {
    queues: Vec<OwnedFd>,
    /// The device takes and gives packets with an offload header.
    pub(super) vnet: bool,
    /// It takes merged UDP packets.
    pub(super) udp: bool,
    /// Why it has one queue, though several were asked for.
    pub(super) unsteered: Option<io::Error>,
}

impl Tun {
    /// Makes the device, or takes over one that no process holds, in the network namespace of the thread. `left`: there is one, and no
    /// process holds it.
    pub(super) fn open(name: &Name, queues: usize, offload: bool, left: bool) -> io::Result<Self> {
        let full = (queues, if offload { libc::IFF_VNET_HDR } else { 0 });
        // A device that was left by another program has one queue; an old or restricted kernel may have no more.
        // Packets one by one work everywhere.
        let mut outcome = Self::attach(name, full.0, full.1, left);
        let mut busy = false;
        for (queues, vnet) in [(1, full.1), (1, 0)] {
            let errno = outcome.as_ref().err().and_then(io::Error::raw_os_error);
            busy |= errno == Some(libc::EBUSY);
            match errno {
                Some(libc::EINVAL | libc::EBUSY) if (queues, vnet) != full => {
                    outcome = Self::attach(name, queues, vnet, left);
                }
                _ => break,
            }
        }
        match outcome {
            // It is there and has several queues: another process holds it.
            Err(error) if busy && error.raw_os_error() == Some(libc::EINVAL) => {
                Err(io::Error::from_raw_os_error(libc::EBUSY))
            }
            outcome => outcome,
        }
    }

    fn attach(name: &Name, queues: usize, vnet: libc::c_int, left: bool) -> io::Result<Self> {
        let multiple = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | vnet | multiple;
        // SAFETY: an all-zero ifreq is a valid value of this plain C structure.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_str().bytes()) {
            *to = from as libc::c_char;
        }
        let mut files: Vec<OwnedFd> = Vec::with_capacity(queues);
        let mut unsteered = None;
        for number in 0..queues {
            // A process that opens a device with several queues joins it, even one that another process holds.
            let alone = if queues > 1 && number == 0 && !left { libc::IFF_TUN_EXCL } else { 0 };
            request.ifr_ifru.ifru_flags = (flags | alone) as libc::c_short;
            let file =
                rustix::fs::open(TUN_FILE, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
            if queues > 1 && number == 0 {
                unsteered = queue_steering::by_source(&file).err();
            }
            files.push(file);
            if unsteered.is_some() {
                // Left alone, the kernel scatters a flow over the queues, and its order is lost.
                break;
            }
        }
        let mut tun = Self { queues: files, vnet: vnet != 0, udp: false, unsteered };
        if tun.vnet {
            // A process before this one may have set another length.
            tun.set(libc::TUNSETVNETHDRSZ, &(vnet::LEN as libc::c_int))?;
            let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
            tun.udp = tun.offload(tcp | TUN_F_USO).is_ok();
            if !tun.udp {
                tun.offload(tcp)?;
            }
        } else if left {
            // Without the header nothing tells of what a process before this one let the kernel leave to it.
            tun.offload(0)?;
        }
        Ok(tun)
    }

    /// Whether the device stays when no process holds it, with its addresses and routes: it takes no packets then.
    pub(super) fn stays(&self, stays: bool) -> io::Result<()> {
        // SAFETY: TUNSETPERSIST takes its argument by value.
        check(unsafe {
            libc::ioctl(self.queues[0].as_raw_fd(), libc::TUNSETPERSIST, libc::c_ulong::from(stays))
        })?;
        Ok(())
    }

    fn set(&self, what: libc::Ioctl, value: &libc::c_int) -> io::Result<()> {
        // SAFETY: the ioctl reads one int at the address, which lives until the call returns.
        check(unsafe { libc::ioctl(self.queues[0].as_raw_fd(), what, std::ptr::from_ref(value)) })?;
        Ok(())
    }

    /// A device that another process has made, by its queues.
    pub(super) fn of(queues: Vec<OwnedFd>, vnet: bool, udp: bool) -> Self {
        Self { queues, vnet, udp, unsteered: None }
    }

    fn offload(&self, what: libc::c_uint) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe {
            libc::ioctl(self.queues[0].as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(what))
        })?;
        Ok(())
    }

    /// Its queues, each of which gives and takes packets.
    pub(super) fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    /// One packet, with its offload header if there is one.
    #[inline]
    pub(super) fn read(&self, queue: usize, room: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.queues[queue], room)?)
    }

    /// One packet in parts, with its offload header if there is one. Through whichever queue makes no
    /// difference.
    #[inline]
    pub(super) fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        rustix::io::writev(&self.queues[0], parts)?;
        Ok(())
    }

    /// One packet that is as it goes over a wire.
    pub(super) fn write_plain(&self, packet: &[u8]) -> io::Result<()> {
        let head = Vnet::PLAIN.bytes();
        let parts = [IoSlice::new(&head), IoSlice::new(packet)];
        self.write(&parts[usize::from(!self.vnet)..])
    }
}

/// Both or neither (drivers/net/tun.c, `set_offload`). Since Linux 6.2.
const TUN_F_USO: libc::c_uint = 0x20 | 0x40;

/// The socket that datagrams of one family come from and go to.
#[derive(Debug)]
pub(super) struct UdpSocket {
    socket: Socket,
    /// Sends instead, from a port of its own.
    sender: Option<Socket>,
    pub(super) local: SocketAddr,
    /// What the kernel granted of the buffer that was asked for, in bytes.
    pub(super) receive_buffer: usize,
}

impl UdpSocket {
    /// A socket of the network namespace of the thread. Those of several workers share the address, and the
    /// kernel gives all that comes from one port of one peer to one of them; but the first, they send from
    /// ports of their own if they may.
    pub(super) fn bind(
        local: SocketAddr,
        offload: bool,
        worker: Option<usize>,
        own_ports: bool,
    ) -> io::Result<Self> {
        let socket = open(local)?;
        buffer(&socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF)?;
        buffer(&socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)?;
        if worker.is_some() {
            set(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        if offload {
            // A kernel before 5.0 gives datagrams one by one.
            let _ = set(&socket, libc::SOL_UDP, libc::UDP_GRO, 1);
        }
        socket.bind(&local.into())?;
        // The kernel says twice what it was asked for (socket(7)).
        let receive_buffer = socket.recv_buffer_size()? / 2;
        // Peers and switches can tell what one worker sends from what others send.
        let sender = match worker {
            None | Some(0) => None,
            Some(_) if !own_ports => None,
            Some(_) => {
                let sender = open(local)?;
                buffer(&sender, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)?;
                sender.bind(&SocketAddr::new(local.ip(), 0).into())?;
                Some(sender)
            }
        };
        Ok(Self { socket, sender, local, receive_buffer })
    }

    /// A socket that another process has bound to `local`, and what that process sent from.
    ///
    /// # Errors
    /// It is bound to something else.
    pub(super) fn of(local: SocketAddr, socket: OwnedFd, sender: Option<OwnedFd>) -> io::Result<Self> {
        let socket = Socket::from(socket);
        let bound = socket.local_addr()?.as_socket();
        if bound != Some(local) {
            let why = format!("the socket for {local} is bound to {bound:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let receive_buffer = socket.recv_buffer_size()? / 2;
        Ok(Self { socket, sender: sender.map(Socket::from), local, receive_buffer })
    }

    /// What it receives from, and what it sends from if that is another socket, for another process.
    pub(super) fn files(&self) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        let sender = self.sender.as_ref().map(|sender| sender.try_clone().map(OwnedFd::from)).transpose()?;
        Ok((self.socket.try_clone()?.into(), sender))
    }

    /// What it sends from.
    pub(super) fn sender(&self) -> &Socket {
        self.sender.as_ref().unwrap_or(&self.socket)
    }

    /// Whether it can send to this address.
    #[inline]
    pub(super) fn reaches(&self, to: IpAddr) -> bool {
        self.local.is_ipv6() == to.is_ipv6()
    }

    pub(super) fn has_whole_buffer(&self) -> bool {
        self.receive_buffer >= BUFFER
    }

    /// Sends groups to peers of its family in one call; gives how many were sent, at least one. `bytes` is what their extents are
    /// parts of.
    ///
    /// # Errors
    /// Of the first group; nothing was sent.
    pub(super) fn send(&self, port: u16, bytes: &[u8], groups: &[Group]) -> io::Result<usize> {
        let part = |extent: &Range<usize>| {
            let part = &bytes[extent.clone()];
            libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }
        };
        let mut addresses: Vec<_> =
            groups.iter().map(|group| Address::new(group.to, group.port_or(port))).collect();
        let mut controls: Vec<_> = groups.iter().map(|group| SegmentControl::new(group.segment)).collect();
        let mut parts: Vec<_> = groups.iter().flat_map(|group| &group.extents).map(part).collect();
        let mut messages: Vec<libc::mmsghdr> = Vec::with_capacity(groups.len());
        let mut rest = &mut parts[..];
        for ((group, address), control) in groups.iter().zip(&mut addresses).zip(&mut controls) {
            let (own, others) = rest.split_at_mut(group.extents.len());
            rest = others;
            // SAFETY: an all-zero mmsghdr is a valid value of this plain C structure.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            let header = &mut message.msg_hdr;
            header.msg_name = (&raw mut *address).cast();
            header.msg_namelen = Address::len(self.local.is_ipv6());
            header.msg_iov = own.as_mut_ptr();
            header.msg_iovlen = own.len() as _;
            if group.packets > 1 {
                header.msg_control = (&raw mut *control).cast();
                header.msg_controllen = size_of::<SegmentControl>() as _;
            }
            messages.push(message);
        }
        // SAFETY: every message points into `addresses`, `parts` and `controls`, which live until the call
        // returns and did not move since; the parts point into `bytes`, which the kernel only reads.
        let sent = check(unsafe {
            libc::sendmmsg(
                self.sender().as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as libc::c_uint,
                0,
            )
        })?;
        Ok(sent as usize)
    }

    /// Sends one datagram.
    pub(super) fn send_one(&self, to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
        self.sender().send_to(bytes, &to.into()).map(drop)
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The control message that tells the length of segments (`UDP_SEGMENT`, a `u16`).
#[repr(C)]
struct SegmentControl {
    header: libc::cmsghdr,
    segment: u16,
    padding: [u8; 6],
}

impl SegmentControl {
    fn new(segment: u16) -> Self {
        // SAFETY: an all-zero cmsghdr is a valid value of this plain C structure.
        let mut header: libc::cmsghdr = unsafe { mem::zeroed() };
        header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<u16>()) as _;
        header.cmsg_level = libc::SOL_UDP;
        header.cmsg_type = libc::UDP_SEGMENT;
        Self { header, segment, padding: [0; 6] }
    }
}

/// Room for a batch of datagrams.
pub(super) struct Receiver {
    bytes: AlignedBuffer,
    found: Vec<Datagram>,
}

/// What came in with one message: one datagram, or several of one length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagram {
    pub(super) from: IpAddr,
    pub(super) port: u16,
    /// Where it begins in the bytes of the receiver.
    pub(super) start: usize,
    pub(super) len: usize,
    /// The length of each but the last.
    pub(super) segment: usize,
}

/// The control message that tells the length of merged datagrams (`UDP_GRO`, an `int`).
#[repr(C)]
#[derive(Clone, Copy)]
struct GroControl {
    header: libc::cmsghdr,
    segment: libc::c_int,
    padding: [u8; 4],
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { bytes: AlignedBuffer::new(BATCH * ROOM, 0), found: Vec::with_capacity(BATCH) }
    }

    /// Takes what is there, up to [`BATCH`] messages; at least one.
    pub(super) fn receive(&mut self, socket: &UdpSocket) -> io::Result<()> {
        self.found.clear();
        let v6 = socket.local.is_ipv6();
        // SAFETY: all-zero addresses and control messages are valid values of these plain C structures.
        let (mut addresses, mut controls): ([Address; BATCH], [GroControl; BATCH]) =
            unsafe { (mem::zeroed(), mem::zeroed()) };
        let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        for (number, room) in self.bytes.chunks_exact_mut(ROOM).enumerate() {
            parts[number] = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            let header = &mut messages[number].msg_hdr;
            header.msg_name = (&raw mut addresses[number]).cast();
            header.msg_namelen = Address::len(v6);
            header.msg_iov = &raw mut parts[number];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut controls[number]).cast();
            header.msg_controllen = size_of::<GroControl>() as _;
        }
        // SAFETY: every message points to its own address, control message and part of `self.bytes`, all of
        // which live until the call returns; the lengths are those of what they point to.
        let count = check(unsafe {
            libc::recvmmsg(
                socket.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        })?;
        for number in 0..count as usize {
            let (message, control) = (&messages[number], &controls[number]);
            let len = message.msg_len as usize;
            let merged = message.msg_hdr.msg_controllen >= size_of::<libc::cmsghdr>() as _
                && control.header.cmsg_level == libc::SOL_UDP
                && control.header.cmsg_type == libc::UDP_GRO;
            let segment = if merged { usize::try_from(control.segment).unwrap_or(len) } else { len };
            self.found.push(Datagram {
                from: addresses[number].ip(v6),
                port: addresses[number].port(v6),
                start: number * ROOM,
                len: len.min(ROOM),
                segment: segment.max(1),
            });
        }
        Ok(())
    }

    /// What the last call took, and the bytes that it refers to.
    pub(super) fn batch(&mut self) -> (&[Datagram], &mut [u8]) {
        (&self.found, &mut self.bytes)
    }
}

/// A socket of the address' family.
fn open(local: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if local.is_ipv6() {
        socket.set_only_v6(true)?;
        // The address may not be usable yet, which is no reason to leave the other family waiting.
        set(&socket, libc::SOL_IPV6, libc::IPV6_FREEBIND, 1)?;
    }
    Ok(socket)
}

/// Asks for a buffer, if need be within the limits of the host.
fn buffer(socket: &Socket, forced: libc::c_int, plain: libc::c_int) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, forced, BUFFER as libc::c_int)
        .or_else(|_| set(socket, libc::SOL_SOCKET, plain, BUFFER as libc::c_int))
}

fn set(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one int at the address, which lives until the call returns.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
