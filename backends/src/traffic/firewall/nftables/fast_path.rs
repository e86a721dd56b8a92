//! The fast path of pods' flows: read back and put right, or one device for a pod that comes or goes.

use ipnet::IpNet;
use rustix::io::Errno;
use subnet::Family;

use super::{NftFirewall, Plan, failed};
use crate::nft::{Change, NftError, Table};
use crate::traffic::fast_path::{Abilities, FastPath};
use crate::traffic::firewall::{FirewallError, FirewallReport, offload};

/// What came of making a fast path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offloaded {
    /// It is as wanted; what was changed, in words.
    Done(Vec<String>),
    /// The kernel refuses a part of it and would take it with these abilities.
    Only(Abilities),
    /// The kernel has no flowtables.
    Lacking,
}

impl NftFirewall {
    /// Makes the fast path of each family be as `wanted`; that of a family that is not in it is removed. A pod that comes or
    /// goes is one change, and flows of others stay. `former` are networks whose tables are ours as well.
    ///
    /// # Errors
    /// [`FirewallError`] when nftables can't be read or changed, as when a device went meanwhile.
    pub fn offload(&mut self, wanted: &[FastPath], former: &[IpNet]) -> Result<Offloaded, FirewallError> {
        let (plan, tables) = match self.plan_offload(wanted, former) {
            Ok(planned) => planned,
            // Where nothing is wanted, a kernel without nftables has nothing of ours.
            Err(_) if wanted.is_empty() => return Ok(Offloaded::Done(Vec::new())),
            Err(error) => return Err(failed("reading the fast path", &error)),
        };
        match self.commit_plan(&plan) {
            Ok(()) => Ok(Offloaded::Done(plan.report.changed)),
            // The same answer means a device that is gone.
            Err(error) if lacks_module(&error) => match self.abilities(wanted, &tables) {
                None => Ok(Offloaded::Lacking),
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
        match self.offload(&[], former)? {
            Offloaded::Done(changed) => Ok(FirewallReport { changed, ..FirewallReport::default() }),
            Offloaded::Only(_) | Offloaded::Lacking => Ok(FirewallReport::default()),
        }
    }

    fn commit_plan(&mut self, plan: &Plan) -> Result<(), NftError> {
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
                offload::smallest(&with(fast_path), &id.name)
            });
            smallest.is_some_and(|table| self.nft.apply(&[table]).is_ok())
        })
    }

    pub(super) fn plan_offload(
        &mut self,
        wanted: &[FastPath],
        former: &[IpNet],
    ) -> Result<(Plan, Vec<Table>), NftError> {
        let (mut plan, mut tables, mut watched) = (Plan::default(), Vec::new(), Vec::new());
        for family in Family::BOTH {
            let fast_path = wanted.iter().find(|fast_path| fast_path.family() == Some(family));
            let networks = fast_path.map(|fast_path| fast_path.networks.as_slice()).unwrap_or_default();
            let own = self.own_tables(family, offload::TABLE, networks, former)?;
            let table = fast_path.and_then(|fast_path| offload::table(fast_path, &own.name));
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

/// Whether the kernel named something that it doesn't know.
fn lacks_module(error: &NftError) -> bool {
    let NftError::Refused { source, .. } = error else { return false };
    matches!(Errno::from_io_error(source), Some(Errno::NOENT | Errno::OPNOTSUPP))
}
