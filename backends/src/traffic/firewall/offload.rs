//! The fast path as an nftables table with a flowtable; pure.
//!
//! ```text
//! table ip flannel-fast-path {
//!     flowtable pods { hook ingress priority 0; devices = { eth0, flannel.1, veth1, veth2 }; counter }
//!     chain forward {
//!         type filter hook forward priority filter + 10
//!         meta random & 63 != 0 return
//!         ct state & established == 0 return
//!         meta l4proto tcp goto flows
//!         meta l4proto udp goto flows
//!     }
//!     chain flows {
//!         oifname "flannel.1" ip saddr 10.244.0.0/16 flow add @pods
//!         iifname "flannel.1" ip daddr 10.244.0.0/16 fib saddr . iif oif exists flow add @pods
//!         …
//!     }
//! }
//! ```
//!
//! The chain comes after those of others, so what they drop is never added. Packets between pods of this node, which
//! `br_netfilter` shows to the hook as well, pass neither the external interface nor a tunnel and stay as they are.
//!
//! The kernel makes the flow's way back leave by the device that the packet came in by, whatever the routes say. While two nodes
//! change their backend one after the other, that is the wrong one: the flow would send what it has to the default gateway. So a
//! packet that comes in adds its flow only if the route to its source does leave by that device.

use crate::nft::matches::{
    TCP, UDP, ct_reply, ct_state_none_of, destination, goto, in_name, leave, offload, one_in, out_name,
    protocol, reverse_path, source,
};
use crate::nft::{Base, Chain, CtState, FAST_PATH_TABLE, Flowtable, Hook, Op, Rule, Table, TableId};
use crate::traffic::fast_path::FastPath;

/// The name of the table, in either family. Another agent of this host that has it makes ours end with the network.
pub(super) const TABLE: &str = FAST_PATH_TABLE;

const FLOWTABLE: &str = "pods";
const OFFLOAD: &str = "flows";

/// After the filters of others, which stand at 0 as a rule.
const PRIORITY: i32 = 10;

/// One packet in `2^SAMPLE_BITS` of an established connection adds it: those of a few packets, which would cost more than they
/// gain, mostly never are.
const SAMPLE_BITS: u32 = 6;

/// The table for `fast_path`; `None` where no device leads to other nodes.
pub(super) fn table(fast_path: &FastPath, name: &str) -> Option<Table> {
    let family = fast_path.family()?;
    if fast_path.outer.is_empty() {
        return None;
    }
    let mut table = Table::new(TableId::new(family, name));
    table.comment = Some("established flows of pods skip rules and routing".to_owned());
    let devices = fast_path.outer.union(&fast_path.pods).map(|device| device.as_str().to_owned());
    table.flowtables.push(Flowtable {
        name: FLOWTABLE.to_owned(),
        priority: 0,
        devices: devices.collect(),
        counter: true,
    });
    let mut forward = Chain::base("forward", Base::filter(Hook::Forward, PRIORITY));
    forward.rules = vec![
        // First, so that it is all that most packets cost.
        Rule::new([one_in(Op::Ne, SAMPLE_BITS), leave()]),
        Rule::new([ct_state_none_of(CtState::ESTABLISHED), leave()]),
        Rule::new([protocol(Op::Eq, TCP), goto(OFFLOAD)]),
        Rule::new([protocol(Op::Eq, UDP), goto(OFFLOAD)]),
    ];
    let mut chain = Chain::regular(OFFLOAD);
    if fast_path.requests_only {
        chain.rules.push(Rule::new([ct_reply(true), leave()]));
    }
    for device in &fast_path.outer {
        for network in &fast_path.networks {
            let device = device.as_str();
            let (to, from) = (out_name(Op::Eq, device), in_name(Op::Eq, device));
            chain.rules.push(Rule::new([to, source(Op::Eq, *network), offload(FLOWTABLE)]));
            if fast_path.abilities.reverse_path {
                let parts = [from, destination(Op::Eq, *network), reverse_path(true), offload(FLOWTABLE)];
                chain.rules.push(Rule::new(parts));
            }
        }
    }
    table.chains = vec![forward, chain];
    Some(table)
}

/// The same with a device that every host has, so that a kernel that refuses it refuses what is in the table.
pub(super) fn smallest(fast_path: &FastPath, name: &str) -> Option<Table> {
    let mut smallest = table(fast_path, name)?;
    for flowtable in &mut smallest.flowtables {
        flowtable.devices = ["lo".to_owned()].into();
    }
    Some(smallest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::{Change, Expr, MetaKey, Refit, Ruleset, Transaction};
    use crate::traffic::fast_path::Abilities;

    fn fast_path(pods: &[&str]) -> FastPath {
        let names = |all: &[&str]| all.iter().map(|name| name.parse().unwrap()).collect();
        FastPath {
            networks: vec!["10.244.0.0/16".parse().unwrap(), "10.99.0.0/16".parse().unwrap()],
            outer: names(&["eth0", "flannel.1"]),
            pods: names(pods),
            requests_only: false,
            abilities: Abilities::default(),
        }
    }

    /// As the kernel would tell it.
    fn told(table: &Table) -> Ruleset {
        let changes = [Change::Replace(table)];
        Ruleset::decode(Transaction::new(&changes, 1).unwrap().bytes())
    }

    #[test]
    fn a_flowtable_reads_as_it_was_written() {
        let table = table(&fast_path(&["veth1", "veth2"]), TABLE).unwrap();
        let found = told(&table);
        assert_eq!(found.tables, std::slice::from_ref(&table));
        assert!(matches!(Refit::of(&table, &found), Refit::Right));
        let devices: Vec<_> = table.flowtables[0].devices.iter().map(String::as_str).collect();
        assert_eq!(devices, ["eth0", "flannel.1", "veth1", "veth2"]);
    }

    #[test]
    fn a_pod_that_comes_or_goes_costs_one_device_and_leaves_the_flowtable() {
        let before = table(&fast_path(&["veth1", "veth2"]), TABLE).unwrap();
        let after = table(&fast_path(&["veth2", "veth3"]), TABLE).unwrap();
        let Refit::Elements(words, changes) = Refit::of(&after, &told(&before)) else { panic!("replaced") };
        let [Change::AddFlowtable { flowtable: new, .. }, Change::DeleteDevices { flowtable: stale, .. }] =
            &changes[..]
        else {
            panic!("{changes:?}")
        };
        assert_eq!((&new.devices, &stale.devices), (&["veth3".into()].into(), &["veth1".into()].into()));
        assert!(words.contains("lacks veth3 and should not have veth1"), "{words}");
        let mut other = before.clone();
        other.flowtables[0].counter = false;
        assert!(matches!(Refit::of(&before, &told(&other)), Refit::Replace(_)));
        other.flowtables.clear();
        assert!(matches!(Refit::of(&before, &told(&other)), Refit::Replace(_)));
    }

    #[test]
    fn each_device_between_nodes_and_each_network_has_a_rule_in_both_directions() {
        let rules = |fast_path: &FastPath| {
            let table = table(fast_path, TABLE).unwrap();
            let rules = table.chain(OFFLOAD).unwrap().rules.clone();
            let adding = rules
                .iter()
                .filter(|rule| rule.exprs.iter().any(|expr| matches!(expr, Expr::Offload { .. })));
            (adding.count(), rules.len())
        };
        assert_eq!(rules(&fast_path(&[])), (8, 8));
        // With policies, packets of servers add nothing: they may pass without having been judged.
        assert_eq!(rules(&FastPath { requests_only: true, ..fast_path(&[]) }), (8, 9));
    }

    #[test]
    fn what_comes_in_adds_a_flow_only_if_the_way_back_leaves_by_the_same_device() {
        let of = |reverse_path| {
            let abilities = Abilities { reverse_path };
            table(&FastPath { abilities, ..fast_path(&[]) }, TABLE).unwrap().chain(OFFLOAD).unwrap().clone()
        };
        let loads = |rule: &Rule, key| {
            rule.exprs.iter().any(|expr| matches!(expr, Expr::Meta { key: found, .. } if *found == key))
        };
        for rule in of(true).rules {
            let checked = rule.exprs.iter().any(|expr| matches!(expr, Expr::ReversePath { .. }));
            assert_eq!(checked, loads(&rule, MetaKey::InName), "{rule:?}");
        }
        // A kernel that can't look takes only what goes out.
        let rules = of(false).rules;
        assert_eq!(rules.len(), 4);
        assert!(rules.iter().all(|rule| loads(rule, MetaKey::OutName)));
    }

    #[test]
    fn without_a_device_between_nodes_there_is_no_table() {
        assert_eq!(table(&FastPath { outer: [].into(), ..fast_path(&["veth1"]) }, TABLE), None);
    }
}
