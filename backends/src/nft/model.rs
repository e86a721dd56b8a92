//! Tables, chains and rules as values.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use subnet::Family;

use super::expr::{Expr, Verdict};
use super::quota::Quota;
use super::set::Set;
use super::uapi::{NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6};

/// What a dump found, or a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// The tables in the kernel's order.
    pub tables: Vec<Table>,
}

impl Ruleset {
    /// The table called so.
    pub fn table(&self, id: &TableId) -> Option<&Table> {
        self.tables.iter().find(|table| table.id == *id)
    }

    /// Every base chain of `hook`, with its table.
    pub fn hooked(&self, hook: Hook) -> impl Iterator<Item = (&Table, &Chain)> {
        self.tables
            .iter()
            .flat_map(|table| table.chains.iter().map(move |chain| (table, chain)))
            .filter(move |(_, chain)| chain.base.as_ref().is_some_and(|base| base.hook == hook))
    }
}

/// The name of the tables of the fast path.
pub(crate) const FAST_PATH_TABLE: &str = "flannel-fast-path";

/// The name of a table for `network` where another agent of this host has the plain one.
pub(crate) fn name_with_network(plain: &str, network: IpNet) -> String {
    format!("{plain}-{}-{}", network.network(), network.prefix_len())
}

/// All tables that the fast path of an agent with these networks may be in.
pub(crate) fn fast_path_tables(networks: &[IpNet]) -> Vec<TableId> {
    let of_family = |family| TableId::new(family, FAST_PATH_TABLE);
    let named = networks.iter().map(|network| {
        TableId::new(Family::of(network.addr()), name_with_network(FAST_PATH_TABLE, *network))
    });
    Family::BOTH.map(of_family).into_iter().chain(named).collect()
}

/// The name of the tables of network policies.
pub const POLICY_TABLE: &str = "flannel-policy";

/// A table's family and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableId {
    /// Which packets its chains see.
    pub family: TableFamily,
    /// Its name.
    pub name: String,
}

impl TableId {
    /// The table `name` of `family`.
    pub fn new(family: impl Into<TableFamily>, name: impl Into<String>) -> Self {
        Self { family: family.into(), name: name.into() }
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// Which packets a table's chains see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TableFamily {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// Both.
    Inet,
    /// Frames on bridges.
    Bridge,
    /// Another one, by its `NFPROTO_*` number.
    Other(u8),
}

impl TableFamily {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Ip => NFPROTO_IPV4,
            Self::Ip6 => NFPROTO_IPV6,
            Self::Inet => NFPROTO_INET,
            Self::Bridge => NFPROTO_BRIDGE,
            Self::Other(number) => number,
        }
    }

    pub(super) fn from_number(number: u8) -> Self {
        match number {
            NFPROTO_IPV4 => Self::Ip,
            NFPROTO_IPV6 => Self::Ip6,
            NFPROTO_INET => Self::Inet,
            NFPROTO_BRIDGE => Self::Bridge,
            other => Self::Other(other),
        }
    }
}

impl From<subnet::Family> for TableFamily {
    fn from(family: subnet::Family) -> Self {
        match family {
            subnet::Family::V4 => Self::Ip,
            subnet::Family::V6 => Self::Ip6,
        }
    }
}

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip => f.write_str("ip"),
            Self::Ip6 => f.write_str("ip6"),
            Self::Inet => f.write_str("inet"),
            Self::Bridge => f.write_str("bridge"),
            Self::Other(3) => f.write_str("arp"),
            Self::Other(5) => f.write_str("netdev"),
            Self::Other(number) => write!(f, "family {number}"),
        }
    }
}

/// A table with all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its family and name.
    pub id: TableId,
    /// A word to the reader of `nft list ruleset`; kernels before 5.10 forget it.
    pub comment: Option<String>,
    /// Whether its chains are switched off.
    pub dormant: bool,
    /// Sets and maps.
    pub sets: Vec<Set>,
    /// Quotas.
    pub quotas: Vec<Quota>,
    /// Flowtables.
    pub flowtables: Vec<Flowtable>,
    /// Chains with their rules.
    pub chains: Vec<Chain>,
}

impl Table {
    /// An empty table.
    pub fn new(id: TableId) -> Self {
        Self {
            id,
            comment: None,
            dormant: false,
            sets: Vec::new(),
            quotas: Vec::new(),
            flowtables: Vec::new(),
            chains: Vec::new(),
        }
    }

    /// The chain called so.
    pub fn chain(&self, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|chain| chain.name == name)
    }

    /// The set or map called so.
    pub fn set(&self, name: &str) -> Option<&Set> {
        self.sets.iter().find(|set| set.name == name)
    }
}

/// Connections whose packets go from device to device at the ingress hook, past everything else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flowtable {
    /// Its name.
    pub name: String,
    /// Its place among what hangs on the ingress hook.
    pub priority: i32,
    /// The devices whose packets are looked up in it, by name.
    pub devices: BTreeSet<String>,
    /// Whether packets are counted for their connections, where those count at all.
    pub counter: bool,
}

/// A chain with its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// Where packets come in; `None` for a chain that is only jumped to.
    pub base: Option<Base>,
    /// A word to the reader; kernels before 5.10 forget it.
    pub comment: Option<String>,
    /// The rules in order.
    pub rules: Vec<Rule>,
}

impl Chain {
    /// A chain that is only jumped to.
    pub fn regular(name: impl Into<String>) -> Self {
        Self { name: name.into(), base: None, comment: None, rules: Vec::new() }
    }

    /// A chain that the kernel sends packets to.
    pub fn base(name: impl Into<String>, base: Base) -> Self {
        Self { base: Some(base), ..Self::regular(name) }
    }
}

/// Where and when a base chain sees packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// The place in the packet's way.
    pub hook: Hook,
    /// Lower ones run first.
    pub priority: i32,
    /// What becomes of a packet that no rule decided on.
    pub policy: Policy,
}

impl Base {
    /// The priority at which the kernel's source NAT stands.
    pub const SOURCE_NAT: i32 = 100;

    /// A chain of type `filter` and policy accept.
    pub fn filter(hook: Hook, priority: i32) -> Self {
        Self { kind: "filter".to_owned(), hook, priority, policy: Policy::Accept }
    }

    /// A chain of type `nat` and policy accept.
    pub fn nat(hook: Hook, priority: i32) -> Self {
        Self { kind: "nat".to_owned(), ..Self::filter(hook, priority) }
    }
}

/// A place in a packet's way; the numbers are `NF_INET_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// All that comes in.
    Prerouting,
    /// What is for this host.
    Input,
    /// What passes through.
    Forward,
    /// What this host sends.
    Output,
    /// All that goes out.
    Postrouting,
    /// Another one, by its number.
    Other(u32),
}

impl Hook {
    /// All that comes in through a port of a bridge; only in tables of family `bridge`.
    pub const BRIDGE_PREROUTING: Self = Self::Other(0);

    const KNOWN: [Self; 5] = [Self::Prerouting, Self::Input, Self::Forward, Self::Output, Self::Postrouting];

    pub(super) fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
            Self::Other(number) => number,
        }
    }

    /// Families that don't carry IP count otherwise.
    pub(super) fn from_number(family: TableFamily, number: u32) -> Self {
        let known = Self::KNOWN.into_iter().find(|hook| hook.number() == number);
        match family {
            TableFamily::Bridge | TableFamily::Other(_) => Self::Other(number),
            _ => known.unwrap_or(Self::Other(number)),
        }
    }
}

/// What becomes of a packet that no rule of a base chain decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It passes.
    Accept,
    /// It is dropped.
    Drop,
}

/// A rule: steps in order, each of which may end it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// The steps.
    pub exprs: Vec<Expr>,
    /// A word to the reader.
    pub comment: Option<String>,
    /// The kernel's number for it, once it is there.
    pub handle: Option<u64>,
}

impl Rule {
    /// A rule made of conditions and actions, see [`super::matches`].
    pub fn new(parts: impl IntoIterator<Item = Vec<Expr>>) -> Self {
        Self { exprs: parts.into_iter().flatten().collect(), comment: None, handle: None }
    }

    /// The rule with a comment.
    pub fn with_comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    /// The chain that it jumps or goes to; those in maps are not seen.
    pub(crate) fn leads_to(&self) -> Option<&str> {
        self.exprs.iter().find_map(|expr| match expr {
            Expr::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => Some(chain.as_str()),
            _ => None,
        })
    }

    /// Whether packets end here: dropped or rejected, by this program's words or by those of iptables.
    pub(crate) fn refuses(&self) -> bool {
        self.exprs.iter().any(|expr| match expr {
            Expr::Verdict(Verdict::Drop) | Expr::Reject { .. } => true,
            other => other.xt_target().is_some_and(|target| target == "REJECT" || target == "DROP"),
        })
    }

    /// Its comment, also where iptables keeps it.
    pub fn any_comment(&self) -> Option<String> {
        self.comment.clone().or_else(|| self.exprs.iter().find_map(Expr::xt_comment))
    }
}
