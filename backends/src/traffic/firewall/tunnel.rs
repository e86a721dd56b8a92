//! The filter of tunnel ports as an nftables table; pure.
//!
//! ```text
//! table ip flannel-tunnel {
//!     set peers { type ipv4_addr; elements = { 192.0.2.2, 192.0.2.3 } }
//!     set active { type inet_service; flags timeout; timeout 5m; elements = { 8472 } }
//!     chain input {
//!         type filter hook input …
//!         udp dport 8472 iifname "eth0" ip saddr @peers accept
//!         udp dport 8472 udp dport @active jump input-8472
//!     }
//!     chain forward { type filter hook forward …; udp dport 8472 udp dport @active jump forward-8472 }
//!     chain input-8472 {
//!         iifname != "eth0" fib saddr . iif oif missing counter drop
//!         ip saddr @peers accept
//!         @th,96,24 != 1 accept
//!         counter drop
//!     }
//!     chain forward-8472 {
//!         ip daddr 10.244.0.0/16 accept
//!         @th,96,24 != 1 accept
//!         ip saddr 10.244.0.0/16 counter drop
//!         iifname != "eth0" fib saddr . iif oif missing counter drop
//!     }
//! }
//! ```
//!
//! The agent renews `active` each minute. Where it doesn't run any more, because another program such as Go flannel
//! has taken its place, `peers` is not kept up to date, and the filter takes itself out of force.

mod ipip;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use subnet::shared_map::Pair;

use crate::nft::matches::{
    Field, UDP, accept, counter, destination, destination_port, drop, in_name, in_set, jump, protocol,
    reverse_path, source, vni_is_none_of,
};
use crate::nft::{Base, Chain, Change, Expr, Hook, KeyType, Op, Rule, Set, Span, Table, TableId};
use crate::state::tunnel::{TunnelFilter, TunnelPort};

/// The name of the table, in either family. Another agent of this host that has it makes ours end with the network.
pub(super) const TABLE: &str = "flannel-tunnel";

const PEERS: &str = "peers";
const ACTIVE: &str = "active";

/// How long the filter is in force without being renewed: several looks of the agent, each of which renews it.
const TIMEOUT: Duration = Duration::from_secs(300);

/// The table for `filter`; `None` where there is no tunnel. Not every kernel can look for the `reverse_path` of a
/// packet.
pub(super) fn table(filter: &TunnelFilter, name: &str, reverse_path: bool) -> Option<Table> {
    if filter.is_empty() {
        return None;
    }
    let mut table = Table::new(TableId::new(filter.family(), name));
    table.comment = Some("tunnels take datagrams from peers only".to_owned());
    table.sets = vec![peers(filter, filter.peers.keys().copied())];
    table.sets.extend(active(filter));
    let mut input = Chain::base("input", Base::filter(Hook::Input, 0));
    let mut forward = Chain::base("forward", Base::filter(Hook::Forward, 0));
    for port in &filter.ports {
        let mut chains = vec![(&mut forward, from_pods(filter, port, reverse_path))];
        if port.check_sources {
            input.rules.push(from_peer(filter, port));
            chains.push((&mut input, from_strangers(filter, port, reverse_path)));
        }
        for (base, rules) in chains {
            let name = format!("{}-{}", base.name, port.number);
            base.rules.push(Rule::new([
                protocol(Op::Eq, UDP),
                destination_port(Op::Eq, port.number),
                in_set(&[Field::DestinationPort], ACTIVE),
                jump(&name),
            ]));
            table.chains.push(Chain { rules, ..Chain::regular(name) });
        }
    }
    if let Some(tunnel) = &filter.ipip {
        ipip::add(&mut table, [&mut input, &mut forward], filter, tunnel, reverse_path);
    }
    table.chains.extend([input, forward].into_iter().filter(|base| !base.rules.is_empty()));
    Some(table)
}

/// Accepts what nearly all datagrams are, in the fewest steps: `from_strangers` would accept it, too, but only after a jump
/// and a look at `active`, which cost 1 % of a 64-byte datagram's way (`bench/tunnel-filter.sh`).
fn from_peer(filter: &TunnelFilter, port: &TunnelPort) -> Rule {
    Rule::new([
        protocol(Op::Eq, UDP),
        destination_port(Op::Eq, port.number),
        in_name(Op::Eq, filter.underlay.as_str()),
        in_set(&[Field::Source(filter.family())], PEERS),
        accept(),
    ])
}

/// For datagrams that have arrived at a port of this node.
fn from_strangers(filter: &TunnelFilter, port: &TunnelPort, reverse_path: bool) -> Vec<Rule> {
    let field = Field::Source(filter.family());
    let mut rules: Vec<Rule> = reverse_path.then(|| spoofed(filter)).into_iter().collect();
    rules.push(Rule::new([in_set(&[field], PEERS), accept()]));
    rules.extend(not_ours(port));
    rules.push(refuse([]));
    rules
}

/// For datagrams that this node forwards: to a node and not to a pod, before they are masqueraded.
fn from_pods(filter: &TunnelFilter, port: &TunnelPort, reverse_path: bool) -> Vec<Rule> {
    let mut rules = to_pods(filter);
    rules.extend(not_ours(port));
    rules.extend(filter.networks.iter().map(|network| refuse([source(Op::Eq, *network)])));
    rules.extend(reverse_path.then(|| spoofed(filter)));
    rules
}

fn to_pods(filter: &TunnelFilter) -> Vec<Rule> {
    filter.networks.iter().map(|network| Rule::new([destination(Op::Eq, *network), accept()])).collect()
}

/// Whose way back would not lead through the device that it came by. Peers may come by any link of the underlay, and
/// only what comes by another device than its own has to prove where it is from.
fn spoofed(filter: &TunnelFilter) -> Rule {
    refuse([in_name(Op::Ne, filter.underlay.as_str()), reverse_path(false)])
}

/// A datagram too short to have a VNI, such as the first piece of a fragmented one, counts as ours.
fn not_ours(port: &TunnelPort) -> Option<Rule> {
    let vnis: Vec<u32> = port.vnis.iter().copied().collect();
    (!vnis.is_empty()).then(|| Rule::new([vni_is_none_of(&vnis), accept()]))
}

fn refuse<const N: usize>(conditions: [Vec<Expr>; N]) -> Rule {
    Rule::new(conditions.into_iter().chain([counter(), drop()]))
}

fn peers(filter: &TunnelFilter, addresses: impl Iterator<Item = IpAddr>) -> Set {
    let set = Set::new(PEERS, &[KeyType::address(filter.family())]);
    Set {
        elements: addresses.map(|address| (Span::address(address), None)).collect::<BTreeMap<_, _>>(),
        ..set
    }
}

/// Has the table admit the addresses, too, that it admits as it was found in the kernel.
pub(super) fn keep_peers(table: &mut Table, found: &Table) {
    let Some(before) = found.set(PEERS) else { return };
    if let Some(set) = table.sets.iter_mut().find(|set| set.name == PEERS && set.key == before.key) {
        set.elements.extend(before.elements.iter().map(|(address, none)| (address.clone(), none.clone())));
    }
}

/// The sets by which rules are in force.
fn active(filter: &TunnelFilter) -> Vec<Set> {
    let ports = filter.ports.iter().map(|port| Span::port(port.number));
    let ports = Set::new(ACTIVE, &[KeyType::Port]).with_timeout(TIMEOUT).with(ports);
    let of_ipip = filter.ipip.iter().flat_map(ipip::active);
    (!filter.ports.is_empty()).then_some(ports).into_iter().chain(of_ipip).collect()
}

/// Keeps the filter in force for [`TIMEOUT`] from now on, without a moment in which it is not. `found` is the table as it
/// is in the kernel.
pub(super) fn renewal(filter: &TunnelFilter, found: &Table) -> Vec<Change<'static>> {
    renewed(filter, &found.id, |set, key| found.set(set).is_some_and(|set| set.elements.contains_key(key)))
}

/// As [`renewal`], where the table is known to be whole. The kernel refuses that where the filter is out of force already.
pub(super) fn renewal_of_whole(filter: &TunnelFilter, id: &TableId) -> Vec<Change<'static>> {
    renewed(filter, id, |_, _| true)
}

fn renewed(
    filter: &TunnelFilter,
    id: &TableId,
    is_there: impl Fn(&str, &Span) -> bool,
) -> Vec<Change<'static>> {
    let of_set = |wanted: Set| {
        let mut stale = wanted.clone();
        stale.elements.retain(|key, _| is_there(&wanted.name, key));
        let delete =
            (!stale.elements.is_empty()).then(|| Change::DeleteElements { table: id.clone(), set: stale });
        // An element that is there keeps its time when it is added once more.
        delete.into_iter().chain([Change::AddElements { table: id.clone(), set: wanted }])
    };
    active(filter).into_iter().flat_map(of_set).collect()
}

/// What turns the set of `before` into that of `filter`: one element for each peer that came or went.
pub(super) fn peer_changes(
    table: &TableId,
    before: &TunnelFilter,
    filter: &TunnelFilter,
) -> Vec<Change<'static>> {
    let (came, gone): (Vec<_>, Vec<_>) =
        filter.peers.changes(&before.peers).partition(|(_, _, now)| now.is_some());
    let set = |changed: Vec<Pair<'_, IpAddr, ()>>| {
        let set = peers(filter, changed.into_iter().map(|(address, ..)| *address));
        (!set.elements.is_empty()).then_some(set)
    };
    let add = set(came).map(|set| Change::AddElements { table: table.clone(), set });
    let delete = set(gone).map(|set| Change::DeleteElements { table: table.clone(), set });
    add.into_iter().chain(delete).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocated::bytes_of;

    fn filter(peers: &[&str]) -> TunnelFilter {
        TunnelFilter {
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            underlay: "eth0".parse().unwrap(),
            ports: vec![TunnelPort { number: 8472, vnis: [1].into(), check_sources: true }],
            ipip: None,
            peers: peers.iter().map(|text| (text.parse().unwrap(), ())).collect(),
            recalled: false,
        }
    }

    fn chains(filter: &TunnelFilter) -> Vec<(String, usize)> {
        let table = table(filter, TABLE, true).unwrap();
        table.chains.into_iter().map(|chain| (chain.name, chain.rules.len())).collect()
    }

    #[test]
    fn without_a_tunnel_there_is_no_table() {
        assert_eq!(table(&TunnelFilter { ports: Vec::new(), ..filter(&[]) }, TABLE, true), None);
    }

    #[test]
    fn sources_that_are_not_checked_have_no_input_chain_and_pods_are_kept_out_all_the_same() {
        let checked = filter(&[]);
        let names = ["forward-8472", "input-8472", "input", "forward"];
        assert!(chains(&checked).iter().map(|(name, _)| name.as_str()).eq(names));
        let ports = vec![TunnelPort { check_sources: false, ..checked.ports[0].clone() }];
        let unchecked = chains(&TunnelFilter { ports, ..checked });
        assert!(unchecked.iter().map(|(name, _)| name.as_str()).eq(["forward-8472", "forward"]));
    }

    #[test]
    fn ports_of_several_tunnels_are_one_where_they_are_the_same() {
        let port = |number, vni, check_sources| TunnelPort { number, vnis: [vni].into(), check_sources };
        let merged = TunnelPort::merged([port(8472, 1, true), port(4789, 1, true), port(8472, 7, false)]);
        assert_eq!(
            merged,
            [port(4789, 1, true), TunnelPort { number: 8472, vnis: [1, 7].into(), check_sources: false }]
        );
    }

    #[test]
    fn a_peer_costs_one_element() {
        let id = table(&filter(&[]), TABLE, true).unwrap().id;
        let (before, after) = (filter(&["192.0.2.2", "192.0.2.3"]), filter(&["192.0.2.3", "192.0.2.4"]));
        let changes = peer_changes(&id, &before, &after);
        let [Change::AddElements { set: new, .. }, Change::DeleteElements { set: stale, .. }] = &changes[..]
        else {
            panic!("{changes:?}")
        };
        let span = |text: &str| Span::address(text.parse().unwrap());
        assert!(
            new.elements.keys().eq([&span("192.0.2.4")]) && stale.elements.keys().eq([&span("192.0.2.2")])
        );
        assert!(peer_changes(&id, &after, &after).is_empty());
        let many = TunnelFilter {
            peers: (0..20_000)
                .map(|number| (IpAddr::from((number + (192u32 << 24)).to_be_bytes()), ()))
                .collect(),
            ..filter(&[])
        };
        let mut more = many.clone();
        more.peers.insert("198.51.100.1".parse().unwrap(), ());
        let (bytes, changes) = bytes_of(|| peer_changes(&id, &many, &more));
        assert!(changes.len() == 1 && bytes < 20_000, "{bytes} bytes for one of 20,000");
    }
}
