//! The fast path as an nftables table with a flowtable; pure.
//!
//! ```text
//! table ip flannel-fast-path {
//!     flowtable pods { hook ingress priority 0; devices = { eth0, flannel.1, veth1, veth2 }; counter }
//!     chain forward {
//!         type filter hook forward priority filter + 10
//!         numgen inc mod 61 == 0 goto sample
//!     }
//!     chain sample {
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
//! This is the table that is armed ([`Phase`]). While it waits, its flowtable has no devices, `goto seen` stands in place of
//! `flow add @pods`, and one packet in 251 is looked at:
//!
//! ```text
//!     quota long { over 1 bytes }
//!     set seen { typeof ip saddr . ip daddr . th sport . th dport; flags dynamic,timeout; timeout 10s }
//!     chain seen {
//!         ip saddr . ip daddr . th sport . th dport @seen quota name "long"
//!         add @seen { ip saddr . ip daddr . th sport . th dport }
//!     }
//! ```
//!
//! The kernel notifies when the quota is used up.
//!
//! The chain comes after those of others, so what they drop is never added. Packets between pods of this node, which
//! `br_netfilter` shows to the hook as well, pass neither the external interface nor a tunnel and stay as they are.
//!
//! The kernel makes the flow's way back leave by the device that the packet came in by, also if the routes lead elsewhere. While two nodes
//! change their backend one after the other, that is the wrong one: the flow would send what it has to the default gateway. So a
//! packet that comes in adds its flow only if the route to its source does leave by that device.

use std::time::Duration;

use crate::nft::matches::{
    Field, TCP, UDP, ct_reply, ct_state_none_of, destination, goto, in_name, in_set, leave, offload, one_of,
    out_name, protocol, quota, remember, reverse_path, source,
};
use crate::nft::{
    Base, Chain, CtState, Expr, FAST_PATH_TABLE, Flowtable, Hook, KeyType, Op, Quota, Rule, Set, Table,
    TableId,
};
use crate::traffic::fast_path::{FastPath, Phase, Seen};
use subnet::Family;

/// The name of the table, in either family. Another agent of this host that has it makes ours end with the network.
pub(super) const TABLE: &str = FAST_PATH_TABLE;

const FLOWTABLE: &str = "pods";
const LONG: &str = "long";
const SAMPLE: &str = "sample";
const SEEN: &str = "seen";
const OFFLOAD: &str = "flows";

/// After the filters of others, which stand at 0 as a rule.
const PRIORITY: i32 = 10;

/// One packet in so many is looked at while it waits. A prime, so that it is now one direction of a connection and now the other.
const EVERY_WAITING: u32 = 251;

/// The same while it is armed, which adds the connection: those of a few packets, which would cost more than they gain, mostly never
/// are.
const EVERY_ARMED: u32 = 61;

/// A connection that is looked at twice in this time is long: it was there for more than [`EVERY_WAITING`] packets. A short one, which
/// is over before the next packet is looked at, is looked at but once, however many there are.
const MEMORY: Duration = Duration::from_secs(10);

/// Room for so many that were looked at once, which each reading of the table lists. On a node with more than 100,000 packets a
/// second not all have room, but a long one is looked at often.
const MEMORIES: u32 = 4096;

/// The table for `fast_path`; `None` where no device leads to other nodes.
pub(super) fn table(fast_path: &FastPath, name: &str, phase: Phase) -> Option<Table> {
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
        devices: devices.filter(|_| phase == Phase::Armed).collect(),
        counter: true,
    });
    let mut forward = Chain::base("forward", Base::filter(Hook::Forward, PRIORITY));
    let every = if phase == Phase::Armed { EVERY_ARMED } else { EVERY_WAITING };
    // All that most packets cost.
    forward.rules = vec![Rule::new([one_of(every), goto(SAMPLE)])];
    let mut sample = Chain::regular(SAMPLE);
    sample.rules = vec![
        Rule::new([ct_state_none_of(CtState::ESTABLISHED), leave()]),
        Rule::new([protocol(Op::Eq, TCP), goto(OFFLOAD)]),
        Rule::new([protocol(Op::Eq, UDP), goto(OFFLOAD)]),
    ];
    table.chains = vec![forward, sample];
    let action = match phase {
        Phase::Armed => offload(FLOWTABLE),
        Phase::Waiting => {
            wait_for_long_connections(&mut table, family);
            goto(SEEN)
        }
    };
    table.chains.push(flows(fast_path, &action));
    Some(table)
}

/// Adds what the kernel remembers connections by, and the quota that is used up by the second packet of one.
fn wait_for_long_connections(table: &mut Table, family: Family) {
    let fields =
        [Field::Source(family), Field::Destination(family), Field::SourcePort, Field::DestinationPort];
    let address = KeyType::address(family);
    let set = Set::new(SEEN, &[address, address, KeyType::Port, KeyType::Port]).dynamic();
    table.sets.push(set.with_timeout(MEMORY).with_size(MEMORIES));
    table.quotas.push(Quota::new(LONG, 1));
    let mut seen = Chain::regular(SEEN);
    seen.rules = vec![Rule::new([in_set(&fields, SEEN), quota(LONG)]), Rule::new([remember(&fields, SEEN)])];
    table.chains.push(seen);
}

/// The chain that does `action` with what passes a device between nodes.
fn flows(fast_path: &FastPath, action: &[Expr]) -> Chain {
    let mut chain = Chain::regular(OFFLOAD);
    if fast_path.requests_only {
        chain.rules.push(Rule::new([ct_reply(true), leave()]));
    }
    for device in &fast_path.outer {
        for network in &fast_path.networks {
            let device = device.as_str();
            let (to, from) = (out_name(Op::Eq, device), in_name(Op::Eq, device));
            chain.rules.push(Rule::new([to, source(Op::Eq, *network), action.to_vec()]));
            if fast_path.abilities.reverse_path {
                let parts = [from, destination(Op::Eq, *network), reverse_path(true), action.to_vec()];
                chain.rules.push(Rule::new(parts));
            }
        }
    }
    chain
}

/// What a table that was found says. `idle` is asked whether no connection is in the flowtable.
pub(super) fn seen(found: Option<&Table>, idle: impl FnOnce() -> bool) -> Seen {
    let Some(table) = found else { return Seen::Nothing };
    let armed = table.flowtables.iter().any(|flowtable| !flowtable.devices.is_empty());
    match armed {
        true if idle() => Seen::ArmedForNothing,
        true => Seen::Armed,
        false if table.quotas.iter().any(|quota| quota.depleted) => Seen::LongConnection,
        false => Seen::ShortConnections,
    }
}

/// The same with a device that every host has, so that a kernel that refuses it refuses what is in the table.
pub(super) fn smallest(fast_path: &FastPath, name: &str, phase: Phase) -> Option<Table> {
    let mut smallest = table(fast_path, name, phase)?;
    for flowtable in &mut smallest.flowtables {
        flowtable.devices = ["lo".to_owned()].into();
    }
    Some(smallest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::{Change, MetaKey, Refit, Ruleset, Transaction};
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

    fn armed(fast_path: &FastPath) -> Table {
        table(fast_path, TABLE, Phase::Armed).unwrap()
    }

    fn waiting(fast_path: &FastPath) -> Table {
        table(fast_path, TABLE, Phase::Waiting).unwrap()
    }

    /// As the kernel would tell it.
    fn told(table: &Table) -> Ruleset {
        let changes = [Change::Replace(table)];
        Ruleset::decode(Transaction::new(&changes, 1).unwrap().bytes())
    }

    #[test]
    fn a_flowtable_reads_as_it_was_written() {
        let table = armed(&fast_path(&["veth1", "veth2"]));
        for table in [&table, &waiting(&fast_path(&["veth1", "veth2"]))] {
            let found = told(table);
            assert_eq!(found.tables, std::slice::from_ref(table));
            assert!(matches!(Refit::of(table, &found), Refit::Right));
        }
        let devices: Vec<_> = table.flowtables[0].devices.iter().map(String::as_str).collect();
        assert_eq!(devices, ["eth0", "flannel.1", "veth1", "veth2"]);
    }

    #[test]
    fn a_pod_that_comes_or_goes_costs_one_device_and_leaves_the_flowtable() {
        let before = armed(&fast_path(&["veth1", "veth2"]));
        let after = armed(&fast_path(&["veth2", "veth3"]));
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
    fn while_it_waits_no_device_is_in_the_flowtable_and_long_connections_are_told_of_instead_of_added() {
        let (waits, is_armed) = (waiting(&fast_path(&["veth1"])), armed(&fast_path(&["veth1"])));
        assert!(
            waits.flowtables[0].devices.is_empty() && is_armed.quotas.is_empty() && is_armed.sets.is_empty()
        );
        let of = |table: &Table| {
            let rules = table.chain(OFFLOAD).unwrap().rules.clone();
            rules.into_iter().map(|mut rule| (rule.exprs.pop().unwrap(), rule.exprs)).collect::<Vec<_>>()
        };
        for ((tells, same), (adds, conditions)) in of(&waits).into_iter().zip(of(&is_armed)) {
            assert_eq!((vec![tells], vec![adds]), (goto(SEEN), offload(FLOWTABLE)));
            assert_eq!(same, conditions);
        }
        // A pod that comes or goes is nothing to it.
        assert_eq!(waits, waiting(&fast_path(&["veth2", "veth3"])));
        // Nor is what the kernel remembers.
        let mut found = told(&waits);
        let key = crate::nft::Span::port(1);
        found.tables[0].sets[0].elements.insert(key, None);
        assert!(matches!(Refit::of(&waits, &found), Refit::Right));
    }

    #[test]
    fn what_was_found_says_in_which_phase_it_is_and_what_was_seen() {
        let never = || -> bool { panic!("asked although no device is in the flowtable") };
        assert_eq!(seen(None, never), Seen::Nothing);
        let mut waits = waiting(&fast_path(&["veth1"]));
        assert_eq!(seen(Some(&waits), never), Seen::ShortConnections);
        waits.quotas[0].depleted = true;
        assert_eq!(seen(Some(&waits), never), Seen::LongConnection);
        assert!(matches!(Refit::of(&waiting(&fast_path(&[])), &told(&waits)), Refit::Right));
        let armed = armed(&fast_path(&["veth1"]));
        assert_eq!(
            [true, false].map(|idle| seen(Some(&armed), || idle)),
            [Seen::ArmedForNothing, Seen::Armed]
        );
    }

    #[test]
    fn each_device_between_nodes_and_each_network_has_a_rule_in_both_directions() {
        let rules = |fast_path: &FastPath| {
            let table = armed(fast_path);
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
            let abilities = Abilities { reverse_path, ..Abilities::default() };
            armed(&FastPath { abilities, ..fast_path(&[]) }).chain(OFFLOAD).unwrap().clone()
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
        let fast_path = FastPath { outer: [].into(), ..fast_path(&["veth1"]) };
        assert_eq!(table(&fast_path, TABLE, Phase::Armed), None);
    }
}
