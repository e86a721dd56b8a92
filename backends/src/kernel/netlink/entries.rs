//! Neighbours and forwarding entries of devices, as they are found.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use subnet::{Mac, Recount};

use super::decode::{self, NeighbourFacts};
use super::{Netlink, failed, or_nothing};
use crate::kernel::KernelError;
use crate::state::KernelState;
use crate::state::name::Name;

/// The tables in which there are entries of a device.
const TABLES: [AddressFamily; 3] = [AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Bridge];

/// What is found on devices of ours.
struct FoundEntries<'a> {
    neighbours: Recount<'a, (Name, IpAddr), Mac>,
    fdb: Recount<'a, (Name, Mac), IpAddr>,
}

impl<'a> FoundEntries<'a> {
    fn new(desired: &'a KernelState) -> Self {
        Self { neighbours: Recount::new(&desired.neighbours), fdb: Recount::new(&desired.fdb) }
    }

    fn note(&mut self, name: Name, entry: NeighbourFacts) {
        match entry {
            NeighbourFacts::Neighbour { ip, mac, permanent: true, .. } => {
                self.neighbours.note((name, ip), mac)
            }
            NeighbourFacts::Neighbour { .. } => {}
            NeighbourFacts::Fdb { mac, dst, .. } => self.fdb.note((name, mac), dst),
        }
    }
}

impl Netlink {
    /// Neighbours and configured forwarding entries of one device.
    pub(super) fn entries(&mut self, index: u32) -> io::Result<Vec<NeighbourFacts>> {
        let mut all = Vec::new();
        for table in TABLES {
            let found = self.dump_entries(table, index, Vec::new, Vec::push);
            all.append(&mut or_nothing(found)?.unwrap_or_default());
        }
        Ok(all)
    }

    /// Takes in the permanent neighbours and the forwarding entries of these devices.
    pub(super) fn read_entries(
        &mut self,
        own: &BTreeMap<u32, Name>,
        desired: &KernelState,
        state: &mut KernelState,
    ) -> Result<(), KernelError> {
        let mut all = FoundEntries::new(desired);
        for (index, name) in own {
            for table in TABLES {
                let found = self.dump_entries(
                    table,
                    *index,
                    || FoundEntries::new(desired),
                    |found, entry| found.note(*name, entry),
                );
                if let Some(FoundEntries { neighbours, fdb }) =
                    or_nothing(found).map_err(failed("reading neighbours"))?
                {
                    all.neighbours.absorb(neighbours);
                    all.fdb.absorb(fdb);
                }
            }
        }
        (state.neighbours, state.fdb) = (all.neighbours.finish(), all.fdb.finish());
        Ok(())
    }

    /// Reads the entries of a device in one table.
    fn dump_entries<T>(
        &mut self,
        table: AddressFamily,
        index: u32,
        start: impl FnMut() -> T,
        mut each: impl FnMut(&mut T, NeighbourFacts),
    ) -> io::Result<T> {
        let mut request = NeighbourMessage::default();
        request.header.family = table;
        if table == AddressFamily::Bridge {
            request.header.ifindex = index;
        } else {
            request.attributes.push(NeighbourAttribute::IfIndex(index));
        }
        let request = RouteNetlinkMessage::GetNeighbour(request);
        self.socket.dump_raw(&request.into(), start, |found, message| {
            if message.kind == decode::RTM_NEWNEIGH
                && let Some(entry) = decode::neighbour(message.payload)
            {
                each(found, entry);
            }
        })
    }
}
