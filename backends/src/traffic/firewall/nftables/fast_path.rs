//! The fast path of pods' flows: read back and put right, or one device for a pod that comes or goes.

use ipnet::IpNet;
use rustix::io::Errno;
use subnet::Family;

use super::{NftFirewall, RulesetPlan, failed};
use crate::nft::{Change, NftError, Table, TableId, any_offloaded};
use crate::traffic::fast_path::{Abilities, FastPath, Phase, Seen};
use crate::traffic::firewall::{FirewallError, FirewallReport, offload};

/// What came of making a fast path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offloaded {
    /// It is as wanted.
    Done {
        /// What was changed, in words.
        changed: Vec<String>,
        /// Whether devices are in the flowtable of any family.
        phase: Phase,
    },
    /// The kernel refuses a part of it and would take it with these abilities.
    Only(Abilities),
    /// The kernel has no flowtables.
    Lacking,
}

impl NftFirewall {
    /// Makes the fast path of each family be as `wanted`; that of a family that is not in it is removed. A pod that comes or
    /// goes is one change, and flows of others stay. `former` are networks whose tables are ours as well. It is armed if a connection
    /// with many packets was seen, and with `may_disarm` no longer once no connection is in the flowtable.
    ///
    /// # Errors
    /// [`FirewallError`] when nftables can't be read or changed, as when a device went meanwhile.
    pub fn offload(
        &mut self,
        wanted: &[FastPath],
        former: &[IpNet],
        may_disarm: bool,
    ) -> Result<Offloaded, FirewallError> {
        let nothing = Offloaded::Done { changed: Vec::new(), phase: Phase::Waiting };
        let (plan, tables) = match self.plan_offload(wanted, former, may_disarm) {
            Ok(planned) => planned,
            // Where nothing is wanted, a kernel without nftables has nothing of ours.
            Err(_) if wanted.is_empty() => return Ok(nothing),
            Err(error) => return Err(failed("reading the fast path", &error)),
        };
        match self.commit_plan(&plan) {
            Ok(()) => Ok(Offloaded::Done { changed: plan.report.changed, phase: phase(&tables) }),
            // The same answer means a device that is gone.
            Err(error) if lacks_module(&error) => match self.abilities(wanted, &tables) {
                None => {
                    // What waits needs less of the kernel than what is armed.
                    let stale: Vec<_> =
                        tables.iter().map(|table| Change::DeleteTable(table.id.clone())).collect();
                    drop(self.nft.commit(&stale));
                    Ok(Offloaded::Lacking)
                }
                Some(abilities) if wanted.iter().any(|fast_path| fast_path.abilities != abilities) => {
                    Ok(Offloaded::Only(abilities))
                }
                Some(_) => Err(failed("making the fast path", &error)),
            },
            Err(error) => Err(failed("making the fast path", &error)),
        }
    }

    /// A report for those who remove everything.
    ///
    /// # Errors
    /// As [`Self::offload`].
    pub fn remove_offload(&mut self, former: &[IpNet]) -> Result<FirewallReport, FirewallError> {
        match self.offload(&[], former, false)? {
            Offloaded::Done { changed, .. } => Ok(FirewallReport { changed, ..FirewallReport::default() }),
            Offloaded::Only(_) | Offloaded::Lacking => Ok(FirewallReport::default()),
        }
    }

    fn commit_plan(&mut self, plan: &RulesetPlan) -> Result<(), NftError> {
        let replaced = plan.tables.iter().map(Change::Replace);
        let deleted = plan.deleted.iter().cloned().map(Change::DeleteTable);
        let changes: Vec<Change<'_>> = replaced.chain(deleted).chain(plan.elements.iter().cloned()).collect();
        self.nft.commit(&changes)
    }

    /// With which abilities the kernel takes such a table, if it takes one with any devices.
    fn abilities(&mut self, wanted: &[FastPath], tables: &[Table]) -> Option<Abilities> {
        Abilities::ALL.into_iter().find(|abilities| {
            let with = |fast_path: &FastPath| FastPath { abilities: *abilities, ..fast_path.clone() };
            let smallest = wanted.iter().find_map(|fast_path| {
                let id = &tables
                    .iter()
                    .find(|table| Some(table.id.family) == fast_path.family().map(Into::into))?
                    .id;
                let phase = if abilities.quotas { phase(tables) } else { Phase::Armed };
                offload::smallest(&with(fast_path), &id.name, phase)
            });
            smallest.is_some_and(|table| self.nft.apply(&[table]).is_ok())
        })
    }

    pub(super) fn plan_offload(
        &mut self,
        wanted: &[FastPath],
        former: &[IpNet],
        may_disarm: bool,
    ) -> Result<(RulesetPlan, Vec<Table>), NftError> {
        let (mut plan, mut tables, mut watched) = (RulesetPlan::default(), Vec::new(), Vec::new());
        for family in Family::BOTH {
            let fast_path = wanted.iter().find(|fast_path| fast_path.family() == Some(family));
            let networks = fast_path.map(|fast_path| fast_path.networks.as_slice()).unwrap_or_default();
            let own = self.own_tables(family, offload::TABLE, networks, former)?;
            let table = fast_path.and_then(|fast_path| {
                let found = own.found.table(&TableId::new(family, own.name.as_str()));
                let seen = offload::seen(found, || may_disarm && is_idle(family));
                offload::table(fast_path, &own.name, Phase::after(seen, fast_path.abilities))
            });
            for id in &own.ids {
                let Some(table) = table.as_ref().filter(|table| table.id == *id) else {
                    plan.remove(id, &own.found);
                    continue;
                };
                plan.refit(table, &own.found);
            }
            tables.extend(table);
            watched.extend(own.ids);
        }
        let mut of_others = self.lock_watched();
        of_others.tables.extend(watched);
        drop(of_others);
        Ok((plan, tables))
    }
}

/// Whether any device is in a flowtable.
fn phase(tables: &[Table]) -> Phase {
    let armed = tables.iter().any(|table| matches!(offload::seen(Some(table), || false), Seen::Armed));
    if armed { Phase::Armed } else { Phase::Waiting }
}

/// Whether no connection is in a flowtable, if the kernel tells.
fn is_idle(family: Family) -> bool {
    any_offloaded(family)
        .inspect_err(|error| tracing::debug!(%error, "fast path: the kernel does not tell its connections"))
        .is_ok_and(|any| !any)
}

/// Whether the kernel named something that it doesn't know.
fn lacks_module(error: &NftError) -> bool {
    let NftError::Refused { source, .. } = error else { return false };
    matches!(Errno::from_io_error(source), Some(Errno::NOENT | Errno::OPNOTSUPP))
}
