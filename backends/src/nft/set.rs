//! Sets and verdict maps as values.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;

use super::expr::Verdict;
use super::matches::padded_name;

/// A named set, or a map from keys to verdicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its name.
    pub name: String,
    /// What its keys are.
    pub key: Key,
    /// What its values are; `None` for a set.
    pub data: Option<DataType>,
    /// Bits of `flags`.
    pub flags: u32,
    /// How long elements stay once they are added, unless they say otherwise.
    pub timeout: Option<Duration>,
    /// A word to the reader; kernels before 5.10 forget it.
    pub comment: Option<String>,
    /// The most elements that it can have; `None` leaves that to the kernel, which then takes a table that it
    /// can resize, and is slower to fill.
    pub size: Option<u32>,
    /// The keys, each with its verdict if this is a map.
    pub elements: BTreeMap<Span, Option<Data>>,
    /// When elements go by themselves, counted from the moment of writing or reading. The others stay.
    pub lifetimes: BTreeMap<Span, Duration>,
}

/// Flags of a set; the numbers are `NFT_SET_*`.
pub(crate) mod flags {
    /// Nameless, part of one rule.
    pub(crate) const ANONYMOUS: u32 = 1;
    /// Its elements never change once a rule uses it.
    pub(crate) const CONSTANT: u32 = 2;
    /// Its keys are ranges.
    pub(crate) const INTERVAL: u32 = 4;
    /// It has values.
    pub(crate) const MAP: u32 = 8;
    /// Its elements may go by themselves after a time.
    pub(crate) const TIMEOUT: u32 = 0x10;
    /// Packets add elements.
    pub(crate) const DYNAMIC: u32 = 0x20;
    /// Its keys are made of several fields.
    pub(crate) const CONCAT: u32 = 0x80;
}

impl Set {
    /// An empty set whose keys are made of these fields.
    pub fn new(name: impl Into<String>, fields: &[KeyType]) -> Self {
        let flags = if fields.len() > 1 { flags::CONCAT } else { 0 };
        let key = Key::new(fields);
        Self {
            name: name.into(),
            key,
            data: None,
            flags,
            timeout: None,
            comment: None,
            size: None,
            elements: BTreeMap::new(),
            lifetimes: BTreeMap::new(),
        }
    }

    /// An empty map to verdicts.
    pub fn verdict_map(name: impl Into<String>, fields: &[KeyType]) -> Self {
        let set = Self::new(name, fields);
        Self { data: Some(DataType::VERDICT), flags: set.flags | flags::MAP, ..set }
    }

    /// The set for ranges as well as for single keys.
    pub fn with_ranges(mut self) -> Self {
        self.flags |= flags::INTERVAL;
        self
    }

    /// The set whose elements go by themselves this long after they were added.
    pub(crate) fn with_timeout(mut self, timeout: Duration) -> Self {
        self.flags |= flags::TIMEOUT;
        self.timeout = Some(timeout);
        self
    }

    /// The set as one whose elements rules add.
    pub(crate) fn dynamic(mut self) -> Self {
        self.flags |= flags::DYNAMIC;
        self
    }

    /// The set as one that doesn't change as long as it lives, which the kernel looks up faster.
    pub fn constant(mut self) -> Self {
        self.flags |= flags::CONSTANT;
        self
    }

    /// Its name and type alone.
    pub(super) fn without_elements(&self) -> Self {
        Self {
            name: self.name.clone(),
            key: self.key.clone(),
            comment: self.comment.clone(),
            elements: BTreeMap::new(),
            lifetimes: BTreeMap::new(),
            ..*self
        }
    }

    /// The set with these elements besides; ranges that touch or overlap become one, because the kernel
    /// refuses them otherwise.
    pub fn with(mut self, elements: impl IntoIterator<Item = Span>) -> Self {
        self.elements.extend(elements.into_iter().map(|span| (span, None)));
        if self.flags & (flags::INTERVAL | flags::CONCAT) == flags::INTERVAL {
            self.elements = joined(self.elements);
        }
        self
    }

    /// The set for no more than so many elements.
    pub fn with_size(mut self, size: u32) -> Self {
        self.size = Some(size);
        self
    }

    /// The set with these elements besides, which go by themselves after the time given.
    pub fn with_lifetimes(mut self, elements: impl IntoIterator<Item = (Span, Duration)>) -> Self {
        self.flags |= flags::TIMEOUT;
        for (span, lifetime) in elements {
            self.elements.insert(span.clone(), None);
            self.lifetimes.insert(span, lifetime);
        }
        self
    }

    /// The map with these elements besides.
    pub fn with_verdicts(mut self, elements: impl IntoIterator<Item = (Span, Verdict)>) -> Self {
        self.elements
            .extend(elements.into_iter().map(|(span, verdict)| (span, Some(Data::Verdict(verdict)))));
        self
    }

    /// Whether ranges are written as a key that begins one and a key behind its end.
    pub(super) fn has_end_elements(&self) -> bool {
        self.flags & flags::INTERVAL != 0 && self.key.fields.len() < 2
    }
}

fn joined(elements: BTreeMap<Span, Option<Data>>) -> BTreeMap<Span, Option<Data>> {
    let mut spans: Vec<Span> = Vec::with_capacity(elements.len());
    for span in elements.into_keys() {
        match spans.last_mut() {
            Some(last) if following(&last.to).is_none_or(|next| span.from <= next) => {
                last.to = std::mem::take(&mut last.to).max(span.to);
            }
            _ => spans.push(span),
        }
    }
    spans.into_iter().map(|span| (span, None)).collect()
}

/// The next number, in network order; `None` behind the last.
pub(super) fn following(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut next = bytes.to_owned();
    for byte in next.iter_mut().rev() {
        let (sum, carry) = byte.overflowing_add(1);
        *byte = sum;
        if !carry {
            return Some(next);
        }
    }
    None
}

/// The number before, in network order; `None` for 0.
pub(super) fn preceding(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut before = bytes.to_owned();
    for byte in before.iter_mut().rev() {
        let (difference, borrow) = byte.overflowing_sub(1);
        *byte = difference;
        if !borrow {
            return Some(before);
        }
    }
    None
}

/// What the keys of a set are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The type in the numbers of the `nft` program, which shows keys accordingly; the kernel doesn't care.
    pub kind: u32,
    /// The length of each field in bytes.
    pub fields: Vec<u32>,
}

impl Key {
    fn new(fields: &[KeyType]) -> Self {
        /// How `nft` packs several types into one number.
        const TYPE_BITS: u32 = 6;
        Self {
            kind: fields.iter().fold(0, |kind, field| kind << TYPE_BITS | field.number()),
            fields: fields.iter().map(|field| field.len()).collect(),
        }
    }

    /// What `nft` notes down about the order of bytes: 0 mixed, 1 the host's, 2 the network's.
    pub(super) fn byte_order(&self) -> u32 {
        let host = [KeyType::Mark, KeyType::Interface].map(KeyType::number);
        match self.fields.len() {
            1 if host.contains(&self.kind) => 1,
            1 => 2,
            _ => 0,
        }
    }

    /// The length in bytes: each of several fields begins at a register of its own.
    pub(crate) fn len(&self) -> u32 {
        match self.fields.as_slice() {
            [one] => *one,
            several => several.iter().map(|len| len.next_multiple_of(4)).sum(),
        }
    }
}

/// The type of one field of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    /// An IPv4 address.
    Ipv4,
    /// An IPv6 address.
    Ipv6,
    /// A transport protocol's number.
    Protocol,
    /// A port.
    Port,
    /// A packet's mark.
    Mark,
    /// An interface's name.
    Interface,
}

impl KeyType {
    /// The type of this family's addresses.
    pub fn address(family: subnet::Family) -> Self {
        match family {
            subnet::Family::V4 => Self::Ipv4,
            subnet::Family::V6 => Self::Ipv6,
        }
    }

    /// The number of the type in the `nft` program.
    fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::Mark => 19,
            Self::Interface => 41,
        }
    }

    fn len(self) -> u32 {
        match self {
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Ipv4 | Self::Mark => 4,
            Self::Ipv6 | Self::Interface => 16,
        }
    }
}

/// The type of a map's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataType {
    /// The type in the numbers of the `nft` program, or of the kernel for verdicts.
    pub kind: u32,
    /// The length in bytes; 0 for verdicts.
    pub len: u32,
}

impl DataType {
    /// `NFT_DATA_VERDICT`.
    pub(crate) const VERDICT: Self = Self { kind: 0xffff_ff00, len: 0 };
}

/// A value of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// What to do.
    Verdict(Verdict),
    /// Bytes of somebody else's map.
    Value(Vec<u8>),
}

/// All keys from the first to the last, both included; a single key is a span of one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The first.
    pub from: Vec<u8>,
    /// The last.
    pub to: Vec<u8>,
}

impl Span {
    /// One address.
    pub fn address(address: IpAddr) -> Self {
        Self::net(IpNet::from(address))
    }

    /// All addresses of a network.
    pub fn net(net: IpNet) -> Self {
        match net {
            IpNet::V4(v4) => Self::new(v4.network().octets(), v4.broadcast().octets()),
            IpNet::V6(v6) => Self::new(v6.network().octets(), v6.broadcast().octets()),
        }
    }

    /// One port.
    pub fn port(port: u16) -> Self {
        Self::ports(port..=port)
    }

    /// Several ports.
    pub fn ports(ports: RangeInclusive<u16>) -> Self {
        Self::new(ports.start().to_be_bytes(), ports.end().to_be_bytes())
    }

    /// One transport protocol.
    pub fn protocol(number: u8) -> Self {
        Self::new([number], [number])
    }

    /// One mark.
    pub fn mark(mark: u32) -> Self {
        Self::new(mark.to_ne_bytes(), mark.to_ne_bytes())
    }

    /// One interface.
    pub fn interface(name: &str) -> Self {
        Self::new(padded_name(name), padded_name(name))
    }

    /// A key made of several fields.
    pub fn concat(fields: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Self::new([], []);
        for field in fields {
            for (sum, part) in [(&mut all.from, &field.from), (&mut all.to, &field.to)] {
                sum.extend(part);
                sum.resize(sum.len().next_multiple_of(4), 0);
            }
        }
        all
    }

    fn new(from: impl Into<Vec<u8>>, to: impl Into<Vec<u8>>) -> Self {
        Self { from: from.into(), to: to.into() }
    }
}
