//! The part of the tunnel filter for IP-in-IP, which has no ports: packets are judged by their inner addresses, once as
//! they arrive and once as they leave the tunnel's device.
//!
//! ```text
//! chain input { meta l4proto ipip meta l4proto @active-protocols jump input-ipip; iifname @active-devices jump inner-ipip }
//! chain input-ipip {
//!     iifname != "eth0" fib saddr . iif oif missing counter drop
//!     ip saddr @peers accept
//!     @th,96,16 != 10.244 @th,128,16 != 10.244 accept
//!     counter drop
//! }
//! chain inner-ipip {
//!     ip saddr 10.244.0.0/16 accept
//!     ip daddr 10.244.0.0/16 accept
//!     counter drop
//! }
//! ```
//!
//! Other IP-in-IP tunnels of the host have inner addresses of their own and devices of their own. A device that takes
//! packets from any sender, as ours does, would carry packets of strangers with any source past the filters of networks
//! (CVE-2020-10136); what leaves it without an address of pods is therefore dropped.

use ipnet::IpNet;

use super::{refuse, spoofed, to_pods};
use crate::nft::matches::{Field, IPIP, accept, destination, in_set, inner_outside, jump, protocol, source};
use crate::nft::{Chain, Expr, KeyType, Op, Rule, Set, Span, Table};
use crate::state::tunnel::{IpipTunnel, TunnelFilter};

const PROTOCOLS: &str = "active-protocols";
const DEVICES: &str = "active-devices";

/// The sets by which these rules are in force.
pub(super) fn active(tunnel: &IpipTunnel) -> [Set; 2] {
    let protocol = Set::new(PROTOCOLS, &[KeyType::Protocol]).with_timeout(super::TIMEOUT);
    let device = Set::new(DEVICES, &[KeyType::Interface]).with_timeout(super::TIMEOUT);
    [protocol.with([Span::protocol(IPIP)]), device.with([Span::interface(tunnel.device.as_str())])]
}

/// Adds the chains for `tunnel`, and the jumps to them to the base chains.
pub(super) fn add(
    table: &mut Table,
    [input, forward]: [&mut Chain; 2],
    filter: &TunnelFilter,
    tunnel: &IpipTunnel,
    reverse_path: bool,
) {
    let arriving = || vec![protocol(Op::Eq, IPIP), in_set(&[Field::Protocol], PROTOCOLS)];
    lead(table, forward, "forward-ipip", arriving(), from_pods(filter, reverse_path));
    if tunnel.check_sources {
        lead(table, input, "input-ipip", arriving(), from_strangers(filter, reverse_path));
        for base in [input, forward] {
            lead(table, base, "inner-ipip", vec![in_set(&[Field::InName], DEVICES)], inner(filter));
        }
    }
}

/// Has packets with these conditions judged by a chain of its own.
fn lead(table: &mut Table, base: &mut Chain, name: &str, conditions: Vec<Vec<Expr>>, rules: Vec<Rule>) {
    base.rules.push(Rule::new(conditions.into_iter().chain([jump(name)])));
    if !table.chains.iter().any(|known| known.name == name) {
        table.chains.push(Chain { rules, ..Chain::regular(name) });
    }
}

/// For packets that have arrived at this node.
fn from_strangers(filter: &TunnelFilter, reverse_path: bool) -> Vec<Rule> {
    let peers = Rule::new([in_set(&[Field::Source(filter.family())], super::PEERS), accept()]);
    let spoofed = reverse_path.then(|| spoofed(filter));
    spoofed.into_iter().chain([peers, not_ours(filter), refuse([])]).collect()
}

/// For packets that this node forwards: to a node and not to a pod.
fn from_pods(filter: &TunnelFilter, reverse_path: bool) -> Vec<Rule> {
    let mut rules = to_pods(filter);
    rules.push(not_ours(filter));
    rules.extend(filter.networks.iter().map(|network| refuse([source(Op::Eq, *network)])));
    rules.extend(reverse_path.then(|| spoofed(filter)));
    rules
}

/// For what has left the tunnel.
fn inner(filter: &TunnelFilter) -> Vec<Rule> {
    let either = |network: &IpNet| {
        [source(Op::Eq, *network), destination(Op::Eq, *network)].map(|of_pod| Rule::new([of_pod, accept()]))
    };
    filter.networks.iter().flat_map(either).chain([refuse([])]).collect()
}

/// A packet too short to have inner addresses counts as ours.
fn not_ours(filter: &TunnelFilter) -> Rule {
    Rule::new([inner_outside(&filter.networks), accept()])
}

#[cfg(test)]
mod tests {
    use super::super::{TABLE, table};
    use super::*;

    fn filter(check_sources: bool) -> TunnelFilter {
        TunnelFilter {
            networks: vec!["10.244.0.0/16".parse().unwrap(), "10.99.0.0/20".parse().unwrap()],
            underlay: "eth0".parse().unwrap(),
            ports: Vec::new(),
            ipip: Some(IpipTunnel { device: "flannel.ipip".parse().unwrap(), check_sources }),
            peers: [("192.0.2.2".parse().unwrap(), ())].into(),
            recalled: false,
        }
    }

    fn chains(filter: &TunnelFilter) -> Vec<(String, usize)> {
        let table = table(filter, TABLE, true).unwrap();
        table.chains.into_iter().map(|chain| (chain.name, chain.rules.len())).collect()
    }

    #[test]
    fn ip_in_ip_is_filtered_before_and_behind_the_tunnel() {
        let expected =
            [("forward-ipip", 6), ("input-ipip", 4), ("inner-ipip", 5), ("input", 2), ("forward", 2)];
        assert_eq!(chains(&filter(true)), expected.map(|(name, rules)| (name.to_owned(), rules)));
    }

    #[test]
    fn sources_that_are_not_checked_leave_pods_out_alone() {
        let expected = [("forward-ipip", 6), ("forward", 1)];
        assert_eq!(chains(&filter(false)), expected.map(|(name, rules)| (name.to_owned(), rules)));
    }
}
