//! `net-conf.json`: the cluster's network and backend, from JSON to values that need no further checking.

mod backend;
mod diff;
mod keys;
mod values;
pub(crate) mod wireguard;

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::gojson::Object;
use crate::net::{Family, Subnets, addr_of, bits_of, overlap};
use crate::text::shortened;
pub use keys::Warnings;
#[cfg(feature = "testing")]
pub use keys::all as all_keys;
use wireguard::WireguardConfig;

/// The configuration can't be used; the text says which key, which value and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network configuration: {0}")]
pub struct ConfigError(pub String);

impl From<String> for ConfigError {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// The addresses of one family: the whole overlay network and how nodes divide it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// The whole overlay (`Network`, `IPv6Network`), without host bits.
    pub network: IpNet,
    /// Prefix length of one node's subnet (`SubnetLen`).
    pub subnet_len: u8,
    /// First address of the lowest subnet that may be allocated (`SubnetMin`).
    pub min: IpAddr,
    /// First address of the highest subnet that may be allocated (`SubnetMax`).
    pub max: IpAddr,
}

impl Range {
    /// Whether this node may hold `subnet`: the contract's "compatible" (§3.1.3).
    pub fn allows(&self, subnet: IpNet) -> bool {
        let base = bits_of(subnet.network());
        Family::of(subnet.network()) == Family::of(self.network.network())
            && subnet.prefix_len() == self.subnet_len
            && (bits_of(self.min)..=bits_of(self.max)).contains(&base)
    }

    /// How far apart two neighbouring subnets start.
    pub fn step(&self) -> u128 {
        1 << (self.network.max_prefix_len() - self.subnet_len)
    }
}

/// The device of the `vxlan` backend (contract §2.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanConfig {
    /// Network identifier, 0 to 2²⁴−1; the device is named after it.
    pub vni: u32,
    /// UDP port; `None` leaves the choice to the kernel (8472).
    pub port: Option<u16>,
    /// MTU of the underlay in bytes, before encapsulation; `None` follows the external interface.
    pub mtu: Option<u32>,
    /// VXLAN group-based policy extension; must be equal on all nodes.
    pub gbp: bool,
    /// Learn peers from their frames. Not needed: leases carry all addresses.
    pub learning: bool,
    /// Route directly to peers on the same link.
    pub direct_routing: bool,
    /// `ChecksumOffload`, a key of ours: whether the kernel may leave checksums of encapsulated packets to
    /// the network card.
    #[serde(default)]
    pub checksum_offload: ChecksumOffload,
    /// `Fallback: "udp"`, a key of ours: a node whose kernel has no VXLAN takes the udp backend, and all
    /// others reach it so. Go flannel ignores it.
    #[serde(default)]
    pub fallback: bool,
    /// `CheckSources`, a key of ours: takes datagrams from the public addresses of peers only. Off where address
    /// translation changes the senders.
    #[serde(default = "yes")]
    pub check_sources: bool,
}

/// Who computes the checksums of packets that leave by a tunnel device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChecksumOffload {
    /// The network card where the kernel is good at it: from Linux 5.7 on.
    #[default]
    Auto,
    /// The network card.
    On,
    /// The kernel: slower, and right with network cards and hypervisors that are wrong.
    Off,
}

/// The device of the `ipip` backend (contract §2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpipConfig {
    /// Route directly to peers on the same link.
    pub direct_routing: bool,
    /// `Fallback: "udp"`, see [`VxlanConfig::fallback`].
    pub fallback: bool,
    /// `CheckSources`, see [`VxlanConfig::check_sources`].
    pub check_sources: bool,
}

/// The commands of the `extension` backend (contract §5.8), each empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtensionConfig {
    /// Runs before the lease; what it prints is published in it.
    pub pre_startup: String,
    /// Runs once there is a lease.
    pub post_startup: String,
    /// Runs for each peer that comes.
    pub subnet_add: String,
    /// Runs for each peer that goes.
    pub subnet_remove: String,
    /// `AllowCommands`, a key of ours: this node runs commands of this configuration, which is a file of its own.
    pub allowed: bool,
}

/// `Backend` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendConfig {
    /// Kernel VXLAN.
    Vxlan(VxlanConfig),
    /// Plain routes through the other nodes' addresses.
    HostGw,
    /// Kernel IP-in-IP.
    Ipip(IpipConfig),
    /// A lease and traffic rules; packets between nodes take other routes, such as those of a cloud's route table.
    Alloc,
    /// Programs of the operator connect nodes.
    Extension(ExtensionConfig),
    /// Userspace encapsulation in UDP; what an absent `Backend` means.
    Udp {
        /// UDP port of all nodes.
        port: u16,
        /// Takes datagrams from known peers only, and packets only from the sender's own addresses. Off
        /// where address translation changes the senders.
        #[serde(default = "yes")]
        check_sources: bool,
        /// `Workers`, a key of ours: threads for each direction, each with pods and a source port of its own.
        #[serde(default = "one")]
        workers: u8,
    },
    /// WireGuard, by the kernel or in this process.
    Wireguard(WireguardConfig),
    /// A type of Go flannel that this release doesn't have, or one that doesn't exist.
    Unknown(String),
}

impl BackendConfig {
    /// The udp backend with its defaults: what an absent `Backend` means, and what stands in for a tunnel that a
    /// kernel can't make (`Backend.Fallback`).
    pub const FALLBACK: Self = Self::Udp { port: DEFAULT_UDP_PORT, check_sources: true, workers: 1 };

    /// The type's name as leases and logs spell it.
    pub fn name(&self) -> &str {
        match self {
            Self::Vxlan(_) => "vxlan",
            Self::HostGw => "host-gw",
            Self::Ipip(_) => "ipip",
            Self::Alloc => "alloc",
            Self::Extension(_) => "extension",
            Self::Udp { .. } => "udp",
            Self::Wireguard(_) => "wireguard",
            Self::Unknown(name) => name,
        }
    }

    /// Whether a node whose kernel lacks this backend takes [`FALLBACK`](Self::FALLBACK) (`Backend.Fallback`).
    pub fn has_fallback(&self) -> bool {
        match self {
            Self::Vxlan(config) => config.fallback,
            Self::Ipip(config) => config.fallback,
            Self::HostGw
            | Self::Alloc
            | Self::Extension(_)
            | Self::Wireguard(_)
            | Self::Udp { .. }
            | Self::Unknown(_) => false,
        }
    }
}

/// The cluster's configuration, complete with Flannel's defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    v4: Option<Range>,
    v6: Option<Range>,
    /// `EnableNFTables`: which kind of traffic rules the operator asks for.
    pub nftables: bool,
    /// How packets get from node to node.
    pub backend: BackendConfig,
    /// `MasqueradeExcept`, a key of ours: networks that see the pods' own addresses although masquerading
    /// is on. Go flannel ignores it.
    pub masquerade_except: Vec<IpNet>,
    /// `FastPath`, a key of ours: established flows of pods go through an nftables flowtable, past bridge, routing and
    /// rules. Go flannel ignores it.
    #[serde(default)]
    pub fast_path: bool,
    /// The keys that have no effect, for the operator.
    #[serde(skip)]
    pub warnings: Warnings,
}

impl NetworkConfig {
    /// Reads and checks `net-conf.json` with the rules for stores that allocate subnets (contract §2).
    ///
    /// # Errors
    /// [`ConfigError`] naming the key, its value and what would be acceptable.
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        Self::parse_with(json, Origin::Store, range)
    }

    /// Reads `net-conf.json` with the rules for stores in which somebody else allocates subnets: its keys
    /// about the division of the network are ignored (contract §2). The lengths are those of `own`, or
    /// Flannel's usual ones where this node has no subnet yet. The document is a file of this node.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key, its value and what would be acceptable.
    pub fn parse_given_subnets(json: &str, own: &Subnets) -> Result<Self, ConfigError> {
        Self::parse_with(json, Origin::File, |object, family| given_range(object, family, own.get(family)))
    }

    fn parse_with(
        json: &str,
        origin: Origin,
        range: impl Fn(&Object<'_>, Family) -> Result<Range, ConfigError>,
    ) -> Result<Self, ConfigError> {
        let object = Object::parse(json)?;
        let enabled = |key, default| object.get::<bool>(key).map(|value| value.unwrap_or(default));
        let v4 = enabled("EnableIPv4", true)?.then(|| range(&object, Family::V4)).transpose()?;
        let v6 = enabled("EnableIPv6", false)?.then(|| range(&object, Family::V6)).transpose()?;
        if v4.is_none() && v6.is_none() {
            return Err(ConfigError(
                "EnableIPv4 is false and EnableIPv6 is not true: enable at least one of them".into(),
            ));
        }
        let backend = backend::backend(&object, origin)?;
        Ok(Self {
            v4,
            v6,
            nftables: enabled("EnableNFTables", false)?,
            masquerade_except: masquerade_except(&object)?,
            fast_path: enabled("FastPath", false)?,
            warnings: keys::without_effect(&object, backend.name(), origin),
            backend,
        })
    }

    /// The range of one family, if the family is enabled.
    pub fn range(&self, family: Family) -> Option<&Range> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// All enabled ranges, IPv4 first.
    pub fn ranges(&self) -> impl Iterator<Item = &Range> {
        self.v4.iter().chain(&self.v6)
    }

    /// The networks, by family.
    pub fn networks(&self) -> Subnets {
        self.ranges().map(|range| range.network).collect()
    }

    /// Whether a node may hold `subnets`: one allowed subnet for each enabled family, and no other.
    pub fn allows(&self, subnets: &Subnets) -> bool {
        Family::BOTH.into_iter().all(|family| match (self.range(family), subnets.get(family)) {
            (Some(range), Some(subnet)) => range.allows(subnet),
            (None, None) => true,
            _ => false,
        })
    }
}

/// Where a configuration comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// What all nodes share; everything with write access to the store can change it.
    Store,
    /// A file of this node.
    File,
}

/// Key names and limits of one family.
struct FamilyKeys {
    network: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
    /// Longest subnet that still has room for pods.
    longest: u8,
    /// Length taken when the network is large enough.
    usual: u8,
}

impl FamilyKeys {
    fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                network: "Network",
                len: "SubnetLen",
                min: "SubnetMin",
                max: "SubnetMax",
                longest: 30,
                usual: 24,
            },
            Family::V6 => Self {
                network: "IPv6Network",
                len: "IPv6SubnetLen",
                min: "IPv6SubnetMin",
                max: "IPv6SubnetMax",
                longest: 126,
                usual: 64,
            },
        }
    }
}

fn range(object: &Object<'_>, family: Family) -> Result<Range, ConfigError> {
    let keys = FamilyKeys::of(family);
    let network = network(object, &keys, family)?;
    let subnet_len = subnet_len(object, &keys, network)?;
    let step = 1u128 << (family.bits() - subnet_len);
    let first = bits_of(network.network());
    let bound = |key, default| bound(object, key, network, subnet_len, addr_of(family, default));
    let min = bound(keys.min, first + step)?;
    let max = bound(keys.max, bits_of(network.broadcast()) & !(step - 1))?;
    if bits_of(min) > bits_of(max) {
        return Err(ConfigError(format!(
            "{}: {min} lies above {} {max}, so no subnet is left: exchange them, or leave one out",
            keys.min, keys.max
        )));
    }
    Ok(Range { network, subnet_len, min, max })
}

/// The whole network, of which somebody else gives every part away.
fn given_range(object: &Object<'_>, family: Family, own: Option<IpNet>) -> Result<Range, ConfigError> {
    let keys = FamilyKeys::of(family);
    let network = network(object, &keys, family)?;
    let subnet_len = own.map_or(keys.usual, |own| own.prefix_len()).max(network.prefix_len());
    let last = IpNet::new(network.broadcast(), subnet_len).map_or(network.network(), |net| net.network());
    Ok(Range { network, subnet_len, min: network.network(), max: last })
}

fn network(object: &Object<'_>, keys: &FamilyKeys, family: Family) -> Result<IpNet, ConfigError> {
    let text: Option<String> = object.get_non_null(keys.network)?;
    let example = if family == Family::V4 { "10.244.0.0/16" } else { "fd00:10:244::/48" };
    let Some(text) = text else {
        let kubernetes = if object.has("apiVersion") && object.has("kind") {
            " (this is an object of Kubernetes: the configuration is the text that its data has as net-conf.json)"
        } else {
            ""
        };
        return Err(ConfigError(format!(
            "{} is missing: add it, for example \"{example}\"{kubernetes}",
            keys.network
        )));
    };
    let parsed = prefix(&text).filter(|net| Family::of(net.addr()) == family);
    let Some(network) = parsed else {
        let key = keys.network;
        return Err(ConfigError(format!(
            "{key}: {:?} is not an {family} prefix such as \"{example}\"",
            shortened(&text)
        )));
    };
    match not_for_pods(network.trunc()) {
        None => Ok(network.trunc()),
        Some(why) => Err(ConfigError(format!(
            "{}: {text:?} {why}: pods can't have such addresses; use a private network such as \"{example}\"",
            keys.network
        ))),
    }
}

/// A prefix; none with zeros before a number, which some programs take for octal, as in `010.1.0.0/16`.
fn prefix(text: &str) -> Option<IpNet> {
    let (addr, _) = text.split_once('/')?;
    addr.parse::<IpAddr>().ok()?;
    text.parse().ok()
}

/// Why pods can't have the addresses of a network, if they can't.
fn not_for_pods(network: IpNet) -> Option<String> {
    const SPECIAL: [(&str, &str); 11] = [
        ("0.0.0.0/8", "\"this network\""),
        ("127.0.0.0/8", "the host's loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved and the broadcast address"),
        ("::/128", "the unspecified address"),
        ("::1/128", "the host's loopback"),
        ("::ffff:0:0/96", "IPv4 addresses in IPv6 clothes (IPv4-mapped)"),
        ("64:ff9b::/96", "IPv4 hosts behind NAT64"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    ];
    let special = SPECIAL.iter().filter_map(|(net, what)| Some((net.parse::<IpNet>().ok()?, *what)));
    special
        .filter(|(net, _)| overlap(*net, network))
        .map(|(net, what)| match net.contains(&network) {
            true => format!("is {what} ({net})"),
            false => format!("contains {net}, which is {what}"),
        })
        .next()
}

fn subnet_len(object: &Object<'_>, keys: &FamilyKeys, network: IpNet) -> Result<u8, ConfigError> {
    let FamilyKeys { len: key, longest, usual, .. } = *keys;
    let smallest = network.prefix_len() + 2;
    match object.get::<u64>(key)?.unwrap_or(0) {
        0 if network.prefix_len() > longest - 2 => Err(ConfigError(format!(
            "{}: {network} is too small to divide: a prefix of at most /{} is needed",
            keys.network,
            longest - 2
        ))),
        0 => Ok(if network.prefix_len() <= usual - 2 { usual } else { smallest }),
        given if given > u64::from(longest) => {
            Err(ConfigError(format!("{key}: {given} leaves no room for pods: use at most {longest}")))
        }
        given if given < u64::from(smallest) => Err(ConfigError(format!(
            "{key}: {given} gives {network} fewer than four subnets: use at least {smallest}"
        ))),
        given => Ok(given as u8),
    }
}

fn bound(
    object: &Object<'_>,
    key: &str,
    network: IpNet,
    subnet_len: u8,
    default: IpAddr,
) -> Result<IpAddr, ConfigError> {
    // The IPv6 bounds are pointers in Go, so there (and only there) null means "not given".
    let text: Option<String> =
        if network.addr().is_ipv4() { object.get_non_null(key)? } else { object.get(key)? };
    let Some(text) = text else { return Ok(default) };
    let refuse = |why: fmt::Arguments<'_>| Err(ConfigError(format!("{key}: {:?} {why}", shortened(&text))));
    let Ok(addr) = text.parse::<IpAddr>() else { return refuse(format_args!("is not an IP address")) };
    if !network.contains(&addr) {
        return refuse(format_args!("lies outside {network}"));
    }
    let base = IpNet::new(addr, subnet_len).map_or(addr, |net| net.network());
    if base != addr {
        return refuse(format_args!("is not the first address of a /{subnet_len}: {base} is"));
    }
    Ok(addr)
}

fn masquerade_except(object: &Object<'_>) -> Result<Vec<IpNet>, ConfigError> {
    let texts: Vec<String> = object.get("MasqueradeExcept")?.unwrap_or_default();
    let parsed = texts.iter().map(|text| match prefix(text) {
        Some(net) => Ok(net.trunc()),
        None => Err(ConfigError(format!(
            "MasqueradeExcept: {:?} is not a prefix such as \"192.168.0.0/16\" or \"fd00::/8\"",
            shortened(text)
        ))),
    });
    parsed.collect()
}

/// Port of the `udp` backend (contract §13).
const DEFAULT_UDP_PORT: u16 = 8285;

fn yes() -> bool {
    true
}

fn one() -> u8 {
    1
}

#[cfg(test)]
mod tests;
