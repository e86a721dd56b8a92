//! Changes to the ruleset, and the words for them.

use super::model::{Rule, Table, TableId};
use super::set::Set;

/// One part of a transaction.
#[derive(Clone, Debug)]
pub enum Change<'a> {
    /// The table is there, and holds exactly this, whether or not it existed.
    Replace(&'a Table),
    /// The table is gone, whether or not it existed.
    DeleteTable(TableId),
    /// A chain of anybody's table is gone, with its rules. It must be there, and nothing may lead to it.
    DeleteChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: String,
    },
    /// A rule of anybody's chain is gone. It must be there.
    DeleteRule {
        /// The table.
        table: TableId,
        /// The chain.
        chain: String,
        /// The rule's number, see [`Rule::handle`].
        handle: u64,
    },
    /// The elements of `set` are in the set of its name, besides those that already are.
    AddElements {
        /// The table.
        table: TableId,
        /// Name and type of the set, and the elements to add.
        set: Set,
    },
    /// The elements of `set` are no longer in the set of its name. They must be there.
    DeleteElements {
        /// The table.
        table: TableId,
        /// Name and type of the set, and the elements to delete.
        set: Set,
    },
    /// A rule is added to anybody's chain.
    AddRule {
        /// The table.
        table: TableId,
        /// The chain.
        chain: String,
        /// The rule.
        rule: Rule,
        /// Where.
        place: Place,
    },
}

/// Where in a chain a rule is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before all others.
    First,
    /// Behind all others.
    Last,
    /// Right before the rule with this number, see [`Rule::handle`].
    Before(u64),
}

/// What a message is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) change: usize,
    pub(super) part: Part,
}

/// What of a change a message is about, by positions.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Whole,
    Chain(usize),
    Set(usize),
    /// The first and the last of several elements.
    Elements(usize, usize, usize),
    Rule(usize, usize),
}

impl Origin {
    pub(super) fn words(self, changes: &[Change<'_>]) -> String {
        match (&changes[self.change], self.part) {
            (Change::Replace(table), part) => {
                let id = &table.id;
                match part {
                    Part::Whole => format!("table {id}"),
                    Part::Chain(chain) => format!("chain {} in table {id}", table.chains[chain].name),
                    Part::Set(set) => format!("set {} in table {id}", table.sets[set].name),
                    Part::Elements(set, first, last) if first == last => {
                        format!("element {} of set {} in table {id}", first + 1, table.sets[set].name)
                    }
                    Part::Elements(set, first, last) => {
                        let name = &table.sets[set].name;
                        format!(
                            "one of the elements {} to {} of set {name} in table {id}",
                            first + 1,
                            last + 1
                        )
                    }
                    Part::Rule(chain, rule) => {
                        format!("rule {} of chain {} in table {id}", rule + 1, table.chains[chain].name)
                    }
                }
            }
            (Change::DeleteTable(id), _) => format!("deletion of table {id}"),
            (Change::DeleteChain { table, chain }, _) => {
                format!("deletion of chain {chain} in table {table}")
            }
            (Change::DeleteRule { table, chain, handle }, _) => {
                format!("deletion of the rule with handle {handle} of chain {chain} in table {table}")
            }
            (Change::AddElements { table, set }, _) => {
                format!("new elements of set {} in table {table}", set.name)
            }
            (Change::DeleteElements { table, set }, _) => {
                format!("deletion of elements of set {} in table {table}", set.name)
            }
            (Change::AddRule { table, chain, .. }, _) => {
                format!("new rule of chain {chain} in table {table}")
            }
        }
    }
}
