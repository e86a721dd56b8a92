//! Steering: frames between two pods of this node are sent to the host, which routes them.
//!
//! A bridge forwards frames without any hook of IP seeing them, so that no policy holds between pods of one node,
//! unless `br_netfilter` passes them through these hooks. Where it doesn't, for a family, a rule writes the bridge's
//! own address as the destination of each frame between two addresses of the node's subnet. Neither pods, ARP nor
//! the CNI plugin take part in it, and connections that were bridged before go on.

use std::fs;
use std::net::IpAddr;

use ipnet::IpNet;
use subnet::Family;

use crate::nft::matches::*;
use crate::nft::{Base, Chain, Hook, Op, POLICY_TABLE, Rule, Table, TableFamily, TableId};

/// Where in a bridge's prerouting frames are steered: where destination NAT stands.
const PRIORITY: i32 = -300;

/// Whether frames between pods of this node are steered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SteerMode {
    /// Where `br_netfilter` doesn't do it.
    #[default]
    Auto,
    /// For both families.
    Always,
    /// For none.
    Never,
}

/// What is steered where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steering {
    /// The bridge's own address.
    pub mac: [u8; 6],
    /// The bridge's name.
    pub bridge: String,
    /// The node's subnets whose frames are steered, each with the bridge's address in it.
    pub subnets: Vec<(IpNet, IpAddr)>,
}

/// The sysctl that says whether bridged packets of a family pass through the hooks of IP.
fn bridge_netfilter(family: Family) -> &'static str {
    match family {
        Family::V4 => "/proc/sys/net/bridge/bridge-nf-call-iptables",
        Family::V6 => "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
    }
}

/// Whether bridged packets of this family pass through the hooks of IP, in the calling thread's network namespace.
pub fn bridged_packets_are_seen(family: Family) -> bool {
    fs::read_to_string(bridge_netfilter(family)).is_ok_and(|value| value.trim() != "0")
}

impl Steering {
    /// What has to be steered on a node with this bridge; `None` if nothing has.
    pub fn wanted(
        mode: SteerMode,
        bridge: &str,
        mac: [u8; 6],
        subnets: &[IpNet],
        seen: impl Fn(Family) -> bool,
    ) -> Option<Self> {
        let steered = |net: &IpNet| match mode {
            SteerMode::Always => true,
            SteerMode::Never => false,
            SteerMode::Auto => !seen(Family::of(net.addr())),
        };
        let subnets: Vec<(IpNet, IpAddr)> = subnets
            .iter()
            .copied()
            .filter(steered)
            .map(|net| (net, subnet::env_file::gateway(net)))
            .collect();
        (!subnets.is_empty()).then(|| Self { mac, bridge: bridge.to_owned(), subnets })
    }

    /// The table that does it. The kernel routes what it gets and tells the sender of a shorter way each time; rules
    /// keep that from pods, because for IPv6 no setting does, and settings can't be written in most containers.
    pub fn tables(&self) -> Vec<Table> {
        let mut steer = Chain::base("steer", Base::filter(Hook::BRIDGE_PREROUTING, PRIORITY));
        steer.rules.push(Rule::new([ether_destination(Op::Eq, self.mac), accept()]));
        for (net, gateway) in &self.subnets {
            let family = Family::of(net.addr());
            if family == Family::V6 {
                for types in [130..=132, 133..=137, 143..=143] {
                    steer.rules.push(Rule::new([ether_type(family), icmpv6_types(types), accept()]));
                }
            }
            steer.rules.push(Rule::new([
                ether_type(family),
                source(Op::Eq, *net),
                destination(Op::Eq, *net),
                destination(Op::Ne, IpNet::from(*gateway)),
                to_this_host(self.mac),
            ]));
        }
        let mut tables = vec![Table { chains: vec![steer], ..Table::new(bridge_table()) }];
        for (net, _) in &self.subnets {
            let family = Family::of(net.addr());
            let mut output = Chain::base("output", Base::filter(Hook::Output, 0));
            output.rules = vec![Rule::new([out_name(Op::Eq, &self.bridge), icmp_redirect(family), drop()])];
            tables.push(Table { chains: vec![output], ..Table::new(redirect_table(family)) });
        }
        tables
    }
}

/// The table that steers.
pub(super) fn bridge_table() -> TableId {
    TableId::new(TableFamily::Bridge, POLICY_TABLE)
}

/// The table that keeps redirects of a family from pods.
pub(super) fn redirect_table(family: Family) -> TableId {
    let family = match family {
        Family::V4 => TableFamily::Ip,
        Family::V6 => TableFamily::Ip6,
    };
    TableId::new(family, POLICY_TABLE)
}
