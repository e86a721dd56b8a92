//! The addresses of pods: what the namespaces have that a device of this one leads to.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};

use super::{Netlink, decode, failed};
use crate::kernel::KernelError;

/// Reads the addresses of another namespace, by its number in this one (Linux 4.20).
const IFA_TARGET_NETNSID: u16 = 10;

impl Netlink {
    /// The addresses of all namespaces that a device of this one leads to (the pods' ends of veth pairs).
    ///
    /// # Errors
    /// [`KernelError::Netlink`] when the kernel does not answer, or refuses to look into one of them.
    pub fn pod_addresses(&mut self) -> Result<BTreeSet<IpAddr>, KernelError> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let request = RouteNetlinkMessage::GetLink(request);
        let namespaces = self.socket.dump(&request, BTreeSet::new, |found, message| {
            if let RouteNetlinkMessage::NewLink(message) = message {
                found.extend(message.attributes.iter().filter_map(|attribute| match attribute {
                    LinkAttribute::LinkNetNsId(id) if *id >= 0 => Some(*id),
                    _ => None,
                }));
            }
        });
        let mut all = BTreeSet::new();
        for id in namespaces.map_err(failed("reading the links"))? {
            let mut request = AddressMessage::default();
            let target = DefaultNla::new(IFA_TARGET_NETNSID, id.to_ne_bytes().to_vec());
            request.attributes.push(AddressAttribute::Other(target));
            let request = RouteNetlinkMessage::GetAddress(request);
            let found = self.socket.dump(&request, Vec::new, |found, message| {
                if let RouteNetlinkMessage::NewAddress(message) = message {
                    found.extend(decode::address(&message).map(|(_, address)| address.net.addr()));
                }
            });
            all.extend(found.map_err(failed("reading the addresses of a pod"))?);
        }
        Ok(all)
    }
}
