//! Traffic rules by the iptables programs, for hosts whose operators ask for them.
//!
//! The programs run only when something has to change: where they keep their rules in nftables, as all
//! current ones do, what they made is read back over netlink and compared with what was there after the
//! last run.

mod programs;
mod text;

use std::sync::{Arc, Mutex};

use ipnet::IpNet;
use subnet::Family;

use crate::nft::{Expr, Ruleset, Watched};
use crate::state::tunnel::TunnelFilter;
use crate::traffic::firewall::nftables::{NftFirewall, Want};
use crate::traffic::firewall::{Firewall, FirewallError, FirewallReport, Look};
use crate::traffic::rules::Traffic;
use programs::Programs;

/// A repair, a look that finds it good, and one more of each for another program that changes rules meanwhile; what
/// is wrong then is heard of again.
const ATTEMPTS: usize = 4;

/// Chains of ours, and rules that lead to them.
const CHAINS: [&str; 2] = ["FLANNEL-POSTRTG", "FLANNEL-FWD"];

/// The iptables programs of this host.
pub struct Iptables {
    nft: NftFirewall,
    v4: Programs,
    /// Missing on hosts without IPv6 rules.
    v6: Option<Programs>,
    /// What was asked for and what was then found, at the last run that changed nothing any more.
    settled: Option<(Vec<Traffic>, Vec<Vec<Expr>>)>,
}

impl Iptables {
    /// Finds the programs.
    ///
    /// # Errors
    /// [`FirewallError`] when there are none.
    pub fn open() -> Result<Self, FirewallError> {
        let nft = NftFirewall::open()?;
        Ok(Self { nft, v4: Programs::find(Family::V4)?, v6: Programs::find(Family::V6).ok(), settled: None })
    }

    /// What a listener has to watch for this firewall.
    pub fn watched(&self) -> Arc<Mutex<Watched>> {
        self.nft.watched()
    }

    /// The rules that are ours, as nftables has them; `None` where they can't be seen there.
    fn seen(&mut self) -> Result<Option<Vec<Vec<Expr>>>, FirewallError> {
        let mut all = std::iter::once(&self.v4).chain(&self.v6);
        if !all.try_fold(true, |so_far, programs| Ok(so_far && programs.are_over_nftables()?))? {
            return Ok(None);
        }
        let Ok(found) = self.nft.hooked() else { return Ok(None) };
        Ok(Some(found.iter().flat_map(ours).collect()))
    }

    fn repair(&mut self, wanted: &[Traffic]) -> Result<Vec<String>, FirewallError> {
        let mut changed = Vec::new();
        let programs = [(Family::V4, Some(&self.v4)), (Family::V6, self.v6.as_ref())];
        for (family, programs) in programs {
            let traffic = wanted.iter().find(|traffic| traffic.family() == family);
            let Some(programs) = programs else {
                if traffic.is_some() {
                    // Says what is missing.
                    Programs::find(family)?;
                }
                continue;
            };
            if let Some(input) = text::repair(&programs.save()?, traffic) {
                programs.restore(&input)?;
                let lines = input.lines().filter(|line| line.starts_with("-")).count();
                changed.push(format!("{family} iptables rules put right: {lines} lines"));
            }
        }
        Ok(changed)
    }
}

/// The rules of our chains, and of others that lead to them, without what counters counted.
fn ours(found: &Ruleset) -> Vec<Vec<Expr>> {
    let chains = found.tables.iter().flat_map(|table| &table.chains);
    let rules = chains.flat_map(|chain| {
        let own = CHAINS.contains(&chain.name.as_str());
        chain.rules.iter().filter(move |rule| own || rule.leads_to().is_some_and(|to| CHAINS.contains(&to)))
    });
    let uncounted = |expr: &&Expr| !matches!(expr, Expr::Counter { .. });
    rules.map(|rule| rule.exprs.iter().filter(uncounted).cloned().collect()).collect()
}

impl Firewall for Iptables {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn converge(&mut self, wanted: &[Traffic], former: &[IpNet]) -> Result<FirewallReport, FirewallError> {
        let mut changed = Vec::new();
        for _ in 0..ATTEMPTS {
            let seen = self.seen()?;
            let settled = |(asked, found): &(Vec<Traffic>, Vec<Vec<Expr>>)| {
                asked == wanted && Some(found) == seen.as_ref()
            };
            if self.settled.as_ref().is_some_and(settled) {
                break;
            }
            let repaired = self.repair(wanted)?;
            let right = repaired.is_empty();
            changed.extend(repaired);
            // Only what was found to be right, and was the same before and after, is known to be right:
            // somebody may meddle at any moment.
            if right && self.seen()? == seen {
                self.settled = seen.map(|seen| (wanted.to_vec(), seen));
                break;
            }
        }
        let mut report = self.nft.carry_out(Want { traffic: wanted, former, by_iptables: true })?;
        report.changed.extend(changed);
        Ok(report)
    }

    fn filter_tunnels(
        &mut self,
        wanted: &[TunnelFilter],
        former: &[IpNet],
        look: Look,
    ) -> Result<FirewallReport, FirewallError> {
        self.nft.filter_tunnels(wanted, former, look)
    }
}
