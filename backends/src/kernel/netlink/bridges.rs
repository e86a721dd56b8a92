//! Notifications about bridges and other links: their names, their hardware addresses, and the addresses of all links.

use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::MulticastGroup;

use super::socket::messages;
use super::{Netlink, decode, failed};
use crate::host::HostView;
use crate::kernel::KernelError;
use crate::netlink::multicast::{MulticastSocket, Received};

/// The receiving end.
pub struct BridgeListener {
    socket: MulticastSocket,
}

impl BridgeListener {
    /// Subscribes in the calling thread's network namespace. Needs a running tokio reactor.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when no netlink socket can be had.
    pub fn open() -> Result<Self, KernelError> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let socket = MulticastSocket::subscribe(NETLINK_ROUTE, &groups.map(|group| group as u32), None);
        Ok(Self { socket: socket.map_err(failed("subscribing to notifications"))? })
    }

    /// Waits until a bridge or an address comes, changes or goes.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the socket fails.
    pub async fn moved(&self) -> Result<(), KernelError> {
        self.heard(|message| match message {
            Message::NewLink(link) | Message::DelLink(link) => {
                decode::link(&link).is_some_and(|facts| facts.host.bridge)
            }
            Message::NewAddress(_) | Message::DelAddress(_) => true,
            _ => false,
        })
        .await
    }

    /// Waits until any link or address comes, changes or goes.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the socket fails.
    pub async fn links_moved(&self) -> Result<(), KernelError> {
        self.heard(|_| true).await
    }

    async fn heard(&self, concerns: impl Fn(Message) -> bool) -> Result<(), KernelError> {
        let mut buffer = MulticastSocket::buffer();
        loop {
            match self.socket.receive(&mut buffer).await.map_err(failed("receiving notifications"))? {
                Received::Datagram(datagram) if messages(datagram).any(&concerns) => return Ok(()),
                Received::Datagram(_) => {}
                Received::Lost => return Ok(()),
            }
        }
    }
}

impl Netlink {
    /// The links of this network namespace with their addresses, without its routes.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the kernel doesn't answer.
    pub fn links_and_addresses(&mut self) -> Result<HostView, KernelError> {
        let links = self.links().map_err(failed("reading the links"))?;
        self.host(&links).map_err(failed("reading the addresses"))
    }
}
