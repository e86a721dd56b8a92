//! What happened since the start, counted; and how the kernel and the rules were found last.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backends::{FirewallError, FirewallReport, KernelError, KernelState, Name, Peers, Report};
use ipnet::IpNet;
use subnet::Tenure;

use crate::agent::cause::Cause;
use crate::status::{ChangeCount, Counters, KernelStatus, Repair, RulesStatus};

/// How many refused changes are listed.
const LISTED: usize = 32;

/// What is counted.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) counters: Counters,
    pub(super) kernel: KernelStatus,
    pub(super) rules: RulesStatus,
    /// Subnets of peers for which the kernel lacks something.
    pub(super) unprogrammed: Arc<BTreeSet<IpNet>>,
    tenure: Tenure,
}

impl Tally {
    /// A turn is over.
    pub(super) fn turned(&mut self, cause: Cause, took: Duration, now: SystemTime) {
        count(&mut self.counters.converges, cause.name(), 1);
        self.counters.converge.add(took);
        self.counters.last_converge = Some(seconds(now));
    }

    /// The loop went on with leases that an earlier run saved.
    pub(super) fn recalled(&mut self) {
        count(&mut self.counters.snapshots, "saved", 1);
    }

    /// How the own lease stands.
    pub(super) fn tenure(&mut self, tenure: &Tenure) {
        let before = std::mem::replace(&mut self.tenure, tenure.clone());
        if before.ends.is_some() && tenure.ends > before.ends {
            count(&mut self.counters.renewals, "done", 1);
        }
        if before.trouble.is_none() && tenure.trouble.is_some() {
            count(&mut self.counters.renewals, "failed", 1);
        }
    }

    /// The kernel was brought into the state of the plan, or not. `repaired`: the plan was the same before.
    pub(super) fn converged(&mut self, report: &Report, repaired: bool, fights: &[String], now: SystemTime) {
        for change in &report.applied {
            self.change(change.object(), change.action(), "done", 1);
        }
        for error in &report.failed {
            if let KernelError::Refused { object, change, .. } = error {
                self.change(object, action_of(change), "refused", 1);
            }
        }
        if repaired {
            report.applied.iter().for_each(|change| count(&mut self.counters.repairs, change.object(), 1));
            self.repaired(report.applied.last().map(ToString::to_string), now);
        }
        let refused = report.failed.iter().map(ToString::to_string).chain(report.conflicts.iter().cloned());
        self.kernel.seen = Some(seconds(now));
        self.kernel.settled = report.settled;
        self.kernel.refused = refused.take(LISTED).collect();
        self.kernel.fights = fights.to_vec();
    }

    /// Compares what peers need with what was observed, where that is not known to be the same.
    pub(super) fn compare(&mut self, peers: &Peers, desired: &KernelState, report: &Report, whole: bool) {
        if whole {
            if !self.unprogrammed.is_empty() {
                self.unprogrammed = Arc::default();
            }
            return;
        }
        self.unprogrammed = Arc::new(lacking(peers, desired, &report.observed.state));
    }

    /// Traffic rules or tunnel filters were carried out, or not.
    pub(super) fn ruled(
        &mut self,
        object: &'static str,
        outcome: &Result<FirewallReport, FirewallError>,
        repaired: bool,
        now: SystemTime,
    ) {
        let changed = outcome.as_ref().map(|report| report.changed.as_slice()).unwrap_or_default();
        self.change(object, "set", "done", changed.len() as u64);
        self.change(object, "set", "refused", u64::from(outcome.is_err()));
        if repaired && !changed.is_empty() {
            count(&mut self.counters.repairs, object, changed.len() as u64);
            self.repaired(changed.last().cloned(), now);
        }
    }

    /// How the rules were found.
    pub(super) fn rules(&mut self, outcome: &Result<FirewallReport, FirewallError>, now: SystemTime) {
        match outcome {
            Ok(report) => {
                self.rules.sound = Some(seconds(now));
                self.rules.obstacles.clone_from(&report.obstacles);
                self.rules.dropping_chains = report.dropping;
                self.rules.failed = None;
            }
            Err(error) => self.rules.failed = Some(error.to_string()),
        }
    }

    fn repaired(&mut self, what: Option<String>, now: SystemTime) {
        if let Some(what) = what {
            self.counters.last_repair = Some(Repair { at: seconds(now), what });
        }
    }

    fn change(&mut self, object: &str, action: &str, result: &str, number: u64) {
        if number == 0 {
            return;
        }
        let same = |known: &&mut ChangeCount| {
            known.object == object && known.action == action && known.result == result
        };
        match self.counters.changes.iter_mut().find(same) {
            Some(known) => known.count += number,
            None => self.counters.changes.push(ChangeCount {
                object: object.to_owned(),
                action: action.to_owned(),
                result: result.to_owned(),
                count: number,
            }),
        }
    }
}

/// The subnets of peers for which the kernel lacks a route, a neighbour or a forwarding entry.
fn lacking(peers: &Peers, desired: &KernelState, observed: &KernelState) -> BTreeSet<IpNet> {
    let fdb = desired.fdb.iter().filter(|(key, dst)| observed.fdb.get(*key) != Some(*dst));
    let neighbours =
        desired.neighbours.iter().filter(|(key, mac)| observed.neighbours.get(*key) != Some(*mac));
    let macs: BTreeSet<_> = fdb.map(|((_, mac), _)| *mac).chain(neighbours.map(|(_, mac)| *mac)).collect();
    let devices = desired.links.iter().filter(|(name, link)| observed.links.get(*name) != Some(*link));
    let devices: BTreeSet<_> = devices.map(|(name, _)| *name).collect();
    let lacks = |subnet: &IpNet| {
        desired.routes.get(subnet).is_some_and(|want| {
            observed.routes.get(subnet) != Some(want)
                || want.dev.is_some_and(|device| devices.contains(&device))
        })
    };
    let all = peers.usable.values();
    all.filter(|peer| macs.contains(&peer.mac) || lacks(&peer.subnet)).map(|peer| peer.subnet).collect()
}

/// What a refused change would have done, by its words: `route replace …`, `fdb del …`.
fn action_of(change: &str) -> &'static str {
    match change.split(' ').nth(1) {
        Some("del") => "delete",
        Some("add") => "add",
        _ => "set",
    }
}

fn count(counters: &mut std::collections::BTreeMap<String, u64>, key: &str, number: u64) {
    *counters.entry(key.to_owned()).or_default() += number;
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default()
}

/// What the kernel refuses that concerns peers alone, whose pods are not reached then, while this node is ready.
pub(super) fn refused_for_peers(failed: &[KernelError], own: &[Name]) -> Option<String> {
    let mut refused = failed.iter().filter(|error| !error.concerns_node(own));
    let first = refused.next()?;
    let more = match refused.count() {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    Some(format!(
        "the kernel refuses changes for peers, whose pods this node can't reach so: {first}{more}: look at the interface's addresses and \
         routes, and at flanneld status --peers"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_refuses_for_peers_alone_is_one_note() {
        assert_eq!(refused_for_peers(&[], &[]), None);
        let of_node = KernelError::NoDevice("flannel.1".parse().unwrap());
        let own = ["flannel.1".parse().unwrap()];
        assert_eq!(refused_for_peers(std::slice::from_ref(&of_node), &own), None);
        let failed = [of_node, refused("route replace 10.1.0.0/24"), refused("route replace 10.2.0.0/24")];
        let note = refused_for_peers(&failed, &own).unwrap();
        assert!(
            note.contains("route replace 10.1.0.0/24") && note.contains(", and 1 more: look at"),
            "{note}"
        );
    }

    fn refused(change: &str) -> KernelError {
        let source = std::io::Error::from_raw_os_error(1);
        KernelError::Refused { object: "route", device: None, change: change.to_owned(), source }
    }

    #[test]
    fn changes_are_counted_by_object_action_and_result_and_repairs_apart() {
        let net = "10.1.0.0/24".parse().unwrap();
        let report = |failed: Vec<KernelError>| Report {
            applied: vec![
                backends::KernelChange::AddBlackhole(net),
                backends::KernelChange::DelBlackhole(net),
            ],
            failed,
            ..Report::default()
        };
        let mut tally = Tally::default();
        tally.converged(&report(vec![]), false, &[], UNIX_EPOCH);
        tally.converged(
            &report(vec![refused("route replace 10.1.0.0/24"), refused("route del 1")]),
            true,
            &[],
            UNIX_EPOCH,
        );
        let found: Vec<_> = tally
            .counters
            .changes
            .iter()
            .map(|change| format!("{} {} {} {}", change.object, change.action, change.result, change.count))
            .collect();
        assert_eq!(
            found,
            [
                "blackhole add done 2",
                "blackhole delete done 2",
                "route set refused 1",
                "route delete refused 1"
            ]
        );
        assert_eq!(tally.counters.repairs, [("blackhole".to_owned(), 2)].into());
        assert!(tally.counters.last_repair.is_some() && tally.kernel.refused.len() == 2);
    }

    #[test]
    fn renewals_are_told_from_the_first_lease_and_failures_counted_once() {
        let mut tally = Tally::default();
        let at = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
        let failed = Tenure { ends: at(20), trouble: Some("denied".into()) };
        for tenure in [
            Tenure::default(),
            Tenure { ends: at(10), trouble: None },
            Tenure { ends: at(20), trouble: None },
            failed.clone(),
            failed,
        ] {
            tally.tenure(&tenure);
        }
        assert_eq!(tally.counters.renewals, [("done".to_owned(), 1), ("failed".to_owned(), 1)].into());
    }
}
