//! A lease: which node holds which subnet, and what its peers need in order to reach it.

mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::mac::Mac;
use crate::net::{Family, PublicAddrs, Subnets};
use crate::shared_map::SharedMap;
use crate::text::shortened;
use crate::wireguard::WireguardData;

pub use wire::{DecodeError, decode_value, encode_value, format_key, parse_key};

/// One node's slice of the network. About 100 bytes, however large the store's object is.
#[derive(Clone, Debug, Eq)]
pub struct Lease {
    /// The pod subnets.
    pub subnets: Subnets,
    /// Where peers send packets for these subnets.
    pub public: PublicAddrs,
    /// How peers have to send them.
    pub attachment: Attachment,
    /// When the lease was created, as a number that grows within one store (etcd create revision, file
    /// time): of two leases that overlap, the one created first is right.
    pub created: u64,
    /// When the lease was last written, as a number that grows within one store (etcd mod revision, the
    /// file's time of modification): of two leases that can't both be living, the one written last is.
    /// Not part of equality: a renewal changes nothing that a follower acts on, and wakes none.
    pub written: u64,
}

impl PartialEq for Lease {
    fn eq(&self, other: &Self) -> bool {
        let Self { subnets, public, attachment, created, written: _ } = self;
        *subnets == other.subnets
            && *public == other.public
            && *attachment == other.attachment
            && *created == other.created
    }
}

/// What a node publishes about its backend: Flannel's `BackendType` and `BackendData`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// Kernel VXLAN: the tunnel endpoint of each family.
    Vxlan {
        /// `BackendData`.
        v4: Option<Vtep>,
        /// `BackendV6Data`.
        v6: Option<Vtep>,
    },
    /// Plain routes.
    HostGw,
    /// Kernel IP-in-IP.
    Ipip,
    /// Programs of the operator, with what this node's program said.
    Extension(Option<Box<str>>),
    /// Userspace UDP, or no backend at all (`alloc`): both are written with an empty type and no data.
    Udp,
    /// WireGuard: the key and the port of each family. Apart, because thousands of leases have another type, and each is as long as the longest.
    Wireguard(Box<WireguardEnds>),
    /// Another one of these, by a node that will announce WireGuard soon and tells its key in advance.
    Preparing(Box<Preparing>),
    /// A type that this node can't use, by its name.
    Foreign(Box<str>),
}

impl Attachment {
    /// The type as Flannel spells it; empty for `udp`.
    pub fn type_name(&self) -> &str {
        match self {
            Self::Vxlan { .. } => "vxlan",
            Self::HostGw => "host-gw",
            Self::Ipip => "ipip",
            Self::Extension(_) => "extension",
            Self::Udp => "",
            Self::Wireguard(_) => "wireguard",
            Self::Preparing(preparing) => preparing.announced.type_name(),
            Self::Foreign(name) => name,
        }
    }

    /// What a type says of which nothing but the name is read, in lower case.
    pub(crate) fn of_type(name: &str) -> Self {
        match name {
            "" | "udp" => Self::Udp,
            "host-gw" => Self::HostGw,
            "ipip" => Self::Ipip,
            _ => Self::Foreign(shortened(name).into()),
        }
    }

    /// WireGuard with what it says of each family.
    pub fn of_wireguard(v4: Option<WireguardData>, v6: Option<WireguardData>) -> Self {
        Self::Wireguard(Box::new(WireguardEnds { v4, v6 }))
    }

    /// The same of a node that tells its key for WireGuard in advance; WireGuard itself, and what has data of its own form, is not
    /// changed.
    #[must_use]
    pub fn preparing(self, ends: WireguardEnds) -> Self {
        let takes_keys = matches!(self, Self::Vxlan { .. } | Self::HostGw | Self::Ipip | Self::Udp);
        if takes_keys && (ends.v4.is_some() || ends.v6.is_some()) {
            Self::Preparing(Box::new(Preparing { announced: self, ends }))
        } else {
            self
        }
    }

    /// How peers have to send packets now.
    pub fn announced(&self) -> &Self {
        match self {
            Self::Preparing(preparing) => &preparing.announced,
            other => other,
        }
    }

    /// What a node that announces another backend tells in advance of one family for WireGuard.
    pub fn prepared(&self, family: Family) -> Option<WireguardData> {
        match self {
            Self::Preparing(preparing) => preparing.ends.get(family),
            _ => None,
        }
    }

    /// The VXLAN tunnel endpoint of one family.
    pub fn vtep(&self, family: Family) -> Option<Vtep> {
        match (self.announced(), family) {
            (Self::Vxlan { v4, .. }, Family::V4) => *v4,
            (Self::Vxlan { v6, .. }, Family::V6) => *v6,
            _ => None,
        }
    }

    /// What a node announces of one family for WireGuard.
    pub fn wireguard(&self, family: Family) -> Option<WireguardData> {
        match self {
            Self::Wireguard(ends) => ends.get(family),
            _ => None,
        }
    }

    /// Whether something is announced of this family that peers need.
    pub fn has_data(&self, family: Family) -> bool {
        self.vtep(family).is_some() || self.wireguard(family).is_some()
    }
}

/// What a node says of WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireguardEnds {
    /// `BackendData`.
    pub v4: Option<WireguardData>,
    /// `BackendV6Data`.
    pub v6: Option<WireguardData>,
}

impl WireguardEnds {
    /// What it says of one family.
    pub fn get(&self, family: Family) -> Option<WireguardData> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// What a node says that goes on to WireGuard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preparing {
    /// How peers have to send packets until then.
    pub announced: Attachment,
    /// What it will say of WireGuard.
    pub ends: WireguardEnds,
}

/// A VXLAN tunnel endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vtep {
    /// VXLAN network identifier.
    pub vni: u32,
    /// Address of the endpoint's device: the destination of inner frames.
    pub mac: Mac,
    /// UDP port, said only while a cluster changes its port: an addition of ours that Go flannel passes over.
    pub port: Option<u16>,
}

/// Every lease in the cluster as of one moment; never a part of them. Two snapshots share what they have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    /// The leases that could be read.
    pub leases: SharedMap<Subnets, Lease>,
    /// The entries that could not, or not in both families, by their key: reported, and never a reason to
    /// touch another lease or the other family.
    pub malformed: BTreeMap<String, Malformed>,
    /// The names of the nodes, where the store has names.
    pub names: SharedMap<Subnets, Arc<str>>,
}

/// An entry of the store that is not a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// What is wrong with it.
    pub why: String,
    /// The subnets that its key names, which no other node can take while the entry exists.
    pub subnets: Option<Subnets>,
    /// The subnets of the lease that was read from the rest of the entry, where that is possible.
    pub lease: Option<Subnets>,
}

impl Leases {
    /// Files one entry of a store that was never written again: a lease, or a malformed entry with the reason.
    pub fn insert_entry(&mut self, key: &str, value: &[u8], created: u64) {
        self.insert_written(key, value, created, created);
    }

    /// Files one entry of a store: a lease, or a malformed entry with the reason.
    pub fn insert_written(&mut self, key: &str, value: &[u8], created: u64, written: u64) {
        let subnets = match subnets_of(key) {
            Ok(subnets) => subnets,
            Err(malformed) => {
                self.malformed.insert(shortened(key), malformed);
                return;
            }
        };
        match wire::decode_for(value, Some(&subnets)) {
            Ok((public, attachment, wrong)) => {
                self.leases.insert(subnets, Lease { subnets, public, attachment, created, written });
                if let Some(error) = wrong {
                    // The lease has the subnets.
                    let malformed = Malformed { why: error.to_string(), subnets: None, lease: None };
                    self.malformed.insert(key.to_owned(), malformed);
                }
            }
            Err(error) => {
                let malformed = Malformed { why: error.to_string(), subnets: Some(subnets), lease: None };
                self.malformed.insert(key.to_owned(), malformed);
            }
        }
    }

    /// Files an entry whose value is too large to be read.
    pub fn insert_too_large(&mut self, key: &str) {
        let subnets = subnets_of(key).ok();
        let why = "its value is too large to be a lease: delete the key".to_owned();
        self.malformed.insert(shortened(key), Malformed { why, subnets, lease: None });
    }

    /// Packs the maps after many insertions, each of which leaves some room.
    pub fn pack(&mut self) {
        self.leases.pack();
        self.names.pack();
    }

    /// The same leases, sharing with `before` what they have in common: what differs is then found without a look at the rest.
    #[must_use]
    pub fn sharing_with(&self, before: &Self) -> Self {
        let same = |one: &Lease, other: &Lease| one == other && one.written == other.written;
        Self {
            leases: self.leases.sharing_with(&before.leases, same),
            malformed: self.malformed.clone(),
            names: self.names.sharing_with(&before.names, PartialEq::eq),
        }
    }

    /// Forgets the entry of `key`, whichever kind it was.
    pub fn remove_entry(&mut self, key: &str) {
        self.malformed.remove(&shortened(key));
        if let Ok(subnets) = subnets_of(key) {
            self.leases.remove(&subnets);
        }
    }

    /// The leases of the node with these addresses, in the order of subnets. It has more than one after
    /// the network was moved, until the old one expires.
    pub fn by_public(&self, public: &PublicAddrs) -> impl Iterator<Item = &Lease> {
        self.leases.values().filter(|lease| lease.public.same_node(public))
    }

    /// Every subnet that somebody holds, readable or not.
    pub fn taken(&self) -> impl Iterator<Item = Subnets> {
        let malformed = self.malformed.values().filter_map(|entry| entry.subnets);
        self.leases.keys().copied().chain(malformed)
    }
}

/// The subnets that a key names. There is one key for each: `10.5.52.7-24` is not another one for
/// `10.5.52.0-24`.
fn subnets_of(key: &str) -> Result<Subnets, Malformed> {
    let subnets = parse_key(key);
    let right = subnets.as_ref().and_then(format_key);
    match (subnets, right) {
        (Some(subnets), Some(right)) if right == key => Ok(subnets),
        (_, Some(right)) => {
            Err(Malformed { why: format!("the key should be {right}"), subnets, lease: None })
        }
        (_, None) => {
            let why = "the key is not a subnet of the form 10.5.52.0-24".to_owned();
            Err(Malformed { why, subnets, lease: None })
        }
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if *self.attachment.announced() == Attachment::Udp {
            "udp or alloc"
        } else {
            self.attachment.type_name()
        };
        write!(f, "{} of {} ({kind})", self.subnets, self.public)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_cannot_be_read_are_kept_apart_with_their_subnet() {
        let mut leases = Leases::default();
        leases.insert_entry("10.5.1.0-24", br#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#, 1);
        leases.insert_entry("10.5.2.0-24", b"nonsense", 2);
        leases.insert_entry("nonsense", b"{}", 3);
        leases.insert_entry("10.5.1.7-24", br#"{"PublicIP":"192.0.2.1"}"#, 4);
        assert_eq!(leases.leases.len(), 1);
        assert_eq!(leases.malformed.len(), 3);
        assert_eq!(leases.taken().count(), 3);
        leases.remove_entry("10.5.1.7-24");
        assert_eq!(leases.leases.len(), 1);
        leases.remove_entry("10.5.2.0-24");
        leases.remove_entry("nonsense");
        leases.remove_entry("10.5.1.0-24");
        assert_eq!(leases, Leases::default());
    }

    #[test]
    fn what_is_wrong_with_one_family_leaves_the_other_one_usable() {
        let data = |mac: &str| format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
        let (good, bad) = (data("c6:d2:32:6f:8f:44"), data("zz"));
        let value = |v4: &str, v6: &str| {
            format!(
                r#"{{"PublicIP":"192.0.2.1","PublicIPv6":"fd00::1","BackendType":"vxlan","BackendData":{v4},"BackendV6Data":{v6}}}"#
            )
        };
        for (v4, v6, usable) in
            [(&good, &bad, Some(Family::V4)), (&bad, &good, Some(Family::V6)), (&bad, &bad, None)]
        {
            let mut leases = Leases::default();
            let key = "10.5.1.0-24&fd00:5:1::-64";
            leases.insert_entry(key, value(v4, v6).as_bytes(), 1);
            assert_eq!(leases.leases.len(), usize::from(usable.is_some()));
            for lease in leases.leases.values() {
                for family in Family::BOTH {
                    let (public, vtep) = (lease.public.get(family), lease.attachment.vtep(family));
                    assert_eq!(
                        (public.is_some(), vtep.is_some()),
                        (usable == Some(family), usable == Some(family))
                    );
                }
            }
            assert!(leases.malformed[key].why.contains("\"zz\""), "{}", leases.malformed[key].why);
            assert_eq!(leases.taken().count(), 1);
            leases.remove_entry(key);
            assert_eq!(leases, Leases::default());
        }
        // Of a family in which there is no subnet nothing is needed.
        let mut leases = Leases::default();
        leases.insert_entry("10.5.1.0-24", value(&good, &bad).as_bytes(), 1);
        assert_eq!(leases.leases.len(), 1);
    }

    #[test]
    fn a_node_is_recognised_by_its_public_address() {
        let mut leases = Leases::default();
        for (key, public) in
            [("10.5.9.0-24", "192.0.2.1"), ("10.5.1.0-24", "192.0.2.2"), ("10.5.3.0-24", "192.0.2.1")]
        {
            leases.insert_entry(key, format!(r#"{{"PublicIP":"{public}"}}"#).as_bytes(), 0);
        }
        let public = PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
        let found: Vec<String> = leases.by_public(&public).map(|lease| lease.subnets.to_string()).collect();
        assert_eq!(found, ["10.5.3.0/24", "10.5.9.0/24"]);
        assert_eq!(leases.by_public(&PublicAddrs::default()).count(), 0);
    }
}
