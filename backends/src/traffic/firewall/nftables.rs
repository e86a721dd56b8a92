//! Traffic rules by nftables over netlink: no program, one transaction, put right when somebody meddles.

use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use subnet::Family;

use super::foreign::{self, RuleOwnership};
use super::{Firewall, FirewallError, FirewallReport, Look, tables};
use crate::nft::{
    Change, Hook, Nft, NftError, POLICY_TABLE, Refit, Ruleset, Table, TableId, Watched, differs, removal,
};
use crate::state::tunnel::TunnelFilter;
use crate::traffic::rules::Traffic;
pub use fast_path::Offloaded;
use tunnels::TunnelFilters;

mod fast_path;
mod tunnels;

/// What Go flannel's iptables mode leaves in tables of iptables-nft: chain by table.
const LEFTOVERS: [(&str, &str); 2] = [("nat", "FLANNEL-POSTRTG"), ("filter", "FLANNEL-FWD")];

/// The nftables of one network namespace.
pub struct NftFirewall {
    nft: Nft,
    watched: Arc<Mutex<Watched>>,
    tunnels: TunnelFilters,
}

/// The names that tables of one kind may have, and those of them that are there.
struct OwnTables {
    ids: Vec<TableId>,
    /// The one to use.
    name: String,
    found: Ruleset,
}

/// What there shall be.
#[derive(Clone, Copy)]
pub(crate) struct Want<'a> {
    pub(crate) traffic: &'a [Traffic],
    /// See [`Firewall::converge`].
    pub(crate) former: &'a [IpNet],
    /// The rules themselves are made with iptables: no tables of our own, and its chains are no leftovers.
    pub(crate) by_iptables: bool,
}

/// What has to change, before it is.
#[derive(Debug, Default)]
struct RulesetPlan {
    tables: Vec<Table>,
    deleted: Vec<TableId>,
    elements: Vec<Change<'static>>,
    foreign: Vec<Change<'static>>,
    report: FirewallReport,
}

impl NftFirewall {
    /// Opens a conversation with the kernel in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`FirewallError`] when no netlink socket can be had.
    pub fn open() -> Result<Self, FirewallError> {
        let nft = Nft::open().map_err(|error| failed("opening nftables", &error))?;
        let watched = Watched { ports: [nft.port()].into(), hook: Some(Hook::Forward), ..Watched::default() };
        Ok(Self { nft, watched: Arc::new(Mutex::new(watched)), tunnels: TunnelFilters::default() })
    }

    /// What a listener has to watch for this firewall.
    pub fn watched(&self) -> Arc<Mutex<Watched>> {
        Arc::clone(&self.watched)
    }

    /// What [`Firewall::converge`] would change, in words, and the filter of tunnels that would be removed.
    ///
    /// # Errors
    /// As [`Firewall::converge`].
    pub fn preview(&mut self, wanted: &[Traffic], former: &[IpNet]) -> Result<Vec<String>, FirewallError> {
        let want = Want { traffic: wanted, former, by_iptables: false };
        let reading = |error| failed("reading nftables", &error);
        let mut changed = self.plan(want).map_err(reading)?.report.changed;
        changed.extend(self.plan_tunnels(&[], former).map_err(reading)?.report.changed);
        changed.extend(self.plan_offload(&[], former, false).map_err(reading)?.0.report.changed);
        Ok(changed)
    }

    /// The base chains at which our rules hang, with what they lead to.
    pub(crate) fn hooked(&mut self) -> Result<[Ruleset; 2], NftError> {
        let mut hooked = [self.nft.dump_hook(Hook::Postrouting)?, self.nft.dump_hook(Hook::Forward)?];
        // Nothing has to pass through network policies but what they allow, and they follow themselves.
        hooked.iter_mut().for_each(|found| found.tables.retain(|table| table.id.name != POLICY_TABLE));
        Ok(hooked)
    }

    /// The base chains at a hook, with what they lead to.
    pub(super) fn dump_hook(&mut self, hook: Hook) -> Result<Ruleset, NftError> {
        self.nft.dump_hook(hook)
    }

    fn lock_watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn plan(&mut self, want: Want<'_>) -> Result<RulesetPlan, NftError> {
        let mut plan = RulesetPlan::default();
        let mut own = Vec::new();
        for family in Family::BOTH {
            own.extend(self.plan_tables(family, want, &mut plan)?);
        }
        let hooked = self.hooked()?;
        if !want.by_iptables {
            hooked.iter().for_each(|found| plan.sweep(found));
        }
        let networks: Vec<IpNet> =
            want.former.iter().copied().chain(want.traffic.iter().map(|traffic| traffic.network)).collect();
        let ours = RuleOwnership { tables: &own, networks: &networks, by_iptables: want.by_iptables };
        let openings = foreign::openings(&hooked[1], ours, want.traffic);
        plan.foreign.extend(openings.changes);
        plan.report.changed.extend(openings.words);
        plan.report.dropping = openings.notes.len();
        plan.report.notes.extend(openings.notes);
        plan.report.notes.extend(legacy_note());
        own.extend(self.tunnels.watched.iter().cloned());
        let mut watched = self.lock_watched();
        watched.tables = own.into_iter().collect();
        watched.chains.clear();
        watched.watch_hook(Hook::Forward, &hooked[1]);
        watched.chains.extend(openings.chains);
        if want.by_iptables {
            let of_iptables = |(table, chain): (&str, &str)| {
                let parent = if table == "nat" { "POSTROUTING" } else { "FORWARD" };
                let id = |family| TableId::new(family, table);
                Family::BOTH.map(|family| [chain, parent].map(|name| (id(family), name.to_owned())))
            };
            watched.chains.extend(LEFTOVERS.into_iter().flat_map(of_iptables).flatten());
        }
        Ok(plan)
    }

    /// Compares the own table of one family, and says by which names there may be one.
    fn plan_tables(
        &mut self,
        family: Family,
        want: Want<'_>,
        plan: &mut RulesetPlan,
    ) -> Result<Vec<TableId>, NftError> {
        let traffic = want.traffic.iter().find(|traffic| traffic.family() == family);
        let networks = traffic.map(|traffic| std::slice::from_ref(&traffic.network)).unwrap_or_default();
        let own = self.own_tables(family, tables::plain_name(family), networks, want.former)?;
        let table =
            traffic.filter(|_| !want.by_iptables).and_then(|traffic| tables::table(traffic, &own.name));
        for id in &own.ids {
            let Some(table) = table.as_ref().filter(|table| table.id == *id) else {
                plan.remove(id, &own.found);
                continue;
            };
            if let Some(difference) = differs(std::slice::from_ref(table), &own.found) {
                plan.replace(table, &difference);
            }
        }
        Ok(own.ids)
    }

    /// Looks for tables with the name `plain`, or with a network at its end where another agent has that one. The
    /// network in force, if any, is the first of `networks`.
    fn own_tables(
        &mut self,
        family: Family,
        plain: &str,
        networks: &[IpNet],
        former: &[IpNet],
    ) -> Result<OwnTables, NftError> {
        let of_family = former.iter().copied().filter(|network| Family::of(network.addr()) == family);
        let all: Vec<IpNet> = networks.iter().copied().chain(of_family).collect();
        let named = all.iter().map(|network| TableId::new(family, tables::own_name(plain, *network)));
        let mut ids: Vec<TableId> = [TableId::new(family, plain)].into_iter().chain(named).collect();
        ids[1..].sort_unstable();
        ids.dedup();
        let found = self.nft.dump_tables(&ids)?;
        // Where no network is known, each table with our name is ours.
        let is_ours = |table: &Table| all.is_empty() || tables::is_ours(table, &all);
        let taken = found.table(&ids[0]).is_some_and(|table| !is_ours(table));
        if taken {
            ids.remove(0);
        }
        let name = match networks.first() {
            Some(network) if taken => tables::own_name(plain, *network),
            _ => plain.to_owned(),
        };
        Ok(OwnTables { ids, name, found })
    }

    /// Does what nftables has to do for either mechanism.
    pub(crate) fn carry_out(&mut self, want: Want<'_>) -> Result<FirewallReport, FirewallError> {
        let mut plan = match self.plan(want) {
            Ok(plan) => plan,
            // Where no table is desired, a kernel without nftables has nothing of ours.
            Err(_) if want.traffic.iter().all(is_off) => return Ok(FirewallReport::default()),
            Err(error) => return Err(failed("reading nftables", &error)),
        };
        let replaced = plan.tables.iter().map(Change::Replace);
        let deleted = plan.deleted.iter().cloned().map(Change::DeleteTable);
        let ours: Vec<Change<'_>> = replaced.chain(deleted).collect();
        self.nft.commit(&ours).map_err(|error| failed("changing nftables", &error))?;
        let mut transactions = u32::from(!ours.is_empty());
        // Apart from ours: what can't be changed in foreign tables shall not keep our own from being right.
        match self.nft.commit(&plan.foreign) {
            Ok(()) => transactions += u32::from(!plan.foreign.is_empty()),
            Err(error) => plan.report.obstacles.push(format!(
                "a chain of another program ends pods' packets or is left from another mode, and can't be changed: {error}"
            )),
        }
        self.filters_after(transactions);
        Ok(plan.report)
    }
}

fn is_off(traffic: &Traffic) -> bool {
    traffic.masquerade.is_none() && !traffic.forward
}

impl RulesetPlan {
    fn replace(&mut self, table: &Table, difference: &str) {
        self.report.changed.push(format!("nftables table {} written: {difference}", table.id));
        self.tables.push(table.clone());
    }

    /// Changes what there is of a table into `table`, by its elements alone where that is enough. Says whether the table stays.
    fn refit(&mut self, table: &Table, found: &Ruleset) -> bool {
        match Refit::of(table, found) {
            Refit::Right => true,
            Refit::Elements(difference, changes) => {
                self.report.changed.push(format!("nftables table {} put right: {difference}", table.id));
                self.elements.extend(changes);
                true
            }
            Refit::Replace(difference) => {
                self.replace(table, &difference);
                false
            }
        }
    }

    fn remove(&mut self, id: &TableId, found: &Ruleset) {
        if found.table(id).is_some() {
            self.report.changed.push(format!("nftables table {id} removed"));
            self.deleted.push(id.clone());
        }
    }

    /// Removes what iptables mode left in the tables of iptables-nft.
    fn sweep(&mut self, found: &Ruleset) {
        for table in &found.tables {
            for (name, chain) in LEFTOVERS {
                if table.id.name != name {
                    continue;
                }
                let changes = removal(found, &table.id, &[chain]);
                if !changes.is_empty() {
                    self.report.changed.push(format!("chain {chain} removed from table {}", table.id));
                    self.foreign.extend(changes);
                }
            }
        }
    }
}

impl Firewall for NftFirewall {
    fn name(&self) -> &'static str {
        "nftables"
    }

    fn converge(&mut self, wanted: &[Traffic], former: &[IpNet]) -> Result<FirewallReport, FirewallError> {
        self.carry_out(Want { traffic: wanted, former, by_iptables: false })
    }

    fn filter_tunnels(
        &mut self,
        wanted: &[TunnelFilter],
        former: &[IpNet],
        look: Look,
    ) -> Result<FirewallReport, FirewallError> {
        self.filter(wanted, former, look)
    }
}

/// Rules of legacy iptables are invisible to nftables, and decide as well.
fn legacy_note() -> Option<String> {
    let tables: Vec<String> = ["ip", "ip6"]
        .iter()
        .filter_map(|family| fs::read_to_string(format!("/proc/thread-self/net/{family}_tables_names")).ok())
        .flat_map(|names| names.lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| name == "filter" || name == "nat")
        .collect();
    (!tables.is_empty()).then(|| {
        "legacy iptables has tables in this kernel besides nftables, and flanneld can't see their rules: look with \
         iptables-legacy -S FORWARD, and move them to iptables-nft"
            .to_owned()
    })
}

pub(super) fn failed(what: &str, error: &NftError) -> FirewallError {
    FirewallError { what: what.to_owned(), why: error.to_string() }
}
