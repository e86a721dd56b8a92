//! Peers that are no more than a lease or a node object, and what the kernel of a node has of them.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::ensure;
use backends::testing::Member;
use serde_json::{Value, json};
use subnet::testing::{announced, fattened, node};

use crate::bed::{IMAGES, TIMEOUT};

/// Shows routes, neighbours and FDB entries of a VXLAN device.
pub const PEER_OBJECTS: [&str; 3] =
    ["ip -4 route show dev flannel.1", "ip -4 neigh show dev flannel.1", "bridge fdb show dev flannel.1"];

/// What makes one peer different from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Decides on its name and subnet.
    pub number: u16,
    /// Decides on its public address.
    pub address: u32,
    /// Decides on its MAC.
    pub mac: u32,
}

/// What a kernel needs for a peer: the first address of its subnet, its public address and its MAC.
pub type Entry = (Ipv4Addr, Ipv4Addr, String);

impl Peer {
    /// The peer with this number, as it is in the beginning.
    pub fn new(number: u16) -> Self {
        Self { number, address: number.into(), mac: number.into() }
    }

    /// The name of its node.
    pub fn name(self) -> String {
        format!("peer-{:05}.example.internal", self.number)
    }

    /// The first address of its subnet, which has 24 bits.
    pub fn first(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(10, 1 + high, low, 0)
    }

    /// Its address in the underlay.
    pub fn public(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + self.address)
    }

    /// The MAC of its tunnel device.
    pub fn mac(self) -> String {
        mac(self.mac)
    }

    /// What a kernel needs for it.
    pub fn entry(self) -> Entry {
        (self.first(), self.public(), self.mac())
    }

    /// Its lease in etcd, and the key of that.
    pub fn lease(self) -> (String, String) {
        (format!("{}-24", self.first()), lease(self.public(), self.mac()))
    }

    /// Its node object, as large as that of a real node.
    pub fn large(self) -> Value {
        let cidr = format!("{}/24", self.first());
        announced(fattened(node(&self.name(), &[&cidr]), IMAGES), &self.public().to_string(), &self.mac())
    }

    /// The same without its status: as large as the metadata that a metadata-only watch would bring.
    pub fn without_status(self) -> Value {
        let mut node = self.large();
        if let Some(members) = node.as_object_mut() {
            members.remove("status");
        }
        node
    }
}

/// A MAC that belongs to a number.
pub fn mac(number: u32) -> String {
    let [a, b, c, d] = number.to_be_bytes();
    format!("02:01:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// A lease as VXLAN agents write it.
pub fn lease(public: Ipv4Addr, mac: impl Display) -> String {
    let data = json!({ "VNI": 1, "VtepMAC": mac.to_string() });
    json!({ "PublicIP": public, "BackendType": "vxlan", "BackendData": data }).to_string()
}

/// When routes, neighbours and FDB entries of all peers were there. The agent writes the subnet file after
/// them: if a look right after finds everything, that moment counts; if not, the end of the look that does.
pub fn time_to_peers(member: &Member, file: Duration, peers: u16) -> anyhow::Result<Duration> {
    let mut whole = file;
    loop {
        let counts = PEER_OBJECTS.iter().map(|look| member.count(look));
        let counts = counts.collect::<anyhow::Result<Vec<_>>>()?;
        if counts == [usize::from(peers); 3] {
            return Ok(whole);
        }
        whole = member.started.elapsed();
        let log = || member.agent.log();
        ensure!(whole < TIMEOUT, "{counts:?} of {peers} routes, neighbours, FDB entries\n{}", log());
    }
}

/// The lines in which the kernel of a node differs from what its peers ask for, which are missing or too many.
pub fn differences(member: &Member, peers: impl IntoIterator<Item = Entry>) -> anyhow::Result<Vec<String>> {
    let mut wanted = [BTreeSet::new(), BTreeSet::new(), BTreeSet::new()];
    for (first, public, mac) in peers {
        wanted[0].insert(format!("{first}/24 via {first} proto 70 onlink"));
        wanted[1].insert(format!("{first} lladdr {mac} PERMANENT"));
        wanted[2].insert(format!("{mac} dst {public} self permanent"));
    }
    let mut differences = Vec::new();
    for (look, wanted) in PEER_OBJECTS.into_iter().zip(wanted) {
        let text = member.show(look)?;
        let found: BTreeSet<String> = text.lines().map(without_nexthop_id).collect();
        differences.extend(wanted.symmetric_difference(&found).cloned());
    }
    Ok(differences)
}

/// A line without the id of the nexthop object that a route uses: its gateway is shown as well.
fn without_nexthop_id(line: &str) -> String {
    match line.trim().split_once(" nhid ") {
        Some((destination, rest)) => format!("{destination} {}", rest.split_once(' ').unwrap_or_default().1),
        None => line.trim().to_owned(),
    }
}

/// An error with some of the differences and the agent's log, if there are any.
pub fn ensure_equal(member: &Member, peers: impl IntoIterator<Item = Peer>) -> anyhow::Result<()> {
    let differences = differences(member, peers.into_iter().map(Peer::entry))?;
    let some = &differences[..differences.len().min(10)];
    let (number, log) = (differences.len(), member.agent.log());
    ensure!(differences.is_empty(), "{number} differences, such as {some:#?}\n{log}");
    Ok(())
}
