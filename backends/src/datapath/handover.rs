//! Hands the tunnels of a process over to the process that takes its place, without losing a packet: both hold the
//! files of a tunnel until the former one stops, and what comes meanwhile waits in the device's queues and the sockets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::shared::Sockets;
use super::sys::{Tun, UdpSocket};
use super::threads::Kept;
use crate::state::name::Name;

/// The files of one tunnel, duplicated for another process.
#[derive(Debug)]
pub struct TunnelFiles {
    /// The device.
    pub name: Name,
    /// The kernel's number for it.
    pub index: u32,
    /// Packets have an offload header.
    pub vnet: bool,
    /// The device takes merged UDP packets.
    pub udp: bool,
    /// The device's queues.
    pub queues: Vec<OwnedFd>,
    /// The sockets of each worker.
    pub sockets: Vec<Vec<SocketFiles>>,
}

/// The files of one socket of a tunnel.
#[derive(Debug)]
pub struct SocketFiles {
    /// Where it receives.
    pub local: SocketAddr,
    /// What it receives from.
    pub socket: OwnedFd,
    /// What it sends from, if that is another one.
    pub sender: Option<OwnedFd>,
}

impl TunnelFiles {
    pub(super) fn of(name: Name, index: u32, tun: &Tun, sockets: &[Sockets]) -> io::Result<Self> {
        let socket = |socket: &Arc<UdpSocket>| {
            let (file, sender) = socket.files()?;
            Ok(SocketFiles { local: socket.local, socket: file, sender })
        };
        let worker = |sockets: &Sockets| sockets.iter().map(socket).collect::<io::Result<_>>();
        Ok(Self {
            name,
            index,
            vnet: tun.vnet,
            udp: tun.udp,
            queues: tun.queues().iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?,
            sockets: sockets.iter().map(worker).collect::<io::Result<_>>()?,
        })
    }

    /// The device, and the sockets for its datapath.
    pub(super) fn open(self) -> io::Result<(Tun, Kept)> {
        if self.queues.is_empty() {
            let why = format!("there is no queue of {}", self.name);
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let socket =
            |files: SocketFiles| UdpSocket::of(files.local, files.socket, files.sender).map(Arc::new);
        let worker = |files: Vec<SocketFiles>| files.into_iter().map(socket).collect::<io::Result<_>>();
        let sockets = self.sockets.into_iter().map(worker).collect::<io::Result<_>>()?;
        Ok((Tun::of(self.queues, self.vnet, self.udp), Kept::of(sockets)))
    }
}
