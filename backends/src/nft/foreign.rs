//! What concerns other people's tables: removing chains from them, and reading how they treat a packet.

use super::change::Change;
#[cfg(any(test, feature = "testing"))]
use super::model::{Chain, Policy};
use super::model::{Ruleset, TableId};

/// What it takes to remove these chains from a table of somebody else, with all rules that lead to them.
///
/// Those that are not there need nothing. Chains that only elements of a map lead to stay in use, and their
/// removal will be refused.
pub fn removal<'a>(found: &Ruleset, table: &TableId, chains: &[&str]) -> Vec<Change<'a>> {
    let Some(found) = found.table(table) else { return Vec::new() };
    let doomed = |name: &str| chains.contains(&name);
    let mut changes = Vec::new();
    for chain in found.chains.iter().filter(|chain| !doomed(&chain.name)) {
        let leading = chain.rules.iter().filter(|rule| rule.leads_to().is_some_and(doomed));
        changes.extend(leading.filter_map(|rule| {
            let (table, chain) = (table.clone(), chain.name.clone());
            rule.handle.map(|handle| Change::DeleteRule { table, chain, handle })
        }));
    }
    // Doomed chains may lead to each other, so all of them are emptied before the first one goes.
    let leaving = found.chains.iter().filter(|chain| doomed(&chain.name));
    for chain in leaving.clone() {
        changes.extend(chain.rules.iter().filter_map(|rule| rule.handle).map(|handle| {
            let (table, chain) = (table.clone(), chain.name.clone());
            Change::DeleteRule { table, chain, handle }
        }));
    }
    changes
        .extend(leaving.map(|chain| Change::DeleteChain { table: table.clone(), chain: chain.name.clone() }));
    changes
}

/// Whether packets may end in this base chain: by its policy, by a rule, or in a chain that it leads to.
///
/// Conditions are not evaluated: this says where to look, not what happens to a packet.
#[cfg(any(test, feature = "testing"))]
pub fn may_refuse(table: &super::Table, chain: &Chain) -> bool {
    let mut seen: Vec<&str> = Vec::new();
    let mut todo = vec![chain];
    while let Some(chain) = todo.pop() {
        if seen.contains(&chain.name.as_str()) {
            continue;
        }
        seen.push(&chain.name);
        let drops = chain.base.as_ref().is_some_and(|base| base.policy == Policy::Drop);
        if drops || chain.rules.iter().any(super::Rule::refuses) {
            return true;
        }
        todo.extend(chain.rules.iter().filter_map(|rule| table.chain(rule.leads_to()?)));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nft::matches::{accept, drop, goto, jump};
    use crate::nft::{Base, Hook, Rule, Table, TableFamily};

    fn table() -> Table {
        let numbered = |handle, rule: Rule| Rule { handle: Some(handle), ..rule };
        let mut base = Chain::base("FORWARD", Base::filter(Hook::Forward, 0));
        base.rules = vec![
            numbered(1, Rule::new([jump("A")])),
            numbered(2, Rule::new([accept()])),
            numbered(3, Rule::new([goto("B")])),
        ];
        let mut a = Chain::regular("A");
        a.rules = vec![numbered(4, Rule::new([jump("B")]))];
        let mut b = Chain::regular("B");
        b.rules = vec![numbered(5, Rule::new([accept()]))];
        Table { chains: vec![a, b, base], ..Table::new(TableId::new(TableFamily::Ip, "filter")) }
    }

    #[test]
    fn whatever_leads_to_a_chain_goes_before_it() {
        let found = Ruleset { tables: vec![table()] };
        let id = &found.tables[0].id;
        let words = |chains: &[&str]| -> Vec<String> {
            let changes = removal(&found, id, chains);
            let word = |change: &Change<'_>| match change {
                Change::DeleteRule { handle, .. } => handle.to_string(),
                Change::DeleteChain { chain, .. } => chain.clone(),
                other => panic!("{other:?}"),
            };
            changes.iter().map(word).collect()
        };
        assert_eq!(words(&["A", "B", "absent"]), ["1", "3", "4", "5", "A", "B"]);
        assert_eq!(words(&["B"]), ["4", "3", "5", "B"]);
        assert!(words(&["absent"]).is_empty());
        assert!(removal(&Ruleset::default(), id, &["A"]).is_empty());
    }

    #[test]
    fn a_refusal_is_found_behind_jumps_and_in_the_policy() {
        let refuses = |damage: fn(&mut Table)| {
            let mut table = table();
            damage(&mut table);
            may_refuse(&table, &table.chains[2])
        };
        assert!(!refuses(|_| {}));
        assert!(!refuses(|table| table.chains[1].rules.push(Rule::new([jump("A")]))));
        assert!(refuses(|table| table.chains[1].rules.push(Rule::new([drop()]))));
        assert!(refuses(|table| {
            let base = table.chains[2].base.as_mut();
            base.unwrap().policy = Policy::Drop;
        }));
    }
}
