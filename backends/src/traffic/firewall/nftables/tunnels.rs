//! The filter of tunnel ports: read back and put right, or one element for a peer that comes or goes.

use std::io;

use ipnet::IpNet;
use subnet::Family;

use super::{NftFirewall, RulesetPlan, failed};
use crate::nft::{Change, NftError, TableId};
use crate::state::tunnel::TunnelFilter;
use crate::traffic::firewall::{FirewallError, FirewallReport, Look, tunnel};

/// What the kernel says to an expression for which it has no module.
const NO_MODULE: [i32; 2] = [2, 95];

/// The tables that are in place, as far as is known.
#[derive(Debug, Default)]
pub(super) struct TunnelFilters {
    /// Those that were found or made with the last look.
    tables: Vec<(TableId, TunnelFilter)>,
    /// All names under which there may be one.
    pub(super) watched: Vec<TableId>,
    /// The ruleset when the tables were last found to be whole.
    whole: Option<Whole>,
    /// This kernel can't look for the reverse path of a packet.
    without_reverse_path: bool,
}

/// What need not be read again while nothing has changed in nftables.
#[derive(Debug)]
struct Whole {
    /// The kernel's number of the ruleset after the last transaction of this agent.
    generation: u32,
    former: Vec<IpNet>,
}

impl NftFirewall {
    pub(crate) fn filter(
        &mut self,
        wanted: &[TunnelFilter],
        former: &[IpNet],
        look: Look,
    ) -> Result<FirewallReport, FirewallError> {
        if self.exchange_peers(wanted, former, look) {
            return Ok(self.tunnel_report(wanted));
        }
        self.tunnels.tables.clear();
        let mut outcome = self.refit(wanted, former);
        if let Err(NftError::Refused { source, .. }) = &outcome
            && lacks_module(source)
            && !self.tunnels.without_reverse_path
        {
            self.tunnels.without_reverse_path = true;
            outcome = self.refit(wanted, former);
            self.tunnels.without_reverse_path = outcome.is_ok();
        }
        match outcome {
            Ok(changed) => Ok(FirewallReport { changed, ..self.tunnel_report(wanted) }),
            // Where no table is desired, a kernel without nftables has nothing of ours.
            Err(_) if wanted.iter().all(TunnelFilter::is_empty) => Ok(FirewallReport::default()),
            Err(error) => Err(failed("filtering the tunnel's port", &error)),
        }
    }

    fn tunnel_report(&self, wanted: &[TunnelFilter]) -> FirewallReport {
        let mut report = FirewallReport::default();
        if self.tunnels.without_reverse_path && wanted.iter().any(|filter| !filter.is_empty()) {
            report.notes.push(
                "the kernel has no module nft_fib: a process in a pod that may send from any address (CAP_NET_RAW) can \
                 speak to the tunnel's port in the name of a peer"
                    .to_owned(),
            );
        }
        report
    }

    /// Adds and deletes peers in the tables that are known, and keeps these in force where a look is due. Says whether that was all
    /// there is to do. With a look it is only where no transaction but this agent's has changed anything in nftables since all was
    /// found to be whole: the addresses of thousands of peers need not be read each minute, whether some of them change or not.
    fn exchange_peers(&mut self, wanted: &[TunnelFilter], former: &[IpNet], look: Look) -> bool {
        let whole = self.tunnels.whole.take();
        let wanted: Vec<_> = wanted.iter().filter(|filter| !filter.is_empty()).collect();
        let known = &self.tunnels.tables;
        let pairs = || known.iter().zip(&wanted).map(|((id, before), filter)| (id, before, *filter));
        if known.len() != wanted.len()
            || wanted.iter().any(|filter| filter.recalled)
            || pairs().any(|(_, before, filter)| !filter.differs_in_peers_alone(before))
        {
            return false;
        }
        let exchanged = pairs().flat_map(|(id, before, filter)| tunnel::peer_changes(id, before, filter));
        let mut changes: Vec<Change<'static>> = exchanged.collect();
        if look == Look::Kernel {
            changes.extend(pairs().flat_map(|(id, _, filter)| tunnel::renewal_of_whole(filter, id)));
            let generation = self.generation();
            let is_whole = |whole: &Whole| whole.former == former && Some(whole.generation) == generation;
            if !whole.as_ref().is_some_and(is_whole) {
                return false;
            }
        }
        if let Err(error) = self.nft.commit(&changes) {
            tracing::debug!("the tunnel's filter is looked at once more: {error}");
            return false;
        }
        for ((_, known), filter) in self.tunnels.tables.iter_mut().zip(wanted) {
            known.clone_from(filter);
        }
        self.tunnels.whole = whole;
        self.filters_after(u32::from(!changes.is_empty()));
        true
    }

    /// The ruleset as it is now, if it is that of `before` with so many transactions of this agent: what somebody else
    /// changed in between was not looked at.
    fn whole_since(&mut self, before: u32, transactions: u32, former: &[IpNet]) -> Option<Whole> {
        let generation = self.generation()?;
        let only_ours = generation == before.wrapping_add(transactions);
        only_ours.then(|| Whole { generation, former: former.to_vec() })
    }

    /// So many transactions of this agent were carried out just now: filters that were whole still are.
    pub(super) fn filters_after(&mut self, transactions: u32) {
        if let Some(Whole { generation, former }) = self.tunnels.whole.take() {
            self.tunnels.whole = self.whole_since(generation, transactions, &former);
        }
    }

    /// Whether the next look need not read the filters.
    #[cfg(feature = "testing")]
    pub fn knows_filters(&mut self) -> bool {
        let known = self.tunnels.whole.as_ref().map(|whole| whole.generation);
        known.is_some() && self.generation() == known
    }

    fn generation(&mut self) -> Option<u32> {
        self.nft.generation().ok()
    }

    fn refit(&mut self, wanted: &[TunnelFilter], former: &[IpNet]) -> Result<Vec<String>, NftError> {
        self.tunnels.whole = None;
        let before = self.generation();
        let plan = self.plan_tunnels(wanted, former)?;
        let replaced = plan.tables.iter().map(Change::Replace);
        let deleted = plan.deleted.iter().cloned().map(Change::DeleteTable);
        let changes: Vec<Change<'_>> = replaced.chain(deleted).chain(plan.elements.iter().cloned()).collect();
        let outcome = self.nft.commit(&changes);
        match (&outcome, before) {
            (Err(_), _) => self.tunnels.tables.clear(),
            (Ok(()), Some(before)) => {
                self.tunnels.whole = self.whole_since(before, u32::from(!changes.is_empty()), former);
            }
            (Ok(()), None) => {}
        }
        outcome.map(|()| plan.report.changed)
    }

    pub(super) fn plan_tunnels(
        &mut self,
        wanted: &[TunnelFilter],
        former: &[IpNet],
    ) -> Result<RulesetPlan, NftError> {
        let mut plan = RulesetPlan::default();
        let (mut tables, mut watched) = (Vec::new(), Vec::new());
        for family in Family::BOTH {
            let filter = wanted.iter().find(|filter| filter.family() == family);
            let networks = filter.map(|filter| filter.networks.as_slice()).unwrap_or_default();
            let own = self.own_tables(family, tunnel::TABLE, networks, former)?;
            let with_fib = !self.tunnels.without_reverse_path;
            let mut table = filter.and_then(|filter| tunnel::table(filter, &own.name, with_fib));
            if let Some(table) = table.as_mut().filter(|_| filter.is_some_and(|filter| filter.recalled))
                && let Some(found) = own.found.table(&table.id)
            {
                tunnel::keep_peers(table, found);
            }
            for id in &own.ids {
                let Some(table) = table.as_ref().filter(|table| table.id == *id) else {
                    plan.remove(id, &own.found);
                    continue;
                };
                let stays = plan.refit(table, &own.found);
                if let (true, Some(filter), Some(found)) = (stays, filter, own.found.table(id)) {
                    plan.elements.extend(tunnel::renewal(filter, found));
                }
            }
            tables.extend(table.zip(filter).map(|(table, filter)| (table.id, filter.clone())));
            watched.extend(own.ids);
        }
        self.lock_watched().tables.extend(watched.iter().cloned());
        // What else a filter admits that was recalled is not remembered.
        let all_known = wanted.iter().all(|filter| !filter.recalled);
        self.tunnels.tables = if all_known { tables } else { Vec::new() };
        self.tunnels.watched = watched;
        Ok(plan)
    }
}

fn lacks_module(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| NO_MODULE.contains(&code))
}
