//! Whether the tables in the kernel are the desired ones.

use std::collections::{BTreeMap, BTreeSet};

use super::change::Change;
use super::expr::Expr;
use super::model::{Chain, Flowtable, Rule, Ruleset, Table};
use super::quota::Quota;
use super::set::{Data, Set, Span, flags};

/// The first difference in words; `None` when every wanted table is there and holds exactly what it should.
///
/// Other tables don't matter here. What counters counted and what the kernel numbered makes no
/// difference, nor do comments on tables, chains and sets, which old kernels forget.
pub fn differs(wanted: &[Table], found: &Ruleset) -> Option<String> {
    wanted.iter().find_map(|table| match found.table(&table.id) {
        Some(found) => table_differs(table, found),
        None => Some(format!("there is no table {}", table.id)),
    })
}

/// The changes that turn a table of the kernel into the desired one.
#[derive(Debug)]
pub enum Refit {
    /// Nothing has to change.
    Right,
    /// Only elements of sets are missing or too many. The difference in words, and the changes.
    Elements(String, Vec<Change<'static>>),
    /// Anything else: the table has to be replaced. The first difference in words.
    Replace(String),
}

impl Refit {
    /// Compares one table. Like [`differs`], but a difference in the elements of sets alone costs no more than
    /// these elements.
    pub fn of(wanted: &Table, found: &Ruleset) -> Self {
        let Some(difference) = differs(std::slice::from_ref(wanted), found) else { return Self::Right };
        let Some(found) = found.table(&wanted.id) else { return Self::Replace(difference) };
        let mut changes = Vec::new();
        for have in &found.sets {
            let Some(want) = wanted.set(&have.name).filter(|want| may_change(want)) else { continue };
            changes.extend(element_changes(wanted, want, &have.elements));
        }
        // Without the elements, which may be thousands: memory that is taken for a moment stays with the process.
        let mut rest = without_changing_elements(found, wanted);
        for flowtable in &mut rest.flowtables {
            let Some(want) = wanted.flowtables.iter().find(|want| want.name == flowtable.name) else {
                continue;
            };
            changes.extend(device_changes(wanted, want, &flowtable.devices));
            flowtable.devices.clone_from(&want.devices);
        }
        match table_differs(&without_changing_elements(wanted, wanted), &rest) {
            None => Self::Elements(difference, changes),
            Some(_) => Self::Replace(difference),
        }
    }
}

/// Whether elements of this set can come and go one by one.
fn may_change(set: &Set) -> bool {
    set.data.is_none()
        && set.flags & (flags::CONSTANT | flags::INTERVAL | flags::ANONYMOUS | flags::DYNAMIC) == 0
}

/// A table without the elements that can come and go one by one, of sets that are in `wanted`.
fn without_changing_elements(table: &Table, wanted: &Table) -> Table {
    let changes = |set: &&Set| wanted.set(&set.name).is_some_and(may_change);
    let sets = table.sets.iter().map(|set| match Some(set).filter(changes) {
        Some(set) => set.without_elements(),
        None => set.clone(),
    });
    Table {
        id: table.id.clone(),
        comment: table.comment.clone(),
        dormant: table.dormant,
        sets: sets.collect(),
        quotas: table.quotas.clone(),
        flowtables: table.flowtables.clone(),
        chains: table.chains.clone(),
    }
}

fn element_changes(
    table: &Table,
    wanted: &Set,
    found: &BTreeMap<Span, Option<Data>>,
) -> impl Iterator<Item = Change<'static>> {
    let difference = |all: &BTreeMap<Span, Option<Data>>, but: &BTreeMap<Span, Option<Data>>| {
        let elements = all.iter().filter(|(span, _)| !but.contains_key(span));
        let elements = elements.map(|(span, data)| (span.clone(), data.clone())).collect();
        Set { elements, ..wanted.without_elements() }
    };
    let (new, stale) = (difference(&wanted.elements, found), difference(found, &wanted.elements));
    let add = (!new.elements.is_empty()).then(|| Change::AddElements { table: table.id.clone(), set: new });
    let delete =
        (!stale.elements.is_empty()).then(|| Change::DeleteElements { table: table.id.clone(), set: stale });
    add.into_iter().chain(delete)
}

/// Devices come before others go, so that a flow loses none that it needs.
fn device_changes(
    table: &Table,
    wanted: &Flowtable,
    found: &BTreeSet<String>,
) -> impl Iterator<Item = Change<'static>> {
    let part =
        |devices: BTreeSet<String>| (!devices.is_empty()).then(|| Flowtable { devices, ..wanted.clone() });
    let new = part(wanted.devices.difference(found).cloned().collect());
    let stale = part(found.difference(&wanted.devices).cloned().collect());
    let add = new.map(|flowtable| Change::AddFlowtable { table: table.id.clone(), flowtable });
    let delete = stale.map(|flowtable| Change::DeleteDevices { table: table.id.clone(), flowtable });
    add.into_iter().chain(delete)
}

fn table_differs(wanted: &Table, found: &Table) -> Option<String> {
    let id = &wanted.id;
    if wanted.dormant != found.dormant {
        return Some(format!("table {id} is {}", if found.dormant { "dormant" } else { "not dormant" }));
    }
    each(&wanted.sets, &found.sets, |set| &set.name, set_differs)
        .map(|what| format!("set {what} in table {id}"))
        .or_else(|| {
            let differs = |want: &Quota, have: &Quota| {
                (want.bytes != have.bytes).then(|| "has another size".to_owned())
            };
            each(&wanted.quotas, &found.quotas, |quota| &quota.name, differs)
                .map(|what| format!("quota {what} in table {id}"))
        })
        .or_else(|| {
            each(&wanted.flowtables, &found.flowtables, |flowtable| &flowtable.name, flowtable_differs)
                .map(|what| format!("flowtable {what} in table {id}"))
        })
        .or_else(|| {
            each(&wanted.chains, &found.chains, |chain| &chain.name, chain_differs)
                .map(|what| format!("chain {what} in table {id}"))
        })
}

/// Compares two lists by name; the order of objects with names means nothing.
fn each<T>(
    wanted: &[T],
    found: &[T],
    name: impl Fn(&T) -> &String,
    differs: impl Fn(&T, &T) -> Option<String>,
) -> Option<String> {
    let mut strangers: BTreeMap<&String, &T> = found.iter().map(|one| (name(one), one)).collect();
    for want in wanted {
        let name = name(want);
        match strangers.remove(name) {
            Some(have) => {
                if let Some(what) = differs(want, have) {
                    return Some(format!("{name} {what}"));
                }
            }
            None => return Some(format!("{name} is missing")),
        }
    }
    strangers.keys().next().map(|name| format!("{name} should not be there"))
}

fn set_differs(wanted: &Set, found: &Set) -> Option<String> {
    if (wanted.flags, &wanted.key, wanted.data) != (found.flags, &found.key, found.data) {
        return Some("is of another type".to_owned());
    }
    // What packets have added is as it is.
    if wanted.elements == found.elements || wanted.flags & flags::DYNAMIC != 0 {
        return None;
    }
    let missing = wanted.elements.iter().filter(|(key, data)| found.elements.get(key) != Some(data)).count();
    let strange = found.elements.iter().filter(|(key, data)| wanted.elements.get(key) != Some(data)).count();
    Some(format!("lacks {missing} elements and has {strange} that should not be there"))
}

fn flowtable_differs(wanted: &Flowtable, found: &Flowtable) -> Option<String> {
    if (wanted.priority, wanted.counter) != (found.priority, found.counter) {
        return Some("has another priority or other flags".to_owned());
    }
    let (missing, strange) =
        (wanted.devices.difference(&found.devices), found.devices.difference(&wanted.devices));
    let words = |text: &str, devices: Vec<&str>| {
        (!devices.is_empty()).then(|| format!("{text} {}", devices.join(", ")))
    };
    let missing = words("lacks", missing.map(String::as_str).collect());
    let strange = words("should not have", strange.map(String::as_str).collect());
    let all: Vec<String> = missing.into_iter().chain(strange).collect();
    (!all.is_empty()).then(|| all.join(" and "))
}

fn chain_differs(wanted: &Chain, found: &Chain) -> Option<String> {
    if wanted.base != found.base {
        return Some("has another hook, priority or policy".to_owned());
    }
    let pairs = wanted.rules.iter().zip(&found.rules);
    if let Some(number) = pairs.enumerate().find(|(_, (want, have))| !same(want, have)).map(|(i, _)| i + 1) {
        return Some(format!("has another rule {number}"));
    }
    let (want, have) = (wanted.rules.len(), found.rules.len());
    (want != have).then(|| format!("has {have} rules where {want} should be"))
}

fn same(wanted: &Rule, found: &Rule) -> bool {
    wanted.comment == found.comment
        && wanted.exprs.len() == found.exprs.len()
        && wanted.exprs.iter().zip(&found.exprs).all(|pair| match pair {
            (Expr::Counter { .. }, Expr::Counter { .. }) => true,
            (want, have) => want == have,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocated::bytes_of;
    use crate::nft::expr::Op;
    use crate::nft::matches::{accept, counter, drop, source};
    use crate::nft::model::{Base, Hook, Policy, TableFamily, TableId};
    use crate::nft::set::{KeyType, Span};

    fn table() -> Table {
        let mut table = Table::new(TableId::new(TableFamily::Ip, "t"));
        table.comment = Some("of no weight".to_owned());
        let net = "10.0.0.0/8".parse().unwrap();
        table.sets.push(Set::new("s", &[KeyType::Port]).with([Span::port(80), Span::port(443)]));
        let mut chain = Chain::base("c", Base::filter(Hook::Forward, 0));
        chain.rules.push(Rule::new([source(Op::Eq, net), counter(), accept()]));
        chain.rules.push(Rule::new([drop()]).with_comment("the rest"));
        table.chains.push(chain);
        table.chains.push(Chain::regular("d"));
        table
    }

    fn difference(damage: impl FnOnce(&mut Table)) -> Option<String> {
        let mut found = table();
        damage(&mut found);
        differs(
            &[table()],
            &Ruleset { tables: vec![Table::new(TableId::new(TableFamily::Inet, "t")), found] },
        )
    }

    #[test]
    fn the_kernels_numbers_and_order_make_no_difference() {
        let found = difference(|table| {
            table.comment = None;
            table.chains.reverse();
            table.chains[1].rules[0].handle = Some(7);
            for expr in &mut table.chains[1].rules[0].exprs {
                if let Expr::Counter { packets, .. } = expr {
                    *packets = 9;
                }
            }
        });
        assert_eq!(found, None);
    }

    #[test]
    fn the_first_difference_is_named() {
        let is = |damage: fn(&mut Table), words: &str| assert_eq!(difference(damage).as_deref(), Some(words));
        is(|t| t.id.name = "u".to_owned(), "there is no table ip t");
        is(|t| t.dormant = true, "table ip t is dormant");
        is(|t| drop_first(&mut t.chains), "chain c is missing in table ip t");
        is(|t| t.chains.push(Chain::regular("e")), "chain e should not be there in table ip t");
        is(|t| t.chains[0].rules.swap(0, 1), "chain c has another rule 1 in table ip t");
        is(|t| t.chains[0].rules[1].comment = None, "chain c has another rule 2 in table ip t");
        is(|t| drop_first(&mut t.chains[0].rules), "chain c has another rule 1 in table ip t");
        is(|t| t.chains[0].rules.truncate(1), "chain c has 1 rules where 2 should be in table ip t");
        is(
            |t| t.chains[0].base.as_mut().unwrap().policy = Policy::Drop,
            "chain c has another hook, priority or policy in table ip t",
        );
        is(
            |t| {
                t.sets[0] =
                    Set::new("s", &[KeyType::Port]).with([Span::port(80), Span::port(81), Span::port(82)])
            },
            "set s lacks 1 elements and has 2 that should not be there in table ip t",
        );
        is(|t| t.sets[0] = Set::new("s", &[KeyType::Mark]), "set s is of another type in table ip t");
    }

    #[test]
    fn elements_alone_cost_no_more_than_themselves() {
        let refit = |damage: fn(&mut Table)| {
            let mut found = table();
            damage(&mut found);
            Refit::of(&table(), &Ruleset { tables: vec![found] })
        };
        assert!(matches!(refit(|_| {}), Refit::Right));
        let one_missing_and_one_strange = |t: &mut Table| {
            let set = Set::new("s", &[KeyType::Port]);
            t.sets[0] = set.with([Span::port(80), Span::port(81)]);
        };
        let Refit::Elements(words, changes) = refit(one_missing_and_one_strange) else { panic!() };
        assert_eq!(words, "set s lacks 1 elements and has 1 that should not be there in table ip t");
        let [Change::AddElements { set: new, .. }, Change::DeleteElements { set: stale, .. }] = &changes[..]
        else {
            panic!("{changes:?}")
        };
        assert!(new.elements.keys().eq([&Span::port(443)]) && stale.elements.keys().eq([&Span::port(81)]));
        let replaced = |damage| matches!(refit(damage), Refit::Replace(_));
        assert!(replaced(|t| t.sets[0] = Set::new("s", &[KeyType::Mark])));
        assert!(replaced(|t| t.chains[0].rules.truncate(1)));
        assert!(replaced(|t| t.id.name = "u".to_owned()));
    }

    #[test]
    fn one_element_among_twenty_thousand_is_found_without_a_copy_of_the_others() {
        let table = |ports: std::ops::Range<u16>| {
            let set = Set::new("s", &[KeyType::Port]).with(ports.map(Span::port));
            Table { sets: vec![set], ..table() }
        };
        let (wanted, found) = (table(0..20_000), Ruleset { tables: vec![table(1..20_000)] });
        let (bytes, refit) = bytes_of(|| Refit::of(&wanted, &found));
        assert!(matches!(refit, Refit::Elements(_, changes) if changes.len() == 1));
        assert!(bytes < 20_000, "{bytes} bytes");
    }

    fn drop_first<T>(list: &mut Vec<T>) {
        list.remove(0);
    }
}
