//! Changes to the ruleset, and the words for them.

use super::model::{Chain, Flowtable, Rule, Table, TableId};
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
    /// A table is there; what it holds stays.
    AddTable(TableId),
    /// A table is there that no other program may change, and that the kernel removes with this socket (Linux 5.12).
    AddOwnedTable(TableId),
    /// A chain is there, and these rules follow those that it has.
    AddChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: &'a Chain,
    },
    /// A chain is there. The rules of the value are left for [`AddRules`](Self::AddRules).
    AddBareChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: &'a Chain,
    },
    /// These rules follow those that a chain has. It must be there.
    AddRules {
        /// The table.
        table: TableId,
        /// The chain.
        chain: &'a Chain,
    },
    /// A chain has no rules any more. It must be there.
    FlushChain {
        /// The table.
        table: TableId,
        /// The chain.
        chain: String,
    },
    /// A set or map is there, with these elements besides those that it has.
    AddSet {
        /// The table.
        table: TableId,
        /// The set.
        set: &'a Set,
    },
    /// A set or map is gone. It must be there, and no rule may use it.
    DeleteSet {
        /// The table.
        table: TableId,
        /// The set.
        set: String,
    },
    /// A flowtable is there, with these devices besides those that it has. Its flows stay.
    AddFlowtable {
        /// The table.
        table: TableId,
        /// The flowtable.
        flowtable: Flowtable,
    },
    /// The devices of `flowtable` are no longer in the flowtable of its name. They must be there.
    DeleteDevices {
        /// The table.
        table: TableId,
        /// Name and hook of the flowtable, and the devices to take out of it.
        flowtable: Flowtable,
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
    /// These single keys, one after another, are in the set of this name, besides those that already are: as
    /// [`AddElements`](Self::AddElements), for sets of so many keys that an element each would take its time.
    AddKeys {
        /// The table.
        table: TableId,
        /// Name and type of the set.
        set: &'a Set,
        /// The keys, each as long as the set's type says.
        keys: &'a [u8],
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
    Flowtable(usize),
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
                    Part::Set(set) | Part::Elements(set, ..) => words_of_set("", &table.sets[set], id, part),
                    Part::Flowtable(flowtable) => {
                        format!("flowtable {} in table {id}", table.flowtables[flowtable].name)
                    }
                    Part::Rule(chain, rule) => {
                        format!("rule {} of chain {} in table {id}", rule + 1, table.chains[chain].name)
                    }
                }
            }
            (Change::DeleteTable(id), _) => format!("deletion of table {id}"),
            (Change::AddTable(id) | Change::AddOwnedTable(id), _) => format!("table {id}"),
            (Change::AddChain { table, chain } | Change::AddRules { table, chain }, Part::Rule(_, rule)) => {
                format!("rule {} of chain {} in table {table}", rule + 1, chain.name)
            }
            (
                Change::AddChain { table, chain }
                | Change::AddBareChain { table, chain }
                | Change::AddRules { table, chain },
                _,
            ) => format!("chain {} in table {table}", chain.name),
            (Change::FlushChain { table, chain }, _) => {
                format!("deletion of the rules of chain {chain} in table {table}")
            }
            (Change::AddSet { table, set }, part) => words_of_set("", set, table, part),
            (Change::DeleteSet { table, set }, _) => format!("deletion of set {set} in table {table}"),
            (Change::AddFlowtable { table, flowtable }, _) => {
                format!("flowtable {} in table {table}", flowtable.name)
            }
            (Change::DeleteDevices { table, flowtable }, _) => {
                format!("deletion of devices of flowtable {} in table {table}", flowtable.name)
            }
            (Change::AddElements { table, set }, part) => words_of_set("", set, table, part),
            (Change::AddKeys { table, set, .. }, part) => words_of_set("", set, table, part),
            (Change::DeleteElements { table, set }, part) => words_of_set("deletion of ", set, table, part),
            (Change::DeleteChain { table, chain }, _) => {
                format!("deletion of chain {chain} in table {table}")
            }
            (Change::DeleteRule { table, chain, handle }, _) => {
                format!("deletion of the rule with handle {handle} of chain {chain} in table {table}")
            }
            (Change::AddRule { table, chain, .. }, _) => {
                format!("new rule of chain {chain} in table {table}")
            }
        }
    }
}

fn words_of_set(action: &str, set: &Set, table: &TableId, part: Part) -> String {
    let name = &set.name;
    match part {
        Part::Elements(_, first, last) if first == last => {
            format!("{action}element {} of set {name} in table {table}", first + 1)
        }
        Part::Elements(_, first, last) => {
            format!(
                "{action}one of the elements {} to {} of set {name} in table {table}",
                first + 1,
                last + 1
            )
        }
        _ => format!("set {name} in table {table}"),
    }
}
