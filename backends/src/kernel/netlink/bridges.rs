//! Notifications about bridges and other links: their names, their hardware addresses, and the addresses of all links.

use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::MulticastGroup;

use super::{Netlink, decode, failed};
use crate::host::HostView;
use crate::kernel::KernelError;
use crate::netlink::multicast::{MulticastSocket, RTM_DELLINK, RTM_NEWLINK, Received};
use crate::netlink::wire;

/// Messages about addresses (include/uapi/linux/rtnetlink.h).
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;

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
        let socket = socket.map_err(failed("subscribing to notifications"))?;
        socket.leave_out_ports(None).map_err(failed("filtering notifications"))?;
        Ok(Self { socket })
    }

    /// Waits until a bridge or an address comes, changes or goes.
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the socket fails.
    pub async fn moved(&self) -> Result<(), KernelError> {
        self.heard(|message| match message.kind {
            RTM_NEWLINK | RTM_DELLINK => {
                decode::LinkHead::of(message.payload).is_some_and(|link| link.is_bridge())
            }
            RTM_NEWADDR | RTM_DELADDR => true,
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

    async fn heard(&self, concerns: impl Fn(&wire::Message<'_>) -> bool) -> Result<(), KernelError> {
        let mut buffer = MulticastSocket::buffer();
        loop {
            match self.socket.receive(&mut buffer).await.map_err(failed("receiving notifications"))? {
                Received::Datagram(datagram)
                    if wire::messages(datagram).any(|message| concerns(&message)) =>
                {
                    return Ok(());
                }
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
