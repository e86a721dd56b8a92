//! The tables in the kernel: read, changed in one transaction each, removed. Only the first one is made in two.

use std::io;
use std::net::Ipv4Addr;
use std::panic::resume_unwind;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use ipnet::IpNet;
use subnet::Family;

use super::conntrack::Conntrack;
use super::engine::{Engine, Plan, TableStep};
use super::generation::FORWARD;
use super::image::Edit;
use super::layout::{empty_table, filter_table};
use super::steer::{Steering, bridge_table, redirect_table};
use crate::nft::{Change, Nft, NftError, Table, TableId, Transaction, differs, fast_path_tables};

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
    /// Whether the table that was there had to be recreated, or put back.
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
        let plan = match self.engine.plan(now) {
            Some(plan) => plan,
            None => {
                let found = self.nft.dump_tables(&[filter_table()])?;
                match found.table(&filter_table()) {
                    None if self.engine.is_wanted() => return self.begin(now),
                    found => self.engine.adopt(found, now),
                }
            }
        };
        // Before the rules that trust in marks. No rule of ours writes any meanwhile.
        if plan.forget_marks && !plan.is_empty() {
            forget_all_marks(&mut self.conntrack, self.engine.mark_mask());
        }
        let empty = empty_table();
        let fast_path = self.fast_path.then(|| self.engine.networks());
        let table = match plan.table {
            TableStep::Keep => None,
            TableStep::Add | TableStep::Replace => Some(Change::Replace(&empty)),
            TableStep::Remove => Some(Change::DeleteTable(filter_table())),
        };
        self.nft.commit(&changes_of_plan(table, &plan, fast_path))?;
        Ok(Converged { changes: plan.edits.len(), table: plan.table, again: plan.again })
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

    /// Has the kernel forget the connections of addresses that pods have just got: they were not judged by these pods' policies, and answers to
    /// them would pass for a while. To be done once their policies are in force.
    ///
    /// # Errors
    /// The kernel's, which may not be able to do it (Linux 6.1 is not).
    pub fn forget_connections(&mut self, addresses: &[Ipv4Addr]) -> io::Result<()> {
        self.conntrack.forget_addresses(addresses)
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

    /// Makes the table where there is none yet, in two transactions. The first one has the sets of pods' addresses, which the kernel
    /// takes in while the rest is computed and put into messages. They judge nothing yet. Generations begin again, and the marks of
    /// earlier ones are forgotten meanwhile, too, for which the kernel goes through the whole of its table of connections.
    fn begin(&mut self, now: Instant) -> Result<Converged, NftError> {
        let mask = self.engine.mark_mask();
        let Self { nft, conntrack, engine, fast_path } = self;
        // Far from the numbers of the first transaction, of which it is not known here how many messages it has.
        let number = nft.next_sequence().wrapping_add(u32::MAX / 2);
        let empty = &empty_table();
        let (tell, told) = mpsc::channel::<Vec<Edit>>();
        thread::scope(|scope| {
            let forgotten = scope.spawn(|| forget_all_marks(conntrack, mask));
            let first = scope.spawn(move || {
                let sets = told.recv().unwrap_or_default();
                let made = nft.commit(&changes_of_all(Some(Change::Replace(empty)), &sets));
                (nft, made.map(|()| sets.len()))
            });
            let plan = engine.begin(now, move |sets| drop(tell.send(sets)));
            let changes = changes_of_plan(None, &plan, fast_path.then(|| engine.networks()));
            let rest = Transaction::new(&changes, number);
            // The rules trust in marks. No rule of ours writes any meanwhile.
            forgotten.join().unwrap_or_else(|panic| resume_unwind(panic));
            let (nft, made) = first.join().unwrap_or_else(|panic| resume_unwind(panic));
            let made = made?;
            nft.carry_out(&rest?)?;
            Ok(Converged { changes: made + plan.edits.len(), table: plan.table, again: plan.again })
        })
    }
}

/// With a fast path in these networks: its flows are judged by no chain, so it goes when all are to be judged once more.
fn changes_of_plan<'a>(
    table: Option<Change<'a>>,
    plan: &'a Plan,
    fast_path: Option<&[IpNet]>,
) -> Vec<Change<'a>> {
    let mut changes = changes_of_all(table, &plan.edits);
    if let Some(networks) = fast_path.filter(|_| plan.judges_anew()) {
        changes.extend(fast_path_tables(networks).into_iter().map(Change::DeleteTable));
    }
    changes
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
