//! Traffic per peer, counted by nftables: for backends whose devices are shared by all peers.
//!
//! ```text
//! table ip flannel-peers-7f3a {
//!     map sent-24 { type ipv4_addr : verdict; elements = { 10.244.7.0 : jump sent-10.244.7.0-24 } }
//!     chain postrouting { type filter hook postrouting …; ip daddr & 255.255.255.0 vmap @sent-24 }
//!     chain sent-10.244.7.0-24 { counter }
//!     …
//! }
//! ```
//!
//! One look into a hash table for each packet, however many peers there are. The table belongs to the socket of this value
//! (Linux 5.12), so no other program changes it, and it goes with the process in whichever way that ends.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use subnet::Family;

use crate::nft::matches::{Field, counter, network_verdict_map};
use crate::nft::{
    Base, Chain, Change, Hook, KeyType, Nft, NftError, Place, Rule, Set, Span, TableId, Verdict,
};

/// How the names of the tables begin. A random number follows: agents in two containers can have the same process id.
const PREFIX: &str = "flannel-peers-";
/// After source NAT and connection tracking, where nothing decides any more.
const PRIORITY: i32 = 300;

/// Bytes to and from one peer, without headers of the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerTraffic {
    /// Sent to addresses of its subnet.
    pub sent: u64,
    /// Received from them.
    pub received: u64,
}

/// Counts while it lives.
pub struct PeerCounters {
    nft: Nft,
    /// The name of the tables.
    name: String,
    /// Subnets that are counted.
    counted: BTreeSet<IpNet>,
    /// Families and lengths of prefixes for which there are maps.
    lengths: BTreeSet<(Family, u8)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TrafficDirection {
    Sent,
    Received,
}

impl TrafficDirection {
    const BOTH: [Self; 2] = [Self::Sent, Self::Received];

    fn word(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Received => "received",
        }
    }

    /// The base chain, without rules.
    fn base(self) -> Chain {
        let (name, hook) = match self {
            Self::Sent => ("postrouting", Hook::Postrouting),
            Self::Received => ("prerouting", Hook::Prerouting),
        };
        Chain::base(name, Base::filter(hook, PRIORITY))
    }

    fn field(self, family: Family) -> Field {
        match self {
            Self::Sent => Field::Destination(family),
            Self::Received => Field::Source(family),
        }
    }

    /// The name of the chain that counts packets of a peer.
    fn chain(self, subnet: IpNet) -> String {
        format!("{}-{}-{}", self.word(), subnet.network(), subnet.prefix_len())
    }

    /// The map for subnets of this length.
    fn map(self, family: Family, prefix_len: u8) -> Set {
        Set::verdict_map(format!("{}-{prefix_len}", self.word()), &[KeyType::address(family)])
    }

    /// The element of a peer in its map.
    fn element(self, subnet: IpNet) -> Set {
        let verdict = Verdict::Jump(self.chain(subnet));
        self.map(Family::of(subnet.addr()), subnet.prefix_len())
            .with_verdicts([(Span::address(subnet.network()), verdict)])
    }
}

impl PeerCounters {
    /// Counts no peer yet.
    ///
    /// # Errors
    /// [`NftError`] when no netlink socket can be had.
    pub fn open() -> Result<Self, NftError> {
        let name = format!("{PREFIX}{:04x}", crate::random::id());
        Ok(Self { nft: Nft::open()?, name, counted: BTreeSet::new(), lengths: BTreeSet::new() })
    }

    /// Counts exactly these subnets from now on; those that stay keep their counters.
    ///
    /// # Errors
    /// [`NftError`] when the kernel refuses that, as one before 5.12 does, which knows no owners of tables. All is then as
    /// it was.
    pub fn count(&mut self, subnets: &BTreeSet<IpNet>) -> Result<(), NftError> {
        if *subnets == self.counted {
            return Ok(());
        }
        let come: Vec<IpNet> = subnets.difference(&self.counted).copied().collect();
        let gone: Vec<IpNet> = self.counted.difference(subnets).copied().collect();
        let lengths: BTreeSet<(Family, u8)> =
            come.iter().map(|subnet| (Family::of(subnet.addr()), subnet.prefix_len())).collect();
        let new: Vec<(Family, u8)> = lengths.difference(&self.lengths).copied().collect();
        let bases = TrafficDirection::BOTH.map(TrafficDirection::base);
        let maps: Vec<(Family, TrafficDirection, Set)> =
            of_both(&new, |(family, length), direction| (family, direction, direction.map(family, length)));
        let chains: Vec<(TableId, Chain)> = of_both(&come, |subnet, direction| {
            let rules = vec![Rule::new([counter()])];
            (self.table(subnet), Chain { rules, ..Chain::regular(direction.chain(subnet)) })
        });
        let mut changes = Vec::new();
        for family in new.iter().map(|(family, _)| *family).collect::<BTreeSet<_>>() {
            let table = TableId::new(family, self.name.as_str());
            changes.push(Change::AddOwnedTable(table.clone()));
            changes.extend(bases.iter().map(|chain| Change::AddChain { table: table.clone(), chain }));
        }
        for (family, direction, map) in &maps {
            let table = TableId::new(*family, self.name.as_str());
            changes.push(Change::AddSet { table: table.clone(), set: map });
            changes.push(Change::AddRule {
                table,
                chain: direction.base().name,
                rule: look_up(*family, *direction, map),
                place: Place::Last,
            });
        }
        changes.extend(chains.iter().map(|(table, chain)| Change::AddChain { table: table.clone(), chain }));
        changes.extend(of_both(&come, |subnet, direction| Change::AddElements {
            table: self.table(subnet),
            set: direction.element(subnet),
        }));
        changes.extend(of_both(&gone, |subnet, direction| Change::DeleteElements {
            table: self.table(subnet),
            set: direction.element(subnet),
        }));
        changes.extend(of_both(&gone, |subnet, direction| Change::FlushChain {
            table: self.table(subnet),
            chain: direction.chain(subnet),
        }));
        changes.extend(of_both(&gone, |subnet, direction| Change::DeleteChain {
            table: self.table(subnet),
            chain: direction.chain(subnet),
        }));
        self.nft.commit(&changes)?;
        self.counted.clone_from(subnets);
        self.lengths.extend(lengths);
        Ok(())
    }

    fn table(&self, subnet: IpNet) -> TableId {
        TableId::new(Family::of(subnet.addr()), self.name.as_str())
    }

    /// What was counted since each of these subnets came.
    ///
    /// # Errors
    /// [`NftError`] when the kernel can't be asked.
    pub fn read(&mut self) -> Result<BTreeMap<IpNet, PeerTraffic>, NftError> {
        let mut found: BTreeMap<String, u64> = BTreeMap::new();
        let families: BTreeSet<Family> =
            self.counted.iter().map(|subnet| Family::of(subnet.addr())).collect();
        for family in families {
            found.extend(self.nft.counters(&TableId::new(family, self.name.as_str()))?);
        }
        let bytes = |subnet: IpNet, direction: TrafficDirection| {
            found.get(&direction.chain(subnet)).copied().unwrap_or_default()
        };
        let traffic = |subnet: IpNet| PeerTraffic {
            sent: bytes(subnet, TrafficDirection::Sent),
            received: bytes(subnet, TrafficDirection::Received),
        };
        Ok(self.counted.iter().map(|subnet| (*subnet, traffic(*subnet))).collect())
    }
}

/// Sends a packet to the chain of its peer, if it has one.
fn look_up(family: Family, direction: TrafficDirection, map: &Set) -> Rule {
    let length = map.name.rsplit('-').next().and_then(|length| length.parse().ok()).unwrap_or_default();
    Rule::new([network_verdict_map(direction.field(family), length, &map.name)])
}

fn of_both<T: Copy, U>(all: &[T], one: impl Fn(T, TrafficDirection) -> U) -> Vec<U> {
    all.iter().flat_map(|item| TrafficDirection::BOTH.map(|direction| one(*item, direction))).collect()
}
