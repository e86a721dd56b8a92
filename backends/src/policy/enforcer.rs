//! The tables in the kernel: read, changed in one transaction each, removed. Only the first one is made in two.

use std::io;
use std::panic::resume_unwind;
use std::thread;
use std::time::Instant;

use subnet::Family;

use super::conntrack::Conntrack;
use super::engine::{Engine, Plan, TableStep};
use super::generation::FORWARD;
use super::image::Edit;
use super::layout::{empty_table, filter_table};
use super::steer::{Steering, bridge_table, redirect_table};
use crate::nft::{Change, Nft, NftError, Table, TableId, differs, fast_path_tables};

/// Makes the kernel's tables be as an [`Engine`] says.
pub struct Enforcer {
    nft: Nft,
    conntrack: Conntrack,
    /// What policies say, and what is known of the cluster.
    pub engine: Engine,
    /// There may be a fast path, whose flows no chain sees: it goes whenever connections have to be judged once more.
    pub fast_path: bool,
}

/// What a run of [`Enforcer::converge`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converged {
    /// How many objects and sets of elements were changed.
    pub changes: usize,
    /// Whether the table that was there had to be made anew, or put back.
    pub table: TableStep,
    /// When to run again though nothing changes.
    pub again: Option<Instant>,
}

/// The tables that are ours.
pub fn own_tables() -> [TableId; 4] {
    [filter_table(), bridge_table(), redirect_table(Family::V4), redirect_table(Family::V6)]
}

impl Enforcer {
    /// Opens a conversation with the kernel in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`NftError`] when no netlink socket can be had.
    pub fn open(engine: Engine) -> Result<Self, NftError> {
        let failed = |source| NftError::Netlink { what: "opening a netlink socket for connections", source };
        Ok(Self {
            nft: Nft::open()?,
            conntrack: Conntrack::open().map_err(failed)?,
            engine,
            fast_path: false,
        })
    }

    /// The number by which a listener knows changes made through this value.
    pub fn port(&self) -> u32 {
        self.nft.port()
    }

    /// Whether an earlier run left a table that judges packets.
    ///
    /// # Errors
    /// [`NftError`] when the kernel doesn't say.
    pub fn is_there(&mut self) -> Result<bool, NftError> {
        let found = self.nft.dump_tables(&[filter_table()])?;
        Ok(found.table(&filter_table()).is_some_and(|table| table.chain(FORWARD).is_some()))
    }

    /// Makes the table be as the policies say. The first time, and after [`Engine::forget_kernel`], what is there is
    /// read and compared; else only what changed in the cluster is looked at.
    ///
    /// # Errors
    /// [`NftError`] when the kernel refuses; then the tables are as before, and the next call reads them.
    pub fn converge(&mut self, now: Instant) -> Result<Converged, NftError> {
        self.try_to_converge(now).inspect_err(|_| self.engine.forget_kernel())
    }

    fn try_to_converge(&mut self, now: Instant) -> Result<Converged, NftError> {
        let (plan, made) = match self.engine.plan(now) {
            Some(plan) => (plan, None),
            None => {
                let found = self.nft.dump_tables(&[filter_table()])?;
                match found.table(&filter_table()) {
                    None if self.engine.is_wanted() => self.begin(now)?,
                    found => (self.engine.adopt(found, now), None),
                }
            }
        };
        self.carry_out(&plan, made.is_some())?;
        let changes = made.unwrap_or(0) + plan.edits.len();
        Ok(Converged { changes, table: plan.table, again: plan.again })
    }

    /// Makes frames between pods of this node be steered so, or not at all. Whether anything had to change.
    ///
    /// # Errors
    /// [`NftError`] when the kernel refuses.
    pub fn steer(&mut self, wanted: Option<&Steering>) -> Result<bool, NftError> {
        let wanted = wanted.map(Steering::tables).unwrap_or_default();
        let ids = [bridge_table(), redirect_table(Family::V4), redirect_table(Family::V6)];
        let found = self.nft.dump_tables(&ids)?;
        let stale =
            ids.iter().filter(|id| !wanted.iter().any(|table| table.id == **id) && found.table(id).is_some());
        let wrong = wanted.iter().filter(|table| differs(std::slice::from_ref(table), &found).is_some());
        let changes: Vec<Change<'_>> =
            wrong.map(Change::Replace).chain(stale.cloned().map(Change::DeleteTable)).collect();
        self.nft.commit(&changes)?;
        Ok(!changes.is_empty())
    }

    /// Takes the marks of superseded generations off connections, so that a number that comes round finds none of them.
    /// To be done when `Generations::walk_due`; it takes some 1.5 µs a connection.
    ///
    /// # Errors
    /// The kernel's, when it doesn't tell of its connections.
    pub fn forget_old_generations(&mut self, now: Instant) -> io::Result<usize> {
        let Some(generations) = self.engine.generations() else { return Ok(0) };
        let forgotten =
            self.conntrack.forget_marks(generations.mask(), |mark| generations.keeps(mark, now))?;
        generations.walked();
        Ok(forgotten)
    }

    /// The plan where there is no table yet, about all but the sets of pods' addresses, which are in the kernel then: it takes them
    /// in while the rest is computed. They judge nothing yet. Generations begin anew, and the marks of earlier ones are forgotten
    /// meanwhile, too, for which the kernel goes through the whole of its table of connections.
    ///
    /// The second value is how many sets there are; `None` without any, and then there is no table yet.
    fn begin(&mut self, now: Instant) -> Result<(Plan, Option<usize>), NftError> {
        let mask = self.engine.mark_mask();
        let Self { nft, conntrack, engine, .. } = self;
        thread::scope(|scope| {
            let forgotten = scope.spawn(|| forget_all_marks(conntrack, mask));
            let mut making = None;
            let plan = engine.begin(now, |sets| {
                if sets.is_empty() {
                    return;
                }
                making = Some(scope.spawn(move || {
                    let table = empty_table();
                    nft.commit(&changes_of_all(Some(Change::Replace(&table)), &sets))?;
                    Ok(sets.len())
                }));
            });
            let made = making.map(|sets| sets.join().unwrap_or_else(|panic| resume_unwind(panic)));
            // The plan forgets them if that thread could not.
            let plan = Plan { forget_marks: forgotten.join().is_err(), ..plan };
            Ok((plan, made.transpose()?))
        })
    }

    /// `begun`: the table is there already.
    fn carry_out(&mut self, plan: &Plan, begun: bool) -> Result<(), NftError> {
        if plan.is_empty() {
            return Ok(());
        }
        let empty = empty_table();
        let table = match plan.table {
            TableStep::Keep => None,
            TableStep::Add if begun => None,
            TableStep::Add | TableStep::Replace => Some(Change::Replace(&empty)),
            TableStep::Remove => Some(Change::DeleteTable(filter_table())),
        };
        let mut changes = changes_of_all(table, &plan.edits);
        if self.fast_path && plan.judges_anew() {
            let tables = fast_path_tables(self.engine.networks());
            changes.extend(tables.into_iter().map(Change::DeleteTable));
        }
        // Before the rules that trust in marks. No rule of ours writes any meanwhile.
        if plan.forget_marks {
            forget_all_marks(&mut self.conntrack, self.engine.mark_mask());
        }
        self.nft.commit(&changes)
    }
}

fn forget_all_marks(conntrack: &mut Conntrack, mask: u32) {
    if let Err(error) = conntrack.forget_marks(mask, |_| false) {
        tracing::warn!(
            %error,
            "connections that policies judged earlier can't be told to be judged again: load nf_conntrack_netlink"
        );
    }
}

/// Removes all that is ours. Whether there was anything.
///
/// # Errors
/// [`NftError`] when the kernel refuses.
pub fn remove_all(nft: &mut Nft) -> Result<bool, NftError> {
    let found = nft.dump_tables(&own_tables())?;
    let changes: Vec<Change<'_>> =
        found.tables.iter().map(|table: &Table| Change::DeleteTable(table.id.clone())).collect();
    nft.commit(&changes)?;
    Ok(!changes.is_empty())
}

fn changes_of_all<'a>(table: Option<Change<'a>>, edits: &'a [Edit]) -> Vec<Change<'a>> {
    table.into_iter().chain(edits.iter().flat_map(changes_of)).collect()
}

fn changes_of(edit: &Edit) -> Vec<Change<'_>> {
    let table = filter_table();
    let chain = |name: &String| (table.clone(), name.clone());
    match edit {
        Edit::AddChain(chain) => vec![Change::AddBareChain { table, chain }],
        Edit::AddRules(chain) => vec![Change::AddRules { table, chain }],
        Edit::AddSet(set) => vec![Change::AddSet { table, set }],
        Edit::AddKeys(set, keys) => {
            vec![Change::AddSet { table: table.clone(), set }, Change::AddKeys { table, set, keys }]
        }
        Edit::Rules(rules) => vec![
            Change::FlushChain { table: table.clone(), chain: rules.name.clone() },
            Change::AddRules { table, chain: rules },
        ],
        Edit::AddElements(set) => vec![Change::AddElements { table, set: set.clone() }],
        Edit::DeleteElements(set) => vec![Change::DeleteElements { table, set: set.clone() }],
        Edit::Empty(name) => {
            let (table, chain) = chain(name);
            vec![Change::FlushChain { table, chain }]
        }
        Edit::DeleteChain(name) => {
            let (table, chain) = chain(name);
            vec![Change::DeleteChain { table, chain }]
        }
        Edit::DeleteMap(name) | Edit::DeleteSet(name) => vec![Change::DeleteSet { table, set: name.clone() }],
    }
}
